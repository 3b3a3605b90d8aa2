"""The lesson on checkpoints: a resumed run is bit-identical to one that was never interrupted."""

import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, read_metrics
from models import make_data, make_model
from processes import plant
from single import run_single
from test_models import load
from transformers import AutoTokenizer

SCRIPT, BASE = "causal_lm_lora_resume", "causal_lm_lora"
SETTINGS = ("--max_steps", 6, "--gradient_accumulation_steps", 2)
SETTINGS += ("--lora_dropout", 0.1, "--learning_rate", 1e-2)
# the batch size of one process, and of each of two
WHOLE, HALF = ("--per_device_train_batch_size", 4), ("--per_device_train_batch_size", 2)
SAME = ("losses", "learning_rates", "grad_norms", "scores", "target_tokens", "input_tokens")
CHECKSUM = 419057417  # of the rows of assets/complaints, since 2026-11-21
LOAD = "part.load_state_dict(value)"
DONE = "done * config.gradient_accumulation_steps,"
GENERATOR = "        train_loader.base_dataloader.generator = torch.Generator()"
# what a resume must restore -> (a line of the script, a replacement that does not restore it)
FORGOTTEN = {
    "weights": ("            part.data.copy_(value)", "            pass"),
    "optimizer": (f"            {LOAD}", f"            part is scheduler and {LOAD}"),
    "schedule": (f"            {LOAD}", f"            part is optimizer and {LOAD}"),
    "order of the rows": (DONE, "0,"),
    "micro-batches": (DONE, "done,"),
    "random numbers": ("            part.set_rng_state(value)", "            pass"),
    "draw of the loader": (GENERATOR, "        pass"),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Flags of a small model, small data and all other settings. An epoch has three updates."""
    folder = tmp_path_factory.mktemp("small")
    model = make_model(folder / "llama", "llama")
    data = make_data(folder / "data", train=24, validation=8)
    return ("--model_name_or_path", model, "--dataset_name", data, *SETTINGS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def single(forks, small, folder):
    """A function that runs commands (script, name of the output, flag, ...).

    It returns the exit code and the output of each. A command is a run of one process, and must not
    read the output of another.
    """

    def run(*commands):
        def full(script, name, *flags):
            return (script, *small, *WHOLE, "--output_dir", folder / name, *flags)

        return run_single(forks, folder, *(full(*command) for command in commands), side_by_side=2)

    return run


@pytest.fixture(scope="module")
def checkpoints(single, small, folder):
    """The folder with the checkpoints of an uninterrupted run.

    The fixture also runs the parent script, runs that resume from each of the checkpoints, and runs
    that do not restore something.
    """
    checkpoints = folder / "checkpoints"
    saving = ("--checkpoint_dir", checkpoints, "--save_steps", 2)
    done = single((BASE, "base"), (SCRIPT, "uninterrupted", *saving))
    assert [code for code, _ in done] == [0, 0], done
    commands = []
    for step in (2, 4, 6):
        flags = ("--resume_from_checkpoint", checkpoints / f"checkpoint-{step}")
        flags += ("--checkpoint_dir", folder / f"checkpoints_from_{step}", "--save_steps", 3)
        commands.append((SCRIPT, f"from_{step}", *flags))
    for name, line in FORGOTTEN.items():
        (folder / name).mkdir()
        script = plant(folder / name, SCRIPT, line)
        flags = ("--resume_from_checkpoint", checkpoints / "checkpoint-2")
        flags += ("--checkpoint_dir", folder / name / "checkpoints")
        commands.append((script, f"{name}/run", *flags))
    # the same model and data in another place
    shutil.copytree(small[1], folder / "moved_llama")
    shutil.copytree(small[3], folder / "moved_data")
    flags = ("--resume_from_checkpoint", f"{checkpoints}/./checkpoint-2/")
    flags += ("--checkpoint_dir", folder / "checkpoints_of_moved", "--eval_strategy", "epoch")
    flags += (small[0], folder / "moved_llama", small[2], folder / "moved_data/../moved_data")
    commands.append((SCRIPT, "moved", *flags))
    done = single(*commands)
    assert [code for code, _ in done] == [0] * len(commands), done
    for step, (_, output) in zip((2, 4, 6), done):
        assert f"checkpoint-{step}, after {step} updates" in output
    return checkpoints


def outcome(run):
    """Return what must be bit-identical in two runs: metrics and adapter."""
    metrics = read_metrics(run)
    adapter = (run / "adapter_model.safetensors").read_bytes()
    return {key: metrics[key] for key in SAME} | {"adapter": adapter}


def error(output):
    """Return the only error line of an output without a traceback of the script."""
    [line] = re.findall(r"^error: .*", output, re.MULTILINE)
    assert "Traceback" not in output.partition("torch/distributed/elastic")[0]
    return line


def read_state(checkpoints, step):
    """Return the content of a checkpoint."""
    return torch.load(checkpoints / f"checkpoint-{step}" / "state.pt", weights_only=True)


def test_the_training_is_that_of_the_parent_script(checkpoints, folder):
    assert outcome(folder / "uninterrupted") == outcome(folder / "base")
    assert len(set(outcome(folder / "uninterrupted")["losses"])) == 6


def test_a_checkpoint_holds_the_trainable_parameters_and_no_others(checkpoints, folder):
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert [file.name for file in (checkpoints / "checkpoint-2").iterdir()] == ["state.pt"]
    state = read_state(checkpoints, 2)
    metrics = read_metrics(folder / "uninterrupted")
    assert sum(value.numel() for value in state["trainable"]) == metrics["trainable_parameters"]
    assert [update["loss"] for update in state["updates"]] == metrics["losses"][:2]
    assert len(state["random"]) == 1


@pytest.mark.parametrize("step", [2, 4, 6])
def test_resumes_bit_for_bit_inside_an_epoch(checkpoints, folder, step):
    run = folder / f"from_{step}"
    assert outcome(run) == outcome(folder / "uninterrupted")
    metrics, state = read_metrics(run), read_state(checkpoints, step)
    # like the tokens, the seconds are those of both parts
    assert metrics["train_seconds"] > state["seconds"] > 0
    speed = metrics["input_tokens"] / metrics["train_seconds"]
    assert metrics["tokens_per_second"] == pytest.approx(speed)


@pytest.mark.cases
def test_resumes_from_model_and_data_that_have_moved(checkpoints, folder):
    assert outcome(folder / "moved") == outcome(folder / "uninterrupted")


@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_run_writes_the_same_checkpoints(checkpoints, folder, step):
    state, other = read_state(checkpoints, 6), read_state(folder / f"checkpoints_from_{step}", 6)
    for key in ("trainable", "random"):
        torch.testing.assert_close(state[key], other[key], rtol=0, atol=0)
    states = (one["stateful"][0]["state"] for one in (state, other))
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert state["stateful"][1] == other["stateful"][1]
    assert [state[key] == other[key] for key in ("run", "before", "updates")] == [True] * 3


@pytest.mark.parametrize("name", FORGOTTEN)
def test_a_state_that_is_not_restored_changes_the_outcome(checkpoints, folder, name):
    assert outcome(folder / name / "run") != outcome(folder / "uninterrupted")


@pytest.mark.cases
def test_checkpoints_of_earlier_versions_fit_the_rows(tmp_path):
    """A checkpoint names the checksum of the encoded rows, so their form must not change."""
    module = load(SCRIPT)
    config = module.Config(checkpoint_dir=str(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(ROOT / config.model_name_or_path)
    config.dataset_name = str(ROOT / config.dataset_name)
    accelerator = SimpleNamespace(num_processes=1, mixed_precision="no", print=print)
    loaders = module.build_dataloaders(config, tokenizer, accelerator)
    rows = [loader.dataset for loader in loaders]
    _, state = module.results.find_state(config, accelerator, rows)
    assert state["run"]["checksum of the rows"] == CHECKSUM


def test_refusals(single, small, checkpoints, folder):
    """Runs with other settings, existing checkpoints or damaged ones neither train nor write."""
    changed = shutil.copytree(small[3], folder / "changed_data") / "train.csv"
    changed.write_text(changed.read_text().replace(" the ", " The ", 1))
    held_out = shutil.copytree(small[3], folder / "changed_held_out") / "validation.csv"
    held_out.write_text(f"{held_out.read_text()}a new text,complaint\n")
    weights = make_model(folder / "other_llama", "llama", seed=1)
    for name in ("truncated", "missing", "code", "foreign"):
        shutil.copytree(checkpoints, folder / name)
    content = (checkpoints / "checkpoint-6" / "state.pt").read_bytes()
    (folder / "truncated" / "checkpoint-6" / "state.pt").write_bytes(content[:-100])
    torch.save({"run": pytest.fail}, folder / "code" / "checkpoint-6" / "state.pt")
    torch.save(torch.ones(3), folder / "foreign" / "checkpoint-6" / "state.pt")
    # newer than checkpoint-6, although its name sorts first
    (folder / "missing" / "checkpoint-10").mkdir()
    resume, unreadable = ("--resume_from_checkpoint", "True"), "/state.pt cannot be read"
    other_rate = (checkpoints, *resume, "--learning_rate", 2e-2)
    cases = [  # (checkpoint folder and flags, words of the error)
        (other_rate, "learning_rate 0.01 (now 0.02)"),
        ((checkpoints, *resume, "--lora_r", 4), "lora_r 8 (now 4)"),
        ((checkpoints, resume[0], "true", "--lora_r", 4), "lora_r 8 (now 4)"),
        ((checkpoints, resume[0], "FALSE"), "checkpoint-6 exists: give"),
        ((checkpoints, *resume, "--dataset_name", changed.parent), "with checksum of the rows "),
        ((checkpoints, *resume, "--dataset_name", held_out.parent), "with checksum of the rows "),
        ((checkpoints, *resume, "--prompt_template", "{text} Label :"), "was made with prompt_"),
        ((checkpoints, *resume, "--model_name_or_path", weights), "with other base weights"),
        ((folder / "foreign", *resume), f"checkpoint-6{unreadable}"),
        ((checkpoints,), "checkpoint-6 exists: give"),
        ((checkpoints / "checkpoint-2" / "state.pt",), "state.pt: [Errno 17] File exists"),
        ((folder / "code", *resume), f"checkpoint-6{unreadable}"),
        ((folder / "truncated", *resume), f"checkpoint-6{unreadable}"),
        ((folder / "missing", *resume), f"checkpoint-10{unreadable}"),
        ((folder / "none", resume[0], folder / "gone"), f"gone{unreadable}"),
    ]
    before = sorted(folder.rglob("checkpoint-*"))
    done = single(*((SCRIPT, "refused", "--checkpoint_dir", *flags) for flags, _ in cases))
    for (code, output), (_, words) in zip(done, cases, strict=True):
        assert code == 1 and words in error(output), output
    assert not (folder / "refused").exists() and sorted(folder.rglob("checkpoint-*")) == before


def test_two_processes_killed_in_a_save_resume_bit_for_bit(launch, single, small, folder, tmp_path):
    def run(script, name, *flags, code=0):
        flags = (*small, *HALF, "--save_steps", 2, *flags, "--output_dir", tmp_path / name)
        return launch(script, "ddp", *flags, processes=2, code=code).stdout

    run(SCRIPT, "uninterrupted", "--checkpoint_dir", tmp_path / "of_uninterrupted")
    checkpoints = tmp_path / "of_killed"
    killed = plant(tmp_path, SCRIPT)
    file, rename = tmp_path / "utils/run_files.py", "    unfinished.rename(folder)"
    text, dies = file.read_text(), "    step == 4 and __import__('os')._exit(9)"
    assert text.count(rename) == 1
    file.write_text(text.replace(rename, f"{dies}\n{rename}"))
    # the first time, there is not a checkpoint yet and the run starts from scratch
    resume = ("--checkpoint_dir", checkpoints, "--resume_from_checkpoint", "True")
    assert "Resumed" not in run(killed, "run", *resume, code=None)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-2", "unfinished-4"]
    assert not (tmp_path / "run").exists()

    assert "checkpoint-2, after 2 updates" in run(SCRIPT, "run", *resume)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "uninterrupted")
    assert read_metrics(tmp_path / "run")["num_processes"] == 2
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert len(read_state(checkpoints, 6)["random"]) == 2

    [(code, output)] = single((SCRIPT, "alone", *resume, *HALF))
    assert code == 1 and "num_processes 2 (now 1)" in error(output)
