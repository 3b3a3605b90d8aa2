"""Start the processes of a cell, and collect what they found.

This file imports no library that could start a GPU.
"""

import json
import multiprocessing
import os
import re
import signal
import socket
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from tools.compatibility.judge import CHECKS
from tools.compatibility.rows import COLUMNS, PROCESSES, ROWS, SETTINGS

ROOT = Path(__file__).resolve().parents[2]
TIME_LIMIT = 400  # seconds for a step of a cell, enough to compile DeepSpeed's CPU Adam


def run_process(step, job):
    """Run a step of a cell in a new process, forked from one that has imported the libraries."""
    os.setsid()  # so that its own processes, such as compilers, end with it
    multiprocessing.set_start_method("fork", force=True)  # as in a process of `accelerate launch`
    from tools.compatibility import cell

    cell.main(step, job)


def start_server(module="tools.compatibility.cell"):
    """Return a context whose processes are forked from one that has imported the module."""
    # read when torch is imported; `accelerate launch` sets the same for two processes
    os.environ["OMP_NUM_THREADS"] = "1"
    paths = (str(ROOT), os.environ.get("PYTHONPATH"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    # looking for a GPU must not start CUDA before the fork
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    if not count_gpus():
        os.environ["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed warns that it found none
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    return context


def run_step(context, step, jobs, folder, limit=TIME_LIMIT, target=None):
    """Run one process per job; return the error, or {} if there was none.

    If a process fails or the time is up, all of them are killed. A process writes what failed to
    folder/error-RANK.json: {"check": ..., "message": ..., "time": ...}.

    Args:
        limit: seconds.
        target: the function that a process calls with the step and its job; None: `run_process`.
    """
    target = target or run_process
    processes = [context.Process(target=target, args=(step, job)) for job in jobs]
    for process in processes:
        process.start()
    end = time.monotonic() + limit
    try:
        while any(process.is_alive() for process in processes) and time.monotonic() < end:
            if any(process.exitcode for process in processes):
                # the other processes may be about to write an error of their own
                end = min(end, time.monotonic() + 2)
            time.sleep(0.02)
        failed = [process.exitcode for process in processes if process.exitcode]
        hangs = any(process.is_alive() for process in processes) and not failed
    finally:
        for process in processes:
            kill(process)
    errors = [json.loads(file.read_text()) for file in sorted(folder.glob("error-*.json"))]
    if errors:
        # the first error is the cause; "closed by peer" is an effect, whenever it was written
        return min(errors, key=lambda error: ("by peer" in error["message"], error["time"]))
    if not hangs and not failed:
        return {}
    message = f"hangs: did not end in {limit} s"
    if failed:
        message = f"a process ended with exit code {failed[0]}"
    reached = folder / "check.txt"
    return {"check": reached.read_text() if reached.is_file() else "starts", "message": message}


def kill(process):
    """Kill a process, and the processes that it started, and wait for its end."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
    process.join()


def measure(context, cell, model_folder, log):
    """Run a cell and return its facts.

    A cell of FSDP1 that fails is run again with the row's setting, if it has one.
    """
    facts = run_cell(context, cell, "", model_folder, log)
    setting = ROWS[cell.split("/")[0]].setting
    if cell.endswith("/fsdp1") and setting and "error" in facts:
        again = run_cell(context, cell, setting, model_folder, log)
        if "error" not in again:
            error = facts["error"]
            return again | {"without": f"{CHECKS[error['check']]}: {error['message']}"}
    return facts


def run_cell(context, cell, setting, model_folder, log):
    """Run the processes of a cell; return what they found, and the error if a check failed."""
    row, column = cell.split("/")
    started = time.monotonic()
    config, flags = COLUMNS[column]
    flags = (*flags, *ROWS[row].flags, *SETTINGS.get(setting, ()))
    processes = PROCESSES.get(column, 2)
    with tempfile.TemporaryDirectory(prefix="compatibility-") as name:
        folder = Path(name)
        job = {
            "row": asdict(ROWS[row]),
            "launch": ["--config_file", str(ROOT / "configs" / f"{config}.yaml"), *flags],
            "folder": name,
            "model": str(model_folder),
            "log": str(log),
        }

        def run(step, world=1):
            port = free_port()
            jobs = [job | {"rank": rank, "world": world, "port": port} for rank in range(world)]
            return run_step(context, step, jobs, folder)

        error = run("train", processes)
        if (folder / "saved").is_file():
            error = run("reload") or error
        if not error and ROWS[row].checkpoint:
            error = run("state", processes)
        found = [json.loads(file.read_text()) for file in sorted(folder.glob("found-*.json"))]
    facts = {key: value for one in found for key, value in one.items()}
    facts["seconds"] = round(time.monotonic() - started, 1)
    if error:
        facts["error"] = {"check": error["check"], "message": plain(error["message"])}
    return facts


def plain(message, limit=240):
    """Return the first line of an error, without folders, addresses and ports.

    Those differ from run to run. Characters beyond the limit are left out.
    """
    line = next(iter(message.strip().splitlines()), "")
    line = re.sub(r"(?<![\w.:/])/(?:[^\s/'\"]+/)+", "", line)
    line = re.sub(r"0x[0-9a-f]{6,}", "0x...", line)
    line = re.sub(r"\d+\.\d+\.\d+\.\d+(\]?:\d+)?", "ADDRESS", line).replace("|", "/")
    return line if len(line) <= limit else f"{line[:limit]}..."


def count_gpus():
    """Return the number of NVIDIA GPUs that the system lists; does not start CUDA."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def free_port():
    """Return a port on which nothing listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
