"""The command `python -m tools.preflight`."""

import os

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is imported

from tools.preflight.command import main  # noqa: E402

main()
