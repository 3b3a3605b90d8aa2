"""tools/merge_adapter: an error is one line and leaves no folder; memory stays small."""

import json
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import ROOT
from merge_models import SENSITIVE, SMALL, draw, error_of, make_llama, run
from merge_models import save_adapter, save_base, tensors
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tools.merge_adapter import command, merging, write


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A base in 32 bits and an adapter of all its linear layers; tests only read them."""
    return make_llama(tmp_path_factory.mktemp("llama"))


def test_a_head_that_was_not_resized_is_an_error(tmp_path, llama, capsys):
    adapter = save_adapter(
        tmp_path / "adapter", llama[0], rows=99, target_modules=["q_proj", "embed_tokens"]
    )
    assert "holds lm_head.weight in the shape" in error_of(
        capsys, adapter, "--output_dir", tmp_path / "out"
    )


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def rekey(path, change):
    save_file({change(key): value for key, value in load_file(path).items()}, path)


def drop(path, word):
    save_file({key: value for key, value in load_file(path).items() if word not in key}, path)


ERRORS = {
    "adapter_config.json": lambda base, adapter: (adapter / "adapter_config.json").unlink(),
    "lacks adapter_model.safetensors": lambda base, adapter: (
        adapter / "adapter_model.safetensors"
    ).unlink(),
    "adapter_model.safetensors is truncated": lambda base, adapter: cut(
        adapter / "adapter_model.safetensors"
    ),
    "type IA3": lambda base, adapter: edit(adapter / "adapter_config.json", peft_type="IA3"),
    "alora_invocation_tokens": lambda base, adapter: edit(
        adapter / "adapter_config.json", alora_invocation_tokens=[1]
    ),
    "init_lora_weights='pissa'": lambda base, adapter: edit(
        adapter / "adapter_config.json", init_lora_weights="pissa"
    ),
    "size mismatch": lambda base, adapter: edit(adapter / "adapter_config.json", r=8),
    "Target modules": lambda base, adapter: edit(
        adapter / "adapter_config.json", target_modules=["c_attn"]
    ),
    "belongs to no module": lambda base, adapter: rekey(
        adapter / "adapter_model.safetensors",
        lambda key: key.replace("model.layers", "_orig_mod.layers"),
    ),
    "the adapter lacks base_model.model.model.layers.1": lambda base, adapter: drop(
        adapter / "adapter_model.safetensors", "layers.1.mlp.up_proj.lora_B"
    ),
    "does not name its base": lambda base, adapter: edit(
        adapter / "adapter_config.json", base_model_name_or_path=None
    ),
    "the base someone/model is neither": lambda base, adapter: edit(
        adapter / "adapter_config.json", base_model_name_or_path="someone/model"
    ),
    "there is no base /gone: give --base_model_name_or_path": lambda base, adapter: edit(
        adapter / "adapter_config.json", base_model_name_or_path="/gone"
    ),
    "index.json is not a valid index": lambda base, adapter: (
        base / "model.safetensors.index.json"
    ).write_text("{}"),
    "Field 'hidden_size'": lambda base, adapter: edit(base / "config.json", hidden_size="wide"),
    "not a valid LoRA configuration": lambda base, adapter: cut(adapter / "adapter_config.json"),
    "holds no config.json": lambda base, adapter: (base / "config.json").unlink(),
    "lacks model.safetensors": lambda base, adapter: (base / "model.safetensors").unlink(),
    "model.safetensors is truncated": lambda base, adapter: cut(base / "model.safetensors"),
    "neither base nor adapter holds model.layers.0.input_layernorm": lambda base, adapter: drop(
        base / "model.safetensors", "norm"
    ),
    "quantized by gptq": lambda base, adapter: edit(
        base / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}
    ),
    "does not recognize": lambda base, adapter: edit(base / "config.json", model_type="nothing"),
}


@pytest.mark.parametrize("words", ERRORS)
def test_errors(tmp_path, llama, capsys, monkeypatch, words):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    base = shutil.copytree(llama[0], tmp_path / "base")
    adapter = shutil.copytree(llama[1], tmp_path / "adapter")
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(base))
    ERRORS[words](base, adapter)
    assert words in error_of(capsys, adapter, "--output_dir", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_wrong_bases_are_errors(tmp_path, llama, capsys):
    other = save_base(tmp_path / "other", "gpt2")
    arguments = ("--base_model_name_or_path", other, "--output_dir", tmp_path / "out")
    assert "does not fit this base" in error_of(capsys, llama[1], *arguments)
    config = transformers.LlamaConfig(**SMALL | {"intermediate_size": 64})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "wider")
    arguments = ("--base_model_name_or_path", tmp_path / "wider", "--output_dir", tmp_path / "out")
    assert "does not fit this base" in error_of(capsys, llama[1], *arguments)


def test_an_existing_folder_is_an_error(tmp_path, llama, capsys):
    assert "exists" in error_of(capsys, llama[1], "--output_dir", tmp_path)


def test_a_full_disk(tmp_path, llama, capsys, monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # bytes a file may have
    try:
        assert "File too large" in error_of(capsys, llama[1], "--output_dir", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 0, 100))
    assert "no room for" in error_of(capsys, llama[1], "--output_dir", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_values_that_float16_cannot_hold(tmp_path, llama, capsys):
    base = shutil.copytree(llama[0], tmp_path / "base")
    save_file(
        {key: value * (7e5 if "norm" in key else 1) for key, value in tensors(base).items()},
        base / "model.safetensors",
    )
    arguments = (
        "--base_model_name_or_path",
        base,
        "--output_dir",
        tmp_path / "out",
        "--dtype",
        "float16",
    )
    assert "float16 cannot hold" in error_of(capsys, llama[1], *arguments)


@pytest.mark.parametrize("wrong", ["merged", "written"])
def test_wrong_logits_leave_nothing(tmp_path, llama, capsys, monkeypatch, wrong):
    if wrong == "merged":
        original = merging.merge_unit

        def merge_unit(*arguments):
            return {key: 1.01 * value for key, value in original(*arguments).items()}

        monkeypatch.setattr(merging, "merge_unit", merge_unit)
    else:
        original = command.write_model

        def write_model(folder, *arguments):
            original(folder, *arguments)
            path = folder / "model.safetensors"
            save_file({key: value.roll(1) for key, value in load_file(path).items()}, path)

        monkeypatch.setattr(command, "write_model", write_model)
    assert "differ from those of base + adapter" in error_of(
        capsys, llama[1], "--output_dir", tmp_path / "out"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def wrong_merge(monkeypatch):
    """Return a function that makes every merged weight wrong by a factor."""
    original = merging.merge_unit

    def plant(factor):
        def merge_unit(*arguments):
            return {key: factor * value for key, value in original(*arguments).items()}

        monkeypatch.setattr(merging, "merge_unit", merge_unit)

    return plant


def test_a_wrong_merge_of_a_model_that_enlarges_rounding_is_found(tmp_path, capsys, wrong_merge):
    base = save_base(tmp_path / "base", "t5")
    adapter = save_adapter(tmp_path / "adapter", base, **SENSITIVE)
    wrong_merge(1.01)
    error = error_of(capsys, adapter, "--output_dir", tmp_path / "out")
    assert "differ from those of base + adapter" in error
    assert "more than 1e-04" not in error  # the tolerance was measured
    assert not (tmp_path / "out").exists()


def test_only_weights_of_the_adapter_make_the_tolerance_larger(tmp_path, capsys, wrong_merge):
    base = save_base(tmp_path / "base", "t5")
    run(save_adapter(tmp_path / "first", base, **SENSITIVE), "--output_dir", tmp_path / "merged")
    last = {"target_modules": r"decoder\.block\.1\..*\.wo"}
    adapter = save_adapter(tmp_path / "second", tmp_path / "merged", **last)
    wrong_merge(1.001)
    error = error_of(capsys, adapter, "--output_dir", tmp_path / "out")
    assert "more than 1e-04" in error


def test_a_wrong_file_of_such_a_model_is_found(tmp_path, capsys, monkeypatch):
    base = save_base(tmp_path / "base", "t5")
    adapter = save_adapter(tmp_path / "adapter", base, **SENSITIVE)
    original = command.write_model

    def write_model(folder, *arguments):
        original(folder, *arguments)
        path = folder / "model.safetensors"
        weights = load_file(path)
        weights["decoder.final_layer_norm.weight"] *= 1.001
        save_file(weights, path)

    monkeypatch.setattr(command, "write_model", write_model)
    error = error_of(capsys, adapter, "--output_dir", tmp_path / "out")
    assert "differ from those of the merged weights" in error and "more than 1e-04" in error


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A random base of 600 MB in several files, written without building the model; an adapter."""
    folder = tmp_path_factory.mktemp("large")
    size = {
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_hidden_layers": 13,
        "vocab_size": 16000,
    }
    config = transformers.LlamaConfig(**SMALL | size, tie_word_embeddings=False)
    with torch.device("meta"):
        shapes = transformers.LlamaForCausalLM(config).state_dict()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder / "base")
    shards = [{}]
    for key, value in shapes.items():
        if sum(tensor.nbytes for tensor in shards[-1].values()) + value.nbytes > 100e6:
            shards.append({})
        shards[-1][key] = torch.empty(value.shape).uniform_(-0.05, 0.05)
    for number, shard in enumerate(shards):
        save_file(shard, folder / "base" / f"model-{number}.safetensors", metadata={"format": "pt"})
    weight_map = {
        key: f"model-{number}.safetensors" for number, shard in enumerate(shards) for key in shard
    }
    (folder / "base" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": weight_map})
    )
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL | size | {"num_hidden_layers": 1})
    )
    model = get_peft_model(
        model, LoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    draw([p for p in model.parameters() if p.requires_grad], 0.02)
    model.save_pretrained(folder / "adapter")
    trained = load_file(folder / "adapter" / "adapter_model.safetensors")
    trained = {
        key.replace("layers.0", f"layers.{i}"): trained[key].clone()
        for key in trained
        for i in range(13)
    }
    save_file(trained, folder / "adapter" / "adapter_model.safetensors")
    edit(folder / "adapter" / "adapter_config.json", base_model_name_or_path=str(folder / "base"))
    return folder


def in_process(folder, prelude, *arguments):
    """Run the command on folder/adapter in a new process, and return the finished process.

    Its last line is its VmHWM, the largest resident size in bytes, imports included.

    Args:
        prelude: code to run before the command.
    """
    code = f"""
import re, runpy, signal, sys
{prelude}
sys.argv[1:] = {[str(folder / "adapter"), "--output_dir", str(folder / "out"), *arguments]}
runpy.run_module("tools.merge_adapter", run_name="__main__", alter_sys=True)
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024)
"""
    streams = {"capture_output": True, "text": True}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=600, **streams)


@pytest.mark.slow
def test_memory(large):
    done = in_process(large, "", "--max_shard_size", "100MB")
    assert done.returncode == 0, done.stderr
    sizes = [path.stat().st_size for path in (large / "base").glob("*.safetensors")]
    assert sum(sizes) > 600e6
    assert int(done.stdout.splitlines()[-1]) <= 2 * max(sizes) + 300e6


KILL = """
import tqdm
class Bar(tqdm.tqdm):
    done = 0
    def update(self, n=1):
        Bar.done += n
        if Bar.done > self.total / 2:
            signal.raise_signal(signal.SIGKILL)
tqdm.tqdm = Bar
"""


@pytest.mark.slow
def test_a_killed_run_leaves_no_folder_that_looks_complete(tmp_path, llama):
    shutil.copytree(llama[1], tmp_path / "adapter")
    killed = in_process(tmp_path, KILL, "--max_shard_size", "20KB")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    [left] = [path for path in tmp_path.iterdir() if path.name != "adapter"]
    assert left.name.startswith(".out.") and list(left.glob("*.safetensors"))
    assert not list(left.glob("*index.json"))
    run(tmp_path / "adapter", "--output_dir", tmp_path / "out")


def test_an_interrupt_leaves_nothing(tmp_path, llama, capsys, monkeypatch):
    # a job in the background ignores SIGINT
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(write.tqdm, "update", interrupted)
    try:
        assert "interrupted, nothing was saved" in error_of(
            capsys, llama[1], "--output_dir", tmp_path / "out"
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert list(tmp_path.iterdir()) == []
