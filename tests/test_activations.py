"""Activation checkpointing: every knob acts, no knob changes a loss, what cannot work is said."""

import contextlib
import os
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, read_metrics
from models import make_data, make_model
from processes import plant
from single import run_single
from test_models import load
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.activations import saved_bytes
from utils import activations
from utils.packing import join

LAYERS = 4
EVERY, OFFLOAD = f"--{activations.EVERY}", f"--{activations.OFFLOAD}"
ON = {"gradient_checkpointing": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "llama", "llama", num_hidden_layers=LAYERS)


def built(script, model, **settings):
    """Return a model as a script builds it, and the function that computes its loss."""
    module = load(script)
    names = {"model_name_or_path": str(model), "dtype": "float32"}
    names |= {"use_liger_kernel": False} if script == "chat_sft" else {}
    config = module.Config(**names, **settings)
    tokenizer = AutoTokenizer.from_pretrained(model)
    torch.manual_seed(0)
    rest = (0,) if script == "chat_sft" else ()
    return module.build_model(config, tokenizer, *rest).train(), module.compute_loss


def step(script, model, **settings):
    """Return loss, gradients, bytes saved for the backward pass and calls of attention."""
    one, compute_loss = built(script, model, **settings)
    ids = torch.arange(10, 50)
    if script == "chat_sft":  # two packed documents
        parts = [{"input_ids": part, "labels": part} for part in (ids[:30].tolist(), [7, 8, 9])]
        batch = join(parts)
    else:
        batch = {"input_ids": ids[None], "labels": ids[None]}
    calls = []
    for name, module in one.named_modules():
        if name.endswith("self_attn"):
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    with saved_bytes(one) as saved:
        loss = compute_loss(one, batch)
    loss.backward()
    gradients = {name: p.grad for name, p in one.named_parameters() if p.grad is not None}
    return loss.item(), gradients, saved(), len(calls)


CASES = {  # settings -> number of layers that are recomputed
    "every": (ON, 4),
    "every second": (ON | {activations.EVERY: 2}, 2),
    "every third": (ON | {activations.EVERY: 3}, 2),
    "first": (ON | {activations.EVERY: 9}, 1),
}
CHAT = {"use_peft_lora": True}


@pytest.mark.parametrize(
    ("script", "more"),
    [
        ("causal_lm_full_zero3", {}),
        ("chat_sft", {}),
        ("chat_sft", CHAT),
        ("chat_sft", CHAT | {"use_reentrant": True}),
    ],
)
def test_layers_are_recomputed_and_nothing_else_changes(model, script, more):
    plain = step(script, model, **more)
    assert plain[3] == LAYERS
    saved = [plain[2]]
    for settings, count in reversed(CASES.values()):
        loss, gradients, bytes_saved, calls = step(script, model, **more, **settings)
        assert calls == LAYERS + count, settings
        assert loss == plain[0]
        assert gradients.keys() == plain[1].keys() != set()
        assert all(torch.equal(gradients[name], plain[1][name]) for name in gradients)
        saved.append(bytes_saved)
    assert saved == sorted(saved, reverse=True) and saved[-1] < 0.6 * saved[0], saved


@pytest.mark.parametrize("more", [{}, CHAT, CHAT | {"use_reentrant": True}])
def test_only_the_inputs_of_layers_are_moved(model, monkeypatch, more):
    """What is moved to the CPU, with a stand-in for the move: this test runs without a GPU."""
    moved = []

    class Move(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, **_):
            super().__init__(lambda tensor: moved.append(tensor) or tensor, lambda tensor: tensor)

    monkeypatch.setattr("transformers.modeling_utils.save_on_cpu", Move)
    plain = step("chat_sft", model, **more)
    loss, *_ = step("chat_sft", model, **more, **ON, **{activations.OFFLOAD: True})
    assert loss == plain[0]
    assert [tuple(tensor.shape) for tensor in moved if tensor.dim() > 1] == [(1, 33, 32)] * LAYERS


def settled(monkeypatch, capsys, gpu=False, variables=(), **flags):
    """Return the flags that `settle_checkpointing` left, and what it printed."""
    monkeypatch.setattr(activations, "uses_gpu", lambda: gpu)
    for name in ("RANK", *map(str.upper, activations.FSDP)):
        monkeypatch.delenv(name, raising=False)
    for name in variables:
        monkeypatch.setenv(name.upper(), "true")
    config = SimpleNamespace(**{"gradient_checkpointing": False} | flags)
    with contextlib.suppress(SystemExit):
        activations.settle_checkpointing(config)
    return vars(config), "".join(capsys.readouterr())


def test_what_has_no_effect_is_printed(monkeypatch, capsys):
    both = {activations.EVERY: 2, activations.OFFLOAD: True}
    _, told = settled(monkeypatch, capsys, gpu=True, **both)
    assert told == f"{EVERY}, {OFFLOAD}: unused without --gradient_checkpointing.\n"
    _, told = settled(monkeypatch, capsys)
    assert told == ""
    flags, told = settled(monkeypatch, capsys, **ON, **both)
    assert told.startswith(f"{OFFLOAD}: unused without a GPU") and told.count("\n") == 1
    assert flags == ON | both | {activations.OFFLOAD: False}
    flags, told = settled(monkeypatch, capsys, gpu=True, **ON, **both)
    assert (flags, told) == (ON | both, "")
    _, told = settled(monkeypatch, capsys, gpu=True, torch_compile=True, **ON, **both)
    assert told.startswith(f"error: {OFFLOAD} has no effect with --torch_compile")


def test_the_flag_overrides_the_launch_config(monkeypatch, capsys):
    name = activations.FSDP[0]
    _, told = settled(monkeypatch, capsys, variables=[name])
    assert told == "" and os.environ[name.upper()] == "true"
    _, told = settled(monkeypatch, capsys, variables=[name], **ON)
    assert told.startswith(f"{name} of the launch config: unused")
    assert os.environ[name.upper()] == "false"


def test_models_that_cannot(model, capsys):
    with torch.device("meta"):
        llama = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    check = activations.check_checkpointing
    check(SimpleNamespace(**ON, **{activations.EVERY: 3}), "", llama)
    assert capsys.readouterr().out.startswith(f"Activations of 2 of {LAYERS} layers are recomputed")
    whole = type("Whole", (torch.nn.Module,), {"supports_gradient_checkpointing": True})()
    check(SimpleNamespace(**ON), "", whole)
    for flags, can, wanted in (
        ({activations.EVERY: 2}, True, f"all of its layers or none: drop {EVERY}"),
        ({}, False, "has no activation checkpointing: drop --gradient_checkpointing"),
    ):
        whole.supports_gradient_checkpointing = can
        with pytest.raises(SystemExit):
            check(SimpleNamespace(**ON, **flags), "--model_name_or_path x", whole)
        assert wanted in capsys.readouterr().err


# Launches -----------------------------------------------------------------------------------------
UPDATES, ACCUMULATED = 8, 2
COUNT = """    calls = []
    for name, module in model.named_modules():
        if name.endswith("self_attn"):
            module.register_forward_pre_hook(lambda module, _: calls.append(module.training))
"""
TELL = '    accelerator.print("calls of attention", sum(calls))\n'
TRAIN = "        reader = chat.signals.UpdateReader("
FLAGS = ("--max_steps", UPDATES, "--gradient_accumulation_steps", ACCUMULATED, "--packing")
FLAGS += ("--max_length", 64, "--eval_strategy", "no", "--save_strategy", "no")
FLAGS += ("--logging_strategy", "no", "--lr_scheduler_type", "constant")


def counting_chat(folder):
    """Return a copy of chat_sft that counts the calls of attention in its training loop."""
    loop = "    # 6. Training loop -"
    ending = "    if stopped_by and len(progress.updates)"
    replacements = [(loop, COUNT + loop), (TRAIN, f"        calls.clear()\n{TRAIN}")]
    return plant(folder, "chat_sft", *replacements, (ending, TELL + ending))


@pytest.fixture(scope="module")
def chat_runs(forks, model, tmp_path_factory):
    """The losses of chat_sft in one process without checkpointing: flags -> losses."""
    folder = tmp_path_factory.mktemp("chats")
    variants = {(): folder / "full", ("--use_peft_lora",): folder / "lora"}
    size = ("--per_device_train_batch_size", 4, "--model_name_or_path", model)
    commands = [("chat_sft", *FLAGS, *size, *v, "--output_dir", o) for v, o in variants.items()]
    done = run_single(forks, folder, *commands)
    assert [code for code, _ in done] == [0, 0], done
    return {flags: read_metrics(output)["losses"] for flags, output in variants.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "lora", "every", "more"),
    [
        ("ddp", True, 2, ()),
        ("zero2", True, 3, ("--use_reentrant",)),
        ("zero3", True, 2, ()),
        ("zero3", False, 2, ()),
        ("fsdp1", True, 2, ()),
        ("fsdp2", True, 2, ("--use_reentrant",)),
        ("fsdp2", False, 3, ()),
    ],
)
def test_every_knob_acts_under_every_strategy(
    launch, model, chat_runs, tmp_path, config, lora, every, more
):
    trained = ("--use_peft_lora",) if lora else ()
    flags = (*FLAGS, *trained, *more, "--per_device_train_batch_size", 2)
    flags += ("--model_name_or_path", model, "--output_dir", tmp_path / "run")
    flags += ("--gradient_checkpointing", EVERY, every, OFFLOAD)
    done = launch(counting_chat(tmp_path), config, *flags, processes=2)
    assert f"{OFFLOAD}: unused without a GPU" in done.stdout
    count = len(range(0, LAYERS, every))
    assert f"Activations of {count} of {LAYERS} layers are recomputed" in done.stdout
    calls = UPDATES * ACCUMULATED * (LAYERS + count)
    assert f"calls of attention {calls}\n" in done.stdout
    losses = read_metrics(tmp_path / "run")["losses"]
    assert losses == pytest.approx(chat_runs[trained], rel=1e-3)


@pytest.mark.slow
def test_a_lesson_under_zero3(launch, forks, model, tmp_path):
    data, rows = make_data(tmp_path / "data", train=32), "--per_device_train_batch_size"
    flags = ("--model_name_or_path", model, "--dataset_name", data, "--max_steps", UPDATES)
    alone = ("causal_lm_full", *flags, rows, 4, "--output_dir", tmp_path / "alone")
    [(code, output)] = run_single(forks, tmp_path, alone)
    assert code == 0, output
    flags += ("--gradient_checkpointing", EVERY, 2, rows, 2, "--output_dir", tmp_path / "run")
    launch("causal_lm_full_zero3", "zero3", *flags, processes=2)
    ours, theirs = (read_metrics(tmp_path / name)["losses"] for name in ("run", "alone"))
    assert ours == pytest.approx(theirs, rel=1e-3) and len(ours) == UPDATES


@pytest.mark.slow
def test_checkpointing_of_fsdps_own_config(launch, model, tmp_path):
    flags = (*FLAGS, "--use_peft_lora", "--model_name_or_path", model)
    yaml = (ROOT / "configs/fsdp2.yaml").read_text()
    line = "fsdp_config:\n"
    assert yaml.count(line) == 1
    more = [f"  {name}: true\n" for name in activations.FSDP]
    (tmp_path / "own.yaml").write_text(yaml.replace(line, line + "".join(more)))
    losses = []
    for number, given in enumerate([(), ("--gradient_checkpointing",)]):
        output = ("--output_dir", tmp_path / str(number))
        done = launch("chat_sft", tmp_path / "own.yaml", *flags, *given, *output, processes=2)
        told = "fsdp_activation_checkpointing, fsdp_activation_checkpointing_offload of the launch"
        assert (told in done.stdout) == bool(given)
        off = "Turned off, because FSDP needs GPUs for it: fsdp_activation_checkpointing_offload"
        assert (off in done.stdout) == (not given)
        losses.append(read_metrics(output[1])["losses"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
