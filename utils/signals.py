"""Let SIGTERM and SIGUSR1 end a run after the update that is running."""

import signal

import torch

from utils.errors import say

STOPPING = (signal.SIGTERM, signal.SIGUSR1)


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


def say_stopped(names, step, max_steps):
    """Print which signals ended the run, and how to resume it."""
    say(
        f"Stopped by {' and '.join(names)} after update {step} of {max_steps}: "
        "--resume_from_checkpoint True resumes the run."
    )
