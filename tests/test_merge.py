"""The merged model equals base + adapter, in little memory, or there is one clear sentence and no folder."""

import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from tools import merge_adapter

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}
EXPERTS = SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_MOE = SMALL | {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "tie_word_embeddings": False,
}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 96,
    "dropout_rate": 0.0,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64}
BASES = {
    "llama": transformers.LlamaConfig(**SMALL, tie_word_embeddings=False),
    "tied": transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**SMALL, tie_word_embeddings=True),  # biases
    "gpt2": transformers.GPT2Config(**GPT2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "t5": transformers.T5Config(**T5, decoder_start_token_id=0),
    "bart": transformers.BartConfig(
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        vocab_size=96,
        max_position_embeddings=64,
    ),
    "mixtral": transformers.MixtralConfig(**EXPERTS),
    "qwen2_moe": transformers.Qwen2MoeConfig(**QWEN_MOE),
}


def auto(config):
    return (
        transformers.AutoModelForSeq2SeqLM
        if config.is_encoder_decoder
        else transformers.AutoModelForCausalLM
    )


def save_base(folder, name, dtype=torch.float32, **saving):
    """Save a random model, norms and biases drawn too (1 and 0 would hide mistakes), and return its folder."""
    torch.manual_seed(0)
    model = auto(BASES[name]).from_config(BASES[name]).to(dtype)
    draw(model.parameters(), 0.1)
    model.save_pretrained(folder, **saving)
    return Path(folder)


def draw(parameters, spread):
    with torch.no_grad():
        for parameter in parameters:
            parameter += spread * torch.randn_like(parameter)


def save_adapter(folder, base, rows=None, **settings):
    """Save an adapter of the base whose every weight was moved, and return its folder."""
    config = transformers.AutoConfig.from_pretrained(base)
    torch.manual_seed(1)
    model = auto(config).from_pretrained(base)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    task = "SEQ_2_SEQ_LM" if config.is_encoder_decoder else "CAUSAL_LM"
    model = get_peft_model(
        model, LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": task} | settings)
    )
    draw([p for p in model.parameters() if p.requires_grad], 0.1)
    model.save_pretrained(folder)
    return Path(folder)


def run(*arguments):
    merge_adapter.main([str(argument) for argument in arguments])


def logits(model, rows):
    ids = torch.arange(0, rows, 5)[None]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids
    with torch.no_grad():
        return model.eval()(**batch).logits


def whole(base, adapter, rows=None, merge=False):
    """The model with the adapter, in 32 bit, made by PEFT in memory."""
    model = auto(transformers.AutoConfig.from_pretrained(base)).from_pretrained(
        base, dtype=torch.float32
    )
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    model = PeftModel.from_pretrained(model, adapter)
    return model.merge_and_unload() if merge else model


def check(base, adapter, out, rows=None, tolerance=1e-5):
    """Compare the result, loaded by plain transformers, with base + adapter; return it."""
    model, found = auto(transformers.AutoConfig.from_pretrained(base)).from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not any(found.values()), found
    expected = logits(whole(base, adapter, rows), rows or 96)
    assert (logits(model, rows or 96) - expected).abs().max() <= tolerance * expected.abs().max()
    return model


def tensors(folder):
    """All tensors of a folder's weight files."""
    return {
        key: value
        for path in folder.glob("*.safetensors")
        for key, value in load_file(path).items()
    }


def refused(capsys, *arguments):
    """Run what must be refused; return the sentence."""
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    *bar, error = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1
    assert error.startswith("error: ") and all(line == "" or "writing:" in line for line in bar), (
        bar,
        error,
    )
    return error


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A base in 32 bit and an adapter of all its linear layers, both only read."""
    folder = tmp_path_factory.mktemp("llama")
    base = save_base(folder / "base", "llama")
    return base, save_adapter(folder / "adapter", base, **ALL)


ALL = {"target_modules": "all-linear"}
MLP = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES = {
    "llama": ("llama", ALL),
    "tied": ("tied", ALL),
    "biases": ("qwen2", ALL | {"bias": "all"}),
    "lora_only": ("qwen2", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "lora_bias": ("qwen2", {"target_modules": ["q_proj", "k_proj"], "lora_bias": True}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}),
    "gpt2_dora": (
        "gpt2",
        {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True},
    ),
    "t5": ("t5", {"target_modules": ["q", "v", "wi", "wo"]}),
    "bart": ("bart", {"target_modules": ["q_proj", "fc1"]}),
    "rslora": ("llama", ALL | {"use_rslora": True}),
    "dora": ("llama", ALL | {"use_dora": True}),
    "patterns": (
        "llama",
        ALL | {"rank_pattern": {"q_proj": 2, "up_proj": 8}, "alpha_pattern": {"v_proj": 32}},
    ),
    "experts": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": MLP}),
    "one_of_experts": ("mixtral", {"target_modules": [], "target_parameters": MLP[1:]}),
    "no_experts": ("mixtral", {"target_modules": ["q_proj", "v_proj"]}),
    "qwen2_moe": (
        "qwen2_moe",
        {"target_modules": ["o_proj"], "target_parameters": MLP, "use_rslora": True},
    ),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "tied_embedding": ("tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "gpt2_embedding": ("gpt2", {"target_modules": ["wte", "c_attn"]}),
    "saved": ("llama", ALL | {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "saved_norm": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["norm", "input_layernorm"]},
    ),
    "tied_both": (
        "tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "tied_head": ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tied_embed": ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "kept_tie": (
        "tied",
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ),
    "t5_head": ("t5", {"target_modules": ["q"], "modules_to_save": ["lm_head"]}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 95]}),
    "tied_tokens": ("tied", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 95]}),
    "t5_tokens": ("t5", {"target_modules": ["q"], "trainable_token_indices": {"shared": [3, 95]}}),
}


@pytest.mark.parametrize("case", CASES)
def test_merged_equals_base_and_adapter_and_pefts_own_merge(tmp_path, case):
    name, settings = CASES[case]
    base = save_base(tmp_path / "base", name)
    adapter = save_adapter(tmp_path / "adapter", base, **settings)
    run(adapter, "--output_dir", tmp_path / "out")
    model = check(base, adapter, tmp_path / "out")
    if case in ("tied_both", "tied_head", "tied_embed", "kept_tie", "t5_head"):
        assert model.config.tie_word_embeddings == (case in ("kept_tie", "t5_head"))
    if case in ("tied_embedding", "gpt2_embedding"):
        return  # PEFT merges into the tensor that both ends share, and so changes the head too
    merged = whole(base, adapter, merge=True).state_dict()
    ours = model.state_dict()
    assert ours.keys() == merged.keys()
    untouched = load_file(base / "model.safetensors")
    for key, value in merged.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-6)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert untouched.keys() <= written.keys()
    assert sum(torch.equal(written[key], untouched[key]) for key in untouched) >= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_base_stays_16_bit_and_is_rounded_once(tmp_path, dtype):
    base = save_base(tmp_path / "base", "mixtral", dtype)
    adapter = save_adapter(
        tmp_path / "adapter", base, target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    run(adapter, "--output_dir", tmp_path / "out")
    written, before = tensors(tmp_path / "out"), tensors(base)
    exact = whole(base, adapter, merge=True).state_dict()
    assert {value.dtype for value in written.values()} == {dtype}
    assert (
        written.keys() == before.keys()
    )  # also the experts' names, which transformers fuses on loading
    for key, value in written.items():
        if "q_proj" in key or key == "lm_head.weight":
            assert not torch.equal(value, before[key])
            assert torch.equal(value, exact[key].to(dtype)), key
        else:
            assert torch.equal(value, before[key]), key
    check(base, adapter, tmp_path / "out", tolerance=2e-2)


def test_dtype_is_cast_and_the_config_says_so(tmp_path, llama, capsys):
    run(llama[1], "--output_dir", tmp_path / "out", "--dtype", "bfloat16")
    assert {value.dtype for value in tensors(tmp_path / "out").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    output = capsys.readouterr().out
    assert "tolerance 5e-02" in output and "tolerance 1e-04" in output
    check(*llama, tmp_path / "out", tolerance=2e-2)


@pytest.mark.parametrize("double", [False, True])
def test_4_bit_base_is_dequantized_or_read_from_the_original(tmp_path, double):
    original = save_base(tmp_path / "original", "llama", torch.bfloat16)
    four_bit = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double
    )
    load = transformers.AutoModelForCausalLM.from_pretrained
    quantized = load(original, quantization_config=four_bit, dtype=torch.bfloat16)
    quantized.save_pretrained(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", original, target_modules=["q_proj", "down_proj"])
    run(
        adapter,
        "--base_model_name_or_path",
        tmp_path / "base",
        "--output_dir",
        tmp_path / "out",
        "--dtype",
        "float32",
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    quantized.dequantize(torch.bfloat16)
    model = PeftModel.from_pretrained(quantized.float(), adapter)
    expected = logits(model, 96)
    found = logits(load(tmp_path / "out"), 96)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    run(adapter, "--output_dir", tmp_path / "plain", "--dtype", "float32")
    from_original = logits(load(tmp_path / "plain"), 96)
    assert (from_original - logits(whole(original, adapter), 96)).abs().max() <= 1e-5
    assert (from_original - found).abs().max() > 1e-3


def test_shards_in_and_out(tmp_path, llama, monkeypatch):
    monkeypatch.setattr(
        merge_adapter, "BLOCK", 200
    )  # six rows of most weights, whose number is no multiple of it
    base = save_base(tmp_path / "base", "llama", max_shard_size="20KB")
    assert len(list(base.glob("*.safetensors"))) > 3
    run(
        llama[1],
        "--base_model_name_or_path",
        base,
        "--output_dir",
        tmp_path / "out",
        "--max_shard_size",
        "30KB",
    )
    out = tmp_path / "out"
    sizes = [
        sum(value.nbytes for value in load_file(path).values())
        for path in out.glob("*.safetensors")
    ]
    assert len(sizes) > 2 and max(sizes) <= 30_000
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert (
        index["metadata"]["total_size"] == sum(sizes)
        and index["weight_map"].keys() == tensors(out).keys()
    )
    check(base, llama[1], out)


RESIZED = {
    "saved_by_itself": ("llama", {"target_modules": ["q_proj"]}),
    "tied_saved_by_itself": ("tied", {"target_modules": ["q_proj"]}),
    "modules_to_save": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "tied": (
        "tied",
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ),
    "split": (
        "tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "gpt2": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["lm_head", "wte"]}),
    "t5": ("t5", {"target_modules": ["q"]}),
    "tokens": ("tied", {"target_modules": ["q_proj"], "trainable_token_indices": [96, 98]}),
    "lora": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
}


@pytest.mark.parametrize("case", RESIZED)
def test_resized_vocabulary(tmp_path, case):
    name, settings = RESIZED[case]
    base = save_base(tmp_path / "base", name)
    adapter = save_adapter(tmp_path / "adapter", base, rows=99, **settings)
    run(adapter, "--output_dir", tmp_path / "out")
    model = check(base, adapter, tmp_path / "out", rows=99)
    assert model.config.vocab_size == 99
    saved = load_file(adapter / "adapter_model.safetensors")
    for key, value in model.state_dict().items():
        if f"base_model.model.{key}" in saved and case != "tokens":
            assert torch.equal(value, saved[f"base_model.model.{key}"]), (
                key
            )  # replaced, so bit-equal


def test_a_weight_in_blocks_is_the_whole_one(monkeypatch):
    monkeypatch.setattr(merge_adapter, "BLOCK", 20)
    whole, x, ids = torch.randn(7, 5), torch.randn(3, 5), torch.tensor([[6, 0], [2, 6]])
    make = lambda rows=None: merge_adapter.take(whole, rows)  # noqa: E731
    lazy = merge_adapter.Lazy(whole.shape, whole.dtype, make, whole.dtype, False)
    for function in (
        lambda w: torch.nn.functional.linear(x, w, w[:, 0]),
        lambda w: torch.nn.functional.embedding(ids, w),
        lambda w: torch.addmm(torch.ones(5), x.new_ones(2, 7), w),
        lambda w: w[ids[0, 0]],
    ):
        torch.testing.assert_close(function(lazy), function(whole))


def test_replaced_modules_and_trained_tokens_are_bit_equal(tmp_path):
    base = save_base(tmp_path / "base", "llama")
    settings = {
        "target_modules": ["q_proj"],
        "modules_to_save": ["lm_head"],
        "trainable_token_indices": [3, 95],
    }
    adapter = save_adapter(tmp_path / "adapter", base, **settings)
    run(adapter, "--output_dir", tmp_path / "out")
    written, saved, before = tensors(tmp_path / "out"), tensors(adapter), tensors(base)
    prefix = "base_model.model.model.embed_tokens."
    [delta] = [value for key, value in saved.items() if key.startswith(prefix)]
    assert torch.equal(written["lm_head.weight"], saved["base_model.model.lm_head.weight"])
    assert torch.equal(written["model.embed_tokens.weight"][[3, 95]], delta)
    assert torch.equal(
        written["model.embed_tokens.weight"][4:95], before["model.embed_tokens.weight"][4:95]
    )


def test_a_head_for_classes(tmp_path):
    base = save_base(tmp_path / "base", "llama")
    kind = transformers.AutoModelForSequenceClassification
    load = lambda folder: kind.from_pretrained(folder, num_labels=3, pad_token_id=0)  # noqa: E731
    model = get_peft_model(load(base), LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]))
    draw([p for p in model.parameters() if p.requires_grad], 0.1)
    model.save_pretrained(tmp_path / "adapter")
    run(tmp_path / "adapter", "--output_dir", tmp_path / "out")
    merged = kind.from_pretrained(tmp_path / "out", pad_token_id=0)
    assert merged.config.num_labels == 3
    torch.testing.assert_close(logits(merged, 96), logits(model, 96))


def test_a_head_that_the_resize_left_out_is_refused(tmp_path, llama, capsys):
    adapter = save_adapter(
        tmp_path / "adapter", llama[0], rows=99, target_modules=["q_proj", "embed_tokens"]
    )
    assert "holds lm_head.weight in the shape" in refused(
        capsys, adapter, "--output_dir", tmp_path / "out"
    )


def test_what_is_left_behind(tmp_path, llama, capsys):
    base = shutil.copytree(llama[0], tmp_path / "base")
    adapter = shutil.copytree(llama[1], tmp_path / "adapter")
    (base / "tokenizer_config.json").write_text('{"of": "base"}')
    (base / "generation_config.json").write_text('{"max_new_tokens": 7}')
    run(adapter, "--base_model_name_or_path", base, "--output_dir", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == '{"of": "base"}'
    output = capsys.readouterr().out
    for path in (tmp_path / "out").iterdir():
        assert f"{path.stat().st_size:,} bytes  {path.name}" in output
    scope = {}
    exec("\n".join(output.splitlines()[-2:]), scope)
    assert scope["model"].generation_config.max_new_tokens == 7
    (adapter / "tokenizer_config.json").write_text('{"of": "adapter"}')
    run(adapter, "--base_model_name_or_path", base, "--output_dir", tmp_path / "second")
    assert (tmp_path / "second" / "tokenizer_config.json").read_text() == '{"of": "adapter"}'


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def rekey(path, change):
    save_file({change(key): value for key, value in load_file(path).items()}, path)


def drop(path, word):
    save_file({key: value for key, value in load_file(path).items() if word not in key}, path)


REFUSALS = {
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
    "is of no module": lambda base, adapter: rekey(
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
    "index.json is no list": lambda base, adapter: (
        base / "model.safetensors.index.json"
    ).write_text("{}"),
    "Field 'hidden_size'": lambda base, adapter: edit(base / "config.json", hidden_size="wide"),
    "no configuration of a LoRA": lambda base, adapter: cut(adapter / "adapter_config.json"),
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


@pytest.mark.parametrize("words", REFUSALS)
def test_refusals(tmp_path, llama, capsys, monkeypatch, words):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    base = shutil.copytree(llama[0], tmp_path / "base")
    adapter = shutil.copytree(llama[1], tmp_path / "adapter")
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(base))
    REFUSALS[words](base, adapter)
    assert words in refused(capsys, adapter, "--output_dir", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_wrong_bases_are_refused(tmp_path, llama, capsys):
    other = save_base(tmp_path / "other", "gpt2")
    arguments = ("--base_model_name_or_path", other, "--output_dir", tmp_path / "out")
    assert "does not fit this base" in refused(capsys, llama[1], *arguments)
    config = transformers.LlamaConfig(**SMALL | {"intermediate_size": 64})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "wider")
    arguments = ("--base_model_name_or_path", tmp_path / "wider", "--output_dir", tmp_path / "out")
    assert "does not fit this base" in refused(capsys, llama[1], *arguments)


def test_an_existing_folder_is_refused(tmp_path, llama, capsys):
    assert "exists" in refused(capsys, llama[1], "--output_dir", tmp_path)


def test_a_full_disk(tmp_path, llama, capsys, monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # bytes a file may have
    try:
        assert "File too large" in refused(capsys, llama[1], "--output_dir", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 0, 100))
    assert "no room for" in refused(capsys, llama[1], "--output_dir", tmp_path / "out")
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
    assert "float16 cannot hold" in refused(capsys, llama[1], *arguments)


@pytest.mark.parametrize("wrong", ["merged", "written"])
def test_wrong_logits_leave_nothing(tmp_path, llama, capsys, monkeypatch, wrong):
    if wrong == "merged":
        original = merge_adapter.merge_unit
        monkeypatch.setattr(
            merge_adapter,
            "merge_unit",
            lambda *args: {key: 1.01 * value for key, value in original(*args).items()},
        )
    else:
        original = merge_adapter.write_model

        def write(folder, *arguments):
            original(folder, *arguments)
            path = folder / "model.safetensors"
            save_file({key: value.roll(1) for key, value in load_file(path).items()}, path)

        monkeypatch.setattr(merge_adapter, "write_model", write)
    assert "are off those of base + adapter" in refused(
        capsys, llama[1], "--output_dir", tmp_path / "out"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A random sharded base of 600 MB, written without building the model, and an adapter of it."""
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
    """Run the command on folder/adapter in a process of its own, some code before it; return it finished.

    The last line that it prints is its VmHWM: the bytes that were resident at most, imports and all.
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


def test_a_kill_half_way_leaves_no_folder_that_looks_complete(tmp_path, llama):
    shutil.copytree(llama[1], tmp_path / "adapter")
    killed = in_process(tmp_path, KILL, "--max_shard_size", "20KB")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    [left] = [path for path in tmp_path.iterdir() if path.name != "adapter"]
    assert left.name.startswith(".out.") and list(left.glob("*.safetensors"))
    assert not list(left.glob("*index.json"))
    run(tmp_path / "adapter", "--output_dir", tmp_path / "out")


def test_an_interrupt_leaves_nothing(tmp_path, llama, capsys, monkeypatch):
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # which a job in the background lacks

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(merge_adapter.tqdm, "update", interrupted)
    try:
        assert "interrupted, nothing was saved" in refused(
            capsys, llama[1], "--output_dir", tmp_path / "out"
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert list(tmp_path.iterdir()) == []
