"""tools/merge_adapter: the merged model equals base + adapter, and PEFT's own merge."""

import functools
import json
import shutil

import pytest
import torch
import transformers
from merge_models import ALL, BASES, SENSITIVE, check, draw, full_model, logits, make_llama, run
from merge_models import save_adapter, save_base, tensors
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from tools.merge_adapter import lazy
from tools.merge_adapter.check import EXACT, LARGEST, exact_tolerance, probe
from tools.merge_adapter.model import build_model
from tools.merge_adapter.read import read_weights

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


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A base in 32 bits and an adapter of all its linear layers; tests only read them."""
    return make_llama(tmp_path_factory.mktemp("llama"))


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
        return  # PEFT merges into the tensor that both ends share, which changes the head, too
    merged = full_model(base, adapter, merge=True).state_dict()
    ours = model.state_dict()
    assert ours.keys() == merged.keys()
    untouched = load_file(base / "model.safetensors")
    for key, value in merged.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-6)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert untouched.keys() <= written.keys()
    assert sum(torch.equal(written[key], untouched[key]) for key in untouched) >= 1


def test_a_model_that_enlarges_rounding_is_merged(tmp_path):
    base = save_base(tmp_path / "base", "t5")
    adapter = save_adapter(tmp_path / "adapter", base, **SENSITIVE)
    run(adapter, "--output_dir", tmp_path / "out")
    check(base, adapter, tmp_path / "out", tolerance=LARGEST)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_only_such_a_model_has_a_larger_tolerance(tmp_path, name):
    base = save_base(tmp_path / "base", name)
    settings = SENSITIVE if name == "t5" else ALL
    model = full_model(base, save_adapter(tmp_path / "adapter", base, **settings), merge=True)
    model.save_pretrained(tmp_path / "merged")
    weights = read_weights(tmp_path / "merged", "model", "base", adapted=True)
    merged = build_model(type(model), BASES[name], weights)
    ids = torch.arange(0, 96, 5)
    logits = probe(merged, ids)
    far = logits + 2 * EXACT * logits.abs().max()
    assert exact_tolerance(merged, ids, logits, logits) == EXACT
    found = exact_tolerance(merged, ids, far, logits)
    assert (found > EXACT) == (name == "t5") and found <= LARGEST
    assert probe(merged, ids).equal(logits)  # the weights are as before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_base_stays_16_bit_and_is_rounded_once(tmp_path, dtype):
    base = save_base(tmp_path / "base", "mixtral", dtype)
    adapter = save_adapter(
        tmp_path / "adapter", base, target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    run(adapter, "--output_dir", tmp_path / "out")
    written, before = tensors(tmp_path / "out"), tensors(base)
    exact = full_model(base, adapter, merge=True).state_dict()
    assert {value.dtype for value in written.values()} == {dtype}
    # the names of single experts, too, which transformers fuses on loading
    assert written.keys() == before.keys()
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
    assert (from_original - logits(full_model(original, adapter), 96)).abs().max() <= 1e-5
    assert (from_original - found).abs().max() > 1e-3


def test_shards_in_and_out(tmp_path, llama, monkeypatch):
    # six rows of most weights; their number of rows is not a multiple of six
    monkeypatch.setattr(lazy, "BLOCK", 200)
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
            # replaced, so bit-equal
            assert torch.equal(value, saved[f"base_model.model.{key}"]), key


def test_operations_in_blocks_equal_those_on_the_full_weight(monkeypatch):
    monkeypatch.setattr(lazy, "BLOCK", 20)
    full, x, ids = torch.randn(7, 5), torch.randn(3, 5), torch.tensor([[6, 0], [2, 6]])
    make = functools.partial(lazy.take, full)
    weight = lazy.Lazy(full.shape, full.dtype, make, full.dtype, adapted=False)
    for function in (
        lambda w: torch.nn.functional.linear(x, w, w[:, 0]),
        lambda w: torch.nn.functional.embedding(ids, w),
        lambda w: torch.addmm(torch.ones(5), x.new_ones(2, 7), w),
        lambda w: w[ids[0, 0]],
    ):
        torch.testing.assert_close(function(weight), function(full))


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


def test_files_of_the_result(tmp_path, llama, capsys):
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


@pytest.mark.cases
def test_the_end_tokens_beside_the_adapter_are_those_of_the_merge(tmp_path, llama):
    shutil.copytree(llama[1], tmp_path / "adapter")
    ends = transformers.GenerationConfig(eos_token_id=[2, 5], pad_token_id=0)
    ends.save_pretrained(tmp_path / "adapter")
    run(tmp_path / "adapter", "--output_dir", tmp_path / "out")
    merged = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert merged["eos_token_id"] == [2, 5]
