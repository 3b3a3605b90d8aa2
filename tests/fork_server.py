"""Run `python ...` and `accelerate launch ...` without the seconds that the imports take.

A server imports the libraries once, initialises nothing, and forks itself for every command.
`accelerate launch` runs in such a fork with its own code: accelerate reads the config and makes the
environment, torch starts, watches and ends the processes. One thing differs. The script is
not run by a new `python SCRIPT`, but by a process that was forked before the launcher initialised
anything.

Tests of the following need a real launch, for a fork cannot show them: what libraries read from the
environment at import, an import that a script forgets, what an import prints, the command line of a
process, what an interpreter does while it frees its memory at the end, and sets whose order differs
between processes (all forks have the hash seed of the server).
"""

import atexit
import ctypes
import functools
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import cpuinfo

LIBRARIES = """accelerate.commands.accelerate_cli accelerate.commands.launch bitsandbytes datasets
deepspeed deepspeed.runtime.zero matplotlib.backends.backend_agg matplotlib.figure peft torch
torch.distributed.fsdp torch.distributed.run torch.distributed.tensor transformers
transformers.models.auto.modeling_auto transformers.models.llama.modeling_llama
transformers.optimization""".split()
LAUNCHERS = ("simple_launcher", "multi_gpu_launcher", "deepspeed_launcher")
PR_SET_CHILD_SUBREAPER = 36  # of Linux' prctl
LIMIT = 900  # seconds, more than ten times what any command needs on a quiet machine
# libraries read these at each use, not at import; OMP_NUM_THREADS must be 1, as in the server
READ_LATE = {"PATH", "PYTHONPATH", "TORCH_EXTENSIONS_DIR", "OMP_NUM_THREADS"}


# The side of the tests ----------------------------------------------------------------------------
class ForkServer:
    """Starts the server and has it run commands, one at a time.

    Args:
        environment: the variables of the server and of its commands.
        folder: an empty folder for the outputs of commands.
    """

    def __init__(self, environment, folder):
        self.environment, self.folder, self.commands = environment, Path(folder), 0
        variables = environment | {"OMP_NUM_THREADS": "1"}  # as launchers set it
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
        self.process = subprocess.Popen([sys.executable, __file__], env=variables, **pipes)

    def run(self, *arguments, cwd, timeout=LIMIT, patience=30, **variables):
        """Run `python *arguments`; return the finished process, its output as one text.

        Args:
            timeout: seconds after which the command counts as hanging and is ended.
            patience: seconds that processes of the command may run on after its end.
            variables: environment variables beside those of the server.

        Raises:
            subprocess.TimeoutExpired: the command did not end in time. Its output is printed.
            RuntimeError: the command ended and left processes behind. They are killed.
        """
        assert set(variables) <= READ_LATE, "the libraries read these at import: start a process"
        output, self.commands = self.folder / f"{self.commands}.txt", self.commands + 1
        command = list(map(str, arguments))
        request = {"arguments": command, "output": str(output), "cwd": str(cwd)}
        request |= {"environment": self.environment | variables, "patience": patience}
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        pid = self.answer(LIMIT)
        code = self.answer(timeout)
        if code is None:
            print(output.read_text())
            os.kill(pid, signal.SIGTERM)  # a launcher ends its processes, too
            if self.answer(60) is None:
                os.kill(pid, signal.SIGKILL)
                self.answer(60)
            self.answer(LIMIT)
            raise subprocess.TimeoutExpired(command, timeout)
        left = self.answer(LIMIT)
        if left:
            raise RuntimeError(f"{command} left processes behind: {left}\n{output.read_text()}")
        return subprocess.CompletedProcess(command, code, output.read_text())

    def answer(self, timeout):
        """Return the next answer of the server, or None if none comes within `timeout` seconds."""
        if not select.select([self.process.stdout], [], [], timeout)[0]:
            return None
        line = self.process.stdout.readline()
        assert line, "the fork server has ended: see what it printed"
        return json.loads(line)

    def close(self):
        self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


# The side of the server ---------------------------------------------------------------------------
class Forked(subprocess.Popen):
    """A `subprocess.Popen` whose process was forked earlier and waits to be told what to run."""

    waiting = []  # (process id, the end of a pipe to it)

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
        assert cwd is None, "the process was forked in the folder of the launcher"
        self.pid, pipe = self.waiting.pop(0)
        self._child_created = True
        with open(pipe, "w") as file:
            json.dump({"arguments": args[1:], "environment": env}, file)


def popen(args, **kwargs):
    """Stand in for `subprocess.Popen` in a launcher."""
    is_forked = args[0] == sys.executable and Forked.waiting
    return (Forked if is_forked else subprocess.Popen)(args, **kwargs)


def fork_first(launcher):
    """Wrap a launcher of accelerate: its processes are forked before it initialises anything."""

    def launch(args):
        for _ in range(int(args.num_processes)):
            ours, theirs = os.pipe()
            if (pid := os.fork()) == 0:
                os.setsid()  # as torch starts its processes
                for end in (theirs, *(end for _, end in Forked.waiting)):
                    os.close(end)
                return run_when_told(ours)
            os.close(ours)
            Forked.waiting.append((pid, theirs))
        launcher(args)
        end_well()

    return launch


def run_when_told(pipe):
    """Wait until the launcher says what to run, and run it; or end, if the launcher ends before."""
    with open(pipe) as file:
        text = file.read()
    if text:
        Forked.waiting.clear()
        run_python(**json.loads(text))
        end_well()


def end_well():
    """End this process with exit code 0, without the long time in which Python frees everything."""
    threading._shutdown()  # these are the first steps of Python's own end
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run_python(arguments, environment):
    """Do in this process what `python *arguments` does."""
    os.environ.clear()
    os.environ.update(environment)
    random.seed()  # else all forks draw the same numbers
    sys.modules["numpy"].random.seed()
    sys.stdout.reconfigure(write_through=True)  # as of `python -u`
    arguments = [word for word in arguments if word != "-u"]
    places = {"-c": "", "-m": os.getcwd()}
    place = places.get(arguments[0], str(Path(arguments[0]).resolve().parent))
    sys.path[:1] = [place, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(arguments[1], {"__name__": "__main__"})
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def end_leftovers(seconds):
    """Wait for the processes that a command left; kill those that stay, return their commands."""
    end, left = time.monotonic() + seconds, []
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return left
        if pid == 0 and time.monotonic() > end:
            for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
                command = Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")
                left += [f"{child} {command}"] if command else []  # without one it has ended
                os.kill(int(child), signal.SIGKILL)
        time.sleep(0.01 if pid == 0 else 0)


def serve():
    """Answer requests from standard input, a line of JSON each, until it ends."""
    answers = os.dup(1)
    os.dup2(2, 1)  # keeps what libraries print off the pipe of the answers
    for name in LIBRARIES:
        importlib.import_module(name)
    # DeepSpeed calls this several times, and each call is slow
    cpuinfo.get_cpu_info = functools.partial(dict, cpuinfo.get_cpu_info())
    launch = sys.modules["accelerate.commands.launch"]
    for name in LAUNCHERS:
        setattr(launch, name, fork_first(getattr(launch, name)))
    launch.subprocess = SimpleNamespace(**vars(subprocess) | {"Popen": popen})
    handler = "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"
    sys.modules[handler].Popen = popen
    gc.collect()
    gc.freeze()  # the collector of a fork skips the objects of the server
    sys.stdout.flush()
    # what a command leaves behind becomes a child of the server
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    for line in open(0, "rb", buffering=0):
        request = json.loads(line)
        if (pid := os.fork()) == 0:
            os.close(answers)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
            os.dup2(1, 2)
            os.chdir(request["cwd"])
            return run_python(request["arguments"], request["environment"])
        tell(answers, pid)
        tell(answers, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        tell(answers, end_leftovers(request["patience"]))


def tell(answers, value):
    os.write(answers, json.dumps(value).encode() + b"\n")


if __name__ == "__main__":
    serve()
