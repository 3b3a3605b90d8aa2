"""Stop with one line, `error: ` and what is wrong and what to do, printed once per machine.

Settings and files look the same to every process, so every process stops. The first one to get
there prints the line. The exit code is 1.
"""

import contextlib
import os
import sys
import time
import traceback
from datetime import timedelta

import torch
import transformers
from torch.distributed import TCPStore


def refuse(message):
    """Print `error: message` once for all processes of a machine; end this one with code 1."""
    if is_first_to_refuse():
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(1)


def is_first_to_refuse():
    """Return whether this process prints the error for all processes that its launcher started.

    torch's launcher keeps a TCPStore that all processes reach, even before there is a process
    group. The first process to count itself there prints. Without the store rank 0 prints at once.
    Other ranks wait 60 s, in which the launcher ends them, and print only after that.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        with contextlib.suppress(RuntimeError):  # the launcher is gone
            store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=60))
            restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
            machine = os.environ.get("GROUP_RANK", 0)  # each has a console of its own
            key = f"refused by {sys.argv[0]} on machine {machine}, restart {restart}"
            return store.add(key, 1) == 1
    elif int(os.environ.get("RANK", 0)) > 0:
        time.sleep(60)  # there is no store; a launcher ends this process once another has failed
    return True


def or_refuse(culprit, function, *args, **kwargs):
    """Return `function(*args, **kwargs)`; stop with the culprit and the first line of its error."""
    try:
        return function(*args, **kwargs)
    except Exception as error:  # libraries raise anything for a missing, foreign or corrupt file
        refuse(f"{culprit}: {first_line(error.__cause__ or error)}")


@contextlib.contextmanager
def refusing(*errors):
    """Stop with the message of an error of these classes that the body raises."""
    try:
        yield
    except errors as error:
        last = str(error).strip().splitlines()[-1]  # a loader's worker puts a traceback before it
        refuse(last.removeprefix(f"{type(error).__module__}.{type(error).__name__}: "))


@contextlib.contextmanager
def explaining(what, remedy):
    """Stop with one sentence for whatever a library raises in the body.

    The traceback is printed, too, if transformers logs at the level debug.

    Args:
        what: subject of the sentence, such as the model and the settings that matter.
        remedy: what works instead.
    """
    try:
        yield
    except Exception as error:  # libraries raise anything for a model that they cannot run
        if transformers.logging.get_verbosity() <= transformers.logging.DEBUG:
            traceback.print_exc()
        if isinstance(error, OSError):
            remedy = "check the files of the model, the disk and the network"
        if isinstance(error, torch.OutOfMemoryError):
            remedy = "give a smaller batch or --max_length, or a strategy that shards the model"
        refuse(f"{what}: {first_line(error)} [{remedy}; --log_level debug shows the traceback]")


def first_line(error):
    """Return the first line of an error's message, or its class where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def say(text):
    """Print a line once, from the first process, also before there is an Accelerator."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, flush=True)


def fail(message):
    """Print `error: message`, end this process with code 1; the launcher then ends the others."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(1)


def fail_together(accelerator, message):
    """Print `error: message` from the main process; every process, which all call it, ends."""
    if accelerator.is_main_process:
        fail(message)
    raise SystemExit(1)
