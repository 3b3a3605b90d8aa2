"""What a launch leaves running, and copies of scripts with a fault planted in them."""

import shutil
from pathlib import Path

from conftest import ROOT


def running(word):
    """Return process id -> command line of the processes whose command line holds the word."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # gone by now
            continue
        if str(word) in command:
            found[int(path.parent.name)] = command
    return found


def plant(folder, script, *replacements):
    """Copy a script and utils/ into the folder, replace (old, new) text in the script, and return its path."""
    text = (ROOT / "examples" / f"{script}.py").read_text()
    for old, new in replacements:
        assert text.count(old) == 1, f"{script} holds {text.count(old)} times: {old}"
        text = text.replace(old, new)
    copy = Path(folder) / f"{script}.py"
    copy.write_text(text)
    shutil.copytree(
        ROOT / "utils", copy.parent / "utils", ignore=shutil.ignore_patterns("__pycache__")
    )
    return copy
