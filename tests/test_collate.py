"""tools/collate.py: one file of a sharded checkpoint, bit-equal to the gathered weights."""

import json
import pickle
import re
import shutil
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT
from models import make_model
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from single import run_single
from transformers import AutoModelForCausalLM

from tools.collate.command import main

SHARDED = ("--fsdp_state_dict_type", "SHARDED_STATE_DICT")
FULL = ("--fsdp_state_dict_type", "FULL_STATE_DICT")
BF16 = ("--mixed_precision", "bf16")
CASES = {  # name -> config, architecture (qwen2 has tied weights), method, flags of accelerate
    "zero3 full": ("zero3", "qwen2", "full", ()),
    "fsdp2 lora": ("fsdp2", "llama", "lora", ()),
    "zero1 full": ("zero1", "qwen2", "full", ()),
    "zero2 full bf16": ("zero2", "qwen2", "full", BF16),
    "zero3 untied": ("zero3", "llama", "full", ()),
    "fsdp1 full": ("fsdp1", "qwen2", "full", SHARDED),
    "fsdp1 one file": ("fsdp1", "qwen2", "full", FULL),
    "fsdp1 lora one file": ("fsdp1", "qwen2", "lora", FULL),
    "fsdp2 one file": ("fsdp2", "qwen2", "full", FULL),
    "fsdp2 full": ("fsdp2", "qwen2", "full", ()),
    "zero1 lora": ("zero1", "qwen2", "lora", ()),
    "zero2 lora": ("zero2", "qwen2", "lora", ()),
    "zero2 frozen": ("zero2", "qwen2", "frozen", ()),
    "zero3 frozen": ("zero3", "llama", "frozen", ()),
    "zero3 lora bf16": ("zero3", "qwen2", "lora", BF16),
    "fsdp1 lora": ("fsdp1", "qwen2", "lora", SHARDED),
    "ddp full": ("ddp", "qwen2", "full", ()),
    "ddp lora": ("ddp", "llama", "lora", ()),
}
DEFAULT = ("zero3 full", "fsdp2 lora")
FAST = (*DEFAULT, "fsdp1 one file")
NAMES = [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CASES]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: make_model(folder / name, name) for name in ("qwen2", "llama")}


@pytest.fixture(scope="module")
def saved(launch, models, tmp_path_factory):
    """Return a function: name of a case -> folder that checkpoint_driver.py wrote, once."""
    folders = {}

    def save(name):
        if name not in folders:
            config, architecture, method, flags = CASES[name]
            folder = folders[name] = tmp_path_factory.mktemp("saved")
            words = (models[architecture], folder, method)
            driver = ROOT / "tests/checkpoint_driver.py"
            launch(driver, config, *words, processes=2, flags=flags, PYTHONPATH=str(ROOT))
        return folders[name]

    return save


def arguments_of(name, folder, models):
    _, architecture, method, _ = CASES[name]
    adapter = ("--adapter_config", folder / "adapter") if method == "lora" else ()
    return ("--model_name_or_path", models[architecture], *adapter)


def collate(*arguments):
    main(list(map(str, arguments)))


def error_of(capsys, *arguments):
    """Return the line of the error of a call that is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        collate(*arguments)
    assert caught.value.code == 1
    [line] = re.findall("^error: .*", capsys.readouterr().err, re.MULTILINE)
    return line


def assert_equal(out, gathered, method):
    """The written folder loads, and its trained weights are bit-equal to the gathered ones."""
    if method == "lora":
        model = AutoPeftModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    else:
        model, found = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not any(found.values()), found
    loaded, expected = dict(model.named_parameters()), load_file(gathered)
    assert model.config.dtype == torch.float32 or method == "lora"
    assert [n for n in expected if not torch.equal(expected[n], loaded[n])] == []
    assert len(expected) >= 20


@pytest.mark.parametrize("name", NAMES)
def test_bit_equal_to_the_gathered_weights(saved, models, tmp_path, name):
    folder = saved(name)
    flags = arguments_of(name, folder, models)
    kinds = {"engine", "engine_trained"} if name.startswith("zero") else set()
    kinds |= {"trainer"} if name in ("fsdp2 full", "fsdp2 lora", "fsdp1 full") else set()
    kinds |= {"state"}
    for kind in kinds:
        collate(folder / kind, tmp_path / kind, *flags)
        assert_equal(tmp_path / kind, folder / "gathered.safetensors", CASES[name][2])
        assert (tmp_path / kind / "tokenizer.json").is_file(), kind
        assert not list(tmp_path.glob(".*"))


def test_one_or_several_files_of_another_dtype(saved, models, tmp_path):
    folder, out = saved("zero3 full"), tmp_path / "out"
    more = ("--dtype", "bfloat16", "--max_shard_size", "20KB")
    collate(folder / "state", out, "--model_name_or_path", models["qwen2"], *more)
    assert len(list(out.glob("model-*.safetensors"))) > 2
    model = AutoModelForCausalLM.from_pretrained(out)
    expected = load_file(folder / "gathered.safetensors")
    weights = dict(model.named_parameters())
    assert all(torch.equal(weights[n], one.bfloat16()) for n, one in expected.items())


def test_a_checkpoint_of_chat_sft(forks, models, tmp_path):
    flags = ("--max_steps", 1, "--save_strategy", "steps", "--save_steps", 1, "--num_samples", 0)
    flags += ("--eval_strategy", "no", "--chat_template_format", "chatml", "--max_length", 64)
    words = ("chat_sft", "--model_name_or_path", models["qwen2"], *flags)
    runs = [(*words, "--output_dir", tmp_path / "full")]
    runs.append((*words, "--use_peft_lora", "--output_dir", tmp_path / "lora"))
    for code, text in run_single(forks, tmp_path, *runs):
        assert code == 0, text
    for name, stem in (("full", "model"), ("lora", "adapter_model")):
        checkpoint, out = tmp_path / name / "checkpoint-1", tmp_path / f"{name}-out"
        collate(checkpoint, out)
        ours, theirs = (load_file(one / f"{stem}.safetensors") for one in (out, checkpoint))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        auto = AutoModelForCausalLM if name == "full" else AutoPeftModelForCausalLM
        auto.from_pretrained(out)


@pytest.mark.slow
def test_deepspeeds_own_tool_aborts_on_tied_weights(saved, tmp_path):
    """docs/checkpoints.md says so."""
    words = (saved("zero3 full") / "engine", tmp_path / "out", "--safe_serialization")
    command = [sys.executable, "-m", "deepspeed.utils.zero_to_fp32", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and "Some tensors share memory" in done.stderr
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("file", ["pytorch_model_fsdp.bin", "model.safetensors", "any name.pt"])
@pytest.mark.parametrize("given", ["folder", "file"])
def test_one_file_of_weights(models, tmp_path, capsys, file, given):
    """It has the names of DDP and of torch.compile, and the tied weight twice if it can."""
    prefix = "module._orig_mod." if given == "file" else "_orig_mod.module."
    weights = AutoModelForCausalLM.from_pretrained(models["qwen2"]).state_dict()
    tied = weights.pop("lm_head.weight")
    saved = {f"{prefix}{name}": one for name, one in weights.items()}
    path, out = tmp_path / "state" / file, tmp_path / "out"
    path.parent.mkdir()
    if path.suffix == ".safetensors":
        # transformers would load this folder with random weights, because of the names
        shutil.copy(models["qwen2"] / "config.json", path.parent)
        save_file(saved, path)
    else:
        torch.save(saved | {f"{prefix}lm_head.weight": tied}, path)
    words = (path if given == "file" else path.parent, out, "--model_name_or_path", models["qwen2"])
    if (given, file) == ("folder", "any name.pt"):
        assert "is no sharded checkpoint" in error_of(capsys, *words)
        return
    collate(*words)
    written = load_file(out / "model.safetensors")
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], one) for name, one in weights.items())


# Memory -------------------------------------------------------------------------------------------
PEAK = """
import re, sys, threading, time
sys.modules["bitsandbytes"] = None
peak, ended = [0], threading.Event()

def watch():
    while not ended.wait(0.01):
        found = re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())
        peak[0] = max(peak[0], int(found[1]) * 1024)

thread = threading.Thread(target=watch)
thread.start()
from tools.collate import main
try:
    main(sys.argv[1:])
finally:
    ended.set()
    thread.join()
print(peak[0])
"""
WIDE = {"vocab_size": 30000, "hidden_size": 1024, "intermediate_size": 4096}


def save_dcp(weights, folder):
    """Write the index and the files of FSDP's checkpoints, from one process."""
    from torch.distributed import checkpoint

    checkpoint.save({"model": weights}, checkpoint_id=folder / "pytorch_model_fsdp_0", no_dist=True)


def save_zero3(weights, folder):
    """Write the files that ZeRO-3 writes on two processes."""
    halves = [one.reshape(-1).chunk(2) for one in weights.values()]
    model = {"module": {}, "buffer_names": [], "shared_params": {}}
    model["param_shapes"] = [{name: one.shape for name, one in weights.items()}]
    folder.mkdir()
    for rank in range(2):
        flat = torch.cat([half[rank] for half in halves])
        state = {"zero_stage": 3, "partition_count": 2, "fp32_flat_groups": [flat]}
        name = f"zero_pp_rank_{rank}_mp_rank_00"
        torch.save({"optimizer_state_dict": state}, folder / f"{name}_optim_states.pt")
        torch.save(model, folder / f"{name}_model_states.pt")


@pytest.mark.slow
@pytest.mark.parametrize("save", [save_dcp, save_zero3])
def test_memory_is_that_of_the_largest_tensor_and_500_mb(tmp_path, save):
    """The model has 750 MB, and its largest tensor 123 MB."""
    make_model(tmp_path / "model", "llama", **WIDE, num_hidden_layers=10)
    weights = load_file(tmp_path / "model/model.safetensors")
    total = sum(one.nbytes for one in weights.values())
    largest = max(one.nbytes for one in weights.values())
    assert total > largest + 500e6
    save(weights, tmp_path / "saved")
    command = [sys.executable, "-c", PEAK, tmp_path / "saved", tmp_path / "out"]
    command += ["--model_name_or_path", tmp_path / "model"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split()[-1])
    print(f"total {total:,}, largest {largest:,}, peak {peak:,} bytes")
    assert peak < largest + 500e6 * 0.9
    written = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(written[name], one) for name, one in weights.items())


# What is refused ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name, path",
    [
        ("zero3 full", "engine/global_step2/zero_pp_rank_1_mp_rank_00_optim_states.pt"),
        ("zero3 full", "engine/global_step2/zero_pp_rank_0_mp_rank_00_model_states.pt"),
        ("fsdp2 lora", "state/pytorch_model_fsdp_0/__1_0.distcp"),
        ("fsdp2 lora", "state/pytorch_model_fsdp_0/.metadata"),
    ],
)
@pytest.mark.parametrize("fault", ["missing", "truncated"])
def test_a_missing_or_truncated_shard_is_named(saved, models, tmp_path, capsys, name, path, fault):
    folder, kind = saved(name), path.split("/")[0]
    shutil.copytree(folder / kind, tmp_path / kind)
    file = tmp_path / path
    if fault == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-700])
    flags = arguments_of(name, folder, models)
    line = error_of(capsys, tmp_path / kind, tmp_path / "out", *flags)
    assert file.name in line and ("lacks" in line) == (fault == "missing")
    assert sorted(one.name for one in tmp_path.iterdir()) == [kind]


class Harmful:
    """A pickle of it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", DEFAULT)
def test_no_code_of_a_pickle_runs(saved, models, tmp_path, capsys, name):
    folder = saved(name)
    shutil.copytree(folder / "state", tmp_path / "state")
    if name == "zero3 full":
        file = tmp_path / "state/pytorch_model/zero_pp_rank_0_mp_rank_00_model_states.pt"
        torch.save({"module": Harmful(tmp_path / "harm")}, file)
    else:
        file = tmp_path / "state/pytorch_model_fsdp_0/.metadata"
        file.write_bytes(pickle.dumps(Harmful(tmp_path / "harm")))
    flags = arguments_of(name, folder, models)
    line = error_of(capsys, tmp_path / "state", tmp_path / "out", *flags)
    assert "could run any code" in line and file.name in line
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("is_safe", [True, False])
def test_several_files_with_an_index(models, tmp_path, capsys, is_safe):
    """As `accelerator.save_model` writes them."""
    model, state = AutoModelForCausalLM.from_pretrained(models["qwen2"]), tmp_path / "state"
    Accelerator(cpu=True).save_model(model, state, "40KB", safe_serialization=is_safe)
    parts = sorted(path.name for path in state.iterdir() if path.suffix != ".json")
    assert len(parts) > 2
    words = (state, tmp_path / "out", "--model_name_or_path", models["qwen2"])
    collate(*words)
    written = load_file(tmp_path / "out" / "model.safetensors")
    expected = load_file(models["qwen2"] / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], one) for name, one in expected.items())
    if is_safe:
        shutil.copy(models["qwen2"] / "model.safetensors", state)
        alone = (state / "model.safetensors", tmp_path / "again", *words[2:])
        assert "stands beside model.safetensors" in error_of(capsys, *alone)
        assert ": give one of them" in error_of(capsys, state, *alone[1:])
        alone[0].unlink()
    (state / parts[1]).unlink()
    line = error_of(capsys, state, tmp_path / "again", *words[2:])
    assert f"{state} lacks {parts[1]}" in line


def save(content, path, **options):
    path.parent.mkdir(exist_ok=True)
    torch.save(content, path, **options)


OLD = {"_use_new_zipfile_serialization": False}
ONE = {"model.norm.weight": torch.ones(32)}


@pytest.mark.parametrize(
    "files, given, told",
    [
        ({"pytorch_model_fsdp.bin": ({},)}, "", "holds no weights, as transformers' Trainer"),
        (
            {f"pytorch_model_fsdp_rank{rank}.bin": (ONE,) for rank in (0, 1)},
            "",
            "pytorch_model_fsdp_rank0.bin, a process's own pieces of the weights",
        ),
        (
            {f"pytorch_model_fsdp{number}.bin": (ONE,) for number in ("", "_1")},
            "",
            "holds pytorch_model_fsdp.bin, pytorch_model_fsdp_1.bin: give one of them",
        ),
        (
            {"pytorch_model.bin": (ONE,), "pytorch_model_1.bin": (ONE,)},
            "",
            "holds pytorch_model.bin, pytorch_model_1.bin: give one of them",
        ),
        (
            {"pytorch_model_fsdp.bin": (ONE,), "pytorch_model_fsdp_rank0.bin": (ONE,)},
            "",
            "pytorch_model_fsdp.bin, pytorch_model_fsdp_rank0.bin: give one of them",
        ),
        ({"a.safetensors.bak": (ONE, OLD)}, "a.safetensors.bak", "or no file of torch.save"),
        ({"a.pt": (ONE, OLD)}, "a.pt", "or in its format of before PyTorch 1.6"),
        ({"a.pt": ({"model": ONE, "step": 3},)}, "a.pt", "holds model, which is no tensor"),
        ({"a.pt": (ONE["model.norm.weight"],)}, "a.pt", "holds no state_dict of a model"),
        ({"a.pt": ({},)}, "a.pt", "holds no weights: give the checkpoint's folder"),
        (
            {"model-00001-of-00002.bin": (ONE,)},
            "model-00001-of-00002.bin",
            "is one part of a model: give model.bin.index.json beside it",
        ),
    ],
)
def test_files_that_are_no_model(models, tmp_path, capsys, files, given, told):
    for name, (content, *options) in files.items():
        save(content, tmp_path / "state" / name, **(options[0] if options else {}))
    model = ("--model_name_or_path", models["qwen2"])
    assert told in error_of(capsys, tmp_path / "state" / given, tmp_path / "out", *model)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_empty_checkpoint_of_fsdp1_and_peft(saved, models, tmp_path, capsys):
    model = ("--model_name_or_path", models["qwen2"])
    line = error_of(capsys, saved("fsdp1 lora") / "trainer", tmp_path / "out", *model)
    assert "holds no weights, as transformers' Trainer leaves it for a PEFT model" in line


def test_what_is_needed_is_said(saved, models, tmp_path, capsys):
    full, lora = saved("zero3 full") / "state", saved("fsdp2 lora")
    out, model = tmp_path / "out", ("--model_name_or_path", models["qwen2"])
    assert "config.json: give --model_name_or_path" in error_of(capsys, full, out)
    other = ("--model_name_or_path", models["llama"])
    line = error_of(capsys, full, out, *other)
    assert "are no part of a Llama" in line and "give the --model_name_or_path" in line
    assert "adapter_config.json: give --adapter_config" in error_of(
        capsys, lora / "state", out, *other
    )
    shutil.copytree(models["qwen2"], tmp_path / "model")
    file = tmp_path / "model/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_size": "wide"}))
    other_config = ("--model_name_or_path", tmp_path / "model")
    assert "hidden_size" in error_of(capsys, full, out, *other_config)
    shutil.copytree(lora / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 3}))
    line = error_of(capsys, lora / "state", out, *other, "--adapter_config", file)
    assert "lora_A" in line and "give the --adapter_config that was trained" in line
    assert "is no sharded checkpoint" in error_of(capsys, tmp_path / "adapter", out, *model)
    assert "does not exist" in error_of(capsys, tmp_path / "nothing", out, *model)
    assert not out.exists()
    out.mkdir()
    assert "exists" in error_of(capsys, full, out, *model) and not list(out.iterdir())
