"""Check the output folder, and keep other runs out of it while this one lasts."""

import atexit
import contextlib
import errno
import fcntl
import json
import os
import socket
import tempfile
from pathlib import Path

from huggingface_hub.utils import validate_repo_id

from utils.errors import or_refuse, refuse, say

LOCKS = {}  # file -> descriptor of each lock that this process holds
BUSY = (errno.EACCES, errno.EAGAIN)


def check_output(config):
    """Stop if the output folder exists and may not be replaced, or cannot be created."""
    if config.hub_model_id:
        or_refuse("--hub_model_id", validate_repo_id, config.hub_model_id)
    folder = lock_folder("output_dir", config.output_dir)
    if folder.is_dir():
        if not config.overwrite_output_dir:
            refuse(f"--output_dir {folder} exists: choose another, or add --overwrite_output_dir")
        if any(folder.iterdir()):
            check_earlier_run(folder)
    elif folder.exists():
        refuse(f"--output_dir {folder} is a file: choose another")
    culprit = f"--output_dir {folder} cannot be created, choose another"
    name = f".{folder.name}."  # the run is first written into a folder with this prefix
    directory = folder.absolute().parent
    or_refuse(culprit, lambda: tempfile.TemporaryDirectory(prefix=name, dir=directory).cleanup())


def check_earlier_run(folder):
    """Stop unless the folder's metrics.json lists the files of an earlier run."""
    culprit = f"--output_dir {folder} holds no metrics.json of an earlier run, choose another"
    or_refuse(culprit, lambda: list(json.loads((folder / "metrics.json").read_text())["saved"]))


def lock_folder(flag, name):
    """Stop if another run uses the folder; keep other runs out until this process ends.

    The lock is a hidden file beside the folder, `.NAME.lock`. It says which process holds it. The
    system releases it when that process ends, however it ends. The first process of a launch holds
    it for all. Creates the folder's parents.

    Args:
        flag: the flag that gives the folder's name.

    Returns:
        The folder's path.
    """
    if not name:
        refuse(f"--{flag} is empty: name a folder")
    folder, culprit = Path(name), f"--{flag} {name} cannot be created, choose another"
    or_refuse(culprit, folder.exists)  # the name may be too long
    full = folder.resolve()
    file = full.with_name(f".{full.name}.lock")
    or_refuse(culprit, file.parent.mkdir, parents=True, exist_ok=True)
    if int(os.environ.get("RANK", 0)) > 0 or file in LOCKS:
        return folder
    while True:
        descriptor = or_refuse(culprit, os.open, file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # a lock of the process, which forked children do not inherit
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(descriptor, 200).decode(errors="replace") or "another process"
            os.close(descriptor)
            if error.errno in BUSY:
                refuse(
                    f"--{flag} {name} belongs to a run that is still active, {owner}: wait until "
                    f"it ends, or choose another {flag}"
                )
            say(f"No lock for --{flag} {name} ({error}): start no other run with that folder.")
            file.unlink(missing_ok=True)
            return folder
        with contextlib.suppress(FileNotFoundError):  # the run that held it has removed it
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                break
        os.close(descriptor)
    os.truncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    LOCKS[file] = descriptor
    atexit.register(unlock, file, os.getpid())
    return folder


def unlock(file, process):
    """Release a lock of this process; one that a forked child only knows of stays."""
    if os.getpid() == process and file in LOCKS:
        file.unlink(missing_ok=True)
        os.close(LOCKS.pop(file))
