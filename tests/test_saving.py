"""Saved files hold the trained weights: slices of all processes, full layers and new tokens."""

import ast
import re
import sys

import pytest
import torch
from conftest import ROOT, read_metrics, write_csv
from models import make_data, make_model, make_rows
from peft import AutoPeftModelForCausalLM
from processes import plant
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools import merge_adapter

SHARDED = {  # config -> script
    "zero3": "causal_lm_lora_zero3_offload",
    "zero3_offload": "causal_lm_lora_zero3_offload",
    "fsdp1": "causal_lm_lora_fsdp1",
    "fsdp2": "causal_lm_lora_fsdp2",
}
SAVE = "    weights = gather_weights(accelerator, model)\n"
END = "    progress.finish(metrics, samples)\n"
STEP = "                    optimizer.step()\n"
# Planted before optimizer.step(): trainable parameters have gradients, which are sharded under
# FSDP, and frozen weights have none.
GRADIENTS = """                    from utils.engine import held_part
                    for parameter in model.parameters():
                        gradient = parameter.grad
                        assert gradient is None or parameter.requires_grad
                        if gradient is not None and accelerator.distributed_type == "FSDP":
                            if hasattr(gradient, "to_local"):
                                gradient = gradient.to_local()
                            assert gradient.numel() == held_part(parameter).numel()
                    if accelerator.distributed_type == "FSDP":
                        assert any(parameter.grad is not None for parameter in model.parameters())
"""
# Planted before saving: every process sets its slice of each LoRA matrix to (rank + 1) / 64.
FILL = """    from utils.engine import held_part, full_shape
    with torch.no_grad():
        for parameter in model.parameters():
            size = torch.Size(full_shape(parameter)).numel()
            if parameter.requires_grad and size <= 64 * config.lora_r:
                held_part(parameter).fill_((accelerator.process_index + 1) / 64)
"""
# Gather the trainable parameters with other functions than the scripts call. Strategy -> code.
DUMP = {
    "zero3": """    from deepspeed.utils import safe_get_full_fp32_param
    trained_ones = {name: p for name, p in model.module.named_parameters() if p.requires_grad}
    dumped = {name: safe_get_full_fp32_param(p) for name, p in trained_ones.items()}
""",
    "fsdp1": """    with FSDP.summon_full_params(model, writeback=False):
        trained_ones = {name: p for name, p in model.named_parameters() if p.requires_grad}
        dumped = {name: p.detach().clone() for name, p in trained_ones.items()}
""",
    "fsdp2": """    from torch.distributed.checkpoint import state_dict as functions
    full = functions.StateDictOptions(full_state_dict=True)
    dumped = functions.get_model_state_dict(model, options=full)
    dumped = {name: p for name, p in dumped.items() if "lora_" in name or "modules_to_save" in name}
""",
}
WRITE = """    import safetensors.torch
    if accelerator.is_main_process:
        dumped = {name: tensor.contiguous() for name, tensor in dumped.items()}
        safetensors.torch.save_file(dumped, __file__ + ".safetensors")
"""
NEW = ["<sigh>", "<cheer>"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """An untied and a tied model with two new tokens, and data with these tokens: name -> path."""
    folder = tmp_path_factory.mktemp("bases")
    for name in ("llama", "qwen2"):
        model = AutoModelForCausalLM.from_pretrained(make_model(folder / name, name))
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        tokenizer.add_tokens(NEW)
        model.resize_token_embeddings(len(tokenizer))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    make_data(folder / "data", train=32, validation=4)
    rows = enumerate(make_rows(32, seed=1))
    rows = [(f"{text} {NEW[number % 2]}", label) for number, (text, label) in rows]
    write_csv(folder / "data" / "train.csv", rows)
    return {name: folder / name for name in ("llama", "qwen2", "data")}


def flags(bases, model, output_dir):
    words = ("--model_name_or_path", bases[model], "--dataset_name", bases["data"])
    words += ("--output_dir", output_dir)
    return (*words, "--max_steps", 2, "--learning_rate", 1e-2)


def assert_slices(tensors):
    """Check that the slices of both processes were saved: each is half of every LoRA matrix."""
    assert len(tensors) == 2 * 2 * 7  # two layers with seven linear layers of two matrices each
    for name, tensor in tensors.items():
        for process in (1, 2):
            assert (tensor == process / 64).sum().item() == tensor.numel() / 2, name


def test_offloaded_slices_are_saved(launch, bases, tmp_path):
    copy = plant(tmp_path, SHARDED["zero3_offload"], (SAVE, FILL + SAVE))
    launch(copy, "zero3_offload", *flags(bases, "llama", tmp_path / "run"), processes=2)
    assert_slices(load_file(tmp_path / "run" / "adapter_model.safetensors"))


@pytest.mark.parametrize("base", ["llama", "qwen2"])
@pytest.mark.parametrize("config", DUMP)
def test_slices_full_layers_and_new_tokens_are_saved_reloaded_and_merged(
    launch, bases, tmp_path, config, base
):
    copy = plant(tmp_path, SHARDED[config], (SAVE, DUMP[config] + WRITE + FILL + SAVE))
    full = ("--modules_to_save", "lm_head", "embed_tokens")
    # FSDP's own activation checkpointing adds another wrapper, whose name is a part of the keys
    checkpointing = ("--fsdp_activation_checkpointing", "true")
    more = checkpointing if (config, base) == ("fsdp1", "llama") else ()
    launch(copy, config, *flags(bases, base, tmp_path / "run"), *full, processes=2, flags=more)
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert_slices({name: tensor for name, tensor in saved.items() if "lora_" in name})
    trained = load_file(f"{copy}.safetensors")
    for wrapper in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        trained = {name.replace(wrapper, ""): tensor for name, tensor in trained.items()}
    assert all(tensor.any() for tensor in trained.values())
    heads = {name: tensor for name, tensor in trained.items() if "modules_to_save" in name}
    assert len(heads) == 2 and len(trained) == 2 + 2 * 2 * 7

    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run")
    reloaded = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in heads.items():
        assert torch.equal(reloaded[name], tensor), name
    original = AutoModelForCausalLM.from_pretrained(bases[base])
    assert original.config.tie_word_embeddings == (base == "qwen2")
    for name in heads:
        before = (original.lm_head if "lm_head" in name else original.model.embed_tokens).weight
        changed = (trained[name][-2:] != before[-2:]).any(dim=1)
        assert changed.all(), "the rows of the new tokens were not trained"

    merge_adapter.main([str(tmp_path / "run"), "--output_dir", str(tmp_path / "merged")])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for name in heads:
        layer = "lm_head" if "lm_head" in name else "model.embed_tokens"
        assert torch.equal(merged[f"{layer}.weight"], trained[name])


GUIDE = (ROOT / "docs/merging.md").read_text()
*MERGES, WRITES = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
COMPARE = """    merged_results = evaluate(accelerator, model, tokenizer, valid_loader, config)
    assert merged_results == (after, samples)
    assert any(layer.merged for layer in model.modules() if hasattr(layer, "merged"))
"""
HEAD = ("--modules_to_save", "lm_head")
BESIDE = [HEAD, ("--target_modules", "q_proj", "lm_head"), HEAD]
CASES = list(zip(DUMP, MERGES, BESIDE, strict=True))


@pytest.mark.parametrize(("config", "block", "beside"), CASES)
def test_documented_block_merges_while_sharded(launch, bases, tmp_path, config, block, beside):
    block += WRITES.replace("outputs/merged", str(tmp_path / "merged"))
    planted = (STEP, GRADIENTS + STEP), (SAVE, f"{block}\n{COMPARE}\n{SAVE}")
    copy = plant(tmp_path, SHARDED[config], *planted)
    launch(copy, config, *flags(bases, "llama", tmp_path / "run"), *beside, processes=2)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run").merge_and_unload()
    original = AutoModelForCausalLM.from_pretrained(bases["llama"])
    ids = torch.arange(24)[None]
    logits, base = expected(ids).logits, original(ids).logits
    assert (logits - base).abs().max() > 1e-2
    assert torch.allclose(merged(ids).logits, logits, atol=1e-4)


# the states of matrices with fewer than 4096 elements would stay in 32 bits
IN_8BIT = ("--optim", "paged_adamw_8bit", "--lora_r", 128)
QLORA = [("causal_lm_qlora", "zero2"), ("causal_lm_qlora_zero3", "zero3_qlora")]


@pytest.mark.parametrize(("script", "config"), QLORA)
def test_8_bit_optimizers_train_where_their_state_can_be_saved(
    launch, bases, tmp_path, script, config
):
    launch(script, config, *flags(bases, "llama", tmp_path / "run"), *IN_8BIT, processes=2)
    metrics = read_metrics(tmp_path / "run")
    assert metrics["engine"]["optimizer"] == "PagedAdamW8bit"
    assert metrics["losses"][1] < metrics["losses"][0]


def weaken(folder, old, new):
    """Replace a check in the copy of utils/ that `plant` made, to reach the checks after it."""
    (file,) = [f for f in (folder / "utils").rglob("*.py") if old in f.read_text()]
    assert file.read_text().count(old) == 1
    file.write_text(file.read_text().replace(old, new))


def test_a_base_that_is_silently_replicated_ends_the_run(launch, bases, tmp_path):
    # accelerate does not shard uint8 tensors under FSDP2
    copy = plant(tmp_path, "causal_lm_qlora_fsdp2")
    weaken(tmp_path, 'if strategy.startswith("fsdp") and storage != config.dtype:', "if False:")
    arguments = ("--bnb_4bit_quant_storage", "uint8", "--output_dir", tmp_path / "run")
    arguments += ("--max_steps", 10**6)
    done = launch(copy, "fsdp2_qlora", *arguments, processes=2, code=None)
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    (line,) = set(re.findall("error: .*", done.stdout))
    assert "bytes of parameters, and fsdp2 should spread them over 2" in line
    assert "bnb_4bit_quant_storage" in line


@pytest.mark.slow
@pytest.mark.parametrize("config", SHARDED)
def test_saving_gathers_only_the_trainable_parameters(launch, bases, tmp_path, config):
    size = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 16}
    size |= {"num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 64}
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "large", "llama", **size))
    assert model.num_parameters() > 150e6
    begin = f"    phase = tracker.phase('save')\n    phase.__enter__()\n{SAVE}"
    end = "    phase.__exit__(None, None, None)\n    print('tracked', tracker.entries['save'])\n"
    end += END
    copy = plant(tmp_path, SHARDED[config], (SAVE, begin), (END, end))
    arguments = flags(bases | {"large": tmp_path / "large"}, "large", tmp_path / "run")
    done = launch(copy, config, *arguments, "--max_length", 48, processes=2, timeout=3600)
    tracked = [line for line in done.stdout.splitlines() if line.startswith("tracked")]
    entries = [ast.literal_eval(line.removeprefix("tracked ")) for line in tracked]
    adapter = (tmp_path / "run" / "adapter_model.safetensors").stat().st_size
    print(config, adapter, entries, file=sys.stderr)
    assert len(entries) == 2
    for entry in entries:
        assert entry["cpu_peak"] - entry["cpu_begin"] <= 2 * adapter + 200e6
