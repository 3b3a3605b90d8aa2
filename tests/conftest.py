"""Shared fixtures and helpers: real and forked launches of scripts, metrics and CSV files."""

import contextlib
import csv
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from fork_server import LIMIT, ForkServer

ROOT = Path(__file__).resolve().parents[1]
ACCELERATE = ("-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", 0)
BUILD = """
import atexit, pathlib, sys
atexit.register(pathlib.Path(sys.argv[1]).touch)
from deepspeed.ops.op_builder import CPUAdamBuilder
CPUAdamBuilder().load(verbose=False)
"""
BUILD_LIMIT = 600  # seconds
# start before the other files
LONGEST = """test_chat test_resume test_runs test_parity test_nvme test_failures test_predict
test_resume_elsewhere test_sharded_loading test_cases_saving test_saving test_machines""".split()
# prefixes of environment variables that a fresh machine does not have
DROPPED = tuple("ACCELERATE_ HF_ FSDP_ OMP_ RANK LOCAL_RANK WORLD_SIZE MASTER_ VIRTUAL_ENV".split())

# More threads than cores wait for each other: two workers would slow down each other's processes.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # the same for processes that tests start without a launcher


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also run the tests marked as slow")
    parser.addoption("--extensions", help="folder that keeps the built CPU Adam for later runs")


def pytest_collection_modifyitems(config, items):
    skips = {"gpu": (not torch.cuda.is_available(), "needs a GPU")}
    skips["slow"] = (not config.getoption("--all"), "slow: runs with --all")
    for item in items:
        for marker, (skip, reason) in skips.items():
            if skip and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
    # files without launches come first: the extension is built in the meantime
    launching = {item.path for item in items if "environment" in item.fixturenames}
    items.sort(key=lambda item: (item.path in launching, item.path.stem not in LONGEST))


def pytest_collection_finish():
    """Exclude all imported objects from garbage collection: tests and scripts collect often."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter):
    """Print the seconds of each test file, setup and teardown included."""
    seconds = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid.partition("::")[0]] += report.duration
    terminalreporter.section("seconds per test file")
    for file, duration in seconds.most_common():
        terminalreporter.write_line(f"{duration:8.1f}  {file}")
    terminalreporter.write_line(f"{seconds.total():8.1f}  all files")


@pytest.fixture(scope="session", autouse=True)
def started(request, tmp_path_factory):
    """Start the build and the fork server in the background, if a selected test launches a script.

    Yields:
        The environment variables of a launch and the fork server, or None without launches.
    """
    items = [item for item in request.session.items if not item.get_closest_marker("skip")]
    if not any("environment" in item.fixturenames for item in items):
        yield None
        return
    shared = tmp_path_factory.getbasetemp()
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    shared = shared.parent if is_worker else shared  # it contains the folders of all workers
    kept = {name: value for name, value in os.environ.items() if not name.startswith(DROPPED)}
    python_folder = str(Path(sys.executable).parent)
    path = [folder for folder in kept["PATH"].split(os.pathsep) if folder != python_folder]
    extensions = request.config.getoption("--extensions") or shared / "torch_extensions"
    environment = kept | {
        "PATH": os.pathsep.join(path),
        "HF_HOME": str(tmp_path_factory.mktemp("huggingface")),
        "HF_HUB_OFFLINE": "1",
        # no GPU: two processes can run on a machine with one GPU; tests/gpu overrides this
        "CUDA_VISIBLE_DEVICES": "",
        # not the default folder: there, a killed compilation may have left a lock, on which every
        # later run waits
        "TORCH_EXTENSIONS_DIR": str(extensions),
    }
    if not torch.cuda.is_available():  # on a GPU the scripts choose the number of threads
        environment["OMP_NUM_THREADS"] = "1"
    compiler, path = ROOT / "tests/compiler/c++", environment["PATH"]
    is_usable = shutil.which("c++", path=path) and os.access(compiler, os.X_OK)
    if is_usable and " " not in str(compiler):  # ninja would split the path there
        environment.setdefault("CXX", str(compiler))
    build = start_build(environment)
    forks = ForkServer(environment, tmp_path_factory.mktemp("forks"))
    yield environment, forks
    forks.close()
    if build:
        with contextlib.suppress(subprocess.TimeoutExpired):
            build.wait(BUILD_LIMIT if is_worker else 0)  # another worker may need the extension
        if build.poll() is None:
            os.killpg(build.pid, signal.SIGKILL)
            build.wait()


def start_build(environment):
    """Start building DeepSpeed's CPU Adam and return the process; None if another worker did so."""
    folder = Path(environment["TORCH_EXTENSIONS_DIR"])
    try:
        folder.mkdir()
    except FileExistsError:
        return None
    # DeepSpeed builds with ninja, which is installed beside python
    path = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    with (folder / "output.txt").open("w") as output:
        streams = {"stdout": output, "stderr": output, "start_new_session": True}
        command = [sys.executable, "-c", BUILD, folder / "done"]
        return subprocess.Popen(command, env=environment | {"PATH": path}, **streams)


@pytest.fixture(scope="session")
def environment(started):
    """Environment variables as on a fresh machine: no network, empty caches, no activated venv.

    Only the number of threads and the compiler are set, to save time.

    The fixture waits at most BUILD_LIMIT seconds for the build of DeepSpeed's CPU Adam. If the
    build fails, it prints the compiler output, and the tests run without the extension.
    """
    environment, _ = started
    folder, begin = Path(environment["TORCH_EXTENSIONS_DIR"]), time.monotonic()
    while not (folder / "done").exists():
        if time.monotonic() - begin > BUILD_LIMIT:
            pytest.fail(f"CPU Adam was not built in {BUILD_LIMIT} s: see {folder}/output.txt")
        time.sleep(0.1)
    if not list(folder.glob("*/cpu_adam.so")):
        print((folder / "output.txt").read_text(), "\nCPU Adam cannot be built", file=sys.stderr)
    return environment


@pytest.fixture(scope="session")
def forks(started, environment):
    """The fork server: it runs `python ...` and launches without importing the libraries again."""
    return started[1]


@pytest.fixture(scope="session")
def launch(environment, forks):
    """Return a function that runs a script through `accelerate launch`.

    `launch("causal_lm_lora", "ddp", "--max_steps", 2, processes=2)` runs
    examples/causal_lm_lora.py with configs/ddp.yaml. Script and config may also be paths.
    The function returns the finished process, with stdout and stderr as one text. It fails the
    test if the exit code is not `code`; None accepts any code. `flags` are flags of accelerate.

    The launcher and its processes are forked from a process that has imported the libraries. With
    `real=True` they are started as a user starts them. That is needed if `variables` contain
    environment variables that libraries read at import.
    """

    def run(
        script,
        config,
        *arguments,
        processes=None,
        flags=(),
        code=0,
        cwd=ROOT,
        timeout=LIMIT,
        real=False,
        **variables,
    ):
        script = script if str(script).endswith(".py") else ROOT / "examples" / f"{script}.py"
        config = config if str(config).endswith(".yaml") else ROOT / "configs" / f"{config}.yaml"
        command = [*ACCELERATE, "--config_file", config, *flags]
        command += [] if processes is None else ["--num_processes", processes]
        command = [str(word) for word in (*command, script, *arguments)]
        if real:
            done = run_real(command, environment | variables, cwd, timeout)
        else:
            done = forks.run(*command, cwd=cwd, timeout=timeout, **variables)
        said = f"exit code {done.returncode}\n{' '.join(command)}\n{done.stdout}"
        assert code in (None, done.returncode), said
        return done

    return run


def run_real(command, environment, cwd, timeout):
    """Start `python *command` and return the finished process, with its output as one text."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([sys.executable, *command], cwd=cwd, env=environment, **streams)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # then a launcher ends its processes; SIGKILL would leave them behind
        process.communicate()
        raise
    return subprocess.CompletedProcess(command, process.returncode, output)


def read_metrics(folder):
    """Return the content of a run's metrics.json."""
    return json.loads((Path(folder) / "metrics.json").read_text())


def write_csv(path, rows, columns=("Tweet text", "Label")):
    """Write rows of cells as a CSV file with a header and return its path."""
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return path
