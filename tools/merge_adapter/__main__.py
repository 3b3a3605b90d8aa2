"""The command `python -m tools.merge_adapter`."""

import ctypes
import sys

M_MMAP_THRESHOLD = -3  # of mallopt

# peft would import bitsandbytes: 47 MB that only `read.dequantized` needs
sys.modules["bitsandbytes"] = None
if sys.platform == "linux":
    # blocks of 1 MB or more go back to the system as soon as they are freed
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)

import torch  # noqa: E402

from tools.merge_adapter import main  # noqa: E402

# reading takes most of the time, and threads wait for each other on a busy machine
torch.set_num_threads(1)
main()
