"""Compute merged weights: each a Lazy tensor that merges its module when its values are needed."""

import functools

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

from tools.merge_adapter.lazy import Lazy, blocks, equal, take


def merge_unit(unit, rows=None):
    """Return name -> tensor, in 32 bits, of the module that one of PEFT's wrappers merges into.

    Args:
        rows: slice of output rows to merge, for LoRA on a linear layer; None for all.
    """
    if isinstance(unit, ModulesToSaveWrapper):
        return unit.modules_to_save[unit.active_adapters[0]].state_dict()
    lazies = [
        (module, name, parameter, None if path.startswith("lora_A") else rows)
        for path, module in unit.named_modules()
        for name, parameter in module._parameters.items()
        if isinstance(parameter, Lazy)
    ]
    for module, name, parameter, part in lazies:
        module._parameters[name] = torch.nn.Parameter(parameter.make(part), requires_grad=False)
    # the two cases of PEFT's own _unload_and_optionally_merge
    if hasattr(unit, "unload_and_optionally_merge_module"):
        merged = unit.unload_and_optionally_merge_module(
            merge=True, safe_merge=False, adapter_names=None
        )
    else:
        unit.merge()
        merged = unit.get_base_layer()
    tensors = {name: tensor.data for name, tensor in merged.state_dict().items()}
    for module, name, parameter, _ in lazies:
        module._parameters[name] = parameter
    for module in unit.modules():
        if isinstance(module, BaseTunerLayer):
            module.merged_adapters = []
    return tensors


def merge_lazily(model, plain):
    """Return name -> Lazy of the merged model.

    Args:
        model: the model with PEFT's wrappers in it.
        plain: name -> tensor, the state of the model before the wrappers were added.
    """
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    wrappers = {name: unit for name, unit in model.named_modules() if isinstance(unit, kinds)}
    now = model.state_dict(keep_vars=True)
    # the tensors of the last unit: one merge gives all weights of a module, and all its experts
    last = {}

    def merged(path, name, rows=None):
        unit = wrappers[path]
        if isinstance(unit, lora.Linear) and type(unit.get_base_layer()) is torch.nn.Linear:
            parts = blocks(unit.get_base_layer().weight, rows)
            return torch.cat([merge_unit(unit, part)[name] for part in parts])
        if path not in last:
            last.clear()
            last[path] = merge_unit(unit)
        return take(last[path][name], rows)

    weights = {}
    for name, tensor in plain.items():
        ends = [i for i, letter in enumerate(name) if letter == "."]
        # wrappers may be nested: the outermost one
        path = next((name[:end] for end in ends if name[:end] in wrappers), None)
        native = tensor.native if isinstance(tensor, Lazy) else tensor.dtype
        if path is None:
            make = functools.partial(take, now[name])
            adapted = isinstance(now[name], Lazy) and now[name].adapted
        else:
            make = functools.partial(merged, path, name.removeprefix(f"{path}."))
            adapted = True
        weights[name] = Lazy(tensor.shape, tensor.dtype, make, native, adapted)
    return weights


def untie(tied, config, weights):
    """Drop the copies of tied weights; if the adapter made them differ, untie the config instead.

    Args:
        tied: name of a copy -> name of the weight that it is tied to.
    """
    pairs = [(weights[target], weights[source]) for target, source in tied.items()]
    if all(not (a.adapted or b.adapted) or equal(a, b) for a, b in pairs):
        for target in tied:
            del weights[target]
    # T5 and its relatives also scale logits by this flag: there it stays, and both copies are kept
    elif not config.is_encoder_decoder:
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
