"""What really runs, and which process holds what.

Read from the live model, optimizer and engine, never from the launch config.
"""

import math

from accelerate.utils import DistributedType, gather_object
from torch.distributed.fsdp import ShardingStrategy
from torch.distributed.tensor import DTensor

from utils.errors import fail_together


# What a process holds -----------------------------------------------------------------------------
def full_shape(parameter):
    """Return the full shape of a parameter, also where a process holds only a shard of it."""
    if hasattr(parameter, "ds_shape"):  # ZeRO-3
        return tuple(parameter.ds_shape)
    if hasattr(parameter, "_unpadded_unsharded_size"):  # FSDP1 flattens the parameters of a unit
        return tuple(parameter._unpadded_unsharded_size)
    return tuple(parameter.shape)


def held_part(parameter):
    """Return the tensor that this process holds: the full parameter, or its shard with padding."""
    if hasattr(parameter, "ds_tensor"):  # ZeRO-3
        return parameter.ds_tensor
    if hasattr(parameter, "_local_shard"):  # FSDP1
        return parameter._local_shard
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter.data


def bytes_held(parameters):
    """Return dtype -> bytes that each process holds, a dict per process; and of the full model."""
    parts = list(map(held_part, parameters))
    held = gather_object([count_bytes((part.dtype, part.numel()) for part in parts)])
    return held, count_bytes((p.dtype, math.prod(full_shape(p))) for p in parameters)


def count_bytes(tensors):
    """Return dtype -> bytes of (dtype, number of elements) pairs."""
    sizes = {}
    for dtype, numel in tensors:
        name = str(dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + numel * dtype.itemsize
    return sizes


def count_elements(model, trainable_only=False):
    """Return the number of parameters. A packed 4-bit weight counts with all its numbers."""
    parameters = [p for p in model.parameters() if p.requires_grad or not trainable_only]
    count = sum(math.prod(full_shape(parameter)) for parameter in parameters)
    for module in () if trainable_only else model.modules():
        if getattr(module, "quant_state", None) is not None:  # a bitsandbytes.nn.Linear4bit
            unpacked = module.quant_state.shape.numel()
            count += unpacked - math.ceil(unpacked / 2) // module.quant_storage.itemsize
    return count


def check_sharding(accelerator, model):
    """Print the optimizer and the bytes of parameters per process; fail if they are not sharded.

    Read from the live parameters, because libraries replicate some of them without a word.
    Collective.
    """
    print_optimizer(accelerator)
    parameters = list(accelerator.unwrap_model(model).parameters())
    held, full = bytes_held(parameters)
    total, count = sum(full.values()), shards(accelerator)
    most = max(sum(one.values()) for one in held)
    holders = {f"process {rank}": one for rank, one in enumerate(held)} | {"full model": full}
    told = [
        f"{name}: {', '.join(f'{dtype} {size:,}' for dtype, size in sorted(one.items()))}"
        for name, one in holders.items()
    ]
    accelerator.print(f"bytes of parameters: {'; '.join(told)}")
    padding = 2**16 + total / count / 10  # small models have much of it
    if most > largest_share(parameters, count) + padding:
        fail_together(
            accelerator,
            f"a process holds {most:,} of {total:,} bytes of parameters, and "
            f"{strategy(accelerator)} should spread them over {count}: check the wrap policy, and "
            "bnb_4bit_quant_storage of 4-bit weights",
        )


def largest_share(parameters, count):
    """Return the bytes that a process holds at most if all parameters are spread over `count`.

    FSDP2 divides the first dimension. Where it has fewer rows than there are processes, such as the
    8 experts of a fused weight on 16 processes, some hold a row and others nothing.
    """
    share = 0
    for parameter in parameters:
        shape = full_shape(parameter)
        rows = shape[0] if isinstance(parameter, DTensor) and shape else count
        size = math.prod(shape) * parameter.dtype.itemsize
        share += size * math.ceil(rows / count) / max(rows, 1)
    return share


def shards(accelerator):
    """Return over how many processes the parameters are spread; 1 where each holds all."""
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version == 2:
            mesh, processes = accelerator.torch_device_mesh, accelerator.num_processes
            return processes if mesh is None else accelerator.parallelism_config.dp_shard_size
        sharded = (ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP)
        return accelerator.num_processes if plugin.sharding_strategy in sharded else 1
    return accelerator.num_processes if strategy(accelerator) == "zero3" else 1


# What runs ----------------------------------------------------------------------------------------
def strategy(accelerator):
    """Return "single", "ddp", "zero1", "zero2", "zero3", "fsdp1" or "fsdp2"."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"zero{accelerator.deepspeed_engine_wrapped.engine.zero_optimization_stage()}"
    if accelerator.distributed_type == DistributedType.FSDP:
        return f"fsdp{accelerator.state.fsdp_plugin.fsdp_version}"
    return "single" if accelerator.distributed_type == DistributedType.NO else "ddp"


def mixed_precision(accelerator):
    """Return "no", "bf16" or "fp16", from DeepSpeed's engine where it casts."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return accelerator.mixed_precision
    engine = accelerator.deepspeed_engine_wrapped.engine
    return "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "no"


def trained_dtype(accelerator, parameters):
    """Return the dtype that the optimizer steps: under DeepSpeed, that of its master weights."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return next(p.dtype for p in parameters if p.requires_grad)
    zero = accelerator.deepspeed_engine_wrapped.engine.optimizer
    is_stage3 = hasattr(zero, "fp32_partitioned_groups_flat")
    groups = (
        zero.fp32_partitioned_groups_flat if is_stage3 else zero.single_partition_of_fp32_groups
    )
    return groups[0].dtype


def quantization(model):
    """Return the arguments of BitsAndBytesConfig that quantized the model; None where none did."""
    found = getattr(getattr(model, "config", None), "quantization_config", None)
    if found is None:
        return None
    settings = found if isinstance(found, dict) else found.to_dict()
    names = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
    names += ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage")
    return {name: settings[name] for name in names if name in settings}


def stepping_optimizer(optimizer):
    """Return the optimizer that steps, inside accelerate's wrapper and DeepSpeed's."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def print_optimizer(accelerator):
    """Print which optimizer runs: its class, where it is from, and whether it is one kernel."""
    for optimizer in map(stepping_optimizer, accelerator._optimizers[:1]):
        library = type(optimizer).__module__.partition(".")[0]
        fused = ", fused" if optimizer.defaults.get("fused") else ""
        accelerator.print(f"Optimizer: {type(optimizer).__name__} ({library}{fused})")


def engine_facts(accelerator, parameters):
    """Return what the live optimizer and engine say of themselves. Collective.

    Keys: optimizer (class name); adamw_mode (null if it is no Adam); offload_optimizer and
    offload_param ("none", "cpu", "nvme"); parameters_held (elements of parameters per process, with
    padding); bytes_held (per process, dtype -> bytes); frozen_gradients (number of frozen
    parameters that have a gradient).
    """
    optimizer = stepping_optimizer(accelerator._optimizers[0])
    name = type(optimizer).__name__
    is_adam = "Adam" in name
    facts = {"offload_optimizer": "none", "offload_param": "none"}
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        engine = accelerator.deepspeed_engine_wrapped.engine
        offloads = {
            "optimizer": engine.zero_offload_optimizer(),
            "param": engine.zero_offload_param(),
        }
        for part, offload in offloads.items():
            facts[f"offload_{part}"] = "none" if offload is None else str(offload.device)
    elif accelerator.device.type != "cpu" and held_part(parameters[0]).device.type == "cpu":
        facts = {"offload_optimizer": "cpu", "offload_param": "cpu"}  # FSDP's
    gradients = sum(not p.requires_grad and p.grad is not None for p in parameters)
    return facts | {
        "optimizer": name,
        "adamw_mode": getattr(optimizer, "adam_w_mode", "AdamW" in name) if is_adam else None,
        "parameters_held": gather_object([sum(held_part(p).numel() for p in parameters)]),
        "bytes_held": bytes_held(parameters)[0],
        "frozen_gradients": sum(gather_object([gradients])),
    }
