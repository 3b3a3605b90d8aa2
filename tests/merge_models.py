"""Small models and adapters for the tests of tools/merge_adapter, and checks of its results."""

from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from tools import merge_adapter

ALL = {"target_modules": "all-linear"}
# an adapter of T5 at this scale makes rounding visible: attention without a scale enlarges it
SENSITIVE = {"target_modules": ["q", "k", "v", "o", "wi", "wo"], "lora_alpha": 200}
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
    """Save a random model and return its folder.

    Norms and biases are random, too: their usual 1 and 0 would hide mistakes.
    """
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
    """Save an adapter for the base, every weight of it changed, and return its folder."""
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


def full_model(base, adapter, rows=None, merge=False):
    """The model with the adapter, in 32 bits, made by PEFT in memory."""
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
    expected = logits(full_model(base, adapter, rows), rows or 96)
    assert (logits(model, rows or 96) - expected).abs().max() <= tolerance * expected.abs().max()
    return model


def tensors(folder):
    """All tensors of a folder's weight files."""
    return {
        key: value
        for path in folder.glob("*.safetensors")
        for key, value in load_file(path).items()
    }


def error_of(capsys, *arguments):
    """Run the command, which must stop with an error, and return the error's line."""
    capsys.readouterr()  # what the test printed before
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    *bar, error = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1
    assert error.startswith("error: ") and all(line == "" or "writing:" in line for line in bar), (
        bar,
        error,
    )
    return error


def make_llama(folder):
    """Save a base in 32 bits and an adapter of all its linear layers; return both folders."""
    base = save_base(folder / "base", "llama")
    return base, save_adapter(folder / "adapter", base, **ALL)
