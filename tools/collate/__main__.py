"""The command `python -m tools.collate`."""

import ctypes
import sys

M_MMAP_THRESHOLD = -3  # of mallopt

sys.modules["bitsandbytes"] = None  # peft would import it: 47 MB that nothing here needs
if sys.platform == "linux":
    # blocks of 1 MB or more go back to the system as soon as they are freed
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)

from tools.collate import main  # noqa: E402

main()
