"""How long a newcomer waits: from the launch of the main job to its first update and to its end.

Run:  python benchmarks/first_run.py [--repeat 3]

The main job is the README's first command, on its defaults: seq2seq_lora_zero3_offload.py under zero3_offload on two
processes. The first launch goes to an empty folder of compiled extensions, so that its difference from the later ones
is the one-time compilation of DeepSpeed's CPU Adam. The peer is the same script on one process without DeepSpeed
(seq2seq_lora.py under single), run in turn with it. Prints minimum and median; goals: 40 s and 120 s on 2 cores.
"""

import argparse
import datetime
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
JOBS = {"zero3_offload": "seq2seq_lora_zero3_offload", "single": "seq2seq_lora"}
GOALS = (40, 120)  # seconds to the first update and to the end, compilation apart


def run(config, folder):
    """Launch a job and return the seconds to its first update, shown by the progress bar, and to its end."""
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
        f"examples/{JOBS[config]}.py",
        "--output_dir",
        folder / "out",
    ]
    environment = os.environ | {
        "TORCH_EXTENSIONS_DIR": str(folder.parent / "extensions"),
        "PYTHONUNBUFFERED": "1",
    }
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output, first = b"", None
    while chunk := os.read(process.stdout.fileno(), 4096):
        output += chunk
        if first is None and re.search(rb"\d(it/s|s/it)\]", output):
            first = time.perf_counter() - start
    end = time.perf_counter() - start
    if process.wait() != 0 or first is None:
        sys.exit(f"error: {JOBS[config]} under {config} failed:\n{output.decode(errors='replace')}")
    return first, end


def cpu():
    """Return the CPU's name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in info.read_text().splitlines()
        if line.startswith("model name")
    ]
    return names[0] if names else platform.processor()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--repeat", type=int, default=3, help="launches of each job after the first"
    )
    repeat = parser.parse_args().repeat
    times = {config: [] for config in JOBS}
    with tempfile.TemporaryDirectory() as temporary:
        first_launch = run("zero3_offload", Path(temporary) / "first")
        for number in range(repeat):
            for config in JOBS:  # in turn, so that noise of the machine meets both
                times[config].append(run(config, Path(temporary) / f"{config}{number}"))
    print(
        f"{datetime.date.today()}, {os.cpu_count()} cores, {cpu()}, {repeat} launches of each job in turn"
    )
    medians = {}
    for config, pairs in times.items():
        for what, seconds, goal in zip(("first update", "end"), zip(*pairs), GOALS):
            medians[config, what] = median = statistics.median(seconds)
            line = f"{config:14} launch to {what:12} minimum {min(seconds):6.1f} s  median {median:6.1f} s"
            print(line + (f"  goal {goal} s" if config == "zero3_offload" else ""))
    ratio = medians["zero3_offload", "end"] / medians["single", "end"]
    print(f"ratio zero3_offload / single, to the end, of medians: {ratio:.2f}")
    compilation = first_launch[0] - medians["zero3_offload", "first update"]
    print(
        f"first launch of all: {first_launch[0]:.1f} s to the first update, of which compilation {compilation:.1f} s"
    )


if __name__ == "__main__":
    main()
