"""Build what an offload to NVMe needs, and find the settings for a drive.

build: compile DeepSpeed's extensions async_io and pin_memory, once per environment.
tune PATH: time reads and writes of a folder with DeepSpeed's own tuner.
"""

import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils import cpp_extension

from utils.errors import or_refuse, refuse
from utils.launch_checks import free_extension_lock
from utils.nvme import BUILD, EXTENSIONS, is_built, refuse_kernel, wanted_kind

LOAD = "from deepspeed.ops.op_builder import AsyncIOBuilder; AsyncIOBuilder().load(verbose=True)"
PROGRAM = """
#include <libaio.h>
#include <cstdio>
int main() { io_context_t context = 0; std::printf("%d", -io_queue_init(1, &context)); }
"""
# as its script ds_nvme_tune, but every measurement runs in this environment, and not in that of
# the file to which a link to the script leads
TUNE = """
import shlex, sys
from deepspeed.nvme import perf_generate_param, perf_run_sweep
perf_run_sweep.script_path = lambda: ""
perf_run_sweep.PERF_SCRIPT = shlex.quote(sys.executable) + " -m deepspeed.nvme.test_ds_aio"
arguments = perf_run_sweep.parse_sweep_arguments()
perf_run_sweep.sweep_main(arguments)
perf_generate_param.generate_main(arguments.log_dir)
"""
MINUTE, KIB = 60, 1024
INTERVAL = 10  # seconds between two lines of progress
# the values that DeepSpeed's tuner tries of each setting, by default
VALUES = {
    "block_size": ["1M", "8M"],
    "queue_depth": [32, 128],
    "sequential_requests": [True, False],
    "single_submit": [False, True],
    "io_parallel": [1, 2, 4, 8],
}
# the tuner's names of settings -> the engine's, with the same kind of values
NAMES = {"sequential_requests": "overlap_events", "io_parallel": "intra_op_parallelism"}


# What is needed -----------------------------------------------------------------------------------
def find_missing():
    """Return what the build lacks, each as a phrase with the name of its Debian package.

    Stops if everything is there, and the kernel refuses asynchronous I/O.
    """
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return [f"a C++ compiler, {compiler} (package g++)"]
    missing = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "test.cpp")
        source.write_text(PROGRAM)
        flags = [*os.environ.get("CFLAGS", "").split(), str(source), "-o", f"{folder}/test"]
        flags += [*os.environ.get("LDFLAGS", "").split(), "-laio"]
        texts = {"capture_output": True, "text": True}
        done = subprocess.run([compiler, *flags], **texts)
        if done.returncode:
            said = next((line for line in done.stderr.splitlines() if "error" in line), "")
            name = "libaio and its header libaio.h (package libaio-dev)"
            missing.append(f"{name} [{said.strip()[:100]}]")
        else:
            done = or_refuse(
                f"{folder}/test cannot be run", subprocess.run, [f"{folder}/test"], **texts
            )
            if done.returncode or not done.stdout.isdigit():
                missing.append(f"a libaio that can be loaded [{done.stderr.strip()[:100]}]")
            elif done.stdout != "0":
                refuse_kernel(int(done.stdout))
    is_cuda = torch.cuda.is_available() and torch.version.hip is None
    if is_cuda and cpp_extension.CUDA_HOME is None:
        missing.append("the CUDA toolkit, whose folder CUDA_HOME names")
    return missing


# A long command -----------------------------------------------------------------------------------
def run(command, progress, minutes=math.inf, folder=None):
    """Run a command, with a line of progress every ten seconds; end it if this process is ended.

    Args:
        progress: function of the command's output so far that returns a phrase.
        minutes: limit after which the command is ended, and None is returned.
        folder: working folder of the command.

    Returns:
        Exit code and output.
    """
    folders = [str(Path(sys.executable).parent), os.environ["PATH"]]  # ninja is beside python
    environment = os.environ | {"PATH": os.pathsep.join(folders)}
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    begin = told = time.monotonic()
    with tempfile.NamedTemporaryFile() as file:
        streams = {"stdout": file, "stderr": file, "start_new_session": True, "cwd": folder}
        process = subprocess.Popen([str(w) for w in command], env=environment, **streams)
        try:
            while process.poll() is None:
                time.sleep(0.2)
                now = time.monotonic()
                if now - begin > minutes * MINUTE:
                    return None
                if now - told > INTERVAL:
                    told = now
                    words = progress(Path(file.name).read_text(errors="replace"))
                    print(f"{now - begin:.0f} s: {words}", flush=True)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
        return process.returncode, Path(file.name).read_text(errors="replace")


# build --------------------------------------------------------------------------------------------
def build(minutes):
    """Build the extensions, with progress, and print what was built; stop at the limit."""
    if is_built():
        print("async_io and pin_memory are built.")
        return
    if missing := find_missing():
        refuse(f"the build needs {'; '.join(missing)}: install it and try again")
    for name in EXTENSIONS:
        free_extension_lock(name)
    begin = time.monotonic()
    done = None
    try:
        done = run([sys.executable, "-c", LOAD], compiled, minutes)
    finally:
        if done is None:
            for name in EXTENSIONS:
                free_extension_lock(name)
    if done is None:
        refuse(f"the build took longer than {minutes:g} minutes: give more --minutes")
    code, output = done
    lines = output.strip().splitlines()
    if code or not is_built():
        print("\n".join(lines[-20:]), file=sys.stderr)
        refuse(f"the build failed: {lines[-1] if lines else 'without a message'}")
    print(f"Built in {time.monotonic() - begin:.0f} s:")
    for name in EXTENSIONS:
        file = Path(cpp_extension._get_build_directory(name, verbose=False), f"{name}.so")
        print(f"  {file}, {file.stat().st_size:,} bytes")


def compiled(output):
    """Return how far ninja has come."""
    steps = re.findall(r"^\[(\d+)/(\d+)\]", output, re.MULTILINE)
    linked = sum(done == total for done, total in steps)
    name = EXTENSIONS[min(linked, len(EXTENSIONS) - 1)]
    done, total = steps[-1] if steps else (0, 0)
    return f"compiling {name}" + (f", {done} of {total} steps" if done != total else "")


# tune ---------------------------------------------------------------------------------------------
def tune(path, size, values):
    """Run DeepSpeed's tuner on a folder; print the block "aio" for DeepSpeed's config.

    Args:
        size: bytes of a read or write, such as "400M".
        values: path of a JSON file: setting -> values to try; None: those of VALUES.
    """
    if not Path(path).is_dir():
        refuse(f"{path} is not a folder: name one on an NVMe drive")
    if not isinstance(number := bytes_of(size), int):
        refuse(f"--size {size} is no number of bytes: give one such as 400M (K, M or G)")
    tried = read_values(values) if values else VALUES
    for parallel in tried["io_parallel"]:
        if number % (KIB * parallel):
            refuse(
                f"--size {size} must be a multiple of {KIB * parallel} bytes, for io_parallel "
                f"{parallel}: each thread reads and writes the same number of KiB"
            )
    if not is_built():
        refuse(f"DeepSpeed's extension async_io is not built: {BUILD}")
    count = 2 * math.prod(len(one) for one in tried.values())
    print(f"Timing {count // 2} combinations of settings, reads and writes of {size} each.")
    culprit = f"{path} cannot be written"
    options = {"dir": path, "prefix": "tune-"}
    with or_refuse(culprit, tempfile.TemporaryDirectory, **options) as name:
        folder = Path(name)
        # the tuner splits its commands at spaces and colons: it gets paths without a folder
        (folder / "values.json").write_text(json.dumps(tried))
        words = [sys.executable, "-c", TUNE, "--nvme_dir", ".", "--log_dir", "logs"]
        words += ["--io_size", size, "--sweep_config", "values.json"]

        def logs():
            return sorted(folder.glob("logs/*/*.txt"), key=lambda file: file.stat().st_mtime)

        code, output = run(words, lambda _: f"{len(logs())} of {count} started", folder=folder)
        if code or "Best performance" not in output:
            said = "".join([output, *(file.read_text() for file in logs()[-1:])])
            print(said[-2000:], file=sys.stderr)
            refuse("DeepSpeed's tuner failed: its last output stands above")
    best = output[output.index("Best performance") :]
    print(best.partition("\n")[0])
    print('Paste this into DeepSpeed\'s config, instead of its block "aio":\n')
    found, _ = json.JSONDecoder().raw_decode(best, best.index("{"))  # warnings may follow
    block = {"aio": translate(found["aio"])}
    print(json.dumps(block, indent=2)[2:-2])


def read_values(file):
    """Return the values to try, from a JSON file that names some of the settings, or all."""
    told = or_refuse(f"{file} cannot be read", lambda: json.loads(Path(file).read_text()))
    unknown = [] if isinstance(told, dict) else [told]
    unknown = unknown or [key for key in told if key not in VALUES]
    if unknown or not all(isinstance(one, list) and one for one in told.values()):
        refuse(f"{file} must hold a list of values for some of {', '.join(VALUES)}")
    for key, values in told.items():
        for value in values:
            number = bytes_of(value, "KM") if key == "block_size" else value
            if kind := wanted_kind(NAMES.get(key, key), number):
                also = ', or a text such as "8M" (K or M)' if key == "block_size" else ""
                refuse(f"{key} {json.dumps(value)} in {file} must be {kind}{also}")
    return VALUES | told


def bytes_of(value, units="KMG"):
    """Return the number of bytes of a text such as "8M"; another value as it is."""
    found = isinstance(value, str) and re.fullmatch(rf"([1-9]\d*)([{units}]?)", value)
    return int(found[1]) * KIB ** " KMG".index(found[2] or " ") if found else value


def translate(found):
    """Return the tuner's settings by the names, and with the types, that the engine reads."""
    return {
        "block_size": found["block_size"],
        "queue_depth": found["queue_depth"],
        "intra_op_parallelism": found["num_threads"],
        "single_submit": found["single_submit"] == "true",
        "overlap_events": found["overlap_events"] == "true",
    }


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.nvme", description=__doc__.partition("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    text = "compile DeepSpeed's extensions async_io and pin_memory, once per environment"
    one = commands.add_parser("build", help=text, description=text)
    one.add_argument("--minutes", type=float, default=120, help="limit after which the build stops")
    text = "find the settings for a drive with DeepSpeed's own tuner"
    one = commands.add_parser("tune", help=text, description=text)
    one.add_argument("path", metavar="PATH", help="folder on the drive")
    one.add_argument("--size", default="400M", help="bytes per read or write, such as 400M")
    one.add_argument(
        "--values",
        metavar="FILE",
        help='JSON file with the values to try, such as {"block_size": ["1M"]} '
        f"(default: {', '.join(f'{key} {value}' for key, value in VALUES.items())})",
    )
    arguments = parser.parse_args()
    if arguments.command == "build":
        build(arguments.minutes)
    else:
        tune(arguments.path, arguments.size, arguments.values)


if __name__ == "__main__":
    main()
