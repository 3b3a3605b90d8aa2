"""Build what an offload to NVMe needs, and find the settings for a drive.

build: compile DeepSpeed's extensions async_io and pin_memory, once per environment.
tune PATH: time reads and writes of a folder with DeepSpeed's own tuner.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from utils.errors import refuse
from utils.launch_checks import free_extension_lock
from utils.nvme import BUILD, EXTENSIONS, is_built

LOAD = "from deepspeed.ops.op_builder import AsyncIOBuilder; AsyncIOBuilder().load(verbose=True)"
PROGRAM = "#include <libaio.h>\nint main() { return io_queue_init(1, 0); }\n"
MINUTE = 60


def find_missing():
    """Return what the build lacks, each as a phrase with the name of its Debian package."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return [f"a C++ compiler, {compiler} (package g++)"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "test.cpp")
        source.write_text(PROGRAM)
        flags = [*os.environ.get("CFLAGS", "").split(), str(source), "-o", f"{folder}/test"]
        flags += [*os.environ.get("LDFLAGS", "").split(), "-laio"]
        done = subprocess.run([compiler, *flags], capture_output=True, text=True)
    if done.returncode == 0:
        return []
    said = next((line for line in done.stderr.splitlines() if "error" in line), "")
    return [f"libaio and its header libaio.h (package libaio-dev) [{said.strip()[:100]}]"]


def build(minutes):
    """Build the extensions, with a line of progress every ten seconds; stop at the limit."""
    if is_built():
        print("async_io and pin_memory are built.")
        return
    if missing := find_missing():
        refuse(f"the build needs {'; '.join(missing)}: install it and try again")
    for name in EXTENSIONS:
        free_extension_lock(name)
    folders = [str(Path(sys.executable).parent), os.environ["PATH"]]  # ninja is beside python
    environment = os.environ | {"PATH": os.pathsep.join(folders)}
    begin = told = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        streams = {"stdout": output, "stderr": output, "start_new_session": True}
        process = subprocess.Popen([sys.executable, "-c", LOAD], env=environment, **streams)
        try:
            while process.poll() is None:
                time.sleep(0.2)
                passed = time.monotonic() - begin
                if time.monotonic() - told > 10:
                    told = time.monotonic()
                    print(f"building async_io and pin_memory: {passed:.0f} s", flush=True)
                if passed > minutes * MINUTE:
                    refuse(f"the build took longer than {minutes} minutes: give more --minutes")
        finally:
            stop(process)
        output.seek(0)
        lines = output.read().strip().splitlines()
    if process.returncode or not is_built():
        print("\n".join(lines[-20:]), file=sys.stderr)
        refuse(f"the build failed: {lines[-1] if lines else 'without a message'}")
    print(f"Built async_io and pin_memory in {time.monotonic() - begin:.0f} s.")


def stop(process):
    """End a build and its compilers, and remove the locks that they leave."""
    if process.poll() is None:
        os.killpg(process.pid, 15)
        process.wait()
        for name in EXTENSIONS:
            free_extension_lock(name)


def tune(path, size):
    """Run DeepSpeed's tuner on a folder; it prints the block "aio" for DeepSpeed's config."""
    if not Path(path).is_dir():
        refuse(f"{path} is not a folder: name one on an NVMe drive")
    if not is_built():
        refuse(f"DeepSpeed's extension async_io is not built: {BUILD}")
    bin_folder = Path(sys.executable).parent
    environment = os.environ | {"PATH": os.pathsep.join([str(bin_folder), os.environ["PATH"]])}
    with tempfile.TemporaryDirectory(dir=path, prefix="tune-") as folder:
        words = [sys.executable, bin_folder / "ds_nvme_tune", "--nvme_dir", folder]
        words += ["--log_dir", f"{folder}/logs", "--io_size", size]
        done = subprocess.run(words, env=environment, cwd=folder)
    if done.returncode:
        refuse("DeepSpeed's tuner ds_nvme_tune failed: its output stands above")
    print(
        'Paste the block "aio" into DeepSpeed\'s config, with num_threads renamed to '
        "intra_op_parallelism."
    )


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.nvme", description=__doc__.partition("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    text = "compile DeepSpeed's extensions async_io and pin_memory, once per environment"
    one = commands.add_parser("build", help=text, description=text)
    one.add_argument("--minutes", type=float, default=30, help="limit after which the build stops")
    text = "find the settings for a drive with DeepSpeed's own tuner"
    one = commands.add_parser("tune", help=text, description=text)
    one.add_argument("path", metavar="PATH", help="folder on the drive")
    one.add_argument("--size", default="400M", help="bytes per test, such as 400M")
    arguments = parser.parse_args()
    if arguments.command == "build":
        build(arguments.minutes)
    else:
        tune(arguments.path, arguments.size)


if __name__ == "__main__":
    main()
