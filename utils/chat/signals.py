"""End a run after the update that is running: on a signal, or where the data cannot be read."""

import signal

import torch

from utils.errors import refuse, say

STOPPING = (signal.SIGTERM, signal.SIGUSR1)
UNREADABLE = "unreadable data"


class StopSignals:
    """Remembers which of the signals arrived, from its creation on, instead of dying of them.

    A signal may reach one process alone. So every process hands its `flags` to a reduction, and all
    of them stop after the same update.
    """

    def __init__(self):
        self.received = set()
        for number in STOPPING:
            signal.signal(number, lambda number, frame: self.received.add(number))

    def flags(self, device):
        """Return name -> scalar on the device: 1 where this process received it, else 0."""
        values = {number.name: float(number in self.received) for number in STOPPING}
        return {name: torch.full((), value, device=device) for name, value in values.items()}


class UpdateReader:
    """Reads the micro-batches of each update while the update before it is running.

    A source of data may fail in one process alone, in the middle of a run. Because it fails one
    update early, all processes can make the update that they have read, save a checkpoint and stop
    together.

    Args:
        loader: yields micro-batches.
        accumulated: micro-batches per update.
        num_updates: how many updates are read.
    """

    def __init__(self, loader, accumulated, num_updates):
        self.batches, self.accumulated, self.left = iter(loader), accumulated, num_updates
        self.error = None
        self.upcoming = self.read()
        self.check()

    def read(self):
        """Return the micro-batches of the next update; [] after the last one or an error."""
        self.left -= 1
        try:
            return [next(self.batches) for _ in range(self.accumulated * (self.left >= 0))]
        except Exception as error:  # a dataset, a file system or a network raises anything
            self.error = error
            return []

    def take(self):
        """Return the micro-batches of this update, after reading those of the next one."""
        micro_batches, self.upcoming = self.upcoming, self.read()
        return micro_batches

    def flags(self, device):
        """Return name -> scalar on the device: 1 where this process cannot read on, else 0."""
        return {UNREADABLE: torch.full((), float(self.error is not None), device=device)}

    def check(self):
        """Stop with the error of this process, if there was one."""
        if self.error is not None:
            # a loader's worker puts a traceback before the message
            last = ([*filter(None, str(self.error).splitlines())] or [""])[-1].strip()
            kind = type(self.error)
            told = last.removeprefix(f"{kind.__module__}.{kind.__name__}: ")
            refuse(told or kind.__name__)


def say_stopped(names, step, max_steps):
    """Print what ended the run, and how to resume it."""
    say(
        f"Stopped by {' and '.join(names)} after update {step} of {max_steps}: "
        "--resume_from_checkpoint True resumes the run."
    )
