"""What is saved is what was trained: every process's share, layers trained whole, new tokens, and nothing else."""

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

SHARDED = {
    "zero3": "causal_lm_lora_zero3_offload",
    "zero3_offload": "causal_lm_lora_zero3_offload",
    "fsdp1": "causal_lm_lora_fsdp1",
    "fsdp2": "causal_lm_lora_fsdp2",
}
SAVE = f"{'    # 7. Save ':-<100}\n"
END = "    finish_run(accelerator, config, metrics, predictions, labels)\n"
STEP = "                    optimizer.step()\n"
# While gradients are there: those of what is trained, in shares under FSDP, and none of what is frozen.
GRADIENTS = """                    from utils.report import held_part
                    for parameter in model.parameters():
                        gradient = parameter.grad
                        assert gradient is None or parameter.requires_grad
                        if gradient is not None and accelerator.distributed_type == "FSDP":
                            local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
                            assert local.numel() == held_part(parameter).numel()
                    if accelerator.distributed_type == "FSDP":
                        assert any(parameter.grad is not None for parameter in model.parameters())
"""
# Each process overwrites its slice of every LoRA matrix with a number of its own.
FILL = """    from utils.report import held_part, full_shape
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and math.prod(full_shape(parameter)) <= 64 * config.lora_r:
                held_part(parameter).fill_((accelerator.process_index + 1) / 64)
"""
# What was trained, gathered by other functions than those that the scripts call.
DUMP = {
    "zero3": """    from deepspeed.utils import safe_get_full_fp32_param
    dumped = {name: safe_get_full_fp32_param(p) for name, p in model.module.named_parameters() if p.requires_grad}
""",
    "fsdp1": """    with FSDP.summon_full_params(model, writeback=False):
        dumped = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
""",
    "fsdp2": """    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    dumped = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
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
    """Models, untied and tied, that know two new tokens, and rows that use them: name -> path."""
    folder = tmp_path_factory.mktemp("bases")
    for name in ("llama", "qwen2"):
        model = AutoModelForCausalLM.from_pretrained(make_model(folder / name, name))
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        tokenizer.add_tokens(NEW)
        model.resize_token_embeddings(len(tokenizer))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    make_data(folder / "data", train=32, validation=4)
    write_csv(
        folder / "data" / "train.csv",
        [(f"{text} {NEW[i % 2]}", label) for i, (text, label) in rows()],
    )
    return {name: folder / name for name in ("llama", "qwen2", "data")}


def rows():
    return enumerate(make_rows(32, seed=1))


def flags(bases, model, output_dir):
    words = (
        "--model_name_or_path",
        bases[model],
        "--dataset_name",
        bases["data"],
        "--output_dir",
        output_dir,
    )
    return (*words, "--max_steps", 2, "--learning_rate", 1e-2)


def assert_slices(tensors):
    """Every process's slice is there: half of each LoRA matrix is the number of the first, half that of the second."""
    assert len(tensors) == 2 * 2 * 7  # a pair of matrices for each linear layer
    for name, tensor in tensors.items():
        assert [(tensor == process / 64).sum().item() for process in (1, 2)] == [
            tensor.numel() / 2
        ] * 2, name


def test_slices_that_were_offloaded_are_saved(launch, bases, tmp_path):
    copy = plant(tmp_path, SHARDED["zero3_offload"], (SAVE, SAVE + FILL))
    launch(copy, "zero3_offload", *flags(bases, "llama", tmp_path / "run"), processes=2)
    assert_slices(load_file(tmp_path / "run" / "adapter_model.safetensors"))


@pytest.mark.parametrize("base", ["llama", "qwen2"])
@pytest.mark.parametrize("config", DUMP)
def test_slices_whole_layers_and_new_tokens_are_saved_reloaded_and_merged(
    launch, bases, tmp_path, config, base
):
    copy = plant(tmp_path, SHARDED[config], (SAVE, SAVE + DUMP[config] + WRITE + FILL))
    whole = ("--modules_to_save", "lm_head", "embed_tokens")
    # FSDP's own checkpointing puts one more wrapper, and so one more name, around the layers
    more = (
        ("--fsdp_activation_checkpointing", "true") if (config, base) == ("fsdp1", "llama") else ()
    )
    launch(copy, config, *flags(bases, base, tmp_path / "run"), *whole, processes=2, flags=more)
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
        assert (trained[name][-2:] != before[-2:]).any(dim=1).all(), (
            "the rows of the new tokens were not trained"
        )

    merge_adapter.main([str(tmp_path / "run"), "--output_dir", str(tmp_path / "merged")])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for name in heads:
        assert torch.equal(
            merged["lm_head.weight" if "lm_head" in name else "model.embed_tokens.weight"],
            trained[name],
        )


*MERGES, WRITES = re.findall(
    r"```python\n(.*?)```", (ROOT / "docs/merging.md").read_text(), re.DOTALL
)
COMPARE = """    again, merged_predictions, _ = evaluate(accelerator, model, tokenizer, valid_loader)
    assert (again, merged_predictions) == (after, predictions)
    assert any(layer.merged for layer in model.modules() if hasattr(layer, "merged"))
"""


BESIDE = [
    ("--modules_to_save", "lm_head"),
    ("--target_modules", "q_proj", "lm_head"),
    ("--modules_to_save", "lm_head"),
]


@pytest.mark.parametrize(
    ("config", "block", "beside"), list(zip(DUMP, MERGES, BESIDE, strict=True))
)
def test_documented_block_merges_while_sharded(launch, bases, tmp_path, config, block, beside):
    block += WRITES.replace("outputs/merged", str(tmp_path / "merged"))
    copy = plant(
        tmp_path, SHARDED[config], (STEP, GRADIENTS + STEP), (SAVE, f"{block}\n{COMPARE}\n{SAVE}")
    )
    launch(copy, config, *flags(bases, "llama", tmp_path / "run"), *beside, processes=2)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run").merge_and_unload()
    original = AutoModelForCausalLM.from_pretrained(bases["llama"])
    ids = torch.arange(24)[None]
    logits, base = expected(ids).logits, original(ids).logits
    assert (logits - base).abs().max() > 1e-2
    assert torch.allclose(merged(ids).logits, logits, atol=1e-4)


IN_8BIT = (
    "--optim",
    "paged_adamw_8bit",
    "--lora_r",
    128,
)  # matrices of fewer than 4096 elements stay in 32 bits


@pytest.mark.parametrize(
    ("script", "config"), [("causal_lm_qlora", "zero2"), ("causal_lm_qlora_zero3", "zero3_qlora")]
)
def test_optimizers_in_8_bits_train_where_their_state_can_be_saved(
    launch, bases, tmp_path, script, config
):
    launch(script, config, *flags(bases, "llama", tmp_path / "run"), *IN_8BIT, processes=2)
    metrics = read_metrics(tmp_path / "run")
    assert (
        metrics["engine"]["optimizer"] == "PagedAdamW8bit"
        and metrics["losses"][1] < metrics["losses"][0]
    )


def weaken(folder, old, new):
    """Take a refusal out of the copy of utils/checks.py that `plant` made, to see what comes after it."""
    checks = folder / "utils" / "checks.py"
    assert checks.read_text().count(old) == 1
    checks.write_text(checks.read_text().replace(old, new))


def test_a_base_that_is_replicated_in_silence_ends_the_run(launch, bases, tmp_path):
    copy = plant(
        tmp_path, "causal_lm_qlora_fsdp2"
    )  # accelerate leaves what is stored as uint8 out of FSDP2's units
    weaken(tmp_path, 'if strategy.startswith("fsdp") and storage != config.dtype:', "if False:")
    arguments = (
        "--bnb_4bit_quant_storage",
        "uint8",
        "--output_dir",
        tmp_path / "run",
        "--max_steps",
        10**6,
    )
    done = launch(copy, "fsdp2_qlora", *arguments, processes=2, code=None)
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    (line,) = set(re.findall("error: .*", done.stdout))
    assert (
        "bytes of parameters, and fsdp2 should spread them over 2" in line
        and "bnb_4bit_quant_storage" in line
    )


def test_an_optimizer_whose_state_cannot_be_saved_ends_the_run_at_its_first_update(
    launch, bases, tmp_path
):
    copy = plant(tmp_path, "causal_lm_qlora_fsdp1")
    refusal = '    if strategy == "fsdp1":\n        refuse(f"--optim'  # it is known, and refused even before
    weaken(tmp_path, refusal, refusal.replace("fsdp1", "never"))
    arguments = (*flags(bases, "llama", tmp_path / "run"), *IN_8BIT, "--max_steps", 10**6)
    done = launch(copy, "fsdp1_qlora", *arguments, processes=2, code=None)
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    (line,) = set(re.findall("error: .*", done.stdout))
    assert (
        "state of PagedAdamW8bit cannot be saved under fsdp1" in line
        and "give --optim adamw_torch" in line
    )


@pytest.mark.slow
@pytest.mark.parametrize("config", SHARDED)
def test_saving_gathers_what_was_trained_alone(launch, bases, tmp_path, config):
    size = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 16,
        "num_attention_heads": 12,
    }
    size |= {"num_key_value_heads": 12, "head_dim": 64}
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "large", "llama", **size))
    assert model.num_parameters() > 150e6
    begin = f"    phase = tracker.phase('save')\n    phase.__enter__()\n{SAVE}"
    end = (
        "    phase.__exit__(None, None, None)\n    print('tracked', tracker.entries['save'])\n"
        + END
    )
    copy = plant(tmp_path, SHARDED[config], (SAVE, begin), (END, end))
    arguments = flags(bases | {"large": tmp_path / "large"}, "large", tmp_path / "run")
    done = launch(copy, config, *arguments, "--max_length", 48, processes=2, timeout=3600)
    entries = [
        ast.literal_eval(line.removeprefix("tracked "))
        for line in done.stdout.splitlines()
        if line.startswith("tracked")
    ]
    adapter = (tmp_path / "run" / "adapter_model.safetensors").stat().st_size
    print(config, adapter, entries, file=sys.stderr)
    assert len(entries) == 2
    for entry in entries:
        assert entry["cpu_peak"] - entry["cpu_begin"] <= 2 * adapter + 200e6
