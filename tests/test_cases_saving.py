"""Whatever is trained is saved, whatever fails after the training; and it loads as it was."""

import json
import os
import signal
import stat
from types import SimpleNamespace

import peft
import pytest
import torch
from conftest import ROOT, read_metrics
from models import SIZE, make_data, make_model
from processes import plant
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from tools.compatibility.rows import ROWS
from utils import experts, launch, loading, results, run_files, saving

pytestmark = pytest.mark.cases
METHODS = {name: row for name, row in ROWS.items() if row.base == "float32" and not row.flags}
METHODS = {name: row for name, row in METHODS.items() if row.optimizer == "torch.optim.AdamW"}
IDS = torch.arange(3, 15)[None]


def make_accelerator():
    return SimpleNamespace(is_main_process=True, print=print)


def make_base():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **SIZE))


def adapt(config):
    return peft.get_peft_model(make_base(), config)


def lora(**options):
    return peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **options)


def files_of(model, folder, **options):
    config = SimpleNamespace(output_dir=str(folder), overwrite_output_dir=False)
    return results.WeightFiles(make_accelerator(), config, model, None, **options)


def trained(model):
    """Change every trainable parameter, and return name -> parameter as a script gathers them."""
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for weight in weights.values():
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    return {name: weight.detach().clone() for name, weight in weights.items()}


# Every method of PEFT in the table of compatibility -----------------------------------------------
@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_written_and_loads(tmp_path, name):
    row = METHODS[name]
    model = adapt(getattr(peft, row.config)(task_type="CAUSAL_LM", **row.options))
    files = files_of(model, tmp_path / "run")
    weights = trained(model)
    logits = model.eval()(IDS).logits
    # from here on the live model is of no use, as where it is sharded
    wrapped = {
        name.replace("model.layers", "_fsdp_wrapped_module.model.layers"): value
        for name, value in weights.items()
    }
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    (tmp_path / "run").mkdir()
    files.write(tmp_path / "run", wrapped)
    files.check(tmp_path / "run")
    loaded = peft.PeftModel.from_pretrained(make_base(), tmp_path / "run").eval()
    assert torch.allclose(loaded(IDS).logits, logits, atol=1e-5)


LESSON = "    return peft.get_peft_model(model, lora)\n"
SHARDED = {"fsdp2": "causal_lm_lora_fsdp2", "ddp": "causal_lm_lora"}
SHARDED["zero3"] = "causal_lm_lora_zero3_offload"
DEFAULT = ("p_tuning-zero3",)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    make_model(folder / "model", "llama")
    make_data(folder / "data", train=32, validation=4)
    return ("--model_name_or_path", folder / "model", "--dataset_name", folder / "data")


LESSONS = [
    pytest.param(name, config, id=f"{name}-{config}",
                 marks=[] if f"{name}-{config}" in DEFAULT else pytest.mark.slow)
    for name in METHODS for config in SHARDED if (name, config) not in (
        # PEFT cannot begin: docs/compatibility.md
        ("trainable_tokens", "zero3"), ("loha", "zero3"))
]  # fmt: skip


@pytest.mark.parametrize("name, config", LESSONS)
def test_a_lesson_saves_every_method(launch, small, tmp_path, name, config):
    row = METHODS[name]
    method = f"    other = peft.{row.config}(task_type='CAUSAL_LM', **{row.options})\n"
    planted = LESSON, f"{method}    return peft.get_peft_model(model, other)\n"
    copy = plant(tmp_path, SHARDED[config], planted)
    flags = (*small, "--max_steps", 2, "--output_dir", tmp_path / "run")
    launch(copy, config, *flags, processes=2)
    assert len(read_metrics(tmp_path / "run")["losses"]) == 2
    peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run")


# What cannot be saved is said before the training -------------------------------------------------
def test_a_trained_parameter_outside_the_adapter_is_an_error(tmp_path, capsys):
    model = adapt(lora())
    model.get_base_model().lm_head.weight.requires_grad_(True)
    with pytest.raises(SystemExit):
        files_of(model, tmp_path / "run")
    message = capsys.readouterr().err
    assert "1 trainable parameters" in message and "lm_head.weight" in message
    assert "modules_to_save" in message


@pytest.mark.parametrize("free", [10, 100_000])
def test_a_disk_without_space_is_an_error(tmp_path, capsys, monkeypatch, free):
    monkeypatch.setattr(results, "free_bytes", lambda path: free)
    with pytest.raises(SystemExit):
        kept = {
            "checkpoints": 0 if free == 10 else 9,
            "state_bytes": launch.state_bytes("adamw_torch"),
        }
        files_of(adapt(lora()), tmp_path / "run", **kept)
    message = capsys.readouterr().err
    assert f"and {free:,} are free on that disk" in message and "another one" in message


def test_free_bytes_of_a_folder_that_does_not_exist_yet(tmp_path):
    assert saving.free_bytes(tmp_path / "a" / "b") > 0


@pytest.mark.parametrize("norms, is_error", [([0, 0, 0], True), ([0, 0, 0.1], False)])
def test_a_gradient_norm_of_zero_ends_the_first_updates(capsys, norms, is_error):
    progress = object.__new__(results.Progress)
    vars(progress).update(accelerator=make_accelerator(), max_steps=9, bar=None)
    progress.updates = [{"loss": 1.0, "grad_norm": norm} for norm in norms]
    if is_error:
        with pytest.raises(SystemExit):
            progress.check_gradients()
        assert "gradient norm is 0 in the first 3 update(s)" in capsys.readouterr().err
    else:
        progress.check_gradients()


# Whatever fails after the gathering, the weights are on the disk ----------------------------------
def raising(error):
    def function(*args, **kwargs):
        raise error

    return function


NO_SPACE = OSError(28, "No space left on device")
BREAKS = {  # what fails -> (object, attribute, error)
    "adapter config": (results, "write_adapter_config", NO_SPACE),
    "generation config": (GenerationConfig, "save_pretrained", ValueError("temperature")),
    "mode of the files": (results, "share", PermissionError("not permitted")),
    "reading back": (saving, "safe_open", SafetensorError("truncated")),
    "check": (results, "check_adapter", SystemExit(1)),
    "check raises": (results, "check_adapter", KeyError("a fault in the check")),
    "log": (run_files, "write_log", NO_SPACE),
    "plot of losses": (run_files, "draw_losses", ValueError("a font is missing")),
    "plot of memory": (run_files, "draw_memory", ValueError("a font is missing")),
    "card and metrics": (run_files, "write_metrics", UnicodeEncodeError("ascii", "é", 0, 1, "no")),
    "load lines": (run_files, "load_lines", KeyError("task_type")),
    "moving": (results, "move_into_place", OSError("Device or resource busy")),
    "renaming": (saving, "share", OSError("Stale file handle")),
}


def progress_of_two_updates():
    updates = [{"step": 1, "epoch": 0.5, "loss": 1.0}, {"step": 2, "epoch": 1.0, "loss": 0.5}]
    return SimpleNamespace(updates=updates, evaluations=[])


def metrics_of(folder):
    entry = {"gpu_peak": 0, "cpu_begin": 1, "cpu_end": 1, "cpu_peak": 1}
    return {
        "config": {"model_name_or_path": "m", "output_dir": str(folder)}, "scores": {},
        "strategy": "ddp", "num_processes": 2, "losses": [1.0, 0.5], "learning_rates": [1e-3] * 2,
        "memory": {"train": [entry, entry]},
    }  # fmt: skip


def save_run(folder, model, files, weights):
    with files.new_folder(metrics_of(folder), progress_of_two_updates()) as hidden:
        files.write(hidden, weights)


def assert_weights_are_kept(folder, weights):
    found = [path for path in folder.rglob("*.safetensors")]
    assert len(found) == 1, list(folder.rglob("*"))
    kept = load_file(found[0])
    expected = {name.replace(".default", ""): value for name, value in weights.items()}
    assert kept.keys() == expected.keys()
    assert all(torch.equal(kept[name], value) for name, value in expected.items())
    return found[0].parent


def test_a_run_that_nothing_disturbs(tmp_path):
    model = adapt(lora())
    files, weights = files_of(model, tmp_path / "run"), trained(model)
    save_run(tmp_path / "run", model, files, weights)
    assert assert_weights_are_kept(tmp_path, weights) == tmp_path / "run"


@pytest.mark.parametrize("broken", BREAKS)
def test_weights_are_on_the_disk_whatever_fails(tmp_path, monkeypatch, capsys, broken):
    model = adapt(lora())
    files, weights = files_of(model, tmp_path / "run"), trained(model)
    holder, name, error = BREAKS[broken]
    monkeypatch.setattr(holder, name, raising(error))
    with pytest.raises((SystemExit, type(error))):
        save_run(tmp_path / "run", model, files, weights)
    monkeypatch.undo()
    folder = assert_weights_are_kept(tmp_path, weights)
    assert str(folder) in capsys.readouterr().err


def test_what_was_gathered_is_kept_if_a_parameter_was_not(tmp_path, capsys):
    model = adapt(lora())
    files, weights = files_of(model, tmp_path / "run"), trained(model)
    del weights[next(iter(weights))]
    with pytest.raises(SystemExit):
        save_run(tmp_path / "run", model, files, weights)
    assert assert_weights_are_kept(tmp_path, weights) == tmp_path / "run.unchecked"
    assert "the written adapter lacks " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("moment", ["writing", "plotting"])
def test_a_signal_does_not_end_a_save_half_way(tmp_path, monkeypatch, capsys, name, moment):
    model = adapt(lora())
    files, weights = files_of(model, tmp_path / "run"), trained(model)
    number, arrived = getattr(signal, name), []
    before = signal.signal(number, lambda *_: arrived.append(moment))
    holder, function = {"writing": (results, "save_file"), "plotting": (run_files, "draw_losses")}[
        moment
    ]
    real = getattr(holder, function)

    def interrupted(*args, **kwargs):
        signal.raise_signal(number)
        assert not arrived
        return real(*args, **kwargs)

    monkeypatch.setattr(holder, function, interrupted)
    try:
        save_run(tmp_path / "run", model, files, weights)
    finally:
        signal.signal(number, before)
    assert arrived == [moment]
    assert assert_weights_are_kept(tmp_path, weights) == tmp_path / "run"
    assert f"{name} arrived while the run was saved" in capsys.readouterr().err


def test_a_failed_push_leaves_the_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "HfApi", raising(ConnectionError("no route to host")))
    monkeypatch.setattr(results, "HfApi", lambda: SimpleNamespace(
        create_repo=raising(ConnectionError("no route to host"))))  # fmt: skip
    model = adapt(lora())
    files, weights = files_of(model, tmp_path / "run"), trained(model)
    save_run(tmp_path / "run", model, files, weights)
    with pytest.raises(SystemExit):
        config = SimpleNamespace(hub_model_id="me/model", output_dir=str(tmp_path / "run"))
        results.push_to_hub(config)
    assert "Nothing is lost" in capsys.readouterr().err
    assert_weights_are_kept(tmp_path, weights)


# Modules that a process calls only for some rows --------------------------------------------------
class Chooser(torch.nn.ModuleDict):
    def forward(self, hidden):
        return self["expert_0"](hidden)


class Block(torch.nn.Module):
    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


LINEAR = torch.nn.Linear(2, 2)
BLOCKS = {  # name -> (model, the class of its blocks that skip modules)
    "container that chooses": (Block(mlp=Chooser({"expert_0": LINEAR})), Chooser),
    "list of experts": (Block(mlp=Block(experts=torch.nn.ModuleList([LINEAR]))), Block),
    "list of layers": (Block(layers=torch.nn.ModuleList([LINEAR])), None),
    "no list": (Block(experts=LINEAR), None),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_that_skip_modules_are_found(name):
    model, kind = BLOCKS[name]
    assert {type(block) for block in experts.skipping_blocks(model)} == ({kind} - {None})


@pytest.mark.parametrize("name", ["container that chooses", "list of layers"])
def test_ddp_looks_for_unused_parameters_where_a_model_skips_some(name):
    accelerator = SimpleNamespace(deepspeed_plugin=None, ddp_handler=None)
    experts.allow_skipping(accelerator, BLOCKS[name][0])
    assert (accelerator.ddp_handler is not None) == (name == "container that chooses")


SWITCH = ("seq2seq_lora", "ddp"), ("seq2seq_lora_zero3_offload", "zero3")


@pytest.mark.slow
@pytest.mark.parametrize("script, config", SWITCH)
def test_experts_of_their_own_weights_train_on_two_processes(launch, tmp_path, script, config):
    size = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    size |= {"num_decoder_layers": 2, "num_experts": 8, "num_sparse_encoder_layers": 1}
    size |= {"num_sparse_decoder_layers": 1, "expert_capacity": 64, "decoder_start_token_id": 0}
    make_model(tmp_path / "t5", "t5")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "t5")
    ends = {"pad_token_id": 0, "eos_token_id": 1, "vocab_size": len(tokenizer)}
    config_of = AutoConfig.for_model("switch_transformers", **size, **ends)
    AutoModelForSeq2SeqLM.from_config(config_of).save_pretrained(tmp_path / "switch")
    tokenizer.save_pretrained(tmp_path / "switch")
    make_data(tmp_path / "data", train=32, validation=4)
    flags = ("--model_name_or_path", tmp_path / "switch", "--dataset_name", tmp_path / "data")
    flags += ("--attn_implementation", "eager", "--per_device_train_batch_size", 2)
    launch(script, config, *flags, "--max_steps", 4, "--output_dir", tmp_path / "run", processes=2)
    assert len(read_metrics(tmp_path / "run")["losses"]) == 4


# What is saved behaves as what was trained --------------------------------------------------------
@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_mode_that_the_umask_says(tmp_path, mask, mode):
    model = adapt(lora())
    files, weights = files_of(model, tmp_path / "run"), trained(model)
    before = os.umask(mask)
    try:
        save_run(tmp_path / "run", model, files, weights)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "run").iterdir()}
    assert modes == {mode}


def test_the_tokens_that_end_a_text_are_saved_and_loaded_by_the_printed_lines(tmp_path):
    model = adapt(lora())
    model.get_base_model().generation_config = GenerationConfig(eos_token_id=[5, 9], pad_token_id=5)
    make_base().save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    files, weights = files_of(model, tmp_path / "run"), trained(model)
    save_run(tmp_path / "run", model, files, weights)
    lines = loading.load_lines(tmp_path / "run", tmp_path / "run", metrics_of(tmp_path))
    names = {}
    exec(lines, names)
    answer = names["model"].eval().generate(input_ids=IDS, max_new_tokens=8)
    assert names["model"].generation_config.eos_token_id == [5, 9]
    greedy = model.eval().get_base_model().generate(input_ids=IDS, max_new_tokens=8)
    assert torch.equal(answer, greedy)


@pytest.mark.parametrize("kind", ["bart", "mbart", "t5", "m2m_100", "pegasus"])
def test_an_encoder_and_decoder_answer_by_the_settings_of_the_run(tmp_path, kind):
    """peft reads a wrapper's settings for causal models alone; those of the base are not wanted."""
    size = {"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
    size |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_layers": 1}
    size |= {"num_heads": 4, "d_kv": 8, "pad_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    base = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, **size))
    leaks = {"num_beams": 3, "forced_bos_token_id": 7, "min_length": 5, "decoder_start_token_id": 9}
    base.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=1, **leaks)
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules="all-linear")
    model = peft.get_peft_model(base, config)
    base.generation_config = GenerationConfig(
        eos_token_id=2, pad_token_id=1, decoder_start_token_id=2
    )
    config.base_model_name_or_path = str(tmp_path / "base")
    files, weights = files_of(model, tmp_path / "run"), trained(model)
    save_run(tmp_path / "run", model, files, weights)
    names = {}
    exec(loading.load_lines(tmp_path / "run", tmp_path / "run", metrics_of(tmp_path)), names)
    loaded = names["model"].eval().generate(input_ids=IDS, max_new_tokens=8)
    assert torch.equal(loaded, model.eval().generate(input_ids=IDS, max_new_tokens=8))


@pytest.mark.parametrize("with_data", [True, False])
def test_the_card_says_what_was_set_and_not_what_was_read(tmp_path, with_data):
    (tmp_path / "adapter_config.json").write_text('{"task_type": "CAUSAL_LM"}')
    metrics = metrics_of(tmp_path)
    if with_data:
        metrics["config"]["dataset_name"] = "rows.csv"
    run_files.write_metrics(tmp_path, metrics)
    card = (tmp_path / "README.md").read_text()
    assert ("(--dataset_name `rows.csv`)" in card) == with_data
    assert "accuracy" not in card


@pytest.mark.parametrize(
    "optimizer, mode",
    [(torch.optim.SGD, None), (torch.optim.AdamW, True), (torch.optim.Adam, False)],
)
def test_adamw_mode_is_that_of_the_optimizer(monkeypatch, optimizer, mode):
    from utils import engine

    monkeypatch.setattr(engine, "gather_object", lambda objects: objects)
    layer = torch.nn.Linear(2, 2)
    accelerator = SimpleNamespace(
        _optimizers=[optimizer(layer.parameters(), lr=0.1)],
        distributed_type="MULTI_CPU",
        device=torch.device("cpu"),
    )
    assert engine.engine_facts(accelerator, list(layer.parameters()))["adamw_mode"] is mode


def test_an_adapter_without_a_task_type_loads_by_its_class(tmp_path):
    model = adapt(peft.LoraConfig(target_modules="all-linear"))
    files, weights = files_of(model, tmp_path / "run"), trained(model)
    save_run(tmp_path / "run", model, files, weights)
    written = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert written["auto_mapping"]["base_model_class"] == "LlamaForCausalLM"
    assert written["inference_mode"] is True


def test_experts_that_no_token_reached_are_saved(tmp_path, capsys):
    model = adapt(lora())
    files = files_of(model, tmp_path / "run")
    weights = trained(model)
    name = next(name for name in weights if "lora_B" in name)
    weights[name] = torch.zeros_like(weights[name])
    save_run(tmp_path / "run", model, files, weights)
    assert "Warning: 1 of 28 trained tensors did not change" in capsys.readouterr().out
    assert_weights_are_kept(tmp_path, weights)


def test_the_base_of_a_full_model_is_kept(tmp_path, monkeypatch, capsys):
    model = make_base()
    files = files_of(model, tmp_path / "run")
    weights = model.state_dict()
    monkeypatch.setattr(results, "check_model", raising(SystemExit(1)))
    with pytest.raises(SystemExit):
        save_run(tmp_path / "run", model, files, weights)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run.unchecked")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert ROOT.is_dir() and "run.unchecked" in capsys.readouterr().err


@pytest.mark.parametrize("epochs, is_told", [(6.0, True), (1.0, False), (1.2, False)])
def test_a_loader_of_other_epochs_than_the_flag_says_is_named(monkeypatch, capsys, epochs, is_told):
    monkeypatch.setattr(results, "check_sharding", lambda *_: None)
    config = SimpleNamespace(num_train_epochs=epochs, max_steps=-1)
    config.per_device_train_batch_size, config.gradient_accumulation_steps = 2, 1
    accelerator = SimpleNamespace(num_processes=2)
    results.Progress(accelerator, None, config, max_steps=3, num_rows=12)  # one epoch
    told = "--num_train_epochs is 6, but the training loader holds 1 epoch(s)."
    assert (told in capsys.readouterr().out) == is_told
