"""What a machine is: versions, files of the repository, memory, GPUs, variables and folders."""

import hashlib
import importlib.metadata
import os
import platform
import re
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("examples", "utils", "tools", "configs")
# NCCL_SOCKET_IFNAME and the like may differ: an interface has another name on another machine
VARIABLES = re.compile(
    r"(NCCL|TORCH_NCCL|GLOO)_(?!SOCKET_IFNAME)|HF_HUB_OFFLINE$|CUDA_DEVICE_ORDER$"
)
LAUNCHED = ("--num_machines", "--num_processes")  # without the same, the processes never connect


@dataclass
class Report:
    """What is known of a machine.

    Attributes:
        clock: seconds by which its clock is ahead of machine 0's.
        shared: name of a folder -> whether it is the same as machine 0's, or an error as text.
    """

    rank: int
    address: str
    facts: dict
    clock: float
    shared: dict

    def name(self):
        return f"machine {self.rank} ({self.facts['host']})"


def gather_facts(machines, processes):
    """Return name -> value. What is in `same` should be equal on all machines.

    Args:
        machines, processes: how many were launched, on all machines together.
    """
    memory = psutil.virtual_memory()
    return {
        "host": socket.gethostname(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": [memory.available, memory.total],
        "number of GPUs": len(found := gpus()),
        "same": {
            **dict(zip(LAUNCHED, (machines, processes))),
            "Python": platform.python_version(),
            **versions(),
            "files of this repository": hash_of_repository(),
            "GPUs": counted(found),
            **{name: value for name, value in os.environ.items() if VARIABLES.match(name)},
        },
    }


def versions():
    """Return library -> version of all that requirements.txt names."""
    names = re.findall(r"^[\w-]+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def hash_of_repository():
    """Return a short hash of the scripts, their helpers and the configs."""
    digest = hashlib.sha256()
    for part in PARTS:
        for path in sorted((ROOT / part).rglob("*")):
            if path.suffix in (".py", ".yaml", ".json"):
                digest.update(f"{path.relative_to(ROOT)}\0".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def gpus():
    """Return a line for each GPU that NVIDIA's driver names: its name, memory and driver."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines()]


def counted(lines):
    """Return lines as one text, equal ones with their number."""
    return "; ".join(f"{lines.count(line)} x {line}" for line in dict.fromkeys(lines)) or "none"


def differences(reports):
    """Return a line for each fact that is not the same on all machines."""
    lines = []
    names = dict.fromkeys(name for report in reports for name in report.facts["same"])
    for name in names:
        places = {}
        for report in reports:
            value = report.facts["same"].get(name, "not set")
            places.setdefault(value, []).append(report.name())
        if len(places) > 1:
            told = ", ".join(f"{value} on {' and '.join(on)}" for value, on in places.items())
            lines.append(f"{name}: {told}")
    return lines


# Folders ------------------------------------------------------------------------------------------
def folders(output):
    """Return name -> folder of what machines may share: the output folder, and caches."""
    from huggingface_hub.constants import HF_HOME

    extensions = os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")
    found = {"output folder": output} if output else {}
    found |= {"Hugging Face cache": HF_HOME, "compiled extensions": extensions}
    return {name: Path(path).expanduser().resolve() for name, path in found.items()}


def mark(folder, word):
    """Write a hidden file into the folder, or into its nearest parent that exists.

    Returns:
        The file, or the error as text.
    """
    while not folder.is_dir():
        folder = folder.parent
    file = folder / f".preflight-{word}"
    try:
        file.touch(exist_ok=False)
    except OSError as error:
        return f"{folder} is not writable ({error.strerror})"
    return file


def sees(folder, word):
    """Return whether the file of another machine's `mark` is in this folder or above it."""
    return any((parent / f".preflight-{word}").exists() for parent in (folder, *folder.parents))
