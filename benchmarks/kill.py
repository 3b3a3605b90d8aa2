"""Kill chat_sft again and again at random moments, saves included, and look at what each kill leaves.

    python benchmarks/kill.py --kills 200

A run of many updates, with a checkpoint after each, is killed with SIGKILL, resumed, killed again. Every kill hits all
processes at once or one of them. After each: every folder that bears a checkpoint's name is whole, byte by byte, and
the newest one is not older than before. At the end the losses of the run that was killed all along are those of one
that was left alone, bit for bit. Exit code 1 and a sentence where any of that does not hold.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from utils.checkpoint import checkpoints, read_state  # noqa: E402

RUN = (
    "--use_peft_lora",
    "--lora_dropout",
    "0.1",
    "--gradient_accumulation_steps",
    "2",
    "--eval_strategy",
    "no",
)
RUN += (
    "--per_device_train_batch_size",
    "1",
    "--max_length",
    "64",
    "--save_strategy",
    "steps",
    "--save_steps",
    "1",
)
RUN += ("--lora_target_modules", "q_proj", "--logging_strategy", "no", "--save_total_limit", "3")
RUN += ("--lr_scheduler_type", "constant")  # so that the rates do not depend on where the run ends


def start(config, processes, updates, folder, *arguments):
    """Start the run and return its launcher."""
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
        f"configs/{config}.yaml",
        "--num_processes",
        str(processes),
        "examples/chat_sft.py",
    ]
    command += [*RUN, "--max_steps", str(updates), "--output_dir", str(folder), *arguments]
    with open(f"{folder}.log", "w") as log:  # no pipe, which would be full one day
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def running(folder):
    """Return the process ids whose command line holds the folder: the launcher, first, and what it started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # gone by now
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return sorted(found)


def kill(process, folder, only_one):
    """Kill one process that trains, whose end the launcher must notice, or all at once; return when all are gone."""
    trains = [number for number in running(folder) if number != process.pid]
    for number in [random.choice(trains)] if only_one else [process.pid, *trains]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    process.wait(timeout=600)
    while running(folder):
        time.sleep(0.05)


def latest(folder):
    """Return the update of the newest folder with a checkpoint's name, 0 without one."""
    return max((int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")), default=0)


def look(folder):
    """Return the update of the newest checkpoint, 0 without one; each folder of such a name must be whole."""
    for path in folder.glob("checkpoint-*"):
        if path not in checkpoints(folder):
            raise SystemExit(f"{path.name} bears the name of a checkpoint and is none")
        read_state(
            path
        )  # reads every byte of it; CheckpointError where one is not what was written
    return latest(folder)


def digests(folder):
    """Return name -> bytes and SHA-256 of the safetensors of a checkpoint."""
    files = json.loads((folder / "state.json").read_text())["files"]
    return {name: facts for name, facts in files.items() if name.endswith(".safetensors")}


def updates_of(folder, step):
    """Return loss, rate, norm and tokens of every update, as a checkpoint holds them."""
    return json.loads((folder / f"checkpoint-{step}" / "state.json").read_text())["updates"]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--config", default="ddp", help="name of a file in configs/")
    parser.add_argument("--num_processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="a kill comes this long after a save at most"
    )
    options = parser.parse_args()
    random.seed(options.seed)
    with tempfile.TemporaryDirectory() as parent:
        folder, newest, inside = Path(parent) / "killed", 0, 0
        for number in range(options.kills):
            process = start(
                options.config,
                options.num_processes,
                10**6,
                folder,
                "--resume_from_checkpoint",
                "True",
            )
            while process.poll() is None and latest(folder) <= newest:
                time.sleep(0.02)
            time.sleep(random.uniform(0, options.seconds))
            if process.poll() is not None:
                raise SystemExit("the run ended by itself:\n" + Path(f"{folder}.log").read_text())
            kill(process, folder, only_one=number % 2 == 1)
            inside += any(folder.glob(".checkpoint-*"))
            before, newest = newest, look(folder)
            if newest <= before:
                raise SystemExit(
                    f"the newest checkpoint was that of update {before}, and is that of {newest} now"
                )
            print(f"kill {number + 1}: update {newest}", flush=True)
        alone = Path(parent) / "alone"
        process = start(options.config, options.num_processes, newest, alone)
        if process.wait() or updates_of(folder, newest) != updates_of(alone, newest):
            raise SystemExit(
                "the run that was left alone has other losses:\n" + Path(f"{alone}.log").read_text()
            )
        one, other = (digests(path / f"checkpoint-{newest}") for path in (folder, alone))
        if one != other:
            raise SystemExit(
                f"files differ: {sorted(name for name in one if one[name] != other[name])}"
            )
    print(
        f"{options.kills} kills, {inside} of them inside a save or a removal: no checkpoint was lost or half, and"
    )
    print(
        f"after {newest} updates losses, adapter and optimizer are those of the run that was left alone, bit for bit"
    )


if __name__ == "__main__":
    main()
