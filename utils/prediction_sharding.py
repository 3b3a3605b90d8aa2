"""What a model needs before it is sharded without an optimizer, by ZeRO-3 or FSDP2."""

from contextlib import contextmanager

import torch
from peft.utils import ModulesToSaveWrapper

from utils.experts import allow_skipping
from utils.lora import gather_blocks


def gather_experts(accelerator, model):
    """Let ZeRO-3 gather a block with experts as a whole, also adapted ones. Call before `prepare`.

    The rows of a process decide which experts it calls. So it might gather an expert that the other
    processes do not call, and wait for them forever.
    """
    allow_skipping(accelerator, model)
    gather_blocks(model)


def drop_frozen_copies(model):
    """Drop PEFT's unused frozen copies of the layers that an adapter holds in full.

    With such a copy, a tied weight would be in two units of FSDP2.
    """
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.original_module = torch.nn.Identity()


@contextmanager
def hiding_embeddings(model):
    """Hide the embeddings of a model with an encoder and a decoder from accelerate in the body.

    It would put the embedding that both share into two units, which FSDP2 does not accept.
    """
    if model.config.is_encoder_decoder:
        model.get_input_embeddings = model.get_output_embeddings = lambda: None
    yield
    for name in ("get_input_embeddings", "get_output_embeddings"):
        vars(model).pop(name, None)
