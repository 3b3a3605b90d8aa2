"""Modules that a process calls only for some of its rows, such as experts of their own weights.

Experts that are fused into one tensor need nothing of this.
"""

import torch
from accelerate.utils import DistributedDataParallelKwargs

CONTAINERS = (torch.nn.ModuleList, torch.nn.ModuleDict)


def skipping_blocks(model):
    """Return the modules that call only some of the modules inside, as the rows decide."""
    modules, found = dict(model.named_modules()), []
    for name, module in modules.items():
        if isinstance(module, CONTAINERS):
            if type(module).forward is not torch.nn.Module.forward:  # it chooses by itself
                found.append(module)
            elif name.endswith("experts"):
                found.append(modules[name.rpartition(".")[0]])
    return found


def allow_skipping(accelerator, model):
    """Let processes call different modules, under DDP and ZeRO-3. Call it before `prepare`.

    DDP then looks for parameters without a gradient after each forward. ZeRO-3 gathers all modules
    of a block together: else one process would gather an expert that the others do not call.
    """
    unused = [name for name, _ in model.named_parameters() if "_global" in name]  # of LED
    blocks = skipping_blocks(model)
    if accelerator.deepspeed_plugin is None and (blocks or unused):
        # keeps the other settings of a handler that the script has given
        accelerator.ddp_handler = accelerator.ddp_handler or DistributedDataParallelKwargs()
        accelerator.ddp_handler.find_unused_parameters = True
    elif blocks and accelerator.deepspeed_plugin.zero_stage == 3:
        from deepspeed.utils import set_z3_leaf_modules  # a large import

        set_z3_leaf_modules(model, list({type(block) for block in blocks}))
