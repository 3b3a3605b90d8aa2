"""What the tests share: the real launch of a script, small random models, small data."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the repetitions that are marked slow, too")


def pytest_collection_modifyitems(config, items):
    skips = {"gpu": (not torch.cuda.is_available(), "needs a GPU")}
    skips["slow"] = (not config.getoption("--all"), "slow: runs with --all")
    for item in items:
        for marker, (skip, reason) in skips.items():
            if skip and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """The environment of a fresh machine without a network: caches of its own, no activated virtual environment."""
    home = tmp_path_factory.mktemp("home")
    dropped = ("ACCELERATE_", "HF_", "FSDP_", "OMP_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    path = [folder for folder in kept["PATH"].split(os.pathsep) if folder != str(Path(sys.executable).parent)]
    return kept | {
        "PATH": os.pathsep.join(path),
        "HF_HOME": str(home / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",  # two processes run also where there is one GPU; tests/gpu says otherwise
        # a killed compilation of another run leaves a lock in the shared folder, on which every later run would wait
        "TORCH_EXTENSIONS_DIR": str(home / "torch_extensions"),
    }


@pytest.fixture(scope="session")
def launch(environment):
    """Run a script through the real `accelerate launch` and return the finished process, its output as one text.

    launch("causal_lm_lora", "ddp", "--max_steps", 2, processes=2) runs examples/causal_lm_lora.py with
    configs/ddp.yaml; both may be paths. `flags` go to accelerate itself. A code other than `code` fails the test.
    """

    def run(script, config, *arguments, processes=None, flags=(), code=0, cwd=ROOT, timeout=300, **extra):
        script = script if str(script).endswith(".py") else ROOT / "examples" / f"{script}.py"
        config = config if str(config).endswith(".yaml") else ROOT / "configs" / f"{config}.yaml"
        command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", config]
        command += ["--main_process_port", 0, *flags]
        command += [] if processes is None else ["--num_processes", processes]
        command = [str(word) for word in (*command, script, *arguments)]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(command, cwd=cwd, env=environment | extra, **streams)
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # the launcher then ends its processes, which SIGKILL would leave behind
            process.communicate()
            raise
        if code is not None:
            assert process.returncode == code, f"exit code {process.returncode}\n{' '.join(command)}\n{output}"
        return subprocess.CompletedProcess(command, process.returncode, output)

    return run


def read_metrics(folder):
    """Return the metrics.json of a run."""
    return json.loads((Path(folder) / "metrics.json").read_text())


def write_csv(path, rows, columns=("Tweet text", "Label")):
    """Write rows of cells as a .csv with a header and return its path."""
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return path
