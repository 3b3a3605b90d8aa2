"""Faster computation of chat_sft's model: torch.compile and Liger's kernels."""

import contextlib

import torch
from transformers.integrations.liger import apply_liger_kernel

from utils.errors import fail_together, say


def compile_layers(accelerator, model):
    """Compile each decoder layer in place, or stop if the model names no decoder layers.

    One compilation serves all layers, and the names of the parameters stay as they are.
    """
    names = model._no_split_modules or ()
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        fail_together(accelerator, "--torch_compile finds no decoder layers here: drop it")
    for layer in layers:
        layer.compile(dynamic=True)  # the rows differ in length


def uncompiled(config):
    """Return a context, for a few batches, in which compiled layers run uncompiled.

    Args:
        config: its torch_compile is read.
    """
    if config.torch_compile:
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


def apply_liger(model, name):
    """Replace RMSNorm, RoPE and SwiGLU by Liger's kernels, and print if Liger has none.

    Liger's loss is not used: `add_token_loss` replaces the loss.

    Args:
        name: name of the model, for what is printed.
    """
    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})
    if not any("forward" in vars(module) for module in model.modules()):
        say(f"Liger is unused: it has no kernels for {name}.")
