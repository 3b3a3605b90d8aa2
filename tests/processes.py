"""Find running processes, and make copies of scripts with planted faults."""

import shutil
from pathlib import Path

from conftest import ROOT


def running(word):
    """Return process id -> command line of all processes with the word in their command line."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # the process has ended
            continue
        if str(word) in command:
            found[int(path.parent.name)] = command
    return found


def plant(folder, script, *replacements):
    """Copy a script and utils/ into the folder, edit the copy of the script and return its path.

    Args:
        replacements: pairs (old, new) of text. Each old text must occur exactly once.
    """
    text = (ROOT / "examples" / f"{script}.py").read_text()
    for old, new in replacements:
        assert text.count(old) == 1, f"{script} contains {text.count(old)} times: {old}"
        text = text.replace(old, new)
    copy = Path(folder) / f"{script}.py"
    copy.write_text(text)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "utils", copy.parent / "utils", ignore=ignored)
    return copy
