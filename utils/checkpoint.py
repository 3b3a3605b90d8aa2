"""Atomic checkpoints of the trainable parameters, from which a run resumes bit for bit.

On a GPU this also needs deterministic operations (`start_accelerator(deterministic=True)`), because
the backward of attention sums in an order that varies.

A folder `checkpoint-<update>` holds the trained weights as the script writes them, and a
safetensors file per process: its part of the trainable parameters in full precision, the state of
the optimizer, and the states of the random number generators. It also says which part that is
(training_state.py), so that a run can resume on another number of processes; not bit for bit then.
`state.json` is written last; it names every file with its bytes and SHA-256. Everything is written
into a hidden folder, flushed to the disk and renamed. So a process that is killed leaves a complete
checkpoint or none. Nothing is ever unpickled.

This file imports no other file of the project but training_state.py, and can be copied with it.
"""

import hashlib
import json
import os
import random
import re
import shutil
from contextlib import ExitStack
from pathlib import Path

import numpy
import torch
from accelerate.utils import DistributedType, gather_object, set_seed
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor

from utils.training_state import (
    StateError,
    local,
    metadata_of,
    pieces_of,
    read_pieces,
    restore_training_state,
    stepped,
    training_state,
)

PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


class CheckpointError(Exception):
    """A checkpoint cannot be written or read, or belongs to another run; the message says which."""


def gather_trained(accelerator, model):
    """Return name -> full trainable parameter in full precision; {} on all but the main process.

    Collective. The names are those in the prepared model, with the wrappers of FSDP1.
    """
    state_dict = {}

    def keep(name, value):
        if accelerator.is_main_process:
            state_dict[name] = value.detach().cpu().clone()

    if isinstance(model, FSDP):
        # one unit at a time, and none of a frozen base
        for path, unit in model.named_modules():
            if isinstance(unit, FSDP) and all(weight.requires_grad for weight in unit.parameters()):
                with FSDP.summon_full_params(unit, recurse=False, writeback=False):
                    for name, value in unit.module.named_parameters(path):
                        if "_flat_param" not in name:  # that of a unit inside, which has its turn
                            keep(name, value)
        return state_dict
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from deepspeed.utils import safe_get_full_fp32_param  # a large import
    for name, value in accelerator.unwrap_model(model).named_parameters():
        if value.requires_grad:
            if accelerator.distributed_type == DistributedType.DEEPSPEED:
                value = safe_get_full_fp32_param(value)
            keep(name, value.full_tensor() if isinstance(value, DTensor) else value)
    return state_dict


def random_state():
    """Return the states of the random generators of Python, NumPy and torch, as tensors."""
    _, words, _ = random.getstate()
    _, keys, *position = numpy.random.get_state()
    state = {"python": torch.tensor(words), "numpy": torch.from_numpy(keys.astype("int64"))}
    position = [float(number) for number in position]
    state["numpy_position"] = torch.tensor(position, dtype=torch.float64)
    state["torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state):
    """Put back what `random_state` returned."""
    random.setstate((3, tuple(state["python"].tolist()), None))
    position, has_gauss, gauss = state["numpy_position"].tolist()
    keys = state["numpy"].numpy().astype("uint32")
    numpy.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def process_file(accelerator, process):
    """Return the name of the file of a process in a checkpoint."""
    return f"process-{process:05}-of-{accelerator.num_processes:05}.safetensors"


def is_replicated(accelerator):
    """Return whether all processes step the same values, so that one copy is enough."""
    return accelerator.distributed_type not in (DistributedType.DEEPSPEED, DistributedType.FSDP)


def digest(file):
    """Return bytes and SHA-256 of a file."""
    with open(file, "rb") as stream:
        return [file.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest()]


def flush(path):
    """Write a file or a folder to the disk itself, so that it survives a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def save_checkpoint(accelerator, output_dir, step, optimizer, state, write_weights):
    """Write `checkpoint-<step>` into output_dir and return its path. Collective.

    Args:
        step: number of updates made.
        optimizer: from `prepare`.
        state: what the run needs to resume, as JSON can hold it; `read_state` returns it.
        write_weights: called with the folder on the main process; writes the trained weights as
            peft or transformers load them.

    Raises:
        OSError, SafetensorError: the disk is full, or the like. Earlier checkpoints are untouched.
        CheckpointError: the optimizer's state cannot be saved.
    """
    target = Path(output_dir) / f"checkpoint-{step}"
    folder = target.with_name(f".{target.name}.unfinished")
    if accelerator.is_main_process:
        remove_unfinished(output_dir)
        folder.mkdir(parents=True)
        write_weights(folder)
    try:
        pieces = pieces_of(accelerator, stepped(accelerator, optimizer)[1])
    except StateError as error:
        raise CheckpointError(str(error)) from error
    tensors, numbers = training_state(accelerator, optimizer)
    if is_replicated(accelerator) and not accelerator.is_main_process:
        tensors, numbers, pieces = {}, {}, []
    tensors |= {f"random.{name}": value for name, value in random_state().items()}
    accelerator.wait_for_everyone()
    file = folder / process_file(accelerator, accelerator.process_index)
    if not folder.is_dir():
        raise OSError(
            f"process {accelerator.process_index} does not see {folder}: give all machines the "
            "same folder"
        )
    save_file(tensors, file, metadata_of(numbers, pieces))
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(0o666 & ~mask)  # safetensors writes with 0600, whatever the umask says
    flush(file)
    files = dict(gather_object([(file.name, digest(file))]))
    if accelerator.is_main_process:
        for other in sorted(folder.rglob("*")):  # a tokenizer may have a folder of templates
            name = other.relative_to(folder).as_posix()
            if name not in files:
                flush(other)
                files |= {name: digest(other)} if other.is_file() else {}
        text = json.dumps(state | {"step": step, "files": files}, indent=1)
        (folder / "state.json").write_text(f"{text}\n")
        flush(folder / "state.json")
        flush(folder)
        if target.exists():  # an earlier run came this far, and this one resumed from before it
            target.rename(target.with_name(f".{target.name}.removed"))
        folder.rename(target)
        flush(target.parent)
        remove_unfinished(output_dir)
    accelerator.wait_for_everyone()
    return target


def remove_unfinished(output_dir):
    """Delete what an interrupted save or removal has left."""
    for folder in Path(output_dir).glob(".checkpoint-*"):
        shutil.rmtree(folder)


def checkpoints(output_dir):
    """Return the complete checkpoints of a folder, the oldest first.

    A checkpoint is complete if every file that its state.json names has the right size.
    """
    found = {}
    for folder in Path(output_dir).glob("checkpoint-*"):
        if re.fullmatch(r"checkpoint-\d+", folder.name) and (folder / "state.json").is_file():
            try:
                files = json.loads((folder / "state.json").read_text())["files"]
                if all((folder / name).stat().st_size == size for name, (size, _) in files.items()):
                    found[int(folder.name.split("-")[1])] = folder
            except (OSError, ValueError, KeyError, TypeError):
                continue
    return [found[step] for step in sorted(found)]


def remove_checkpoints(folders):
    """Delete checkpoints, on one process. They are renamed first, so that none is ever partial."""
    for folder in folders:
        shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.removed")))


def keep_newest(output_dir, limit):
    """Delete all checkpoints but the newest `limit`, on one process; 0 keeps all."""
    if limit:
        remove_checkpoints(checkpoints(output_dir)[:-limit])


def find_checkpoint(output_dir, wanted):
    """Return the checkpoint to resume from, or None to start from the beginning.

    Args:
        wanted: "" or "False" for none, "True" for the newest complete one in output_dir, or a path.

    Raises:
        CheckpointError: there is no such folder, or output_dir holds a newer checkpoint.
    """
    if wanted.lower() in ("", "false"):
        return None
    if wanted.lower() == "true":
        return next(reversed(checkpoints(output_dir)), None)
    if not Path(wanted).is_dir():
        raise CheckpointError(
            f"--resume_from_checkpoint {wanted} is not there: give a checkpoint's folder, or True"
        )
    *older, newest = checkpoints(output_dir) or [None]
    if Path(wanted).resolve() in [folder.resolve() for folder in older]:
        raise CheckpointError(f"{newest} is newer than {wanted}: resume it, or move it away")
    return Path(wanted)


def check_same_run(folder, then, now):
    """Raise CheckpointError where a checkpoint belongs to a run with other settings or data.

    Args:
        folder: the checkpoint.
        then, now: what identifies the run that made it and this one, name -> value, as JSON can
            hold it.
    """
    now = json.loads(json.dumps(now))
    # a setting that did not exist then was off
    names = [name for name in {**then, **now} if then.get(name, False) != now.get(name, False)]
    if names:
        told = ", ".join(f"{name} {then.get(name)} (now {now.get(name)})" for name in names)
        raise CheckpointError(
            f"{folder} was made with {told}: give the same to resume exactly, or start a new run"
        )


def read_state(folder, needed=(), process=0, processes=1):
    """Return the state that `save_checkpoint` was given, with `step`; checks every file.

    Args:
        needed: names that the state must hold.
        process, processes: rank and number of the processes of this machine. Each reads the bytes
            of its share of the files; together they read all.

    Raises:
        CheckpointError: a file is missing or changed, or is a pickle.
    """
    folder = Path(folder)
    try:
        state = json.loads((folder / "state.json").read_text())
        files, _ = [*state.pop("files").items()], [state[name] for name in ("step", *needed)]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{folder} is not a checkpoint, its state.json cannot be read ({error})"
        ) from error
    if pickles := [file.name for file in folder.rglob("*") if file.suffix in PICKLES]:
        raise CheckpointError(
            f"{folder} holds {pickles[0]}, a pickle, which could run any code; save_checkpoint "
            "writes none: delete it if you trust the rest"
        )
    for number, (name, facts) in enumerate(files):
        own = number % processes == process
        if not (folder / name).is_file() or (own and digest(folder / name) != facts):
            raise CheckpointError(
                f"{folder / name} is missing or is not what was written: resume another checkpoint"
            )
    return state


def load_checkpoint(accelerator, folder, optimizer):
    """Put this process's parameters, optimizer state and random states back, in place. Collective.

    Call it after `accelerator.prepare` and before the first forward: a unit that FSDP2 or ZeRO-3
    keeps gathered after a forward would keep its old values.

    On another number of processes every process assembles its part from the files of all. Then it
    draws other random numbers than any process of the interrupted run would have drawn.

    Args:
        folder: the checkpoint.
        optimizer: from `prepare`.

    Raises:
        CheckpointError: the files cannot be read, or hold other parameters, or the state of an
            optimizer that cannot be divided among another number of processes.
    """
    own = folder / process_file(accelerator, accelerator.process_index)
    paths = sorted(folder.glob("process-*-of-*.safetensors"))
    try:
        with ExitStack() as stack:
            files = {path: stack.enter_context(safe_open(path, framework="pt")) for path in paths}
            _, masters = stepped(accelerator, optimizer)
            pieces, shapes = pieces_of(accelerator, masters), [local(one).shape for one in masters]
            source = paths[0] if is_replicated(accelerator) else own
            tensors, numbers = read_pieces(files, source, pieces, shapes)
            restore_training_state(accelerator, optimizer, tensors, numbers)
            restore_random_state(tensors_of(files.get(own, files[paths[0]]), "random."))
    except (OSError, SafetensorError, IndexError) as error:
        raise CheckpointError(f"{own} cannot be read ({error})") from error
    except StateError as error:
        raise CheckpointError(f"{folder} cannot be resumed here: {error}") from error
    if own not in paths:  # seeds that no other process has, nor this one at another update
        set_seed(int(torch.randint(2**31, ())), device_specific=True)


def tensors_of(file, prefix):
    """Return the tensors of an open file whose names begin with a prefix, named without it."""
    names = [name for name in file.keys() if name.startswith(prefix)]
    return {name.removeprefix(prefix): file.get_tensor(name) for name in names}
