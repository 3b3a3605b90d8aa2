"""Generation from a model that is sharded over the processes.

This file imports no other file of the project and can be copied along with a script.
"""

from contextlib import contextmanager, nullcontext

from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP


@contextmanager
def generating(accelerator, model):
    """Yield the model to call `generate` on, under any strategy; the body runs on every process alike.

    Where `model.gather_for_generation` is true the parameters of a sharded model are gathered once, and are sharded
    again at the end; else a layer at a time is gathered for every token: give `synced_gpus=True`.
    """
    whole = model.gather_for_generation
    if hasattr(next(model.parameters()), "ds_id"):  # ZeRO-3
        from deepspeed.runtime.zero import unwrap_model_for_generation  # here alone: a large import

        with unwrap_model_for_generation(model) if whole else nullcontext():
            yield model.module
    elif isinstance(model, FSDP):
        units = FSDP.fsdp_modules(model) if whole else []
        with FSDP.summon_full_params(model, recurse=whole, writeback=False), accelerator.autocast():
            for unit in units:
                unit.forward = unit.module.__call__  # past FSDP, which would shard the unit again
            yield model.module
            for unit in units:
                del unit.forward
    elif isinstance(model, FSDPModule):
        units = [unit for unit in model.modules() if isinstance(unit, FSDPModule)]
        freed = [
            unit
            for unit in units[1:]
            if list(unit.children()) or unit is model.get_input_embeddings()
        ]
        for unit in freed:  # all but root, norm and head, which stay gathered anyhow
            unit.set_reshard_after_forward(not whole)
        yield model
        for unit in freed:
            unit.set_reshard_after_forward(accelerator.state.fsdp_plugin.reshard_after_forward)
        for unit in units:
            unit.reshard()
    else:
        with accelerator.autocast():
            yield accelerator.unwrap_model(model)
