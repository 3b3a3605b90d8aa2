"""End a run on several machines with one sentence when a machine or one of its processes is lost.

Collectives wait for hours, because one process may save or tokenize for that long. So they do not
find out that another machine has lost its network or its power. Every process therefore keeps one
more TCP connection, to process 0, on which nothing is sent. The kernels at both ends check it
(keepalive) and report it as broken after HEARTBEAT_SECONDS. A process that is only busy, holds
Python's lock or is stopped by a debugger stays connected. One that dies closes its connection.

`start_accelerator` starts the heartbeat, `end_run` stops it.
"""

import atexit
import contextlib
import errno
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from dataclasses import dataclass

import torch
from accelerate.utils import broadcast_object_list, gather_object

from utils.errors import refuse, say
from utils.process_group import has_other_machines, own_address

SECONDS = 30  # default of HEARTBEAT_SECONDS
CONNECTING = 20  # seconds for all connections at the start
GRACE = 5  # seconds in which a process can end by itself, by the error that has ended another one
# The network or the machine itself does not answer. Other errors are the answer of its kernel.
SILENT = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN)
BYE = b"bye\n"
SAVING = threading.Lock()  # held while results are written, which a lost machine does not stop
RUNNING = []  # the Heartbeat of this process, if there is one


@dataclass
class Place:
    """Where a process of the run is."""

    process: int
    machine: int
    host: str
    address: str


# The thread ---------------------------------------------------------------------------------------
class Heartbeat:
    """The connections of this process, and a thread that watches them.

    Args:
        peers: socket -> Place of the process at its other end. Process 0 is connected to all
            others, and every other process to process 0.
        own: Place of this process.
        seconds: for which a machine may be silent.
    """

    def __init__(self, peers, own, seconds):
        self.peers, self.own, self.seconds = peers, own, seconds
        self.is_first_here = int(os.environ.get("LOCAL_RANK", 0)) == 0
        self.reason, self.is_told = "", threading.Lock()
        for peer in peers:
            keep_alive(peer, seconds)
        threading.Thread(target=self.watch, name="heartbeat", daemon=True).start()

    def watch(self):
        """Wait for the first connection that breaks. The thread's task."""
        with selectors.PollSelector() as selector:
            for peer in self.peers:
                selector.register(peer, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    try:
                        message = key.fileobj.recv(2000)
                    except OSError as error:
                        message = error.errno
                    if self not in RUNNING:  # this process has stopped it
                        return
                    selector.unregister(key.fileobj)
                    if message != BYE:
                        self.handle(self.peers[key.fileobj], message)

    def handle(self, place, message):
        """End this process: a peer sent the reason, is silent or has ended.

        Args:
            message: what was received, b"" at the end of a connection, or the errno of its error.
        """
        where = f"machine {place.machine} ({place.host}, {place.address})"
        if isinstance(message, bytes) and message:
            self.reason = message.decode()
        elif message in SILENT:
            self.reason = f"{where} is lost: it has not answered for {self.seconds} s"
        else:
            self.reason = (
                f"process {place.process} on {where} ended before the run was done: see its own "
                "output"
            )
            time.sleep(GRACE)
        self.tell()
        if not self.is_first_here:
            time.sleep(GRACE)  # the first process of the machine prints the reason for all
        if not SAVING.acquire(blocking=False):
            SAVING.acquire()
            time.sleep(GRACE)  # the main thread prints what was written
        # in a thread of its own, because the main thread may hold the lock of the output
        flush = threading.Thread(target=sys.stdout.flush, daemon=True)
        flush.start()
        flush.join(GRACE)
        os._exit(1)

    def tell(self):
        """Send the reason to the other machines, and print it once per machine.

        Other processes of this machine are not told. They end when this one does, and it may still
        have to write the results.
        """
        if not self.is_told.acquire(blocking=False):
            return
        for peer, place in self.peers.items():
            if place.machine != self.own.machine:
                send(peer, self.reason.encode())
        if self.is_first_here:
            text = (
                f"\nerror: {self.reason}. This run ends: start it again on all machines, or resume "
                "it from its last checkpoint\n"
            )
            os.write(2, text.encode(errors="replace"))

    def explain(self):
        """Print the reason, if there is one, below the traceback of an error."""
        for _ in range(20):  # the thread may learn the reason a little later than the collective
            if self.reason:
                return self.tell()
            time.sleep(0.1)

    def close(self):
        """Close the connections, without a word; for a forked child."""
        for peer in self.peers:
            peer.close()


def keep_alive(peer, seconds):
    """Let the kernel report an error if the other end is silent for so many seconds."""
    every = max(1, seconds // 6)
    tcp = {socket.TCP_KEEPIDLE: every, socket.TCP_KEEPINTVL: every, socket.TCP_KEEPCNT: 100}
    tcp |= {socket.TCP_USER_TIMEOUT: 1000 * seconds}  # also ends the unanswered probes
    for option, value in tcp.items():
        peer.setsockopt(socket.IPPROTO_TCP, option, value)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    peer.settimeout(None)


def send(peer, message):
    """Send a short message if the connection still takes one."""
    with contextlib.suppress(OSError):
        peer.send(message, socket.MSG_DONTWAIT)


# Start and stop -----------------------------------------------------------------------------------
def start_heartbeat():
    """Start the heartbeat if the run has other machines. Every process calls it.

    Stops with an error if HEARTBEAT_SECONDS is not a number. 0 turns the heartbeat off.
    """
    if not has_other_machines():
        return
    given = os.environ.get("HEARTBEAT_SECONDS", str(SECONDS))
    if not given.isdigit():
        refuse(f"HEARTBEAT_SECONDS is {given!r}: give seconds, or 0 to turn the heartbeat off")
    if given == "0":
        return say("No heartbeat (HEARTBEAT_SECONDS is 0): nothing finds out if a machine is lost.")
    places = find_places()
    own = places[int(os.environ["RANK"])]
    server = listen() if own.process == 0 else None
    greeting = secrets.token_hex(16) if server else ""
    port = server.getsockname()[1] if server else 0
    greeting, port = broadcast_object_list([greeting, port])
    peers = accept(server, greeting, places) if server else connect(greeting, port, places[0], own)
    connected = {place.process for place in peers.values()} if server else set()
    if missing := [place for place in places[1:] if server and place.process not in connected]:
        told = ", ".join(f"process {place.process} ({place.host})" for place in missing)
        say(
            f"Warning: no heartbeat with {told}, because port {port} of {own.host} cannot be "
            "reached. If a machine is lost, this will not be noticed. Open the ports between the "
            "machines."
        )
    if peers:
        RUNNING.append(Heartbeat(peers, own, int(given)))
        os.register_at_fork(after_in_child=forget)
        atexit.register(stop_if_ended)
        sys.excepthook = explaining(sys.excepthook)


def find_places():
    """Return the Place of every process, in the order of the processes. Collective."""
    own = (os.environ.get("GROUP_RANK"), socket.gethostname(), own_address() or "no address")
    found = gather_object([own])
    machines = list(dict.fromkeys(group or host for group, host, _ in found))
    return [
        Place(process, machines.index(group or host), host, address)
        for process, (group, host, address) in enumerate(found)
    ]


def listen():
    """Return a socket that accepts connections at any free port."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def accept(server, greeting, places):
    """Return the connections of the other processes, as many as arrive in time."""
    peers, end = {}, time.monotonic() + CONNECTING
    while len(peers) < len(places) - 1 and time.monotonic() < end:
        server.settimeout(max(0.1, end - time.monotonic()))
        with contextlib.suppress(OSError, ValueError):
            peer, _ = server.accept()
            peer.settimeout(GRACE)
            word, process = peer.makefile().readline().split()
            if word == greeting:  # and not a stranger who looks for open ports
                peers[peer] = places[int(process)]
    server.close()
    return peers


def connect(greeting, port, first, own):
    """Return the connection to process 0, or none."""
    for address in dict.fromkeys((os.environ["MASTER_ADDR"], first.address)):
        with contextlib.suppress(OSError):
            peer = socket.create_connection((address, port), timeout=CONNECTING / 3)
            peer.sendall(f"{greeting} {own.process}\n".encode())
            return {peer: first}
    return {}


def stop_heartbeat():
    """Stop the heartbeat: from now on this process may end. It is not an error to call it twice."""
    while RUNNING:
        for peer in RUNNING.pop().peers:
            send(peer, BYE)


def stop_if_ended():
    """Stop the heartbeat at the exit of a process that has ended its process group."""
    if not torch.distributed.is_initialized():
        stop_heartbeat()


def forget():
    """Close the connections in a forked child, so that they break when its parent dies."""
    while RUNNING:
        RUNNING.pop().close()


def explaining(hook):
    """Return an excepthook that also says which process was lost, as a collective does not."""

    def explain(*error):
        hook(*error)
        for heartbeat in RUNNING:
            heartbeat.explain()

    return explain
