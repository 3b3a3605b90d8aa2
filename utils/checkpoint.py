"""Checkpoints of the trainable parameters, complete or not there; a run resumes bit for bit.

On a GPU this also needs deterministic operations (`start_accelerator(deterministic=True)`): the
backward of attention sums in an order that varies.

A folder `checkpoint-<update>` holds the trained weights as the script writes them, and of each process a safetensors
file with what it steps: its part of the values in full precision, the optimizer's state of them, its random numbers'
states. `state.json`, written last, names every file with its bytes and SHA-256. All is written into a hidden
folder first, flushed to the disk and renamed, so that a process that is killed leaves no checkpoint or a whole one.
Nothing is ever unpickled.

This file imports no other file of the project and can be copied along with a script.
"""

import hashlib
import json
import os
import random
import re
import shutil
from pathlib import Path

import numpy
import torch
from accelerate.utils import DistributedType, gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor

PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


class CheckpointError(Exception):
    """A checkpoint that cannot be read, or was made by another run than the one that wants to go on; says which."""


def gather_trained(accelerator, model, name_in_file):
    """Return name -> whole trained value, in full precision, on the main process, and {} on others. Collective.

    Args:
        name_in_file: from a parameter's name in the wrapped model to the one in the file.
    """
    state_dict = {}

    def keep(name, value):
        if accelerator.is_main_process:
            state_dict[name_in_file(name)] = value.detach().cpu().clone()

    if isinstance(model, FSDP):
        for path, unit in model.named_modules():  # one at a time, and of LoRA no part of the base
            if isinstance(unit, FSDP) and all(weight.requires_grad for weight in unit.parameters()):
                with FSDP.summon_full_params(unit, recurse=False, writeback=False):
                    for name, value in unit.module.named_parameters(path):
                        if "_flat_param" not in name:  # of a unit within, whose turn comes
                            keep(name, value)
        return state_dict
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from deepspeed.utils import safe_get_full_fp32_param  # here alone: a large import
    for name, value in accelerator.unwrap_model(model).named_parameters():
        if value.requires_grad:
            if accelerator.distributed_type == DistributedType.DEEPSPEED:
                value = safe_get_full_fp32_param(value)
            keep(name, value.full_tensor() if isinstance(value, DTensor) else value)
    return state_dict


def stepped(accelerator, optimizer):
    """Return the inner optimizer and the tensors that it steps in this process, in an order that is always the same.

    Under DeepSpeed these are the engine's flat partitions in full precision; else the trained parameters: whole, or
    under FSDP this process's part.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        zero = accelerator.deepspeed_engine_wrapped.engine.optimizer
        stage3 = hasattr(zero, "fp32_partitioned_groups_flat")
        masters = (
            zero.fp32_partitioned_groups_flat if stage3 else zero.single_partition_of_fp32_groups
        )
        if any(master is None or not master.numel() for master in masters):
            raise CheckpointError(
                "the optimizer's values lie on NVMe, of which no checkpoint is made"
            )
        return zero.optimizer, list(masters)
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer, [
        parameter for group in optimizer.param_groups for parameter in group["params"]
    ]


def local(tensor):
    """Return the part of a tensor that lies in this process."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def training_state(accelerator, optimizer):
    """Return tensors and numbers of all that this process steps: values, the optimizer's state, a loss scale."""
    inner, masters = stepped(accelerator, optimizer)
    tensors, numbers = {}, {}
    for index, master in enumerate(masters):
        tensors[f"{index}.value"] = local(master).detach()
        for key, value in inner.state.get(master, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{key}"] = local(value).detach()
            else:
                numbers[f"{index}.{key}"] = value
    if accelerator.scaler is not None:
        numbers["scaler"] = accelerator.scaler.state_dict()
    if scaler := engine_scaler(accelerator):
        numbers["loss_scaler"] = {
            name: value for name, value in vars(scaler).items() if type(value) in (int, float)
        }
    return {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}, numbers


def restore_training_state(accelerator, optimizer, tensors, numbers):
    """Put back what `training_state` returned, in place. CheckpointError: tensors of other shapes or names."""
    inner, masters = stepped(accelerator, optimizer)
    numbers = dict(numbers)
    on_device = any(group.get("fused") or group.get("capturable") for group in inner.param_groups)
    with torch.no_grad():
        for index, master in enumerate(masters):
            own = {name.split(".", 1)[1]: name for name in tensors if name.startswith(f"{index}.")}
            value = tensors.get(own.pop("value", None))
            if value is None or value.shape != local(master).shape:
                raise CheckpointError(
                    f"it holds no value of shape {tuple(local(master).shape)} for tensor {index}"
                )
            local(master).copy_(value)
            for key, name in own.items():
                state = tensors[name]
                if key != "step" or on_device:  # a count, on the CPU unless AdamW is fused
                    state = state.to(local(master).device)
                if isinstance(master, DTensor) and state.shape == local(master).shape:
                    layout = {"shape": master.shape, "stride": master.stride()}
                    state = DTensor.from_local(
                        state, master.device_mesh, master.placements, run_check=False, **layout
                    )
                inner.state[master][key] = state
            for name in [name for name in numbers if name.startswith(f"{index}.")]:
                inner.state[master][name.split(".", 1)[1]] = numbers.pop(name)
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(numbers["scaler"])
    if scaler := engine_scaler(accelerator):
        vars(scaler).update(numbers["loss_scaler"])
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        publish_values(accelerator.deepspeed_engine_wrapped.engine.optimizer)


def engine_scaler(accelerator):
    """Return what scales DeepSpeed's loss in fp16, else None."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return None
    return accelerator.deepspeed_engine_wrapped.engine.optimizer.loss_scaler


def publish_values(zero):
    """Copy DeepSpeed's values in full precision into the model's parameters, as each of its steps does. Collective."""
    if not hasattr(zero, "fp32_partitioned_groups_flat"):
        zero.update_lp_params()
        return
    zero._partition_all_parameters()
    for index in range(len(zero.fp32_partitioned_groups_flat)):
        zero._reassign_or_swap_out_partitioned_parameters(index)
    if zero.persistent_parameters:  # the small ones, of which every process keeps a whole copy
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
    zero.invalidate_secondary_tensor()


def random_state():
    """Return the states of Python's, NumPy's and torch's random numbers of this process, as tensors."""
    version, words, gauss = random.getstate()
    name, keys, *position = numpy.random.get_state()
    state = {"python": torch.tensor(words), "numpy": torch.from_numpy(keys.astype("int64"))}
    state["numpy_position"] = torch.tensor(
        [float(number) for number in position], dtype=torch.float64
    )
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
    return f"process-{process:05}-of-{accelerator.num_processes:05}.safetensors"


def is_replicated(accelerator):
    """Return whether every process steps the same values, of which one copy is enough."""
    return accelerator.distributed_type not in (DistributedType.DEEPSPEED, DistributedType.FSDP)


def digest(file):
    """Return bytes and SHA-256 of a file."""
    with open(file, "rb") as stream:
        return [file.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest()]


def flush(path):
    """Have a file or a folder written to the disk, so that not even a loss of power takes it back."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def save_checkpoint(accelerator, output_dir, step, optimizer, state, write_weights):
    """Write `checkpoint-<step>` into output_dir and return its path. Collective: every process calls it.

    Args:
        step: how many updates were made.
        state: whatever JSON can hold and the run needs to go on; `load_checkpoint` gives it back.
        write_weights: called with the folder, on the main process alone, to write the trained weights for others.

    OSError, SafetensorError: the disk is full, or the like; what was there before is untouched.
    """
    target = Path(output_dir) / f"checkpoint-{step}"
    folder = target.with_name(f".{target.name}.unfinished")
    if accelerator.is_main_process:
        remove_unfinished(output_dir)
        folder.mkdir(parents=True)
        write_weights(folder)
    tensors, numbers = training_state(accelerator, optimizer)
    if is_replicated(accelerator) and not accelerator.is_main_process:
        tensors, numbers = {}, {}
    tensors |= {f"random.{name}": value for name, value in random_state().items()}
    accelerator.wait_for_everyone()
    file = folder / process_file(accelerator, accelerator.process_index)
    if not folder.is_dir():
        raise OSError(
            f"process {accelerator.process_index} does not see {folder}: give all machines the same folder"
        )
    save_file(tensors, file, {"numbers": json.dumps(numbers)})
    flush(file)
    files = dict(gather_object([(file.name, digest(file))]))
    if accelerator.is_main_process:
        for other in sorted(folder.iterdir()):
            if other.name not in files:
                flush(other)
                files[other.name] = digest(other)
        (folder / "state.json").write_text(
            json.dumps(state | {"step": step, "files": files}, indent=1) + "\n"
        )
        flush(folder / "state.json")
        flush(folder)
        if target.exists():  # of an earlier run that came this far, and went on from before it
            target.rename(target.with_name(f".{target.name}.removed"))
        folder.rename(target)
        flush(target.parent)
        remove_unfinished(output_dir)
    accelerator.wait_for_everyone()
    return target


def remove_unfinished(output_dir):
    """Delete what a save or a removal that was cut off has left."""
    for folder in Path(output_dir).glob(".checkpoint-*"):
        shutil.rmtree(folder)


def checkpoints(output_dir):
    """Return the complete checkpoints of a folder, the oldest first; complete: every file is there with its bytes."""
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
    """Delete checkpoints, on one process; renamed first, so that no half of one ever shows."""
    for folder in folders:
        shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.removed")))


def find_checkpoint(output_dir, wanted):
    """Return the folder to go on from, or None to start from the beginning.

    Args:
        wanted: "" or "False" for none, "True" for the newest complete one in output_dir, or the path of one.

    CheckpointError: no such folder.
    """
    if wanted.lower() in ("", "false"):
        return None
    if wanted.lower() == "true":
        return next(reversed(checkpoints(output_dir)), None)
    if not Path(wanted).is_dir():
        raise CheckpointError(
            f"--resume_from_checkpoint {wanted} is not there: give a checkpoint's folder, or True"
        )
    newest = next(reversed(checkpoints(output_dir)), None)
    if newest and Path(wanted).resolve() in (
        folder.resolve() for folder in checkpoints(output_dir)[:-1]
    ):
        raise CheckpointError(f"{newest} is newer than {wanted}: go on from it, or move it away")
    return Path(wanted)


def check_same_run(folder, then, now):
    """Raise CheckpointError where the run that made a checkpoint differs in anything that its continuation rests on.

    Args:
        then, now: what identifies the two runs, name -> value as JSON holds it.
    """
    now = json.loads(json.dumps(now))
    # a setting that did not exist then was off
    names = [name for name in {**then, **now} if then.get(name, False) != now.get(name, False)]
    if names:
        told = ", ".join(f"{name} {then.get(name)} (now {now.get(name)})" for name in names)
        raise CheckpointError(
            f"{folder} was made with {told}: give the same to go on exactly, or start a new run"
        )


def read_state(folder, needed=()):
    """Return the state that `save_checkpoint` was given, with `step`, of a whole checkpoint; `needed` must be in it.

    CheckpointError: a file is missing, of another content than written, or of a kind that could run code.
    """
    folder = Path(folder)
    try:
        state = json.loads((folder / "state.json").read_text())
        files, _ = state.pop("files").items(), [state[name] for name in ("step", *needed)]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{folder} is no checkpoint, its state.json cannot be read ({error})"
        ) from error
    if pickles := [file.name for file in folder.iterdir() if file.suffix in PICKLES]:
        raise CheckpointError(
            f"{folder} holds {pickles[0]}, a pickle, which could run any code: no file of ours is one"
        )
    for name, facts in files:
        if not (folder / name).is_file() or digest(folder / name) != facts:
            raise CheckpointError(f"{folder / name} is missing or is not what was written")
    return state


def load_checkpoint(accelerator, folder, optimizer):
    """Put values, optimizer and random numbers of this process back, in place, to be called on the prepared objects.

    CheckpointError: the files are those of another number of processes or of other parameters.
    """
    own = folder / process_file(accelerator, accelerator.process_index)
    values = folder / process_file(accelerator, 0) if is_replicated(accelerator) else own
    tensors, numbers, random_states = {}, {}, {}
    try:
        with safe_open(values, framework="pt") as file:
            numbers = json.loads(file.metadata()["numbers"])
            tensors = {
                name: file.get_tensor(name)
                for name in file.keys()
                if not name.startswith("random.")
            }
        with safe_open(own, framework="pt") as file:
            states = [name for name in file.keys() if name.startswith("random.")]
            random_states = {name.removeprefix("random."): file.get_tensor(name) for name in states}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{own} cannot be read ({error})") from error
    restore_training_state(accelerator, optimizer, tensors, numbers)
    restore_random_state(random_states)
