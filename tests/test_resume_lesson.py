"""The lesson on checkpoints: a run that goes on from one ends, bit for bit, as one that was never interrupted."""

import re
import shutil

import pytest
import torch
from conftest import read_metrics
from models import make_data, make_model
from processes import plant
from single import run_single

SCRIPT, BASE = "causal_lm_lora_resume", "causal_lm_lora"
SETTINGS = (
    "--max_steps",
    6,
    "--lora_dropout",
    0.1,
    "--gradient_accumulation_steps",
    2,
    "--learning_rate",
    1e-2,
)
WHOLE, HALF = (
    ("--per_device_train_batch_size", 4),
    ("--per_device_train_batch_size", 2),
)  # of two processes each
SAME = ("losses", "learning_rates", "grad_norms", "score", "target_tokens", "input_tokens")
# what a resume must not forget -> a line of the script, and what stands there instead
FORGOTTEN = {
    "weights": ("            parameter.data.copy_(value)", "            pass"),
    "optimizer": (
        "            part.load_state_dict(value)",
        "            part is scheduler and part.load_state_dict(value)",
    ),
    "schedule": (
        "            part.load_state_dict(value)",
        "            part is optimizer and part.load_state_dict(value)",
    ),
    "order of the rows": ("len(updates) * config.gradient_accumulation_steps)", "0)"),
    "micro-batches": ("len(updates) * config.gradient_accumulation_steps)", "len(updates))"),
    "random numbers": ("            generator.set_rng_state(random_state)", "            pass"),
    "draw of the loader": (
        "        train_loader.base_dataloader.generator = torch.Generator()",
        "        pass",
    ),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Flags of a small model and of small data, of which three updates are a pass, and all other settings."""
    folder = tmp_path_factory.mktemp("small")
    model, data = (
        make_model(folder / "llama", "llama"),
        make_data(folder / "data", train=24, validation=8),
    )
    return ("--model_name_or_path", model, "--dataset_name", data, *SETTINGS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def single(forks, small, folder):
    """Run commands (script, name of the output, flag, ...) and return their codes and outputs.

    Each is one process. None may read the output of another.
    """

    def run(*commands):
        def full(script, name, *flags):
            return (script, *small, *WHOLE, "--output_dir", folder / name, *flags)

        return run_single(forks, folder, *(full(*command) for command in commands), side_by_side=2)

    return run


@pytest.fixture(scope="module")
def whole(single, folder):
    """The checkpoints of a run that nothing interrupts.

    Beside it: a run of the base, runs that go on from each of the checkpoints, and runs that forget something then.
    """
    checkpoints = folder / "checkpoints"
    saving = ("--checkpoint_dir", checkpoints, "--save_steps", 2)
    done = single((BASE, "base"), (SCRIPT, "whole", *saving))
    assert [code for code, _ in done] == [0, 0], done
    commands = []
    for step in (2, 4, 6):
        mine = ("--checkpoint_dir", folder / f"checkpoints_from_{step}", "--save_steps", 3)
        commands.append(
            (
                SCRIPT,
                f"from_{step}",
                "--resume_from_checkpoint",
                checkpoints / f"checkpoint-{step}",
                *mine,
            )
        )
    for name, line in FORGOTTEN.items():
        (folder / name).mkdir()
        script = plant(folder / name, SCRIPT, line)
        mine = ("--checkpoint_dir", folder / name / "checkpoints")
        commands.append(
            (script, f"{name}/run", "--resume_from_checkpoint", checkpoints / "checkpoint-2", *mine)
        )
    done = single(*commands)
    assert [code for code, _ in done] == [0] * len(commands), done
    for step, (_, output) in zip((2, 4, 6), done):
        assert f"checkpoint-{step}, after update {step} of 6" in output
    return checkpoints


def outcome(run):
    """What must be equal, to the bit."""
    metrics = read_metrics(run)
    return {key: metrics[key] for key in SAME} | {
        "adapter": (run / "adapter_model.safetensors").read_bytes()
    }


def error(output):
    [line] = re.findall(r"^error: .*", output, re.MULTILINE)
    assert "Traceback" not in output.partition("torch/distributed/elastic")[0]
    return line


def test_the_training_is_that_of_the_base(whole, folder):
    assert outcome(folder / "whole") == outcome(folder / "base")
    assert len(set(outcome(folder / "whole")["losses"])) == 6


def test_a_checkpoint_holds_what_is_trained_and_no_more(whole, folder):
    assert sorted(path.name for path in whole.iterdir()) == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
    ]
    assert [file.name for file in (whole / "checkpoint-2").iterdir()] == ["state.pt"]
    state = torch.load(whole / "checkpoint-2" / "state.pt", weights_only=True)
    metrics = read_metrics(folder / "whole")
    assert sum(value.numel() for value in state["trained"]) == metrics["trainable_parameters"]
    assert [update[0] for update in state["updates"]] == metrics["losses"][:2]
    assert len(state["random"]) == 1


@pytest.mark.parametrize("step", [2, 4, 6])
def test_goes_on_bit_for_bit_inside_a_pass(whole, folder, step):
    run = folder / f"from_{step}"
    assert outcome(run) == outcome(folder / "whole")
    metrics, then = (
        read_metrics(run),
        torch.load(whole / f"checkpoint-{step}" / "state.pt", weights_only=True),
    )
    assert metrics["train_seconds"] > then["seconds"] > 0  # of both parts, as the tokens are
    assert metrics["tokens_per_second"] == pytest.approx(
        metrics["input_tokens"] / metrics["train_seconds"]
    )


@pytest.mark.parametrize("step", [2, 4])
def test_writes_the_checkpoints_that_it_would_have_written(whole, folder, step):
    places = (whole, folder / f"checkpoints_from_{step}")
    state, other = (
        torch.load(place / "checkpoint-6" / "state.pt", weights_only=True) for place in places
    )
    for key in ("trained", "random"):
        torch.testing.assert_close(state[key], other[key], rtol=0, atol=0)
    torch.testing.assert_close(
        *(one["stateful"][0]["state"] for one in (state, other)), rtol=0, atol=0
    )
    assert state["stateful"][1] == other["stateful"][1]
    assert [state[key] == other[key] for key in ("run", "before", "updates")] == [True] * 3


@pytest.mark.parametrize("name", FORGOTTEN)
def test_whatever_is_forgotten_shows(whole, folder, name):
    assert outcome(folder / name / "run") != outcome(folder / "whole")


def test_refusals(single, whole, folder):
    """Other settings, a start where checkpoints lie, checkpoints that are damaged; none trains or writes a thing."""
    for name in ("truncated", "missing", "code"):
        shutil.copytree(whole, folder / name)
    content = (whole / "checkpoint-6" / "state.pt").read_bytes()
    (folder / "truncated" / "checkpoint-6" / "state.pt").write_bytes(content[:-100])
    torch.save({"run": pytest.fail}, folder / "code" / "checkpoint-6" / "state.pt")
    (
        folder / "missing" / "checkpoint-10"
    ).mkdir()  # newer than checkpoint-6, though it sorts before it
    before = sorted(folder.rglob("checkpoint-*"))
    cases = [
        (
            (whole, "--resume_from_checkpoint", "True", "--learning_rate", 2e-2),
            "learning_rate 0.01 (now 0.02)",
        ),
        ((whole, "--resume_from_checkpoint", "True", "--lora_r", 4), "lora_r 8 (now 4)"),
        ((whole,), "checkpoint-6 is of an earlier run"),
        ((whole / "checkpoint-2" / "state.pt",), "--checkpoint_dir: "),
        (
            (folder / "code", "--resume_from_checkpoint", "True"),
            "checkpoint-6/state.pt cannot be read",
        ),
        (
            (folder / "truncated", "--resume_from_checkpoint", "True"),
            "checkpoint-6/state.pt cannot be read",
        ),
        (
            (folder / "missing", "--resume_from_checkpoint", "True"),
            "checkpoint-10/state.pt cannot be read",
        ),
        (
            (folder / "none", "--resume_from_checkpoint", folder / "gone"),
            "gone/state.pt cannot be read",
        ),
    ]
    done = single(*((SCRIPT, "refused", "--checkpoint_dir", *flags) for flags, _ in cases))
    for (code, output), (_, words) in zip(done, cases, strict=True):
        assert code == 1 and words in error(output), output
    assert not (folder / "refused").exists() and sorted(folder.rglob("checkpoint-*")) == before


def test_two_processes_killed_in_a_save_go_on_bit_for_bit(launch, single, small, folder, tmp_path):
    def run(script, name, *flags, code=0):
        flags = (*small, *HALF, "--save_steps", 2, *flags, "--output_dir", tmp_path / name)
        return launch(script, "ddp", *flags, processes=2, code=code).stdout

    run(SCRIPT, "whole", "--checkpoint_dir", tmp_path / "of_whole")
    checkpoints = tmp_path / "of_killed"
    rename = "                    unfinished.rename(folder)"
    dies = "                    len(updates) == 4 and __import__('os')._exit(9)"
    killed = plant(tmp_path, SCRIPT, (rename, f"{dies}\n{rename}"))
    resume = (
        "--checkpoint_dir",
        checkpoints,
        "--resume_from_checkpoint",
        "True",
    )  # nothing there yet: from the start
    assert "Going on" not in run(killed, "run", *resume, code=None)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-2", "unfinished-4"]
    assert not (tmp_path / "run").exists()

    assert "checkpoint-2, after update 2 of 6" in run(SCRIPT, "run", *resume)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    assert read_metrics(tmp_path / "run")["num_processes"] == 2
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
    ]
    state = torch.load(checkpoints / "checkpoint-6" / "state.pt", weights_only=True)
    assert len(state["random"]) == 2

    [(code, output)] = single((SCRIPT, "alone", *resume, *HALF))
    assert code == 1 and "num_processes 2 (now 1)" in error(output)
