"""Two machines in one: network namespaces that are joined by a pair of virtual network cards.

Each has an address, a host name that nobody resolves, and no other network. Needs root and `ip`.

As a script it runs a command on each machine, in processes that the fork server forked:
`python tests/machines.py COMMANDS.json`. The file holds a list of dicts with the keys `namespace`,
`host`, `output` (a file), `arguments` (of python) and `variables` (of the environment). The script
prints the exit codes as a list.
"""

import atexit
import contextlib
import ctypes
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

NETWORK, UTS = 0x40000000, 0x04000000  # CLONE_NEWNET and CLONE_NEWUTS of Linux's setns and unshare
NAME = "machine-of-tests"  # begins the names of the namespaces


@dataclass
class Machine:
    """A network namespace, and the host name that its processes see."""

    namespace: str
    card: str
    host: str
    address: str

    def enter(self):
        """Move this process, which has no threads, to the machine."""
        enter(self.namespace, self.host)

    def connect(self, state):
        """Set the network card "up" or "down"."""
        ip("-n", self.namespace, "link", "set", self.card, state)

    @contextlib.contextmanager
    def closed(self, *ports):
        """Drop what arrives for these ports (such as "1-99"), as a firewall does: nobody answers.

        It drops every packet, also the answers to connections from these ports.
        """
        rule = ("-n", self.namespace, "rule")
        # of the local addresses: it has priority 0, which nothing precedes
        ip(*rule, "add", "pref", len(ports) + 1, "lookup", "local")
        ip(*rule, "delete", "pref", 0)
        for number, port in enumerate(ports, 1):
            arriving = ("iif", self.card, "ipproto", "tcp", "dport", port)
            ip(*rule, "add", "pref", number, *arriving, "blackhole")
        try:
            yield
        finally:
            ip(*rule, "add", "pref", 0, "lookup", "local")
            for number in range(1, len(ports) + 2):
                ip(*rule, "delete", "pref", number)


def enter(namespace, host):
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}") as file:
        if libc.setns(file.fileno(), NETWORK) or libc.unshare(UTS):
            raise OSError(ctypes.get_errno(), "cannot enter the namespace")
    socket.sethostname(host)


def ip(*words):
    """Run `ip`. Raises CalledProcessError, with what it printed."""
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def two_machines():
    """Yield two connected machines, and remove them with all of their processes.

    Raises:
        RuntimeError: this system does not allow it; the message says why.
    """
    if os.geteuid() or not shutil.which("ip"):
        raise RuntimeError("two machines need root and the command ip (iproute2)")
    remove_machines(of_ended_tests=True)
    process = os.getpid()
    machines = [
        Machine(f"{NAME}-{process}-{number}", f"t{process}-{number}", f"host{number}", address)
        for number, address in enumerate(("10.77.0.1", "10.77.0.2"))
    ]
    try:
        for machine in machines:
            ip("netns", "add", machine.namespace)
        first, second = machines
        ends = ["name", first.card, "netns", first.namespace, "type", "veth", "peer"]
        ends += ["name", second.card, "netns", second.namespace]
        ip("link", "add", *ends)
        for machine in machines:
            own = ("-n", machine.namespace)
            ip(*own, "addr", "add", f"{machine.address}/24", "dev", machine.card)
            ip(*own, "link", "set", "lo", "up")
            machine.connect("up")
    except subprocess.CalledProcessError as error:
        remove_machines()
        raise RuntimeError(f"network namespaces cannot be made: {error.stderr.strip()}") from error
    try:
        yield machines
    finally:
        remove_machines()


def machines_or_skip():
    """For a fixture: yield two machines, or skip the test and say why there are none."""
    with contextlib.ExitStack() as stack:
        try:
            machines = stack.enter_context(two_machines())
        except RuntimeError as reason:
            pytest.skip(str(reason))
        yield machines


def remove_machines(of_ended_tests=False):
    """Kill the processes of the namespaces of this process, or of ended ones; remove them."""
    for path in Path("/run/netns").glob(f"{NAME}-*"):
        process = int(re.fullmatch(rf"{NAME}-(\d+)-\d+", path.name)[1])
        if Path(f"/proc/{process}").exists() if of_ended_tests else process != os.getpid():
            continue
        listed = subprocess.run(["ip", "netns", "pids", path.name], capture_output=True, text=True)
        for one in listed.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(one), signal.SIGKILL)
        ip("netns", "delete", path.name)


# Commands -----------------------------------------------------------------------------------------
class Started:
    """Commands that run on the machines, each with its output in a file."""

    def __init__(self, folder, machines):
        self.outputs = [Path(folder) / f"{machine.host}.txt" for machine in machines]
        self.codes = None

    def texts(self):
        return [output.read_text(errors="replace") for output in self.outputs]

    def wait_for(self, pattern, machine=0, limit=300):
        """Wait until the output of a machine matches; return the match."""
        end = time.monotonic() + limit
        while time.monotonic() < end:
            if found := re.search(pattern, self.texts()[machine]):
                return found
            assert self.codes is None, self.told()
            time.sleep(0.1)
        raise AssertionError(f"no {pattern!r} within {limit} s\n{self.told()}")

    def told(self):
        return "\n".join([f"exit codes {self.codes}", *self.texts()])


class Forked(Started):
    """Commands in forks of a process that has imported the libraries."""

    def __init__(self, forks, folder, machines, commands, **variables):
        super().__init__(folder, machines)
        file, content = Path(folder) / "commands.json", []
        for machine, output, words in zip(machines, self.outputs, commands, strict=True):
            output.touch()
            one = {"namespace": machine.namespace, "host": machine.host, "output": str(output)}
            content.append(one | {"arguments": list(map(str, words)), "variables": variables})
        file.write_text(json.dumps(content))
        root = Path(__file__).resolve().parents[1]
        self.error = None

        def run():
            done = forks.run(__file__, file, cwd=root, PYTHONPATH=str(root), OMP_NUM_THREADS="1")
            self.error = done.stdout
            self.codes = json.loads(done.stdout.splitlines()[-1])

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def wait(self, limit):
        """Return the exit codes; fail if the commands do not end within `limit` seconds."""
        self.thread.join(limit)
        assert self.codes is not None, f"not ended after {limit} s\n{self.error}\n{self.told()}"
        return self.codes


class Real(Started):
    """Commands in new processes, as a user starts them."""

    def __init__(self, environment, folder, machines, commands, cwd, **variables):
        super().__init__(folder, machines)
        self.processes = []
        for machine, output, words in zip(machines, self.outputs, commands, strict=True):
            self.processes.append(
                subprocess.Popen(
                    list(map(str, words)),
                    stdout=output.open("w"),
                    stderr=subprocess.STDOUT,
                    env=environment | {"PYTHONUNBUFFERED": "1"} | variables,
                    cwd=cwd,
                    preexec_fn=machine.enter,
                )
            )

    def wait(self, limit):
        end = time.monotonic() + limit
        for process in self.processes:
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"not ended after {limit} s\n{self.told()}") from None
        self.codes = [process.returncode for process in self.processes]
        return self.codes


def run_here(namespace, host, output, arguments, variables):
    """Run `python *arguments` on a machine, in this process. Does not return."""
    os.dup2(os.open(output, os.O_WRONLY | os.O_TRUNC | os.O_APPEND), 1)
    os.dup2(1, 2)
    code = 0
    try:
        enter(namespace, host)
        os.environ.update(variables)
        sys.argv = arguments[:]
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # as Python does at the end of a script
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(file):
    children = []
    for command in json.loads(Path(file).read_text()):
        if (pid := os.fork()) == 0:
            run_here(**command)
        children.append(pid)
    print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children])


if __name__ == "__main__":
    main(*sys.argv[1:])
