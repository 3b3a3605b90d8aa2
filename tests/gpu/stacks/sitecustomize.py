"""Every Python process of tests/gpu/run.py loads this: at SIGUSR2 it writes its threads' stacks."""

import faulthandler
import signal

faulthandler.register(signal.SIGUSR2, all_threads=True)
