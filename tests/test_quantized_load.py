"""Sharded QLoRA quantizes its weights on the CPU: no GPU ever holds the full 4-bit model."""

import textwrap
from types import SimpleNamespace

import bitsandbytes
import deepspeed
import pytest
import torch
from conftest import ROOT
from processes import plant
from test_models import load
from transformers import AutoTokenizer, HfArgumentParser
from transformers.integrations import deepspeed as integration
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from utils.launch import move_quant_states, shard_4bit_model

SHARDED = ("fsdp1", "fsdp2", "zero3")
REPLICATED = ("single", "ddp", "zero1", "zero2")
LESSONS = [(f"causal_lm_qlora_{strategy}", strategy) for strategy in SHARDED]
LESSON = ("causal_lm_qlora", "ddp")
# script -> number of FSDP versions that it supports
FSDP = {"causal_lm_qlora_fsdp1": 1, "causal_lm_qlora_fsdp2": 1, "chat_sft": 2}
CHAT = ("--use_peft_lora", "--use_4bit_quantization", "--use_nested_quant")
MODEL = ROOT / "assets/tiny-causal-lm"
BF16 = ("--mixed_precision", "bf16")
# Before `prepare`, the process holds a slice of every parameter, in the engine's dtype.
CHECK = """
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
assert all(hasattr(weight, "ds_id") and not weight.numel() for weight in model.parameters())
assert {weight.ds_tensor.dtype for weight in model.parameters()} == {torch.bfloat16}
assert is_deepspeed_zero3_enabled()
print("sharded before prepare")
"""
PREPARES = {  # script -> the line before which CHECK is planted
    "causal_lm_qlora_zero3": "        model, optimizer, train_loader = accelerator.prepare(model,",
    "chat_sft": "    model, optimizer = accelerator.prepare(model,",
}


def chats(strategies):
    """Return pairs of chat_sft and each of the strategies."""
    return [("chat_sft", strategy) for strategy in strategies]


def make_layer(nested):
    """Return a model on the CPU of a 4-bit linear layer and an ordinary one."""
    options = {"compute_dtype": torch.float32, "compress_statistics": nested, "quant_type": "nf4"}
    layer = bitsandbytes.nn.Linear4bit(128, 64, **options, quant_storage=torch.float32)
    return torch.nn.Sequential(layer, torch.nn.Linear(64, 2)).to("cpu")


def tensors_of(state):
    """Return all tensors of a quantization state, including the state of its quantized scales."""
    states = [state] if state.state2 is None else [state, state.state2]
    return [value for one in states for value in vars(one).values() if torch.is_tensor(value)]


@pytest.fixture
def gpus(monkeypatch):
    """Make transformers see GPUs, with this process on the fourth."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)


def build(monkeypatch, script, strategy):
    """Return the model that a script's `build_model` makes under a strategy."""
    module, tokenizer = load(script), AutoTokenizer.from_pretrained(MODEL)
    if script != "chat_sft":
        return module.build_model(module.Config(model_name_or_path=str(MODEL)), tokenizer)
    monkeypatch.setattr(module.launch, "launched_strategy", lambda: strategy)
    monkeypatch.setattr(module.launch, "shards_parameters", lambda: strategy in SHARDED)
    # transformers chooses the device
    monkeypatch.setattr(module.launch, "device_map", lambda: None)
    parser = HfArgumentParser(module.Config)
    flags = [*CHAT, "--dtype", "float32", "--model_name_or_path", str(MODEL)]
    [config] = parser.parse_args_into_dataclasses(flags)
    return module.build_model(config, tokenizer, 0)


@pytest.mark.parametrize(("script", "strategy"), [*LESSONS, *chats(SHARDED)])
def test_sharded_models_are_packed_on_the_cpu_beside_a_gpu(monkeypatch, gpus, script, strategy):
    zero3 = None  # must stay referenced: transformers keeps only a weak reference to it
    if strategy == "zero3":
        zero3 = integration.HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
        assert integration.is_deepspeed_zero3_enabled()
    try:
        model = build(monkeypatch, script, strategy)
    finally:
        integration.unset_hf_deepspeed_config()
    is_packed = bitsandbytes.nn.Linear4bit
    layers = [layer for layer in model.modules() if isinstance(layer, is_packed)]
    assert layers and all(layer.weight.bnb_quantized for layer in layers)
    tensors = [*model.parameters(), *model.buffers()]
    for layer in layers:
        assert layer.weight.quant_state is layer.quant_state
        assert len(tensors_of(layer.quant_state)) == 5
        tensors += tensors_of(layer.quant_state)
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    del zero3


@pytest.mark.parametrize(("script", "strategy"), [LESSON, *chats(REPLICATED)])
def test_other_models_are_packed_on_the_gpu_of_the_process(monkeypatch, gpus, script, strategy):
    class Stop(Exception):
        pass

    def stop(self, device_map):
        raise Stop(choose(self, device_map))

    choose = Bnb4BitHfQuantizer.update_device_map
    monkeypatch.setattr(Bnb4BitHfQuantizer, "update_device_map", stop)
    with pytest.raises(Stop) as stopped:
        build(monkeypatch, script, strategy)
    assert stopped.value.args == ({"": 3},)


@pytest.mark.parametrize("nested", [False, True])
def test_all_tensors_of_quantization_states_are_moved(nested):
    model = make_layer(nested)
    layer = model[0]
    assert len(tensors_of(layer.quant_state)) == (5 if nested else 2)
    assert {tensor.device.type for tensor in tensors_of(layer.quant_state)} == {"cpu"}
    move_quant_states(model, torch.device("meta"))
    assert {tensor.device.type for tensor in tensors_of(layer.quant_state)} == {"meta"}
    assert layer.weight.quant_state is layer.quant_state
    assert {weight.device.type for weight in model.parameters()} == {"cpu"}


@pytest.mark.parametrize(("script", "calls"), FSDP.items())
def test_fsdp_scripts_move_quantization_states_after_prepare(script, calls):
    text = (ROOT / "examples" / f"{script}.py").read_text()
    is_chat = script == "chat_sft"
    move = "move_quant_states(model" if is_chat else "layer.quant_state.to("
    move += ", accelerator.device)" if is_chat else "accelerator.device)"
    prepare, _, rest = text.partition("accelerator.prepare(model")
    assert move not in prepare and rest.count(move) == calls


def test_zero3_shards_on_the_cpu_and_moves_the_rest(monkeypatch):
    model = make_layer(True)
    model.register_buffer("frequencies", torch.ones(3), persistent=False)
    calls = []

    def init(module, config_dict_or_path):
        assert module is model and model.frequencies.device.type == "cpu"
        assert {weight.device.type for weight in model.parameters()} == {"cpu"}
        calls.append(config_dict_or_path)

    def tell():
        calls.append("told")

    monkeypatch.setattr(deepspeed.zero, "Init", init)
    monkeypatch.setattr(integration, "deepspeed_config", lambda: "the config")
    plugin = SimpleNamespace(set_deepspeed_weakref=tell)
    options = {"mixed_precision": "no", "device": torch.device("meta")}
    shard_4bit_model(SimpleNamespace(deepspeed_plugin=plugin, **options), model)
    assert calls == ["told", "the config"]
    moved = [model.frequencies, *tensors_of(model[0].quant_state)]
    assert {tensor.device.type for tensor in moved} == {"meta"}
    assert "frequencies" in model._non_persistent_buffers_set


@pytest.mark.parametrize("script", PREPARES)
def test_zero3_shards_before_prepare(launch, tmp_path, script):
    prepare = PREPARES[script]
    check = textwrap.indent(CHECK, " " * (len(prepare) - len(prepare.lstrip())))
    copy = plant(tmp_path, script, (prepare, check + prepare))
    arguments = ("--output_dir", tmp_path / "run", "--max_steps", 1, "--dtype", "bfloat16")
    if script == "chat_sft":
        arguments += (*CHAT, "--eval_strategy", "no", "--save_strategy", "no")
    done = launch(copy, "zero3_qlora", *arguments, flags=BF16, processes=2)
    assert done.stdout.count("sharded before prepare") == 2
