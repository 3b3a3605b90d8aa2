"""Read the weights of DeepSpeed's checkpoints: of ZeRO-1, 2 and 3, in the optimizer's precision."""

import math
import re
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch

from tools.merge_adapter.lazy import Lazy
from utils.errors import fail, first_line

OPTIMIZER, MODEL = "_optim_states.pt", "_model_states.pt"
ARCHIVE = b"PK\x03\x04"  # begins what torch.save writes


class Stub:
    """Stands in for a class of DeepSpeed that a checkpoint holds, without its code."""


# DeepSpeed's classes in its checkpoints; else only tensors and plain values are unpickled
CLASSES = [
    (Stub, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (Stub, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (Stub, "deepspeed.utils.tensor_fragment.fragment_address"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]


class Part(NamedTuple):
    """Elements `start` to `start + length` of a flattened weight, in a flat tensor at `offset`."""

    flat: torch.Tensor
    offset: int
    start: int
    length: int


def joined(parts, shape):
    """Return the Lazy tensor of a shape that is joined from parts in mapped files."""
    shape, dtype = torch.Size(shape), parts[0].flat.dtype if parts else torch.float32
    return Lazy(shape, dtype, partial(join, parts, shape, dtype), dtype, adapted=True)


def join(parts, shape, dtype, rows=None):
    """Return some rows, or all, of a tensor that is joined from its parts."""
    if rows is not None:
        row = shape[1:].numel()
        first, shape = rows.start * row, torch.Size([rows.stop - rows.start, *shape[1:]])
    else:
        first = 0
    whole = torch.empty(shape.numel(), dtype=dtype)
    for part in parts:
        start, end = max(first, part.start), min(first + len(whole), part.start + part.length)
        if start < end:
            offset = part.offset + start - part.start
            whole[start - first : end - first] = part.flat[offset : offset + end - start]
    return whole.view(shape)


def load(path):
    """Return the content of a file, with its tensors mapped; stop if it holds unknown classes."""
    try:
        with path.open("rb") as file:
            begin = file.read(len(ARCHIVE))
        if begin != ARCHIVE:
            fail(
                f"{path} is damaged, or no file of torch.save, or in its format of before PyTorch "
                "1.6, which cannot be mapped: copy it again, or load it with torch and save it"
            )
        unknown = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        if unknown := sorted(unknown - {name for _, name in CLASSES}):
            fail(f"{path} holds {unknown[0]}, which is not loaded: it could run any code")
        with torch.serialization.safe_globals(CLASSES):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        fail(f"{path} is damaged or truncated, copy it again: {first_line(error)}")


def find_deepspeed(folder):
    """Return the folder of ZeRO's files: this one, or the one that its file `latest` names; None.

    Stops with an error if that folder is missing.
    """
    if list(folder.glob(f"*{OPTIMIZER}")):
        return folder
    if not (folder / "latest").is_file():
        return None
    tag = (folder / "latest").read_text().strip()
    if not (folder / tag).is_dir():
        fail(f"{folder} lacks the folder {tag}, which its file latest names: copy it, too")
    return folder / tag


def shards(folder, pattern, count):
    """Return the content of the file of each process; stop where one is missing.

    Args:
        pattern: name of the files, with {} for the number of the process.
    """
    names = [pattern.format(process) for process in range(count)]
    if missing := [name for name in names if not (folder / name).is_file()]:
        fail(
            f"{folder} lacks {', '.join(missing)}: {count} processes wrote this checkpoint, copy "
            "the files of all"
        )
    return [load(folder / name) for name in names]


def processes_of(optimizer):
    """Return how many processes wrote a checkpoint, by what one of them saved of its optimizer."""
    counts = optimizer["partition_count"]
    return max(counts) if isinstance(counts, list) else counts


def read_deepspeed(folder):
    """Return the weights of a checkpoint, and the names of the trained ones.

    Returns:
        name -> Lazy: the trained weights in the optimizer's precision, buffers, frozen weights if
            the checkpoint holds them; a tied weight stands under each of its names.
        set of names.
    """
    found = sorted(path.name for path in folder.glob(f"*{OPTIMIZER}"))
    if not found:
        fail(f"{folder} holds no file *{OPTIMIZER}: the weights in full precision are in them")
    forms = [re.fullmatch(rf"(.*zero_pp_rank_)\d+_mp_rank_00{OPTIMIZER}", name) for name in found]
    if None in forms:
        name = found[forms.index(None)]
        fail(f"{folder} holds {name}, of tensor or expert parallelism, which is not joined here")
    prefixes = {form[1] for form in forms}
    if len(prefixes) > 1:
        fail(
            f"{folder} holds files of two runs, {' and '.join(prefixes)}...: delete the older ones"
        )
    count = processes_of(load(folder / found[0])["optimizer_state_dict"])
    optimizers = shards(folder, f"{prefixes.pop()}{{}}_mp_rank_00{OPTIMIZER}", count)
    optimizers = [one["optimizer_state_dict"] for one in optimizers]
    if any(processes_of(one) != count for one in optimizers):
        fail(f"{folder} holds files of runs on several numbers of processes: delete the older ones")
    is_stage3 = optimizers[0]["zero_stage"] == 3
    if is_stage3:
        models = shards(folder, f"zero_pp_rank_{{}}_mp_rank_00{MODEL}", count)
        trained = stage3(models[0]["param_shapes"], [one["fp32_flat_groups"] for one in optimizers])
    else:
        models = shards(folder, f"mp_rank_00{MODEL}", 1)
        trained = stage2(models[0]["param_shapes"], optimizers)
    frozen = models[0].get("frozen_param_shapes") or {}
    weights = {name: models[0]["module"][name] for name in models[0]["buffer_names"]}
    weights = {
        name: joined(cut([one.reshape(-1)], 0, one.numel()), one.shape)
        for name, one in weights.items()
    }
    for name, shape in frozen.items():
        fragments = [one["frozen_param_fragments"][name].reshape(-1) for one in models]
        weights[name] = complete(name, cut(fragments, 0, shape.numel()), shape)
    weights |= trained
    tied = models[0]["shared_params"].items()
    weights |= {alias: weights[name] for alias, name in tied if name in weights}
    return weights, set(trained)


def cut(flats, first, length, start=0):
    """Return parts of a weight: `length` elements from `first` on, of flat tensors end to end.

    Args:
        start: of these elements in the flattened weight.
    """
    parts = []
    for flat, begin in zip(flats, accumulate(map(len, flats), initial=0)):
        low, high = max(first, begin), min(first + length, begin + len(flat))
        if low < high:
            parts.append(Part(flat, low - begin, start + low - first, high - low))
    return parts


def stage2(groups, optimizers):
    """Return name -> Lazy: the processes' parts of each group, end to end, hold its parameters.

    Args:
        groups: name -> shape of each group of the optimizer.
        optimizers: what each process saved of its optimizer.
    """
    weights = {}
    for index, shapes in enumerate(groups):
        flats = [one["single_partition_of_fp32_groups"][index] for one in optimizers]
        paddings = optimizers[0].get("param_alignment_paddings")
        paddings = paddings[index] if paddings else [0] * len(shapes)
        offset = 0
        for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
            weights[name] = complete(name, cut(flats, offset, shape.numel()), shape)
            offset += shape.numel() + padding
    return weights


def stage3(groups, flats):
    """Return name -> Lazy: each process has an equal part of each parameter, the last one padded.

    Args:
        groups: name -> shape of each group of the optimizer.
        flats: for each process its flat tensors, which put end to end hold its parts.
    """
    weights, offset = {}, 0
    for name, shape in (pair for shapes in groups for pair in shapes.items()):
        size, parts = math.ceil(shape.numel() / len(flats)), []
        for process, own in enumerate(flats):
            start = process * size
            parts += cut(own, offset, min(size, shape.numel() - start), start)
        weights[name] = complete(name, parts, shape)
        offset += size
    return weights


def complete(name, parts, shape):
    """Return the Lazy tensor of a weight; stop if its parts are not all of it."""
    if sum(part.length for part in parts) != shape.numel():
        fail(f"the checkpoint does not hold all of {name}: was its optimizer offloaded to NVMe?")
    return joined(parts, shape)
