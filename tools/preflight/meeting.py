"""Let the machines meet at the address of machine 0 before the launcher does, and say why not.

The launcher's own rendezvous waits for 10 minutes and ends with a traceback, whatever is wrong.
Here every machine connects to machine 0, says who it is, and gets an answer. Both ends talk in
lines of JSON.
"""

import contextlib
import errno
import ipaddress
import json
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from tools.preflight.facts import LAUNCHED, Report, differences, folders, mark, sees

TALK = 5  # seconds for one answer
POLL = 1  # seconds for one try
PINGS = 5


class MeetingError(Exception):
    """The machines cannot meet; the message says why and what to do."""


@dataclass
class Machine:
    """This machine, as its command line describes it."""

    rank: int
    machines: int
    processes: int
    address: str
    port: int

    def place(self):
        return f"{self.address}:{self.port}"


class Line:
    """A connection that sends and receives lines of JSON."""

    def __init__(self, connection):
        connection.settimeout(TALK)
        self.connection, self.file = connection, connection.makefile("r", encoding="utf-8")

    def send(self, **content):
        self.connection.sendall(f"{json.dumps(content)}\n".encode())

    def receive(self):
        """Return the next line.

        Raises:
            OSError, ValueError: the other end does not answer, or speaks another language.
        """
        content = json.loads(self.file.readline())
        if not isinstance(content, dict):
            raise ValueError("not an object")
        return content


def meet(machine, facts, output, wait):
    """Return the Report of each machine, on machine 0 only, and whether the machines are the same.

    Args:
        machine: this Machine.
        facts: from `gather_facts`.
        output: the script's output folder, or "".
        wait: seconds in which the others have to come.

    Raises:
        MeetingError: on every machine that can be told, if not all of them can meet.
    """
    return (receive if machine.rank == 0 else visit)(machine, facts, output, wait)


# Machine 0 ----------------------------------------------------------------------------------------
def receive(machine, facts, output, wait):
    """Wait for the other machines, hear their reports, and tell them the result."""
    server, problem = open_port(machine), None
    word, end = secrets.token_hex(8), time.monotonic() + wait
    marks = {name: mark(folder, word) for name, folder in folders(output).items()}
    shared = {name: True if isinstance(file, Path) else file for name, file in marks.items()}
    reports, lines = [Report(0, machine.address, facts, 0.0, shared)], []
    try:
        while len(reports) < machine.machines and time.monotonic() < end and not problem:
            if not has_address(machine.address):
                problem = ask_other_first(machine)
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                connection, (address, *_) = server.accept()
                lines.append(Line(connection))
                report = hear(lines[-1], address.removeprefix("::ffff:"), word)
                problem = find_clash(reports, report)
                reports.append(report)
        problem = problem or find_missing(reports, machine, wait)
    finally:
        server.close()
        for file in marks.values():
            if isinstance(file, Path):
                file.unlink(missing_ok=True)
    is_same = not problem and not differences(reports)
    for line in lines:
        with contextlib.suppress(OSError):
            line.send(problem=problem, same=is_same)
            line.connection.close()
    if problem:
        raise MeetingError(problem)
    return sorted(reports, key=lambda report: report.rank), is_same


def open_port(machine):
    """Return a socket that accepts connections at the port of the rendezvous."""
    try:
        if socket.has_dualstack_ipv6():
            family = {"family": socket.AF_INET6, "dualstack_ipv6": True}
            server = socket.create_server(("", machine.port), **family)
        else:
            server = socket.create_server(("", machine.port))
    except OSError as error:
        is_used = error.errno == errno.EADDRINUSE
        if is_used and (problem := ask_other_first(machine)):
            raise MeetingError(problem) from None
        reason = "is used by another program" if is_used else error.strerror
        raise MeetingError(
            f"port {machine.port} of this machine {reason}: give another --main_process_port, the "
            "same on all machines"
        ) from None
    server.settimeout(POLL)
    return server


def ask_other_first(machine):
    """Return the problem if another machine answers as machine 0 at its address, else None."""
    with contextlib.suppress(OSError, ValueError):
        line = Line(socket.create_connection((machine.address, machine.port), POLL))
        line.send(preflight=True, rank=0, host=socket.gethostname())
        return line.receive().get("problem")
    return None  # nobody is there, or the address is one that a router translates


def hear(line, address, word):
    """Return the Report of a machine that has come; without facts, if it says it is machine 0.

    Raises:
        OSError, ValueError, KeyError, TypeError: it is no preflight, or has no more to say.
    """
    hello = line.receive()
    if hello["preflight"] and hello["rank"] == 0:
        return Report(0, address, {"host": hello["host"]}, 0.0, {})
    line.send(word=word)
    while "facts" not in (answer := line.receive()):
        line.send(time=time.time())
    return Report(hello["rank"], address, answer["facts"], answer["clock"], answer["shared"])


def find_clash(reports, last):
    """Return why the machine that came last cannot run with the others, or None."""
    for other in reports:
        if other.rank == last.rank:
            told = " and ".join(f"{one.facts['host']} ({one.address})" for one in (other, last))
            return (
                f"two machines have --machine_rank {last.rank}: {told}. Give each machine a rank "
                "of its own"
            )
    for name in LAUNCHED:
        first, own = (report.facts["same"][name] for report in (reports[0], last))
        if first != own:
            return (
                f"{name} is {first} on {reports[0].name()} and {own} on {last.name()}: give the "
                "same everywhere"
            )
    return None


def find_missing(reports, machine, wait):
    """Return which machines have not come, or None."""
    missing = sorted({*range(machine.machines)} - {report.rank for report in reports})
    if not missing:
        return None
    names = (
        f"machine {missing[0]}" if len(missing) == 1 else f"machines {', '.join(map(str, missing))}"
    )
    hint = ""
    if not has_address(machine.address):
        own = ", ".join(addresses())
        hint = f" --main_process_ip is no address of this machine, which has {own}."
    return (
        f"{names} did not come to {machine.place()} within {wait} s: start the preflight there at "
        "the same time, with this --main_process_ip and a --machine_rank of its own, and see what "
        f"it prints.{hint}"
    )


# The other machines -------------------------------------------------------------------------------
def visit(machine, facts, output, wait):
    """Go to machine 0, compare clocks and folders with it, report, and hear the result."""
    line = Line(reach(machine, wait))
    try:
        line.send(preflight=True, rank=machine.rank, host=facts["host"])
        word = line.receive()["word"]
        clock = compare_clocks(line)
        shared = {}
        for name, folder in folders(output).items():
            own = mark(folder, f"{word}-{machine.rank}")
            shared[name] = sees(folder, word) if isinstance(own, Path) else own
            if isinstance(own, Path):
                own.unlink()
        line.send(facts=facts, clock=clock, shared=shared)
        line.connection.settimeout(wait + TALK)
        result = line.receive()
    except (OSError, ValueError, KeyError):
        raise MeetingError(
            f"what answers at {machine.place()} is no preflight, or one that has ended: see "
            "machine 0's output, stop the run that uses this port, or give another "
            "--main_process_port"
        ) from None
    if result["problem"]:
        raise MeetingError(result["problem"])
    return [], result["same"]


def reach(machine, wait):
    """Return a connection to machine 0."""
    end, error = time.monotonic() + wait, None
    while (left := end - time.monotonic()) > 0:
        try:
            return socket.create_connection((machine.address, machine.port), min(left, TALK))
        except OSError as problem:
            error = problem
            time.sleep(0.2)
    if has_address(machine.address):
        raise MeetingError(
            f"no machine with --machine_rank 0 answers at {machine.place()}: this machine has that "
            f"address, and --machine_rank {machine.rank}. Start it with --machine_rank 0 and the "
            "others with ranks of their own, or give the address of machine 0 everywhere"
        )
    if isinstance(error, ConnectionRefusedError):
        raise MeetingError(
            f"nobody listens at {machine.place()} (connection refused for {wait} s): start the "
            "preflight on machine 0 at the same time, and with --machine_rank 0: perhaps two "
            f"machines have --machine_rank {machine.rank}. Or correct --main_process_ip or "
            "--main_process_port; a firewall may also refuse"
        )
    if isinstance(error, socket.gaierror):
        raise MeetingError(
            f"the name {machine.address} of --main_process_ip is unknown on this machine "
            f"({error.strerror}): give the address of machine 0"
        )
    raise MeetingError(
        f"{machine.place()} does not answer ({error.strerror or 'timed out'}): correct "
        "--main_process_ip, or open that port in machine 0's firewall"
    )


def compare_clocks(line):
    """Return by how many seconds this machine's clock is ahead of machine 0's.

    The fastest of some answers counts. It is exact to half the time that it took.
    """
    found = []
    for _ in range(PINGS):
        begin = time.time()
        line.send(ping=True)
        theirs, now = line.receive()["time"], time.time()
        found.append((now - begin, (begin + now) / 2 - theirs))
    return min(found)[1]


# Addresses ----------------------------------------------------------------------------------------
def addresses():
    """Return this machine's addresses, without those of the loopback."""
    families = (socket.AF_INET, socket.AF_INET6)
    found = [one for group in psutil.net_if_addrs().values() for one in group]
    found = [one.address.partition("%")[0] for one in found if one.family in families]
    return [one for one in found if not ipaddress.ip_address(one).is_loopback]


def has_address(address):
    """Return whether an address or a name means this machine."""
    with contextlib.suppress(OSError):
        found = {info[4][0] for info in socket.getaddrinfo(address, None)}
        return any(one in addresses() or ipaddress.ip_address(one).is_loopback for one in found)
    return False
