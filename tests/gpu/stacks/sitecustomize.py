"""Loaded by every Python process of tests/gpu/run.py: SIGUSR2 makes it write the stacks of its threads."""

import faulthandler
import signal

faulthandler.register(signal.SIGUSR2, all_threads=True)
