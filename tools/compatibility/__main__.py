"""The command `python -m tools.compatibility`."""

from tools.compatibility.command import main

main()
