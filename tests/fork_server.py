"""Run `python ...` and `accelerate launch ...` without the seconds that the imports take.

A server imports the libraries once, initialises nothing, and forks itself for every command.
The code of `accelerate launch` runs unchanged in such a fork: accelerate reads the config and sets
the environment variables, and torch starts, monitors and ends the processes. There is one
difference: the script does not run in a new `python SCRIPT`, but in a process that was forked
before the launcher initialised anything.

A fork cannot show the following, so tests of it need a real launch: environment variables that
libraries read at import, an import that a script lacks, the output of an import, the command line
of a process, and sets whose order differs between processes (all forks share the server's hash
seed). A fork skips what an interpreter does while it frees its memory at exit, unless WHOLE_EXIT is
set.
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
PR_SET_CHILD_SUBREAPER = 36  # an option of Linux's prctl
LIMIT = 900  # seconds; no command needs a tenth of that on an idle machine
# libraries read these variables at use, not at import; OMP_NUM_THREADS must be 1, as in the server
READ_LATE = {"PATH", "PYTHONPATH", "TORCH_EXTENSIONS_DIR", "OMP_NUM_THREADS", "CXX"}
# with this variable, the processes of a launch end like any other, and Python cleans its memory
WHOLE_EXIT = "TESTS_WHOLE_EXIT"
READ_LATE |= {"ACCELERATE_DEEPSPEED_CONFIG_FILE", WHOLE_EXIT}


# Client: runs in the tests ------------------------------------------------------------------------
class ForkServer:
    """Start the server and let it run commands, one at a time.

    Args:
        environment: environment variables of the server and of its commands.
        folder: an empty folder for the commands' output.
    """

    def __init__(self, environment, folder):
        self.environment, self.folder, self.commands = environment, Path(folder), 0
        variables = environment | {"OMP_NUM_THREADS": "1"}  # as launchers set it
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
        self.process = subprocess.Popen([sys.executable, __file__], env=variables, **pipes)

    def run(self, *arguments, cwd, timeout=LIMIT, patience=30, **variables):
        """Run `python *arguments` and return the finished process, with its output as one text.

        Args:
            cwd: the working directory.
            timeout: seconds after which the command counts as hanging and is terminated.
            patience: seconds for which child processes may outlive the command.
            variables: environment variables in addition to those of the server.

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
            os.kill(pid, signal.SIGTERM)  # a launcher then ends its processes
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
        """Return the server's next answer, or None if there is none within `timeout` seconds."""
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


# Server -------------------------------------------------------------------------------------------
class Forked(subprocess.Popen):
    """A `subprocess.Popen` whose process was forked earlier and waits for its command."""

    waiting = []  # pairs (process id, write end of the pipe to the process)

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
        assert cwd is None, "the process was forked in the folder of the launcher"
        self.pid, pipe = self.waiting.pop(0)
        self._child_created = True
        with open(pipe, "w") as file:
            json.dump({"arguments": args[1:], "environment": env}, file)


def popen(args, **kwargs):
    """Replace `subprocess.Popen` in a launcher: use a process that was forked earlier, if any."""
    is_forked = args[0] == sys.executable and Forked.waiting
    return (Forked if is_forked else subprocess.Popen)(args, **kwargs)


def fork_first(launcher):
    """Wrap a launcher of accelerate, so that its processes are forked before it starts."""

    def launch(args):
        for _ in range(int(args.num_processes)):
            ours, theirs = os.pipe()
            if (pid := os.fork()) == 0:
                os.setsid()  # torch starts each of its processes in a new session
                for end in (theirs, *(end for _, end in Forked.waiting)):
                    os.close(end)
                return run_when_told(ours)
            os.close(ours)
            Forked.waiting.append((pid, theirs))
        launcher(args)
        if WHOLE_EXIT not in os.environ:
            end_well()

    return launch


def run_when_told(pipe):
    """Wait for the launcher's command and run it. End if the launcher ends without a command."""
    with open(pipe) as file:
        text = file.read()
    if text:
        Forked.waiting.clear()
        run_python(**json.loads(text))
        if WHOLE_EXIT not in os.environ:
            end_well()
        sys.exit()


def end_well():
    """End this process with exit code 0, without the slow cleanup of Python's memory."""
    threading._shutdown()  # Python's own exit starts with these steps
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run_python(arguments, environment):
    """Do in this process what `python *arguments` would do."""
    os.environ.clear()
    os.environ.update(environment)
    random.seed()  # otherwise, all forks would draw the same numbers
    sys.modules["numpy"].random.seed()
    sys.stdout.reconfigure(write_through=True)  # as `python -u` does
    arguments = [word for word in arguments if word != "-u"]
    folders = {"-c": "", "-m": os.getcwd()}
    folder = folders.get(arguments[0], str(Path(arguments[0]).resolve().parent))
    sys.path[:1] = [folder, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
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
    """Wait for the processes that a command left behind. Kill the rest and return their commands.

    Args:
        seconds: how long to wait before killing.
    """
    end, left = time.monotonic() + seconds, []
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return left
        if pid == 0 and time.monotonic() > end:
            for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
                command = Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")
                left += [f"{child} {command}"] if command else []  # a zombie has no command line
                os.kill(int(child), signal.SIGKILL)
        time.sleep(0.01 if pid == 0 else 0)


def serve():
    """Answer requests from standard input until it is closed. Each request is one line of JSON."""
    answers = os.dup(1)
    os.dup2(2, 1)  # output of libraries must not reach the pipe of the answers
    for name in LIBRARIES:
        importlib.import_module(name)
    # DeepSpeed calls this slow function several times
    cpuinfo.get_cpu_info = functools.partial(dict, cpuinfo.get_cpu_info())
    launch = sys.modules["accelerate.commands.launch"]
    for name in LAUNCHERS:
        setattr(launch, name, fork_first(getattr(launch, name)))
    launch.subprocess = SimpleNamespace(**vars(subprocess) | {"Popen": popen})
    handler = "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"
    sys.modules[handler].Popen = popen
    gc.collect()
    gc.freeze()  # the garbage collector of a fork skips the server's objects
    sys.stdout.flush()
    # processes that a command leaves behind become children of the server
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
