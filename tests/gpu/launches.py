"""Launch scripts as users do, with one process, or with two that may share a GPU.

NCCL does not allow two processes on one GPU. Two processes on one GPU are therefore launched as two
machines of one process each, and TESTS_GPU_BACKEND selects the gloo backend. Each machine has its
own cache. With two GPUs, one launch starts both processes, and they use NCCL. Without a GPU, the
two machines run on the CPU.
"""

import fcntl
import json
import math
import os
import random
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ACCELERATE = (sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch")
DROPPED = ("ACCELERATE_", "FSDP_", "OMP_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_")
COMPARED = ("losses", "grad_norms", "learning_rates")


def count_gpus():
    """Return the number of GPUs. tests/gpu/run.py passes it to its steps in TEST_GPUS."""
    if "TEST_GPUS" in os.environ:
        return int(os.environ["TEST_GPUS"])
    import torch

    return torch.cuda.device_count()


GPUS = count_gpus()


@dataclass
class Run:
    """A launch of a script. Its output folder is runs/NAME in a work folder."""

    name: str
    script: str  # name of a script in examples/, or the path of a .py file
    config: str  # name of a config in configs/, or the path of a .yaml file
    arguments: tuple = ()
    processes: int = 1
    precision: str = "no"
    shared: bool = False  # several steps compare with this run; the first of them launches it
    before: Callable | None = None  # called before the launch
    output: str = "--output_dir"  # the flag that gets the name of the output folder, or of a file

    def commands(self, work):
        """Return the command of each machine."""
        config = self.config if self.config.endswith(".yaml") else f"configs/{self.config}.yaml"
        machines = 2 if self.processes == 2 and GPUS < 2 else 1
        port = free_port() if machines == 2 else 0
        output = (self.output, work / "runs" / self.name)
        commands = []
        for machine in range(machines):
            words = [*ACCELERATE, "--config_file", config, "--num_processes", self.processes]
            words += ["--mixed_precision", self.precision, "--main_process_port", port]
            if machines == 2:
                words += ["--num_machines", 2, "--machine_rank", machine]
                words += ["--main_process_ip", "127.0.0.1"]
            script = self.script if self.script.endswith(".py") else f"examples/{self.script}.py"
            words += [script, *self.arguments, *output]
            commands.append([str(word) for word in words])
        return commands

    def environment(self, work, machine, machines):
        """Return a machine's environment variables; each machine has its own cache folder."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(DROPPED)}
        folder = work / "huggingface" / str(machine)
        kept |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder), "PYTHONUNBUFFERED": "1"}
        if machines == 2:
            kept = {"GLOO_SOCKET_IFNAME": "lo"} | kept
            kept |= {"TESTS_GPU_BACKEND": "gloo"}
        return kept


def free_port():
    """Return a free port below the range that systems use for outgoing connections."""
    while True:
        port = random.randint(20_000, 30_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):  # no server listens there
                return port


def run(work, one):
    """Launch a Run, unless it is shared and has been launched. Return its metrics."""
    if not one.shared:
        return launch(work, one)
    locks = work / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with (locks / one.name).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        file = work / "runs" / one.name / "metrics.json"
        return json.loads(file.read_text()) if file.is_file() else launch(work, one)


def launch(work, one):
    """Launch a Run and return its metrics. Its output is written to this process's stdout."""
    commands = one.commands(work)
    machines = []
    for number, command in enumerate(commands):
        print(shlex.join(command), flush=True)
        variables = one.environment(work, number, len(commands))
        machines.append(subprocess.Popen(command, cwd=ROOT, env=variables))
    wait_for(machines)
    codes = [machine.returncode for machine in machines]
    assert not any(codes), f"{one.name} ended with exit codes {codes}"
    metrics = json.loads((work / "runs" / one.name / "metrics.json").read_text())
    assert metrics["num_processes"] == one.processes, metrics["num_processes"]
    assert metrics["mixed_precision"] == one.precision, metrics["mixed_precision"]
    assert GPUS == 0 or metrics["device"] != "cpu", metrics["device"]
    for key in COMPARED:
        assert metrics[key] and all(map(math.isfinite, metrics[key])), f"{key}: {metrics[key]}"
    return metrics


def wait_for(machines):
    """Wait until all launchers have ended. If one fails, end the others, which would hang."""
    while any(machine.poll() is None for machine in machines):
        if any(machine.returncode for machine in machines):
            time.sleep(10)  # the others may print errors of their own
            for machine in machines:
                machine.terminate()  # then a launcher ends its processes
            for machine in machines:
                try:
                    machine.wait(10)
                except subprocess.TimeoutExpired:
                    machine.kill()
        time.sleep(0.1)


def difference(ours, theirs):
    """Return the largest relative difference between two lists of numbers."""
    assert len(ours) == len(theirs) > 0, (len(ours), len(theirs))
    pairs = zip(ours, theirs)
    return max(abs(one - other) / max(abs(other), 1e-12) for one, other in pairs)


def compare(metrics, reference, tolerance):
    """Assert that two runs have equal training curves. Return a line with the largest differences.

    Args:
        tolerance: the largest relative difference allowed.
    """
    found = {key: difference(metrics[key], reference[key]) for key in COMPARED}
    line = ", ".join(f"{key} differ by {value:.1e}" for key, value in found.items())
    assert max(found.values()) <= tolerance, f"{line}, more than {tolerance:.0e}"
    return line
