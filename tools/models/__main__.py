"""The command `python -m tools.models`."""

from tools.models.command import main

main()
