"""Choose where LoRA goes: layers of the language model, and the fused weights of its experts.

This file imports no other file of the project but errors.py and can be copied along with a script.
"""

import inspect
import math
import re

import torch
from peft import load_peft_weights
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

    all-linear means the linear layers that text runs through (`text_layers`). If those are not all,
    the result is a regular expression that matches their full names.

    Args:
        model: the base model, without an adapter.
        wanted: ["all-linear"], or names or regular expressions of layers.
    """
    if wanted == ["all-linear"]:
        kept, *skipped = text_layers(model)
        if not any(skipped):
            return "all-linear"
        # the same layers of all blocks, whatever the number of the block
        patterns = {re.sub(r"\.\d+(?=\\)", r".\\d+", re.escape(name)) for name in kept}
        return "|".join(sorted(patterns))
    if not any(map(PATTERN.search, wanted)):
        return wanted or None  # LoRA on fused experts alone
    parts = [one if PATTERN.search(one) else rf"(?:.*\.)?{re.escape(one)}" for one in wanted]
    return "|".join(parts)


def matching(target, names):
    """Return the names that a LoRA target, a name or a regular expression, selects."""
    if PATTERN.search(target):
        return [name for name in names if re.fullmatch(target, name)]
    return [name for name in names if name == target or name.endswith(f".{target}")]


def text_layers(model):
    """Return three lists of linear layers by name, none of them the head.

    1. Those that text runs through.
    2. Those of vision or audio towers, and of what connects these to the language model.
    3. Those that LoRA would not reach or would break (`is_bypassed`).
    """
    modules = {name: module for name, module in model.named_modules() if name}
    towers = [
        name
        for name, module in modules.items()
        if isinstance(module, PreTrainedModel) and not reads_text(module)
    ]
    outside = set(towers)
    if towers and not model.config.is_encoder_decoder:
        decoder = model.get_decoder()
        part = next(name for name, module in modules.items() if module is decoder)
        inner = [tower.removeprefix(f"{part}.") for tower in towers if is_within(tower, part)]
        # in Phi 4 multimodal a tower is inside the decoder: leave out the branch that holds it
        outside |= {f"{part}.{tower.split('.')[0]}" for tower in inner}
        outside |= {
            name for name in modules if not (is_within(name, part) or is_within(part, name))
        }
        outside.remove(part)
    head, lists = model.get_output_embeddings(), ([], [], [])
    for name, module in modules.items():
        if isinstance(module, LINEAR) and module is not head:
            ends = [match.start() for match in re.finditer(r"\.|$", name)]
            is_outside = any(name[:end] in outside for end in ends)
            lists[1 if is_outside else 2 if is_bypassed(name, modules) else 0].append(name)
    return lists


def say_layers(model):
    """Print which layers all-linear leaves out of a model, if it does."""
    kept, outside, bypassed = text_layers(model)
    reasons = []
    if outside:
        parts = sorted({".".join(name.split(".")[:2]) for name in outside})
        reasons.append(f"the {len(outside)} of {', '.join(parts)}, which text does not run through")
    if bypassed:
        ends = sorted({".".join(name.split(".")[-2:]) for name in bypassed})
        reasons.append(f"the {len(bypassed)} called {', '.join(ends)}, which LoRA would not reach")
    if reasons:
        say(f"LoRA goes on {len(kept)} linear layers, but not on {', nor on '.join(reasons)}.")


def is_within(name, part):
    """Return whether a module lies inside of another one, by their names."""
    return name.startswith(f"{part}.")


def is_bypassed(name, modules):
    """Return whether LoRA on this layer would be left out, or would break the model.

    The kernels of the Mamba family read the weights of some layers without calling these. A router
    that is a linear layer with further outputs cannot be wrapped.
    """
    path, _, own = name.rpartition(".")
    if "Router" in type(modules[name]).__name__:
        return True
    if not hasattr(modules.get(path), "conv1d"):
        return False
    reads = rf"self\.{own}\.weight(?!\.(dtype|device|shape))"
    return re.search(reads, inspect.getsource(type(modules[path]))) is not None


def reads_text(model):
    """Return whether text is among the inputs of a model of transformers, or of a part of one."""
    kinds = model.input_modalities
    return "text" in ([kinds] if isinstance(kinds, str) else kinds)


def adapter_rows(place, model):
    """Return how many rows the embedding has that an adapter holds in full; 0 if it holds none."""
    if not place:
        return 0
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    weights = load_peft_weights(place, device="cpu")
    return len(weights.get(f"base_model.model.{name}.weight", ()))


def settle_dtypes(model, dtype, is_engine):
    """Round the trainable weights to the base's dtype; under DeepSpeed also store them in it.

    DeepSpeed rounds them in any case. So all strategies start from the same values.

    Args:
        dtype: the base's dtype.
        is_engine: whether DeepSpeed's engine trains, which wants one dtype.
    """
    for weight in model.parameters():
        if weight.requires_grad:
            rounded = weight.data.to(dtype)
            weight.data = rounded if is_engine else rounded.float()


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


def gather_blocks(model):
    """Let ZeRO-3 gather a block with adapted experts as a whole, the LoRA matrices included.

    PEFT reads these matrices without calling their modules, so they would stay sharded.
    Call it before `accelerator.prepare`; without adapted experts it does nothing.
    """
    from deepspeed.utils import set_z3_leaf_modules  # a large import

    wrapped = {name for name, one in model.named_modules() if isinstance(one, ParamWrapper)}
    parents = {name.rpartition(".")[0] for name in wrapped} - wrapped  # wrappers may be nested
    if classes := {type(model.get_submodule(name)) for name in parents}:
        set_z3_leaf_modules(model, list(classes))


def say_experts(model):
    """Print how many parameters of fused experts get LoRA, and which stay unquantized.

    Args:
        model: a `PeftModel`, before a strategy shards it.
    """
    wrapped = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    adapted = [module for module in wrapped if module.num_experts > 1]  # others are routers
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
            f"{sum(map(math.prod, shapes)):,} parameters; it adds {trained:,} trainable ones."
        )
    is_4bit = any(getattr(module, "quant_state", None) is not None for module in model.modules())
    if is_4bit and (experts := fused_experts(model)):
        weights = [weight for name, weight in model.named_parameters() if name in experts]
        size = sum(weight.numel() * weight.element_size() for weight in weights)
        say(
            f"bitsandbytes quantizes only linear layers: {len(weights)} fused weights of experts "
            f"stay in {str(weights[0].dtype).removeprefix('torch.')}, {size:,} bytes."
        )
