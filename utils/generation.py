"""Generate from a model under any strategy, sharded or not."""

import os
import re
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP


@contextmanager
def generating(accelerator, model, layerwise=False):
    """Yield the model to call `generate` on. Every process runs the body alike.

    A sharded model is gathered once, and every process goes back to its own shard at the end of the
    body. If a process has no memory for the full model, or with `layerwise`, one layer at a time is
    gathered instead, for every token; this is slow. Give `synced_gpus=True` to `generate` under a
    strategy that shards: a process whose rows are done then keeps taking part in the gathering
    until the last one is done.

    What happens inside:

    - ZeRO-3: DeepSpeed's `unwrap_model_for_generation` gathers the parameters and removes the hooks
      that would release them after each layer.
    - FSDP1: `summon_full_params` gathers. Each unit's `forward` is replaced by that of the module
      inside, because FSDP's own would shard the unit again.
    - FSDP2: the first forward gathers each unit, and `set_reshard_after_forward(False)` keeps it.
      The root, the last norm and the head stay gathered anyway. At the end every unit is resharded:
      one that stayed gathered would keep its old values after the next update.

    Args:
        accelerator, model: from `prepare`.
        layerwise: gather a layer at a time, even if the full model fits.
    """
    if isinstance(model, FSDP | FSDPModule) or hasattr(next(model.parameters()), "ds_id"):
        full = not layerwise and fits(accelerator, model)
    if hasattr(next(model.parameters()), "ds_id"):  # ZeRO-3
        from deepspeed.runtime.zero import unwrap_model_for_generation  # a large import

        with unwrap_model_for_generation(model) if full else nullcontext():
            yield model.module
    elif isinstance(model, FSDP):
        units = FSDP.fsdp_modules(model) if full else []
        gathered = FSDP.summon_full_params(model, recurse=full, writeback=False)
        with gathered, accelerator.autocast():
            for unit in units:
                unit.forward = unit.module.__call__
            yield model.module
            for unit in units:
                del unit.forward
    elif isinstance(model, FSDPModule):
        units = [unit for unit in model.modules() if isinstance(unit, FSDPModule)]
        embedding = model.get_input_embeddings()
        kept = [unit for unit in units[1:] if list(unit.children()) or unit is embedding]
        for unit in kept:
            unit.set_reshard_after_forward(not full)
        yield model
        for unit in kept:
            unit.set_reshard_after_forward(accelerator.state.fsdp_plugin.reshard_after_forward)
        for unit in units:
            unit.reshard()
    else:
        with accelerator.autocast():
            yield accelerator.unwrap_model(model)


def fits(accelerator, model) -> bool:
    """Return whether every process has memory for the full model; print it if one has not.

    Compares the bytes of the full parameters with 80 % of what is free: on the process's GPU, or of
    the machine's memory, shared among its processes. The rest is for what generation keeps.
    Collective.
    """
    swapped = [
        p
        for p in model.parameters()
        if getattr(getattr(p, "ds_tensor", None), "final_location", "") == "nvme"
    ]
    if swapped and swapped[0].nvme_swapper.available_swap_in_buffers() < len(swapped):
        accelerator.print(
            f"{len(swapped)} weights are on NVMe, more than buffer_count of offload_param. So one "
            "layer at a time is read to generate, for every token, which is slow."
        )
        return False
    needed = 0
    for parameter in model.parameters():
        shape = getattr(parameter, "_unpadded_unsharded_size", parameter.shape)  # FSDP1
        shape = getattr(parameter, "ds_shape", shape)  # ZeRO-3
        needed += shape.numel() * parameter.element_size()
    if accelerator.device.type == "cuda":
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        free = torch.cuda.mem_get_info()[0] + unused
    else:
        available = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
        free = int(available[1]) * 1024 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    free = min(gather_object([free]))
    if needed > 0.8 * free:
        accelerator.print(
            f"The full model has {needed:,} bytes, and a process has {free:,} free. So one layer "
            "at a time is gathered to generate, for every token, which is slow."
        )
    return needed <= 0.8 * free
