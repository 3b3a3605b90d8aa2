"""chat_sft resumes a checkpoint bit for bit, whatever ended the run before."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import LIMIT, ROOT, read_metrics
from safetensors import safe_open
from safetensors.torch import load_file
from single import run_single

STOP, UPDATES = 3, 8  # inside the first epoch of 7 updates
FLAGS = (
    "--use_peft_lora",
    "--lora_dropout",
    0.1,
    "--gradient_accumulation_steps",
    2,
    "--max_steps",
    UPDATES,
)
FLAGS += (
    "--save_strategy",
    "steps",
    "--save_steps",
    STOP,
    "--eval_strategy",
    "steps",
    "--eval_steps",
    4,
)
FLAGS += ("--num_samples", 1, "--max_new_tokens", 4)
WHOLE = ("--per_device_train_batch_size", 2)  # of one process, or 1 of each of two
ON = ("--resume_from_checkpoint", True)


def go_on(folder, source, step):
    """Make an output folder with the checkpoint and the log of a run that was stopped there."""
    folder.mkdir()
    shutil.copytree(source / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    shutil.copy(source / "log.jsonl", folder)
    return folder


def make_older(folder):
    """Write the updates of a checkpoint as lists, as they were before they became dicts."""
    state = json.loads((folder / "state.json").read_text())
    names = ("loss", "learning_rate", "grad_norm", "target_tokens", "input_tokens")
    state["updates"] = [[update[name] for name in names] for update in state["updates"]]
    (folder / "state.json").write_text(json.dumps(state))


def assert_same(folder, other, processes):
    """Losses, norms, scores, adapter and the states of all processes are equal bit for bit."""
    ours, theirs = read_metrics(folder), read_metrics(other)
    for key in (
        "losses",
        "grad_norms",
        "learning_rates",
        "evaluations",
        "target_tokens",
        "input_tokens",
    ):
        assert ours[key] == theirs[key], key
    last = f"checkpoint-{len(theirs['losses'])}"
    files = [
        f"{last}/process-{number:05}-of-{processes:05}.safetensors" for number in range(processes)
    ]
    for file in [*files, f"{last}/adapter_model.safetensors", "adapter_model.safetensors"]:
        left, right = load_file(folder / file), load_file(other / file)
        assert left.keys() == right.keys()
        assert [key for key in left if not torch.equal(left[key], right[key])] == [], file
        assert (folder / file).read_bytes() == (other / file).read_bytes(), file
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert steps == [
        json.loads(line)["step"] for line in (other / "log.jsonl").read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Flags of data with 25 conversations, 7 updates per epoch, and of 3 held-out ones."""
    folder = tmp_path_factory.mktemp("chats")
    for name, number in (("train", 25), ("test", 3)):
        lines = (ROOT / f"assets/chat/{name}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:number]))
    return ("--dataset_name", folder)


@pytest.fixture(scope="module")
def whole(forks, chats, tmp_path_factory):
    """A run that was not stopped, one that resumes it, and one that resumes the resumed one."""
    folder = tmp_path_factory.mktemp("whole")
    flags = (*FLAGS, *WHOLE, *chats)
    command = ("chat_sft", *flags, "--output_dir", folder / "whole")
    [(code, output)] = run_single(forks, folder, command)
    assert code == 0, output
    runs = (("once", "whole", STOP), ("twice", "once", 2 * STOP), ("older", "whole", STOP))
    for name, source, step in runs:
        target = go_on(folder / name, folder / source, step)
        if name == "older":
            make_older(target / f"checkpoint-{step}")
        command = ("chat_sft", *flags, *ON, "--output_dir", target)
        [(code, output)] = run_single(forks, folder, command)
        assert code == 0, output
        assert (
            f"Resumed from {target}/checkpoint-{step}, after update {step} of {UPDATES}." in output
        )
    return folder


@pytest.mark.parametrize("name", ["once", "twice", "older"])
def test_one_process_goes_on(whole, name):
    assert_same(whole / name, whole / "whole", 1)


# test_resume_elsewhere.py resumes under ZeRO-3 in the default suite
STRATEGIES = ["zero2", "zero3", "fsdp1", "fsdp2"]
SLOW = [pytest.param(strategy, marks=pytest.mark.slow) for strategy in STRATEGIES]


@pytest.mark.parametrize("strategy", ["ddp", *SLOW])
def test_two_processes_go_on(launch, chats, strategy, tmp_path):
    flags = (*FLAGS, *chats, "--per_device_train_batch_size", 1)
    launch("chat_sft", strategy, *flags, "--output_dir", tmp_path / "whole", processes=2)
    target = go_on(tmp_path / "once", tmp_path / "whole", STOP)
    launch("chat_sft", strategy, *flags, *ON, "--output_dir", target, processes=2)
    assert_same(target, tmp_path / "whole", 2)


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])  # each of two processes reads its share of the files
def test_a_changed_file_is_found_by_the_process_that_reads_it(
    whole, launch, chats, tmp_path, number
):
    target = go_on(tmp_path / "run", whole / "whole", STOP)
    names = list(json.loads((target / f"checkpoint-{STOP}/state.json").read_text())["files"])
    file = target / f"checkpoint-{STOP}" / names[number]
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    flags = (*FLAGS, *chats, *ON, "--per_device_train_batch_size", 1, "--output_dir", target)
    done = launch("chat_sft", "ddp", *flags, processes=2, code=None)
    [error] = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and f"{file} is missing or is not what was written" in error


def test_checkpoint_holds_what_is_trained_and_no_pickle(whole):
    folder = whole / f"whole/checkpoint-{STOP}"
    suffixes = {file.suffix for file in folder.iterdir()}
    assert suffixes == {".safetensors", ".json", ".jinja"}
    trained = read_metrics(whole / "whole")["trainable_parameters"]
    with safe_open(folder / "process-00000-of-00001.safetensors", framework="pt") as file:
        values = [
            file.get_slice(name).get_shape() for name in file.keys() if name.endswith(".value")
        ]
    assert sum(torch.Size(shape).numel() for shape in values) == trained
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert (
        size < 4 * 4 * trained + 2**17
    )  # adapter, values and two moments, in float32, and some kB of states


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGUSR1", marks=pytest.mark.slow)])
def test_signal_saves_and_stops(forks, environment, chats, tmp_path, name):
    """Sent while it trains; the resumed run then ends like one that was not stopped."""
    flags = (*FLAGS[:5], *WHOLE, *chats)
    flags += ("--max_steps", 12, "--num_samples", 0, "--logging_steps", 1)
    flags += ("--eval_strategy", "steps", "--eval_steps", 1)  # due in whatever update it arrives
    flags = list(map(str, flags))
    command = [sys.executable, "examples/chat_sft.py", *flags, "--save_strategy", "epoch"]
    environment = environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    output = tmp_path / "output.txt"
    stopped = subprocess.Popen(
        [*command, "--output_dir", tmp_path / "run"],
        cwd=ROOT,
        env=environment,
        stdout=output.open("w"),
        stderr=subprocess.STDOUT,
    )
    while stopped.poll() is None and '"step": 2' not in read(tmp_path / "run/log.jsonl"):
        time.sleep(0.02)
    stopped.send_signal(getattr(signal, name))
    assert stopped.wait(timeout=LIMIT) == 0, output.read_text()
    steps = {int(path.name.split("-")[1]) for path in (tmp_path / "run").glob("checkpoint-*")}
    step = max(steps)
    assert steps <= {7, step} and step < 12  # update 7 ends an epoch
    assert (
        f"Stopped by {name} after update {step} of 12: --resume_from_checkpoint True resumes"
        in output.read_text()
    )
    assert not (tmp_path / "run/metrics.json").exists()
    whole = ("chat_sft", *flags, "--save_strategy", "epoch", "--output_dir", tmp_path / "whole")
    rest = ("chat_sft", *flags, "--save_strategy", "epoch", *ON, "--output_dir", tmp_path / "run")
    for code, text in run_single(forks, tmp_path, whole, rest, side_by_side=2):
        assert code == 0, text
    assert_same(tmp_path / "run", tmp_path / "whole", 1)


def read(file):
    return file.read_text() if file.is_file() else ""


@pytest.mark.slow
def test_signal_to_the_launcher_stops_all_processes(environment, tmp_path):
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        "--main_process_port",
        "0",
    ]
    command += [
        "--config_file",
        "configs/ddp.yaml",
        "examples/chat_sft.py",
        "--use_peft_lora",
        "--max_steps",
        "1000",
    ]
    command += ["--eval_strategy", "no", "--output_dir", str(tmp_path / "run")]
    with (tmp_path / "output.txt").open("w") as output:
        launcher = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output
        )
    while launcher.poll() is None and '"step": 5' not in read(tmp_path / "run/log.jsonl"):
        time.sleep(0.02)
    launcher.terminate()
    launcher.wait(timeout=LIMIT)
    text = (tmp_path / "output.txt").read_text()
    newest = max(int(path.name.split("-")[1]) for path in (tmp_path / "run").glob("checkpoint-*"))
    assert (
        f"Stopped by SIGTERM after update {newest} of 1000: --resume_from_checkpoint True" in text
    ), text


@pytest.mark.slow  # test_resume_lesson.py kills in a save in the default suite
def test_killed_at_random_moments(environment):
    command = [sys.executable, "benchmarks/kill.py", "--kills", "20", "--seed", str(os.getpid())]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 kill" in done.stdout and "bit for bit" in done.stdout
