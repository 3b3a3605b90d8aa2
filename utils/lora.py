"""Choose where LoRA goes: layers of the language model, and the fused weights of its experts.

This file imports no other file of the project but errors.py and can be copied along with a script.
"""

import math
import re

import torch
from peft.tuners.lora import ParamWrapper
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from utils.errors import refuse, say

LINEAR = (torch.nn.Linear, Conv1D)
PATTERN = re.compile(
    r"[\\^$*+?()\[\]{}|]"
)  # characters of a regular expression, in no layer's name


def lora_targets(model, wanted):
    """Return the `target_modules` of a LoraConfig for the names that a flag lists.

    PEFT's all-linear also reaches the vision or audio towers of a multimodal checkpoint, which text
    never runs through. Here it means the language part alone, and a line says so. A regular
    expression is matched with the full name of a layer, as PEFT does.

    Args:
        model: the base model, without an adapter.
        wanted: ["all-linear"], or names or regular expressions of layers.
    """
    if wanted == ["all-linear"]:
        return language_part(model) or "all-linear"
    if not any(map(PATTERN.search, wanted)):
        return wanted
    parts = [one if PATTERN.search(one) else rf"(?:.*\.)?{re.escape(one)}" for one in wanted]
    return "|".join(parts)


def matching(target, names):
    """Return those of the names that a LoRA target stands for: a name or a regular expression."""
    if PATTERN.search(target):
        return [name for name in names if re.fullmatch(target, name)]
    return [name for name in names if name == target or name.endswith(f".{target}")]


def language_part(model):
    """Return a regular expression of the linear layers that text runs through.

    None where the model has no tower for another kind of input: then those are all layers. Prints
    how many layers get LoRA, and which parts get none.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    towers = [
        name
        for name, module in modules.items()
        if isinstance(module, PreTrainedModel) and not reads_text(module)
    ]
    if not towers:
        return None
    decoder = model.get_decoder()
    part = next(name for name, module in modules.items() if module is decoder)
    # a tower inside of the decoder, as in Phi 4 multimodal: the branch that holds it
    inner = {name.removeprefix(f"{part}.").split(".")[0] for name in towers if within(name, part)}
    linear = {name for name, module in modules.items() if isinstance(module, LINEAR)}
    branches = [f"{part}.{name}" for name in inner]
    adapted = {
        name
        for name in linear
        if within(name, part) and not any(within(name, branch) for branch in branches)
    }
    head = model.get_output_embeddings()
    others = {
        ".".join(name.split(".")[:2]) for name in linear - adapted if modules[name] is not head
    }
    say(
        f"LoRA goes on the {len(adapted)} linear layers of the language part, {part}. "
        f"{' and '.join(sorted(others))} get none: name their layers to adapt them, too."
    )
    ends = "|".join(sorted({re.escape(name.rpartition(".")[2]) for name in adapted}))
    skipped = "".join(rf"(?!{re.escape(name)}\.)" for name in sorted(inner))
    return rf"{re.escape(part)}\.{skipped}(?:.*\.)?(?:{ends})"


def within(name, part):
    """Return whether a module lies inside of another one, by their names."""
    return name.startswith(f"{part}.")


def reads_text(model):
    """Return whether text is among the inputs of a model of transformers, or of a part of one."""
    kinds = model.input_modalities
    return "text" in ([kinds] if isinstance(kinds, str) else kinds)


# The experts --------------------------------------------------------------------------------------
def fused_experts(model):
    """Return name -> shape of the tensors that hold one weight of all experts: [experts, ., .]."""
    return {
        f"{path}.{name}": tuple(getattr(weight, "ds_shape", weight.shape))
        for path, module in model.named_modules()
        for name, weight in module.named_parameters(recurse=False)
        if len(getattr(weight, "ds_shape", weight.shape)) == 3
        and not type(module).__module__.startswith("torch.nn")  # a convolution
    }


def expert_targets(model, wanted):
    """Return the `target_parameters` of a LoraConfig.

    Args:
        wanted: ["experts"] for all fused weights of experts, or names, such as experts.down_proj.
    """
    if wanted == ["experts"]:
        return sorted({".".join(name.split(".")[-2:]) for name in fused_experts(model)})
    return wanted


def check_target_parameters(wanted, skeleton):
    """Stop if a name stands for no fused weight of experts."""
    experts = fused_experts(skeleton)
    known = ", ".join(expert_targets(skeleton, ["experts"]))
    for target in wanted:
        if not experts:
            refuse(
                f"--lora_target_parameters {target}: {type(skeleton).__name__} has no experts that "
                "are fused into one tensor: drop the flag"
            )
        if wanted != ["experts"] and not matching(target, experts):
            refuse(
                f"--lora_target_parameters {target} names no fused weight of experts: the model "
                f"has {known}"
            )


def say_experts(model):
    """Print how many numbers of fused experts have LoRA, and what 4-bit leaves unquantized.

    Args:
        model: a `PeftModel`, before a strategy shards it.
    """
    adapted = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    if adapted:
        shapes = [getattr(one.get_param(), "ds_shape", one.get_param().shape) for one in adapted]
        trained = sum(
            getattr(weight, "ds_numel", weight.numel())
            for module in adapted
            for part in (module.lora_A, module.lora_B)
            for weight in part.parameters()
        )
        say(
            f"LoRA goes on {len(adapted)} fused weights of routed experts, "
            f"{sum(map(math.prod, shapes)):,} parameters, with {trained:,} of its own."
        )
    is_4bit = any(getattr(module, "quant_state", None) is not None for module in model.modules())
    if is_4bit and (experts := fused_experts(model)):
        weights = [weight for name, weight in model.named_parameters() if name in experts]
        size = sum(weight.numel() * weight.element_size() for weight in weights)
        say(
            f"bitsandbytes quantizes linear layers alone: {len(weights)} fused weights of experts "
            f"stay in {str(weights[0].dtype).removeprefix('torch.')}, {size:,} bytes."
        )
