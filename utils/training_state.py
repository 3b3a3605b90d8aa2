"""What the optimizer of a process steps, and which part of which parameter that is.

A strategy divides the trainable parameters among the processes: ZeRO-1 and 2 cut a flat tensor of
all parameters, ZeRO-3 each parameter, FSDP1 the flat tensor of a unit, FSDP2 the rows of each
parameter; all but FSDP2 add padding. So each tensor that a process steps is described by its pieces
(name, start, offset, length): the elements `start` to `start + length` of the flattened parameter
`name` begin at element `offset` of the flattened tensor. Padding belongs to no piece. By its pieces
a tensor is found again by other processes, in another number or under another strategy.

This file imports no other file of the project and can be copied along with a script.
"""

import json
from collections import defaultdict
from typing import NamedTuple

import torch
from accelerate.utils import DistributedType
from safetensors import safe_open
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

SCALERS = ("scaler", "loss_scaler")  # of the loss: numbers that belong to no parameter
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


class StateError(Exception):
    """A state cannot be saved, or a checkpoint does not hold what a process needs."""


# What a process steps -----------------------------------------------------------------------------
def stepped(accelerator, optimizer):
    """Return the inner optimizer and the tensors that it steps in this process, in a fixed order.

    Under DeepSpeed these are the engine's flat partitions in full precision. Otherwise they are the
    trainable parameters: in full, or under FSDP this process's shards.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        zero = accelerator.deepspeed_engine_wrapped.engine.optimizer
        stage3 = hasattr(zero, "fp32_partitioned_groups_flat")
        masters = (
            zero.fp32_partitioned_groups_flat if stage3 else zero.single_partition_of_fp32_groups
        )
        if any(master is None or not master.numel() for master in masters):
            raise StateError("the optimizer is offloaded to NVMe, which cannot be saved")
        return zero.optimizer, list(masters)
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer, [p for group in optimizer.param_groups for p in group["params"]]


def local(tensor):
    """Return the part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def training_state(accelerator, optimizer):
    """Return the tensors and numbers that this process steps.

    These are its part of the trainable parameters, the optimizer's state, and the loss scale.

    Returns:
        name -> tensor on the CPU, and name -> number. Names begin with the index of the parameter.
    """
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
        values = vars(scaler).items()
        numbers["loss_scaler"] = {name: one for name, one in values if type(one) in (int, float)}
    return {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}, numbers


def restore_training_state(accelerator, optimizer, tensors, numbers):
    """Put back in place what `training_state` returned.

    Raises:
        StateError: the tensors have other names or shapes.
    """
    inner, masters = stepped(accelerator, optimizer)
    tensors_of, numbers_of = by_parameter(tensors), by_parameter(numbers)
    # AdamW counts its steps on the CPU, unless it runs as one kernel
    on_device = any(group.get("fused") or group.get("capturable") for group in inner.param_groups)
    with torch.no_grad():
        for index, master in enumerate(masters):
            own, shape = tensors_of[index], local(master).shape
            value = own.pop("value", None)
            if value is None or value.shape != shape:
                raise StateError(f"it holds no value of shape {tuple(shape)} for {index}")
            local(master).copy_(value)
            for key, state in own.items():
                # a copy: tensors of a file may share its memory with each other
                where = "cpu" if key == "step" and not on_device else local(master).device
                state = state.to(where, copy=True)
                if isinstance(master, DTensor) and state.shape == shape:
                    layout = {"shape": master.shape, "stride": master.stride()}
                    mesh, placements = master.device_mesh, master.placements
                    state = DTensor.from_local(state, mesh, placements, run_check=False, **layout)
                inner.state[master][key] = state
            inner.state[master].update(numbers_of[index])
            count_steps(inner, inner.state[master], local(master).device if on_device else "cpu")
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(loss_scale(numbers, "scaler"))
    if (scaler := engine_scaler(accelerator)) and scaler.dynamic:
        vars(scaler).update(loss_scale(numbers, "loss_scaler"))
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        publish_values(accelerator.deepspeed_engine_wrapped.engine.optimizer)


def loss_scale(numbers, name):
    """Return the state of the loss scaler of fp16; StateError if it is another strategy's."""
    if name not in numbers:
        raise StateError("the loss scale is of another strategy: launch the same, or without fp16")
    return numbers[name]


def count_steps(optimizer, state, device):
    """Turn the count of steps into what the optimizer takes: torch's a tensor, DeepSpeed's an int.

    Args:
        state: of a parameter, in place.
        device: of the tensor.
    """
    step, library = state.get("step"), type(optimizer).__module__.partition(".")[0]
    if library == "torch" and isinstance(step, int):
        state["step"] = torch.tensor(float(step), device=device)
    if library == "deepspeed" and isinstance(step, torch.Tensor):
        state["step"] = int(step)


def by_parameter(entries):
    """Return index of a parameter -> {key: value} of the entries named `index`.key."""
    found = defaultdict(dict)
    for name, value in entries.items():
        index, _, key = name.partition(".")
        if index.isdigit():  # others are of no parameter, such as random.cpu
            found[int(index)][key] = value
    return found


def engine_scaler(accelerator):
    """Return DeepSpeed's loss scaler for fp16; None without DeepSpeed."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return None
    return accelerator.deepspeed_engine_wrapped.engine.optimizer.loss_scaler


def publish_values(zero):
    """Copy DeepSpeed's values in full precision into the model's parameters, as its step does.

    Collective.
    """
    if not hasattr(zero, "fp32_partitioned_groups_flat"):
        zero.update_lp_params()
        return
    zero._partition_all_parameters()
    for index in range(len(zero.fp32_partitioned_groups_flat)):
        zero._reassign_or_swap_out_partitioned_parameters(index)
    if zero.persistent_parameters:  # small ones, which every process keeps in full
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
    zero.invalidate_secondary_tensor()


# Which part of which parameter that is ------------------------------------------------------------
def pieces_of(accelerator, masters):
    """Return for each tensor that this process steps the list of its pieces.

    Args:
        masters: the tensors, in the order of the optimizer, after `prepare`.

    Raises:
        StateError: a parameter is divided in an unknown way.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        engine = accelerator.deepspeed_engine_wrapped.engine
        names = names_of(engine.module)
        if hasattr(engine.optimizer, "fp32_partitioned_groups_flat"):
            return [stage3_pieces(group, names) for group in engine.optimizer.fp16_groups]
        return stage2_pieces(engine.optimizer, names)
    names, flat = {}, {}
    for model in accelerator._models:
        names |= names_of(accelerator.unwrap_model(model))
        for path, unit in model.named_modules():
            if isinstance(unit, FSDP) and unit._handle is not None:
                flat[id(unit._handle.flat_param)] = path
    return [
        fsdp1_pieces(flat[id(one)], one)
        if id(one) in flat
        else parameter_pieces(names.get(id(one), f"parameter {index}"), one)
        for index, one in enumerate(masters)
    ]


def names_of(model):
    """Return id -> name of each parameter, without the wrappers of FSDP1 and torch.compile."""
    return {id(parameter): plain(name) for name, parameter in model.named_parameters()}


def plain(name):
    """Return a parameter's name without the wrappers of FSDP1, checkpointing and torch.compile."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def stage3_pieces(group, names):
    """Return the pieces of a flat tensor of ZeRO-3: this process's part of each parameter."""
    pieces, offset = [], 0
    for parameter in group:
        size = parameter.partition_numel()
        start = torch.distributed.get_rank(parameter.ds_process_group) * size
        length = min(size, parameter.ds_numel - start)  # the rest is padding
        pieces += [(names[id(parameter)], start, offset, length)] if length > 0 else []
        offset += size
    return pieces


def stage2_pieces(zero, names):
    """Return the pieces of the flat tensors of ZeRO-1 or 2: cuts through all parameters."""
    found = []
    for index, group in enumerate(zero.round_robin_bit16_groups):
        size, pieces = zero.partition_size[index], []
        first = torch.distributed.get_rank(zero.real_dp_process_group[index]) * size
        offsets = zero.round_robin_bit16_offsets[index]
        for parameter, offset in zip(group, offsets, strict=True):
            start = max(first - offset, 0)
            length = min(first + size - offset, parameter.numel()) - start
            if length > 0:
                pieces.append((names[id(parameter)], start, offset + start - first, length))
        found.append(pieces)
    return found


def fsdp1_pieces(path, flat):
    """Return the pieces of this process's part of the flat parameter of a unit of FSDP1."""
    prefix = f"{path}." if path else ""
    return [
        (
            plain(f"{prefix}{name}"),
            part.intra_param_start_idx,
            part.offset_in_shard,
            part.numel_in_shard,
        )
        for name, part in zip(flat._fqns, flat._shard_param_infos, strict=True)
        if part.in_shard
    ]


def parameter_pieces(name, parameter):
    """Return the piece of a parameter: all of it, or under FSDP2 this process's rows."""
    if not isinstance(parameter, DTensor):
        return [(name, 0, 0, parameter.numel())]
    mesh, placements = parameter.device_mesh, parameter.placements
    if any(one not in (Shard(0), Replicate()) for one in placements):
        raise StateError(f"{name} is divided as {placements}, not by rows")
    _, (row, *_) = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    length, row_size = parameter.to_local().numel(), parameter.numel() // parameter.shape[0]
    return [(name, row * row_size, 0, length)] if length else []


# What a checkpoint holds --------------------------------------------------------------------------
def metadata_of(numbers, pieces):
    """Return the metadata of a file: one entry, for safetensors writes several in random order."""
    return {"state": json.dumps({"numbers": numbers, "pieces": pieces})}


def read_metadata(file):
    """Return the numbers and the pieces of an open file; None for pieces that it does not hold."""
    metadata = file.metadata()
    if "state" in metadata:
        state = json.loads(metadata["state"])
        return state["numbers"], state["pieces"]
    pieces = json.loads(metadata.get("pieces", "null"))
    return json.loads(metadata["numbers"]), pieces


class Source(NamedTuple):
    """Where a run of elements is stored: in which file, in the tensors named `index`.key."""

    file: safe_open
    keys: list  # of the tensors
    numbers: dict  # key -> number of the optimizer's state
    index: int
    start: int  # of the elements in the flattened parameter
    offset: int  # of the elements in the stored tensor
    length: int

    def read(self, key):
        """Return a tensor. It is a view of the mapped file: only what is copied from it is read."""
        return self.file.get_tensor(f"{self.index}.{key}")


class Stored:
    """The tensors of a checkpoint, found by the parameters that they hold parts of.

    A file holds tensors named `index`.value and `index`.key, for each key of the optimizer's state;
    and in its metadata the numbers, `index`.key -> number, and the pieces, from `pieces_of`.

    Args:
        files: (open file, numbers, pieces) of each process.
    """

    def __init__(self, files):
        self.sources = defaultdict(list)  # name of a parameter -> where its elements are, in order
        for file, numbers, pieces_of_all in files:
            numbers, names = by_parameter(numbers), by_parameter(dict.fromkeys(file.keys()))
            for index, pieces in enumerate(pieces_of_all):
                own = list(names[index]), numbers[index], index
                for name, *place in pieces:
                    self.sources[name].append(Source(file, *own, *place))
        for sources in self.sources.values():
            sources.sort(key=lambda source: source.start)

    def find(self, piece):
        """Yield (source, first element in its tensor, first element in mine, length) of a piece."""
        name, start, offset, length = piece
        at, end = start, start + length
        for source in self.sources.get(name, ()):  # several may hold the same elements
            taken = min(end, source.start + source.length) - at
            if source.start <= at and taken > 0:
                yield source, source.offset + at - source.start, offset + at - start, taken
                at += taken
        if at < end:
            raise StateError(f"it holds no element {at} of {name}")

    def assemble(self, pieces, shape):
        """Return key -> tensor and key -> number: the values and the optimizer's state of a tensor.

        Args:
            pieces: of the tensor. Its other elements, padding, become 0.
            shape: of the tensor.
        """
        parts = [part for piece in pieces for part in self.find(piece)]
        # a process may hold padding alone; the steps of the optimizer are those of any other tensor
        first = parts[0][0] if parts else next(source[0] for source in self.sources.values())
        tensors = {key: self.assemble_one(key, first, parts, shape) for key in first.keys}
        return tensors, dict(first.numbers)

    def assemble_one(self, key, first, parts, shape):
        """Return the tensor `key` of the given shape; or a number of the optimizer as it is."""
        stored = first.read(key)
        if stored.shape != first.read("value").shape:
            if stored.numel() == 1:
                return stored
            raise StateError(
                f"{key} of the optimizer's state belongs to blocks of elements, which cannot be "
                "divided anew"
            )
        whole = torch.zeros(shape, dtype=stored.dtype)
        for source, there, here, length in parts:
            stored = source.read(key).view(-1)
            whole.view(-1)[here : here + length] = stored[there : there + length]
        return whole


def read_pieces(files, own, pieces, shapes):
    """Return what `training_state` gave, for the tensors of this process.

    These are name -> tensor and name -> number. Where the process's own file holds the same pieces,
    they are its content, unchanged. Else they are assembled from all files.

    Args:
        files: path -> open file of each process.
        own: path of the file of this process, which is not there if other processes wrote.
        pieces, shapes: of the tensors that this process steps.

    Raises:
        StateError: the files do not hold all of it, or it cannot be divided.
    """
    pieces = json.loads(json.dumps(pieces))  # as a file holds them
    facts = {path: read_metadata(file) for path, file in files.items()}
    if own in files and facts[own][1] in (None, pieces):
        names = [name for name in files[own].keys() if not name.startswith("random.")]
        return {name: files[own].get_tensor(name) for name in names}, facts[own][0]
    if any(stored is None for _, stored in facts.values()):
        raise StateError(
            f"it is of an older version, which resumes on as many processes only: {len(files)}"
        )
    stored, tensors = Stored([(file, *facts[path]) for path, file in files.items()]), {}
    numbers, _ = next(iter(facts.values()))
    numbers = {name: numbers[name] for name in SCALERS if name in numbers}
    for index, (place, shape) in enumerate(zip(pieces, shapes, strict=True)):
        own_tensors, own_numbers = stored.assemble(place, shape)
        tensors |= {f"{index}.{key}": tensor for key, tensor in own_tensors.items()}
        numbers |= {f"{index}.{key}": number for key, number in own_numbers.items()}
    return tensors, numbers
