"""Measure how long a new user waits: from a launch to the first update, and to the end.

Run:  python benchmarks/first_run.py [--repeat 3]

The job is the README's first command with its defaults: seq2seq_lora_zero3_offload.py under
zero3_offload, on two processes. The first launch starts with an empty folder of compiled
extensions, so it takes longer than the later ones by the one-time compilation of DeepSpeed's CPU
Adam. For comparison, seq2seq_lora.py runs on one process without DeepSpeed (under single), in turn
with it. Prints minimum and median. Goals on 2 cores: 40 s to the first update, 120 s to the end.
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
ACCELERATE = ["-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"]
GOALS = (40, 120)  # seconds to the first update and to the end, without compilation


def run(config, folder):
    """Launch a job; return the seconds to its first update and to its end.

    The first update is when the progress bar shows a rate.
    """
    command = [sys.executable, *ACCELERATE, "--config_file", f"configs/{config}.yaml"]
    command += [f"examples/{JOBS[config]}.py", "--output_dir", folder / "out"]
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(folder.parent / "extensions")}
    environment["PYTHONUNBUFFERED"] = "1"
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **streams)
    output, first = b"", None
    while chunk := os.read(process.stdout.fileno(), 4096):
        output += chunk
        if first is None and re.search(rb"\d(it/s|s/it)[\],]", output):
            first = time.perf_counter() - start
    end = time.perf_counter() - start
    if process.wait() != 0 or first is None:
        sys.exit(f"error: {JOBS[config]} under {config} failed:\n{output.decode(errors='replace')}")
    return first, end


def cpu():
    """Return the name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--repeat", type=int, default=3, help="launches of each job after the first"
    )
    repeat = parser.parse_args().repeat
    times = {config: [] for config in JOBS}
    with tempfile.TemporaryDirectory() as temporary:
        first_launch = run("zero3_offload", Path(temporary) / "first")
        for number in range(repeat):
            for config in JOBS:  # in turn, so that noise affects both
                times[config].append(run(config, Path(temporary) / f"{config}{number}"))
    machine = f"{datetime.date.today()}, {os.cpu_count()} cores, {cpu()}"
    print(f"{machine}, {repeat} launches of each job in turn")
    medians = {}
    for config, pairs in times.items():
        for what, seconds, goal in zip(("first update", "end"), zip(*pairs), GOALS):
            medians[config, what] = median = statistics.median(seconds)
            line = f"{config:14} launch to {what:12} "
            line += f"minimum {min(seconds):6.1f} s  median {median:6.1f} s"
            print(f"{line}  goal {goal} s" if config == "zero3_offload" else line)
    ratio = medians["zero3_offload", "end"] / medians["single", "end"]
    print(f"ratio zero3_offload / single of the medians to the end: {ratio:.2f}")
    first = first_launch[0]
    compilation = first - medians["zero3_offload", "first update"]
    print(f"very first launch: {first:.1f} s to the first update, {compilation:.1f} s compiling")


if __name__ == "__main__":
    main()
