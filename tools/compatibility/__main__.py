"""The command `python -m tools.compatibility`."""

from tools.compatibility import main

main()
