"""Kill chat_sft at random moments, also while it saves, and check what every kill leaves behind.

    python benchmarks/kill.py --kills 200

A run that saves a checkpoint after every update is killed with SIGKILL, resumed, and killed again.
A kill hits all processes at once, or one of them. After each kill every folder with the name of a
checkpoint must be complete, byte by byte, and the newest one must not be older than before. At the
end the losses must be bit-identical to those of a run that was not killed. If a check fails, the
command says so and ends with exit code 1.
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
from benchmarks.first_run import ACCELERATE  # noqa: E402
from utils.checkpoint import checkpoints, read_state  # noqa: E402

# a constant learning rate does not depend on the number of updates
RUN = """--use_peft_lora --lora_dropout 0.1 --gradient_accumulation_steps 2 --eval_strategy no
--per_device_train_batch_size 1 --max_length 64 --save_strategy steps --save_steps 1
--lora_target_modules q_proj --logging_strategy no --save_total_limit 3
--lr_scheduler_type constant""".split()


def start(config, processes, updates, folder, *arguments):
    """Start the run and return its launcher."""
    command = [sys.executable, *ACCELERATE, "--config_file", f"configs/{config}.yaml"]
    command += ["--num_processes", str(processes), "examples/chat_sft.py"]
    command += [*RUN, "--max_steps", str(updates), "--output_dir", str(folder), *arguments]
    with open(f"{folder}.log", "w") as log:  # a pipe would fill up
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def running(folder):
    """Return the ids of the processes whose command lines name the folder, the launcher's first."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return sorted(found)


def kill(process, folder, only_one):
    """Kill a run, and return when all its processes have ended.

    Args:
        process: the launcher.
        only_one: kill one of the training processes, which the launcher must notice; else all.
    """
    workers = [number for number in running(folder) if number != process.pid]
    for number in [random.choice(workers)] if only_one else [process.pid, *workers]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    process.wait(timeout=600)
    while running(folder):
        time.sleep(0.05)


def latest(folder):
    """Return the update of the newest folder with the name of a checkpoint; 0 without one."""
    return max((int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")), default=0)


def look(folder):
    """Check that all checkpoints are complete; return the update of the newest, 0 without one."""
    for path in folder.glob("checkpoint-*"):
        if path not in checkpoints(folder):
            raise SystemExit(f"{path.name} has the name of a checkpoint but is not one")
        read_state(path)  # reads every byte; raises CheckpointError if one is wrong
    return latest(folder)


def digests(folder):
    """Return name -> size and SHA-256 of the safetensors files of a checkpoint."""
    files = json.loads((folder / "state.json").read_text())["files"]
    return {name: facts for name, facts in files.items() if name.endswith(".safetensors")}


def updates_of(folder, step):
    """Return loss, learning rate, gradient norm and tokens of every update up to a checkpoint."""
    return json.loads((folder / f"checkpoint-{step}" / "state.json").read_text())["updates"]


def kill_repeatedly(options, folder):
    """Start or resume a run and kill it, again and again, and check every time what is left.

    Returns:
        the update of the newest checkpoint, and how many kills hit a save or a removal.
    """
    newest, inside = 0, 0
    resume = ("--resume_from_checkpoint", "True")
    for number in range(options.kills):
        process = start(options.config, options.num_processes, 10**6, folder, *resume)
        while process.poll() is None and latest(folder) <= newest:
            time.sleep(0.02)
        time.sleep(random.uniform(0, options.seconds))
        if process.poll() is not None:
            raise SystemExit("the run ended by itself:\n" + Path(f"{folder}.log").read_text())
        kill(process, folder, only_one=number % 2 == 1)
        inside += any(folder.glob(".checkpoint-*"))
        before, newest = newest, look(folder)
        if newest <= before:
            reason = f"the newest checkpoint was of update {before} and is now of {newest}"
            raise SystemExit(reason)
        print(f"kill {number + 1}: update {newest}", flush=True)
    return newest, inside


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="number of kills")
    parser.add_argument("--config", default="ddp", help="name of a file in configs/")
    parser.add_argument("--num_processes", type=int, default=2, help="processes of the run")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="longest time between a save and the next kill"
    )
    options = parser.parse_args()
    random.seed(options.seed)
    with tempfile.TemporaryDirectory() as parent:
        folder, alone = Path(parent) / "killed", Path(parent) / "alone"
        newest, inside = kill_repeatedly(options, folder)
        process = start(options.config, options.num_processes, newest, alone)
        if process.wait() or updates_of(folder, newest) != updates_of(alone, newest):
            log = Path(f"{alone}.log").read_text()
            raise SystemExit(f"the run that was not killed has other losses:\n{log}")
        one, other = (digests(path / f"checkpoint-{newest}") for path in (folder, alone))
        if one != other:
            names = sorted(name for name in one if one[name] != other[name])
            raise SystemExit(f"files differ: {names}")
    print(f"{options.kills} kills, {inside} of them during a save or a removal:")
    print(f"no checkpoint was lost or incomplete. After {newest} updates losses, adapter and")
    print("optimizer equal those of a run that was not killed, bit for bit.")


if __name__ == "__main__":
    main()
