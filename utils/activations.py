"""Activation checkpointing: which layers recompute their activations, and where inputs are kept.

transformers does the work (`model.activation_checkpointing_enable`). Here is checked, before the
weights are loaded, that each setting has the effect that its name says.
"""

import os

from transformers.modeling_layers import GradientCheckpointingLayer

from utils.environment import uses_gpu
from utils.errors import refuse, say

SWITCH = "gradient_checkpointing"
EVERY, OFFLOAD = f"{SWITCH}_every_n_layers", f"{SWITCH}_offload"
FSDP = ("fsdp_activation_checkpointing", "fsdp_activation_checkpointing_offload")


def settle_checkpointing(config):
    """Turn off what cannot work on this machine or beside other settings; print each change.

    Args:
        config: the script's Config. Read are gradient_checkpointing and, if it has them,
            gradient_checkpointing_every_n_layers and gradient_checkpointing_offload, which is set
            to False where it has no effect.
    """
    flags = vars(config)
    is_on, every, offload = flags.get(SWITCH), flags.get(EVERY, 1), flags.get(OFFLOAD, False)
    if not is_on and (given := [f"--{EVERY}"] * (every != 1) + [f"--{OFFLOAD}"] * offload):
        say(f"{', '.join(given)}: unused without --{SWITCH}.")
    elif offload and not uses_gpu():
        say(f"--{OFFLOAD}: unused without a GPU, because activations are in CPU memory already.")
        config.gradient_checkpointing_offload = False
    elif offload and flags.get("torch_compile"):
        refuse(
            f"--{OFFLOAD} has no effect with --torch_compile, whose graphs keep what they save on "
            "the GPU: drop one of them"
        )
    if is_on and (given := [name for name in FSDP if os.environ.get(name.upper()) == "true"]):
        say(f"{', '.join(given)} of the launch config: unused, because --{SWITCH} is given.")
        os.environ |= {name.upper(): "false" for name in given}


def check_checkpointing(config, culprit, skeleton):
    """Stop if the model cannot checkpoint the layers that the flags ask for; print which it does.

    Args:
        config: as for `settle_checkpointing`.
        culprit: the model's flag and name, for an error.
        skeleton: the model on the meta device.
    """
    flags = vars(config)
    if not flags.get(SWITCH):
        return
    if not skeleton.supports_gradient_checkpointing:
        refuse(
            f"{culprit} is a {type(skeleton).__name__}, for which transformers has no activation "
            f"checkpointing: drop --{SWITCH}"
        )
    every = flags.get(EVERY, 1)
    layers = [one for one in skeleton.modules() if isinstance(one, GradientCheckpointingLayer)]
    if every == 1:
        return
    if not layers:
        refuse(
            f"{culprit} is a {type(skeleton).__name__}, which checkpoints all of its layers or "
            f"none: drop --{EVERY}"
        )
    count = len(layers[::every])
    say(f"Activations of {count} of {len(layers)} layers are recomputed in the backward pass.")
