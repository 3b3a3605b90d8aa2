"""Count the floating-point operations of a model, to say how much of a GPU's arithmetic is used."""

import math

import torch
from peft.utils import ModulesToSaveWrapper

from utils.engine import full_shape

# dense bf16 FLOP per second of a GPU, from the makers' data sheets
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}


def flop_per_token(model):
    """Return the floating-point operations per input token, and those of the head per label token.

    A weight costs 2 in the forward, 2 for the gradient of its input, and 2 for its own gradient
    unless it is frozen. The embedding costs nothing, because it is only looked up. Not counted are
    the attention scores, and what activation checkpointing computes a second time.

    Args:
        model: not prepared yet.
    """
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    unused = [weight for wrapper in wrappers for weight in wrapper.original_module.parameters()]
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    ends = [getattr(end, "modules_to_save", {"default": end})["default"].weight for end in ends]
    seen, body = {id(weight) for weight in (*unused, *ends)}, 0
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            if id(weight) in seen:
                continue
            seen.add(id(weight))
            quant_state = getattr(module, "quant_state", None)
            is_packed = quant_state is not None and weight is module.weight  # the bias is not
            shape = quant_state.shape if is_packed else full_shape(weight)
            body += flop_of(weight, shape)
    head = ends[1]
    return body, flop_of(head, full_shape(head))


def flop_of(weight, shape):
    """Return the floating-point operations of a weight per token."""
    return (6 if weight.requires_grad else 4) * math.prod(shape)


def peak_flop_per_second(accelerator):
    """Return the bf16 FLOP per second of all GPUs of the run; 0 on CPUs and unknown GPUs."""
    if accelerator.device.type != "cuda":
        return 0
    name = torch.cuda.get_device_name()
    peak = next((peak for known, peak in PEAKS.items() if known in name), 0)
    return peak * accelerator.num_processes
