"""Checkpoints and flags that were lost, misread or ended in a traceback: models, LoRA, resuming."""

import json
import os
import re
import shutil
from types import SimpleNamespace

import accelerate
import pytest
import torch
import transformers
from accelerate import Accelerator
from conftest import ROOT, read_metrics
from merge_models import run as merge
from models import make_data, make_model
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from processes import plant
from safetensors.torch import load_file, save_file
from single import run_single
from test_models import load
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.integrations import hub_kernels

from utils import (
    deepspeed_checks,
    documents,
    errors,
    launch_checks,
    model_files,
)
from utils.chat import resuming
from utils.chat import settings as chat_settings
from utils import vocabulary
from utils.conversations import DataError
from utils.lora import adapter_rows, expert_targets, lora_targets, text_layers
from utils.chat.token_loss import add_token_loss, attention_that_works, check_token_loss
from utils.launch import find_tied_weights
from utils.launch_checks import check_optimizer
from utils.vocabulary import valid_generation

pytestmark = pytest.mark.cases

SIZE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
MOE |= {"moe_intermediate_size": 16}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "image_size": 28}
VISION |= {"num_attention_heads": 2, "patch_size": 14}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
FALCON = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FALCON |= {"bos_token_id": 1, "eos_token_id": 2}
BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48}
BART |= {"decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
BART |= {"vocab_size": 96, "max_position_embeddings": 64, "decoder_start_token_id": 2}


def make_config(name, **more):
    """Return the config of a small model: of a text model, or of one with a vision tower."""
    if name == "gemma3":
        tokens = {"image_token_index": 95, "boi_token_index": 94, "eoi_token_index": 93}
        text = SIZE | {"sliding_window": 64} | more
        return transformers.Gemma3Config(
            text_config=text, vision_config=VISION, mm_tokens_per_image=4, **tokens
        )
    own = {
        "falcon": FALCON | {"alibi": False},
        "falcon_h1": SIZE | MAMBA | {"mamba_d_ssm": 64},
        "bamba": SIZE | MAMBA | {"attn_layer_indices": [1]},
        "mamba2": SIZE | {"head_dim": 16, "num_heads": 4, "state_size": 16, "n_groups": 1},
        "mamba": SIZE | {"state_size": 8},
        "gpt_oss": SIZE | MOE | {"layer_types": ["full_attention"] * 2},
        "llama4_text": SIZE
        | MOE
        | {"intermediate_size_mlp": 48, "interleave_moe_layer_step": 1, "no_rope_layers": [1, 0]},
        "phimoe": SIZE | MOE,
        "mixtral": SIZE | MOE,
        "qwen3_moe": SIZE | MOE,
        "bloom": {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        "gptj": {"vocab_size": 96, "n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 8},
        "gpt_neo": {
            "vocab_size": 96,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
        },
        "mpt": {"vocab_size": 96, "d_model": 32, "n_layers": 1, "n_heads": 4},
    }
    return AutoConfig.for_model(name, **(own.get(name, SIZE) | more))


def build(name, **more):
    """Return a small random model."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(make_config(name, **more))


def on_meta(name, **more):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(make_config(name, **more))


def error_of(capsys, function, *args, **kwargs):
    """Call a function that must stop with an error, and return its line."""
    with pytest.raises(SystemExit) as ended:
        function(*args, **kwargs)
    assert ended.value.code == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


# Where LoRA goes ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "outside", "bypassed"),
    [
        ("gemma3", {"vision_tower"}, set()),
        ("falcon_h1", set(), {"out_proj"}),
        ("bamba", set(), {"out_proj"}),
        ("mamba2", set(), {"out_proj"}),
        ("mamba", set(), {"out_proj", "x_proj", "dt_proj"}),
        ("phimoe", set(), {"router"}),
        ("llama", set(), set()),
        ("falcon", set(), set()),
        ("gpt_oss", set(), set()),
    ],
)
def test_all_linear_means_the_layers_that_text_runs_through(name, outside, bypassed):
    model = on_meta(name)
    kept, towers, skipped = text_layers(model)
    assert {one.split(".")[1] for one in towers} == outside
    assert {one.rpartition(".")[2] for one in skipped} == bypassed
    lora = LoraConfig(target_modules=lora_targets(model, ["all-linear"]))
    wrapped = {
        path.removeprefix("base_model.model.")
        for path, module in get_peft_model(model, lora).named_modules()
        if isinstance(module, LoraLayer)
    }
    assert wrapped == set(kept) and kept


@pytest.mark.parametrize(
    ("wanted", "count"),
    [
        (["q_proj", "v_proj"], 4),
        ([r".*layers\.1\..*(q|v)_proj"], 2),
        (["layers.0.self_attn.q_proj"], 1),
        (["q_proj", r".*\.0\.mlp\..*_proj"], 5),
        (["model.layers.1.mlp.up_proj"], 1),
    ],
    ids=str,
)
def test_names_and_regular_expressions_reach_layers(wanted, count):
    model = on_meta("llama")
    lora = LoraConfig(target_modules=lora_targets(model, wanted))
    adapted = get_peft_model(model, lora)
    assert sum(isinstance(module, LoraLayer) for module in adapted.modules()) == count


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        (" all-linear ", ["all-linear"]),
        (r"layers\.\d{1,2}\.mlp", [r"layers\.\d{1,2}\.mlp"]),
        ("(q|k)_proj", ["(q|k)_proj"]),
        ("", []),
    ],
    ids=str,
)
def test_names_of_a_flag(text, names):
    assert chat_settings.split_names(text) == names


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("query", ("query names no linear layer", "q_proj")),
        (r".*\.self_attn", ("self_attn names no linear layer",)),
        (r".*layers\.0.*", ("also names model.layers.0", "LlamaDecoderLayer")),
        (r"(q_proj", ("--target_modules (q_proj", "missing )")),
    ],
    ids=str,
)
def test_a_target_that_is_no_linear_layer(capsys, target, parts):
    line = error_of(capsys, model_files.check_target_modules, [target], on_meta("llama"))
    assert all(part in line for part in parts)


def test_a_subclass_of_a_linear_layer_is_a_target():
    model_files.check_target_modules(["query_key_value"], on_meta("falcon"))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen3_moe", "llama4_text"])
def test_lora_on_all_fused_experts(name, capsys):
    model = build(name)
    targets = expert_targets(model, ["experts"])
    assert targets == ["experts.down_proj", "experts.gate_up_proj"]
    lora = LoraConfig(target_modules=["q_proj"], target_parameters=targets)
    model = get_peft_model(model, lora)
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert sum("experts" in name for name in names) == 2 * 2 * 2  # layers, weights, A and B


@pytest.mark.parametrize(
    ("name", "wanted", "parts"),
    [
        ("llama", ["experts"], ("LlamaForCausalLM has no experts",)),
        ("mixtral", ["experts.w1"], ("experts.w1 names no fused weight", "experts.down_proj")),
    ],
    ids=str,
)
def test_experts_that_are_not_there(capsys, name, wanted, parts):
    line = error_of(capsys, model_files.check_target_parameters, wanted, on_meta(name))
    assert all(part in line for part in parts)


def lora_flags(**more):
    flags = {"target_modules": ["all-linear"], "lora_dropout": 0.0, "lora_target_parameters": []}
    return SimpleNamespace(**flags | more)


@pytest.mark.parametrize("strategy", ["fsdp1", "zero3"])
def test_experts_that_a_strategy_cannot_gather(capsys, monkeypatch, strategy):
    monkeypatch.setattr(model_files, "launched_strategy", lambda: strategy)
    flags = lora_flags(lora_target_parameters=["experts"])
    if strategy == "zero3":  # of a lesson, for a model whose experts PEFT adapts by itself
        del flags.lora_target_parameters
    line = error_of(capsys, model_files.check_lora, flags, on_meta("mixtral"))
    assert f"fused experts under {strategy}" in line and "fsdp2" in line


def test_dropout_that_peft_cannot_apply_is_told_before_loading(capsys):
    line = error_of(
        capsys, model_files.check_lora, lora_flags(lora_dropout=0.1), on_meta("mixtral")
    )
    assert "give --lora_dropout 0" in line


def test_layers_left_out_are_told(capsys):
    model_files.check_lora(lora_flags(), on_meta("gemma3"))
    said = capsys.readouterr().out
    assert "LoRA goes on 14 linear layers, but not on the 9 of model.vision_tower" in said


# The vocabulary -----------------------------------------------------------------------------------
class Words:
    """A tokenizer whose tokens are numbers."""

    eos_token_id, eos_token, pad_token_id, pad_token = 2, "</s>", 0, "<pad>"

    def __call__(self, text, **options):
        ids = [int(word) for word in text.split()]
        return {"input_ids": ids, "offset_mapping": [(0, 1)] * len(ids)}

    def __len__(self):
        return 97

    def convert_ids_to_tokens(self, token):
        return f"token {token}"


def test_unused_tokens_need_no_row(capsys):
    vocabulary.check_tokens_used("the model", on_meta("llama"), Words())
    said = capsys.readouterr()
    assert said.err == "" and "1 further tokens, such as 'token 96'" in said.out


@pytest.mark.parametrize("name", ["eos_token", "pad_token"])
def test_a_token_that_generation_needs_has_a_row(capsys, name):
    tokenizer = Words()
    setattr(tokenizer, f"{name}_id", 96)
    line = error_of(capsys, vocabulary.check_tokens_used, "it", on_meta("llama"), tokenizer)
    assert name in line and "96 rows" in line


@pytest.mark.parametrize(("text", "fails"), [("5 95", False), ("5 96 7", True), ("400", True)])
def test_tokens_of_documents_without_a_row_are_named_by_row(text, fails):
    config = SimpleNamespace(
        train_on="all", add_special_tokens=None, append_concat_token=None, max_length=16
    )
    options = {"tokenizer": Words(), "shape": ("text",), "split": "train", "num_rows": 96}
    encode = lambda: documents.encode({"text": text}, 4, config, **options)  # noqa: E731
    if not fails:
        assert encode()[0]["input_ids"][:2] == [5, 95]
        return
    with pytest.raises(DataError, match=r"row 5 of train has the token 'token \d+'"):
        encode()


# Generation settings of the checkpoint ------------------------------------------------------------
INVALID = [  # settings, those that are dropped
    ({"do_sample": False, "temperature": 0.9, "top_p": 0.6}, ["temperature", "top_p"]),
    ({"early_stopping": True}, ["early_stopping"]),
    ({"num_beams": 1, "length_penalty": 2.0}, ["length_penalty"]),
    ({"num_return_sequences": 3}, ["num_return_sequences"]),
    ({"top_k": 20, "min_p": 0.1, "repetition_penalty": 1.2}, ["top_k", "min_p"]),
]


@pytest.mark.parametrize(("settings", "dropped"), INVALID, ids=str)
def test_invalid_generation_settings_are_corrected_and_told(settings, dropped, capsys, tmp_path):
    known = GenerationConfig(eos_token_id=[2, 5])
    for name, value in settings.items():
        setattr(known, name, value)
    kept = valid_generation(known)
    assert kept.eos_token_id == [2, 5]
    kept.eos_token_id = [2]
    kept.save_pretrained(tmp_path)
    said = capsys.readouterr().out
    assert all(name in said for name in dropped)
    for name in settings.keys() - dropped:
        assert getattr(kept, name) == settings[name]


def test_valid_generation_settings_stay(capsys):
    settings = GenerationConfig(do_sample=True, temperature=0.7, num_beams=1, eos_token_id=2)
    assert valid_generation(settings).to_dict() == settings.to_dict()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "leak",
    [
        {"do_sample": True, "temperature": 9.0},
        {"num_beams": 3},
        {"min_new_tokens": 9},
        {"repetition_penalty": 9.0},
        {"suppress_tokens": list(range(3, 60))},
    ],
    ids=str,
)
def test_answers_do_not_depend_on_generation_settings(leak, capsys):
    answers = []
    for settings in ({}, leak):
        model = build("llama")
        model.generation_config = GenerationConfig(eos_token_id=[2], **settings)
        tokenizer = SimpleNamespace(decode=lambda ids, **options: str(ids))
        config = SimpleNamespace(layerwise_generation=False, max_new_tokens=8)
        accelerator = SimpleNamespace(
            unwrap_model=lambda model: model,
            device=torch.device("cpu"),
            print=lambda text: answers.append(text),
            autocast=torch.no_grad,
        )
        load("chat_sft").show_answers(config, accelerator, model, tokenizer, [[5, 6, 7]])
    assert answers[0] == answers[1]


# Attention and packing ----------------------------------------------------------------------------
def loss_reason(model, attention="documents"):
    """Return what check_token_loss says of a model on two documents in a row."""
    model.set_attn_implementation(attention)
    add_token_loss(model)
    rows = [{"input_ids": list(range(5, 15))}, {"input_ids": list(range(30, 42))}]
    return check_token_loss(Accelerator(cpu=True), model, *documents.probe(rows))


@pytest.mark.parametrize("name", ["gpt_oss", "llama4_text", "llama", "mixtral"])
def test_packed_documents_stay_apart(name):
    assert loss_reason(build(name)) is None


@pytest.mark.parametrize("name", ["falcon", "bloom"])
def test_documents_that_are_mixed_are_found(name):
    assert "mixes documents" in loss_reason(build(name), "eager")


@pytest.mark.parametrize(
    ("train", "held_out", "strategy", "is_joined"),
    [(1, 8, "epoch", True), (1, 8, "no", False), (1, 1, "epoch", False), (2, 1, "no", True)],
)
def test_the_check_has_as_many_documents_as_evaluation(
    monkeypatch, train, held_out, strategy, is_joined
):
    module, seen = load("chat_sft"), []
    monkeypatch.setattr(
        module.chat.token_loss,
        "check_token_loss",
        lambda accelerator, model, packed, alone: seen.append(alone),
    )
    config = SimpleNamespace(
        packing=False,
        torch_compile=False,
        per_device_train_batch_size=train,
        per_device_eval_batch_size=held_out,
        eval_strategy=strategy,
    )
    module.check_loss(config, None, None, [{"input_ids": [5, 6]}, {"input_ids": [7, 8]}])
    assert len(seen[0]) == 1 + is_joined


@pytest.mark.parametrize("name", ["falcon", "bloom", "gpt_neo", "gptj", "mpt"])
def test_an_attention_that_a_model_does_not_have(capsys, name):
    config = SimpleNamespace(attn_implementation="documents")
    arguments = (config, AutoModelForCausalLM, make_config(name), "--model_name_or_path x")
    line = error_of(capsys, model_files.build_skeleton, *arguments)
    assert "which has no attention documents: give --attn_implementation" in line
    assert "mixes the documents" in line and "--per_device_train_batch_size 1" in line


@pytest.mark.parametrize(
    ("name", "attention", "remedy"),
    [
        ("gptj", "sdpa", "eager"),
        ("gpt_oss", "sdpa", "eager"),
        ("bloom", "sdpa", "eager"),
        ("llama", "no_such_kernel", "sdpa"),
        ("gpt_oss", "no_such_kernel", "eager"),
    ],
)
def test_an_attention_is_named_with_one_that_the_model_has(capsys, name, attention, remedy):
    """transformers' own sentence has six lines, and asks to open an issue."""
    config = SimpleNamespace(attn_implementation=attention)
    arguments = (config, AutoModelForCausalLM, make_config(name), "--model_name_or_path x")
    line = error_of(capsys, model_files.build_skeleton, *arguments)
    assert line.endswith(f"which has no attention {attention}: give --attn_implementation {remedy}")
    config.attn_implementation = remedy
    assert model_files.build_skeleton(*arguments) is not None


@pytest.mark.parametrize("is_installed", [False, True])
def test_a_kernel_of_the_hub_that_cannot_be_used_says_why(monkeypatch, capsys, is_installed):
    """Not installed, transformers asks for the package; installed, the package for trust."""
    untrusted = ValueError("Kernel 'someone/attention' is not from a trusted publisher\nmore")

    def load(*_, trust_remote_code, **__):
        assert not trust_remote_code
        raise untrusted

    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: is_installed)
    monkeypatch.setattr(hub_kernels, "get_kernel_hub", load, raising=False)
    config = SimpleNamespace(attn_implementation="someone/attention")
    arguments = (config, AutoModelForCausalLM, make_config("llama"), "--model_name_or_path x")
    line = error_of(capsys, model_files.build_skeleton, *arguments)
    told = "not from a trusted publisher" if is_installed else "pip install"
    assert line.startswith("error: --model_name_or_path x cannot use someone/attention (")
    assert told in line and line.endswith("): give --attn_implementation sdpa")


def test_a_config_that_no_attention_can_be_made_of_keeps_its_reason(capsys):
    config = SimpleNamespace(attn_implementation="sdpa")
    broken = make_config("llama")
    broken.hidden_act = "no_such_activation"
    line = error_of(capsys, model_files.build_skeleton, config, AutoModelForCausalLM, broken, "it")
    assert "no_such_activation" in line and "attn_implementation" not in line


@pytest.mark.parametrize(
    ("name", "attention", "works"),
    [("stablelm", "documents", "sdpa"), ("falcon_h1", "documents", None)],
)
def test_the_attention_that_is_named_was_tried(name, attention, works):
    model = build(name)
    model.set_attn_implementation(attention)
    add_token_loss(model)
    rows = [{"input_ids": list(range(5, 15))}, {"input_ids": list(range(30, 42))}]
    arguments = (Accelerator(cpu=True), model, *documents.probe(rows))
    assert "mixes documents" in check_token_loss(*arguments)
    assert attention_that_works(*arguments) == works
    one = (Accelerator(cpu=True), model, *documents.probe(rows[:1]))
    assert check_token_loss(*one) is None  # what is named where no attention works
    assert chat_settings.loss_remedy(None, is_joined=True).startswith("give --per_device_train_")


def test_a_model_that_cannot_take_several_documents_says_so_in_a_sentence():
    """Qwen3-Next raises on a row of several documents without flash-linear-attention."""
    size = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
    size |= {"linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"]}
    model = build("qwen3_next", **MOE, **size, shared_expert_intermediate_size=16)
    model.set_attn_implementation("documents")
    add_token_loss(model)
    rows = [{"input_ids": list(range(5, 15))}, {"input_ids": list(range(30, 42))}]
    accelerator = Accelerator(cpu=True)
    reason = check_token_loss(accelerator, model, *documents.probe(rows))
    assert "flash-linear-attention" in reason and not reason.endswith(".")
    assert model.config._attn_implementation == "documents"
    assert attention_that_works(accelerator, model, *documents.probe(rows)) is None
    assert check_token_loss(accelerator, model, *documents.probe(rows[:1])) is None


def test_chunks_of_attention_that_documents_does_not_have(capsys, tmp_path):
    make_config("llama4_text", attention_chunk_size=32).save_pretrained(tmp_path)
    names = {"model_name_or_path": str(tmp_path), "attn_implementation": "documents"}
    chat_settings.check_row_length(SimpleNamespace(max_length=32, **names))
    config = SimpleNamespace(max_length=33, **names)
    line = error_of(capsys, chat_settings.check_row_length, config)
    assert "--max_length 33 exceeds 32 tokens" in line and "sdpa" in line


@pytest.mark.parametrize("level", ["warning", "debug"])
def test_whatever_a_library_raises_is_one_sentence(capsys, monkeypatch, level):
    levels = transformers.logging.log_levels
    monkeypatch.setattr(transformers.logging, "get_verbosity", lambda: levels[level])

    def body():
        with errors.explaining("the model with sdpa", "give eager"):
            raise KeyError("no such kernel\nand a second line")

    with pytest.raises(SystemExit):
        body()
    output = capsys.readouterr().err
    line = output.splitlines()[-1]
    assert line.startswith("error: the model with sdpa: ") and "no such kernel" in line
    assert "give eager" in line and ("Traceback" in output) == (level == "debug")


# Encoders and decoders ----------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["m2m_100", "blenderbot-small", "blenderbot", "bart", "t5gemma"])
def test_the_decoder_starts_as_in_training(tmp_path, name, monkeypatch):
    module = load("seq2seq_lora")
    settings = BART
    if name == "t5gemma":
        settings = {"encoder": SIZE, "decoder": SIZE, "vocab_size": 96}
    model = transformers.AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(name, **settings))
    auto = SimpleNamespace(from_pretrained=lambda *args, **kwargs: model)
    monkeypatch.setattr(module.transformers, "AutoModelForSeq2SeqLM", auto)
    monkeypatch.setattr(module.launch, "device_map", lambda: None)

    class Target(SimpleNamespace):
        def __call__(self, text_target):
            return SimpleNamespace(input_ids=[5, 6, 2])

    config = module.Config(target_modules=["q_proj"])
    adapted = module.build_model(config, Target(eos_token_id=2, pad_token_id=0))
    start = adapted.generation_config.decoder_start_token_id
    assert start == (1 if name == "t5gemma" else 2)
    labels = torch.tensor([[5, 6, 2, -100]])
    assert adapted(input_ids=torch.tensor([[5, 6, 7]]), labels=labels).loss.isfinite()


@pytest.mark.parametrize("ids", [[5, 6], [5, 6, 2], [7, 5, 6, 2], [5, 6, 2, 7]], ids=str)
@pytest.mark.parametrize("script", ["seq2seq_lora", "seq2seq_lora_fsdp1"])
def test_mbart_starts_with_the_last_token_that_it_learned(monkeypatch, script, ids):
    """Its decoder starts with the last token of the label, which may be eos or the language."""
    module = load(script)
    config = AutoConfig.for_model("mbart", **BART)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config)
    auto = SimpleNamespace(from_pretrained=lambda *args, **kwargs: model)
    monkeypatch.setattr(module.transformers, "AutoModelForSeq2SeqLM", auto)
    monkeypatch.setattr(module.launch, "load_sharded", lambda *args, **kwargs: model)
    monkeypatch.setattr(module.launch, "device_map", lambda: None)

    class Target(SimpleNamespace):
        def __call__(self, text_target):
            return SimpleNamespace(input_ids=list(ids))

    tokenizer = Target(eos_token_id=2, pad_token_id=0)
    adapted = module.build_model(module.Config(target_modules=["q_proj"]), tokenizer)
    learned = ids if 2 in ids else [*ids, 2]  # as build_dataloaders makes it
    assert adapted.generation_config.decoder_start_token_id == learned[-1]


# Which checkpoints are usable ---------------------------------------------------------------------
def test_code_of_a_checkpoint_is_the_true_reason(capsys, tmp_path):
    settings = {"model_type": "own_kind", "auto_map": {"AutoConfig": "own.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    line = error_of(capsys, model_files.check_code, str(tmp_path), "it")
    assert "own_kind" in line and "auto_map" in line and "not run" in line


def test_code_beside_a_known_model_is_no_obstacle(tmp_path):
    settings = {"model_type": "llama", "auto_map": {"AutoConfig": "own.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    model_files.check_code(str(tmp_path), "it")


def test_weights_under_older_names_belong_to_the_model(capsys, tmp_path):
    model = build("gemma3")
    model.save_pretrained(tmp_path)  # with the names of before transformers 5
    assert not set(model_keys(tmp_path)) & {name for name, _ in model.named_parameters()}
    model_files.check_weight_names(tmp_path, "it", on_meta("gemma3"))


def model_keys(folder):
    with model_files.safe_open(folder / "model.safetensors", framework="pt") as file:
        return list(file.keys())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base, an adapter of it, and models that stand in for published ones."""
    place = tmp_path_factory.mktemp("place")
    base = make_model(place / "llama", "llama")
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(place / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(base)
    size = {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    for name, kind in {"vision": "gemma3", "experts": "gpt_oss"}.items():
        build(kind, **size).save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    return place


def test_the_folder_of_an_adapter_in_a_lesson(capsys, place):
    folder = str(place / "adapter")
    line = error_of(capsys, model_files.check_place, folder, f"--model_name_or_path {folder}")
    assert f"holds an adapter of {place / 'llama'}: give that model" in line


def chat_config(**settings):
    return load("chat_sft").Config(**settings)


def test_the_folder_of_an_adapter_in_chat_sft(capsys, place):
    config = chat_config(model_name_or_path=str(place / "adapter"))
    chat_settings.take_adapter(config)
    assert config.model_name_or_path == str(place / "llama") and config.use_peft_lora
    assert config.adapter_name_or_path == str(place / "adapter")
    assert "continues, on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"base_model_name_or_path": None}, "does not name its base"),
        ({"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM"}, "of type PROMPT_TUNING"),
        ({"peft_type": "NOTHING"}, "cannot be read"),
    ],
    ids=str,
)
def test_adapters_that_cannot_be_trained_on(capsys, place, tmp_path, change, part):
    shutil.copytree(place / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_config.json"
    settings = json.loads(file.read_text()) | change
    if change.get("peft_type") == "PROMPT_TUNING":
        settings = {**change, "base_model_name_or_path": str(place / "llama")}
    file.write_text(json.dumps(settings))
    config = chat_config(model_name_or_path=str(tmp_path / "adapter"))
    assert part in error_of(capsys, chat_settings.take_adapter, config)


def test_rows_of_an_adapter_with_new_tokens(place, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(place / "llama")
    rows = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(rows + 2, mean_resizing=False)
    lora = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    get_peft_model(model, lora).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(place / "llama")
    assert adapter_rows(str(tmp_path), base) == rows + 2
    assert adapter_rows(str(place / "adapter"), base) == adapter_rows("", base) == 0


def test_dropout_and_experts_contradict_each_other(capsys):
    config = chat_config(lora_target_parameters="experts", lora_dropout=0.1)
    line = error_of(capsys, chat_settings.check_combinations, config)
    assert "--lora_dropout 0.1" in line and "give 0" in line


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_optimizers_of_bitsandbytes_under_fsdp1(optim):
    check_optimizer(optim, "fsdp1")


# What a checkpoint has in common with the run that resumes it -------------------------------------
def identity(place, facts="2 documents, checksum 00", **settings):
    config = chat_config(**{"model_name_or_path": str(place / "llama"), **settings})
    data = SimpleNamespace(facts=facts, template_date=None)
    return resuming.identify(config, SimpleNamespace(num_processes=1), data)


def differing(then, now):
    then, now = resuming.by_content(json.loads(json.dumps(then)), now)
    return {name for name in {**then, **now} if then.get(name) != now.get(name)}


def test_a_moved_model_and_data_set_resume(place, tmp_path, monkeypatch):
    then = identity(place, dataset_name="assets/chat")
    shutil.copytree(place / "llama", tmp_path / "elsewhere")
    moved = str(tmp_path / "elsewhere")
    now = identity(place, model_name_or_path=moved, dataset_name=str(ROOT / "assets/chat"))
    assert differing(then, now) == set()


@pytest.mark.parametrize("changed", ["model.safetensors", "config.json"])
def test_another_model_in_the_same_place_does_not(place, tmp_path, changed):
    shutil.copytree(place / "llama", tmp_path / "model")
    then = identity(place, model_name_or_path=str(tmp_path / "model"))
    file = tmp_path / "model" / changed
    file.write_bytes(file.read_bytes()[:-2] + b" }")
    now = identity(place, model_name_or_path=str(tmp_path / "model"))
    assert differing(then, now) == {"model_name_or_path"}


def test_a_stream_is_known_by_its_files(tmp_path, place):
    (tmp_path / "one").mkdir()
    (tmp_path / "one/train.jsonl").write_text('{"text": "a"}\n')
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    streams = [identity(place, "", dataset_name=str(tmp_path / name)) for name in ("one", "two")]
    assert differing(*streams) == set()
    (tmp_path / "two/train.jsonl").write_text('{"text": "b"}\n')
    now = identity(place, "", dataset_name=str(tmp_path / "two"))
    assert differing(streams[0], now) == {"dataset_name"}


def test_a_template_is_known_by_its_text(tmp_path, place, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.jinja").write_text("{{ messages }}")
    then = identity(place, chat_template_format="own.jinja")
    assert differing(then, identity(place, chat_template_format="./own.jinja")) == set()
    (tmp_path / "own.jinja").write_text("{{ messages[0] }}")
    now = identity(place, chat_template_format="own.jinja")
    assert differing(then, now) == {"chat_template_format"}


NEW = (*resuming.PLACES.values(), "adapter_name_or_path", "lora_target_parameters")


@pytest.mark.parametrize("name", ["./llama", "llama", "{place}/llama"])
def test_checkpoints_of_before_resume(place, monkeypatch, name):
    monkeypatch.chdir(place)
    then = identity(place, model_name_or_path="llama")
    then = {key: value for key, value in then.items() if key not in NEW}
    now = identity(place, model_name_or_path=name.replace("{place}", str(place)))
    assert differing(then, now) == set()


@pytest.mark.parametrize(
    "change", [{"learning_rate": 0.5}, {"lora_r": 3}, {"packing": True}, {"lora_alpha": 9}], ids=str
)
def test_other_settings_still_decide(place, change):
    assert differing(identity(place), identity(place, **change)) == set(change)


def test_other_documents_still_decide(place):
    assert differing(identity(place), identity(place, "2 documents, checksum 01")) == {"data"}


# Whole runs ---------------------------------------------------------------------------------------
FLAGS = ("--use_peft_lora", "--max_steps", 1, "--num_samples", 1, "--max_new_tokens", 4)
FLAGS += ("--packing", "--max_length", 64, "--save_strategy", "no")


@pytest.fixture(scope="module")
def train(forks, place):
    """Return a function that runs chat_sft once with a model of `place`, and returns its output."""
    outputs = {}

    def train(name):
        if name == "trained on":
            train("vision")
        if name not in outputs:
            model = place / "run/vision" if name == "trained on" else place / name
            words = ("chat_sft", "--model_name_or_path", model, *FLAGS)
            words += ("--lora_target_parameters", "experts") if name == "experts" else ()
            [(code, output)] = run_single(
                forks, place, (*words, "--output_dir", place / "run" / name)
            )
            assert code == 0, output
            outputs[name] = output
        return outputs[name]

    return train


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("experts", "trained on")]


@pytest.mark.parametrize("name", ["vision", *SLOW])
def test_runs_reload_and_merge(train, place, tmp_path, name):
    output = train(name)
    folder = place / "run" / name
    ids = torch.tensor([[5, 6, 7, 8]])
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    merge(folder, "--output_dir", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        expected, found = model.eval()(input_ids=ids).logits, merged.eval()(input_ids=ids).logits
    assert (expected - found).abs().max() <= 1e-5 * expected.abs().max()
    assert isinstance(model, PeftModel)
    if name == "experts":
        assert "LoRA goes on 4 fused weights of routed experts" in output
    if name == "trained on":
        assert f"The training of the adapter {place}/run/vision continues" in output


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero3", "fsdp2", "zero2"])
def test_experts_train_alike_under_every_strategy(launch, place, tmp_path, strategy):
    flags = ("--model_name_or_path", place / "experts", *FLAGS, "--max_steps", 3)
    flags += ("--lora_target_parameters", "experts", "--output_dir")
    losses = []
    for config in ("ddp", strategy):
        launch("chat_sft", config, *flags, tmp_path / config, processes=2)
        losses.append(read_metrics(tmp_path / config)["losses"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


WRAP = "FSDP_TRANSFORMER_CLS_TO_WRAP"


@pytest.mark.parametrize("kind", ["pegasus", "marian", "blenderbot", "prophetnet", "led", "xglm"])
def test_fsdp_takes_the_layers_of_a_model_that_names_none(monkeypatch, capsys, kind):
    monkeypatch.delenv(WRAP, raising=False)
    auto = transformers.AutoModelForSeq2SeqLM
    auto = AutoModelForCausalLM if kind == "xglm" else auto
    with torch.device("meta"):
        model = auto.from_config(AutoConfig.for_model(kind))
    model._no_split_modules = None  # as in the released transformers of most of these
    launch_checks.check_wrap_classes("it", model)
    found = os.environ.pop(WRAP).split(",")
    assert len(found) == (1 if kind == "xglm" else 2) and all("Layer" in name for name in found)
    assert "it names no layers for FSDP" in capsys.readouterr().out


class OwnBlock(torch.nn.Module):
    """A layer of a class that transformers does not know."""


@pytest.mark.parametrize(
    ("part", "remedy"),
    [(OwnBlock, "name one of OwnBlock"), (torch.nn.ReLU, "train under zero3 or ddp")],
)
def test_a_model_that_tells_nothing_of_its_layers_is_an_error(monkeypatch, capsys, part, remedy):
    monkeypatch.delenv(WRAP, raising=False)
    model = torch.nn.Sequential(part())
    model._no_split_modules = None
    line = error_of(capsys, launch_checks.check_wrap_classes, "it", model)
    assert "fsdp_transformer_layer_cls_to_wrap" in line and remedy in line


def test_a_layer_class_that_the_model_lacks_is_named_beside_those_that_it_has(monkeypatch, capsys):
    monkeypatch.setenv(WRAP, "LlamaDecoderLayer")
    line = error_of(capsys, launch_checks.check_wrap_classes, "it", on_meta("falcon"))
    assert "no LlamaDecoderLayer" in line and line.endswith("name one of FalconDecoderLayer")


def test_a_model_that_cannot_be_trained_is_an_error(capsys):
    config = SimpleNamespace(model_type="fsmt", is_encoder_decoder=True)
    line = error_of(capsys, model_files.check_kind, "AutoModelForSeq2SeqLM", config, "the model")
    assert "take another one" in line


def test_tied_weights_are_found_inside_of_an_adapter(monkeypatch):
    """accelerate looks for model.decoder.embed_tokens in the wrapper, which has no such part."""
    settings = BART | {"decoder_start_token_id": 0, "pad_token_id": 0}
    config = AutoConfig.for_model("marian", **settings)
    base = transformers.AutoModelForSeq2SeqLM.from_config(config)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    retied = accelerate.accelerator.ensure_weights_retied
    monkeypatch.setattr(accelerate.accelerator, "ensure_weights_retied", retied)
    with pytest.raises(AttributeError, match="decoder"):
        retied(None, model, torch.device("cpu"))
    find_tied_weights()
    accelerate.accelerator.ensure_weights_retied(None, model, torch.device("cpu"))
    accelerate.accelerator.ensure_weights_retied(None, base, torch.device("cpu"))


@pytest.mark.slow
def test_positions_that_a_checkpoint_does_not_hold_are_the_same_when_sharded(launch, tmp_path):
    """Published Pegasus models lack them: transformers computes them from the full weight."""
    make_model(tmp_path / "model", "pegasus", max_position_embeddings=128)
    make_data(tmp_path / "rows", train=16, validation=4)
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    kept = {name: value for name, value in weights.items() if "embed_positions" not in name}
    assert len(kept) < len(weights)
    save_file(kept, file, {"format": "pt"})
    flags = ("--model_name_or_path", tmp_path / "model", "--dataset_name", tmp_path / "rows")
    flags += ("--max_steps", 3, "--per_device_train_batch_size", 2, "--output_dir")
    runs = {"seq2seq_lora": "ddp", "seq2seq_lora_zero3_offload": "zero3"}
    losses = []
    for script, config in (runs | {"seq2seq_lora_fsdp1": "fsdp1"}).items():
        launch(script, config, *flags, tmp_path / script, processes=2)
        losses.append(read_metrics(tmp_path / script)["losses"])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[2] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.slow
def test_fewer_experts_than_processes_are_no_fault_of_sharding(launch, place, tmp_path):
    """FSDP2 divides the first dimension: two processes hold 2 of the 4 experts, the third none."""
    tokenizer = AutoTokenizer.from_pretrained(place / "llama")
    size = {"hidden_size": 64, "intermediate_size": 512, "vocab_size": len(tokenizer)}
    build("gpt_oss", **size, max_position_embeddings=512).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = ("--use_peft_lora", "--chat_template_format", "chatml", "--max_steps", 1)
    words = ("--model_name_or_path", tmp_path / "model", *flags, "--output_dir", tmp_path / "run")
    done = launch("chat_sft", "fsdp2", *words, processes=3)
    [line] = re.findall("^bytes of parameters: (.*)$", done.stdout, re.MULTILINE)
    *held, full = [int(one.replace(",", "")) for one in re.findall(r"float32 ([\d,]*\d)", line)]
    assert len(held) == 3 and max(held) > 0.48 * full


@pytest.mark.parametrize("has_gpu", [True, False])
def test_use_cpu_beside_deepspeed_is_an_error_where_there_is_a_gpu(monkeypatch, capsys, has_gpu):
    monkeypatch.setattr(deepspeed_checks, "launch_config", lambda: {"use_cpu": True})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    # the check that comes next
    config = SimpleNamespace(dtype="bfloat16")
    line = error_of(capsys, deepspeed_checks.check_deepspeed, config, "no", False)
    assert ("use_cpu: true" in line) == has_gpu


@pytest.mark.parametrize(
    ("report_to", "fragment"),
    [
        ("all", ""),
        ("tensorboard", ""),
        ("tensorboard, tensorboard", ""),
        ("nothing", "not a tracker"),
        ("tensorboard,nothing", "not a tracker"),
        ("comet_ml", "is not installed"),
    ],
)
def test_trackers_are_those_of_accelerate(capsys, monkeypatch, report_to, fragment):
    """TensorBoard may be tensorboardX, and `all` means whatever is installed."""
    monkeypatch.setattr(chat_settings, "get_available_trackers", lambda: ["tensorboard"])
    if fragment:
        assert fragment in error_of(capsys, chat_settings.check_trackers, report_to)
    else:
        assert chat_settings.check_trackers(report_to) is None
    monkeypatch.setattr(chat_settings, "get_available_trackers", lambda: [])
    assert "not" in error_of(capsys, chat_settings.check_trackers, report_to)


@pytest.mark.parametrize("has_flag", [True, False])
def test_a_4_bit_checkpoint_is_sharded_by_a_script_that_can(monkeypatch, capsys, has_flag):
    monkeypatch.setattr(model_files, "launched_strategy", lambda: "zero3")
    config = SimpleNamespace(dtype="float32")
    if has_flag:
        config.use_4bit_quantization = False
    saved = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    line = error_of(capsys, model_files.check_quantization, config, "it", saved, "frozen")
    wanted = "add --use_4bit_quantization" if has_flag else "take causal_lm_qlora_zero3.py"
    assert line.endswith(wanted)


def test_a_model_of_images_that_has_no_causal_class_is_an_error_with_a_remedy(capsys):
    config = SimpleNamespace(attn_implementation="sdpa")
    arguments = (config, AutoModelForCausalLM, transformers.LlavaConfig(), "the model")
    line = error_of(capsys, model_files.build_skeleton, *arguments)
    assert "AutoModelForCausalLM" in line and "save its language model alone" in line


def test_names_in_a_list_may_end_with_a_comma():
    assert chat_settings.split_names("q_proj, v_proj,") == ["q_proj", "v_proj"]
    assert chat_settings.split_names(" ") == []


def test_a_count_may_be_a_plain_number(forks, place, tmp_path):
    """The loop is the same in all lessons, so a script of the user's own may return an int."""
    make_data(place / "rows", train=8, validation=2)
    end = "[:, 1:].ne(-100).sum()"
    copy = plant(tmp_path, "causal_lm_lora", (end, f"{end}.item()"))
    flags = ("--model_name_or_path", place / "llama", "--dataset_name", place / "rows")
    flags += ("--max_steps", 2, "--gradient_accumulation_steps", 2, "--output_dir")
    commands = ("causal_lm_lora", *flags, tmp_path / "tensor"), (copy, *flags, tmp_path / "int")
    for code, output in run_single(forks, tmp_path, *commands):
        assert code == 0, output
    first, second = (read_metrics(tmp_path / name) for name in ("tensor", "int"))
    assert first["losses"] == second["losses"]
    assert first["target_tokens"] == second["target_tokens"] > 0
