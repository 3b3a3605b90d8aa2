"""Merge a LoRA adapter into its base, weight by weight, on one CPU, and check the logits of what was written.

    python -m tools.merge_adapter outputs/lora --output_dir outputs/merged

Also rsLoRA, DoRA, rank_pattern, target_parameters (fused experts), modules_to_save, trainable_token_indices, resized
vocabularies, trained biases. A 4-bit base is dequantized; `--base_model_name_or_path` names the original instead.

How: transformers builds the model and PEFT adapts it, but each weight is a `Lazy` tensor, a recipe that reads its file
when an operation needs the values, and keeps nothing. So names in the files, fused experts, ties and the formulas of
the deltas are the libraries' own, and memory holds a block of 8 MB of a weight and its delta at a time.

docs/merging.md holds the memory that was measured. LoRA on fused experts needs a layer's experts four times.

Checked in 32 bit on up to 24 tokens, against base + adapter: the merged weights before anything is written, then the
written files, loaded as transformers loads them. 16-bit weights were rounded once, hence their wider tolerance. The
folder gets its name last; a killed run leaves a hidden `.NAME.PID` beside it, to be deleted by hand.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import json
import logging
import math
import re
import shutil
import sys
import warnings
from pathlib import Path

if __name__ == "__main__":
    sys.modules["bitsandbytes"] = None  # peft would import it, 47 MB that only `dequantized` needs
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(
            -3, 2**20
        )  # M_MMAP_THRESHOLD: what is freed goes back to the system at once

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only
from tqdm import tqdm
from transformers.core_model_loading import revert_weight_conversion

from utils.report import fail, new_folder

BLOCK = 2**21  # numbers of a weight that are in memory at a time, 8 MB in 32 bit

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
DTYPES |= {
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# how far the written model's logits may be from those of base + adapter, as a fraction of the largest logit
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
AUTO_CLASSES = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
}
TOKENIZER = [
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
]
TOKENIZER += ["spiece.model", "sentencepiece*.model", "source.spm", "target.spm"]


class Lazy(torch.Tensor):
    """A tensor that knows its shape and dtype and makes its values anew whenever an operation needs them.

    While `Lazy.recording` operations give further Lazy tensors; otherwise they read their operands and compute.
    Attributes: make(rows=None) -> tensor, of a slice of its rows or of all; native, the dtype in the file; adapted,
    whether the adapter has a part in it.
    """

    recording = False

    @staticmethod
    def __new__(cls, shape, dtype, make, native, adapted):
        tensor = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)
        tensor.make, tensor.native, tensor.adapted = make, native, adapted
        return tensor

    def __deepcopy__(self, memo):
        return self

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in IN_BLOCKS and not cls.recording:
            return IN_BLOCKS[func](*args, **kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten.set_.source_Tensor and args[0].make is args[1].make:
            return args[0]  # a parametrization, PEFT's for experts, sets each parameter to itself
        if func._schema.is_mutable:
            raise RuntimeError(f"{func} would be lost: it changes a tensor that lies in a file")
        lazies = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Lazy)]
        native, adapted = lazies[0].native, any(tensor.adapted for tensor in lazies)
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return Lazy(lazies[0].shape, lazies[0].dtype, lazies[0].make, native, adapted)
        if not cls.recording or func is torch.ops.aten.equal.default:
            return func(*values(args), **values(kwargs))
        meta_args, meta_kwargs = tree_map_only(torch.Tensor, without_values, (args, kwargs))
        outputs = func(
            *meta_args, **meta_kwargs | ({"device": "meta"} if "device" in meta_kwargs else {})
        )
        if isinstance(outputs, torch.Tensor):
            make = functools.partial(compute, func, args, kwargs, None)
            return Lazy(outputs.shape, outputs.dtype, make, native, adapted)
        makes = [functools.partial(compute, func, args, kwargs, i) for i in range(len(outputs))]
        return [Lazy(o.shape, o.dtype, make, native, adapted) for o, make in zip(outputs, makes)]


def values(tree, rows=None):
    return tree_map_only(Lazy, lambda tensor: tensor.make(rows), tree)


def compute(func, args, kwargs, output, rows=None):
    """Return some rows, or all, of what an operation gives, of the output with that number where it gives several.

    The operations that transformers casts weights with, fuses experts and splits them read no more than they need.
    """
    aten, first = torch.ops.aten, args[0]
    named = {argument.name: value for argument, value in zip(func._schema.arguments, args)} | kwargs
    dim = named.get("dim", 0) % (first.dim() if isinstance(first, Lazy) else first[0].dim())
    if func is aten.split.Tensor and dim == 0:
        start = output * args[1]
        stop = min(start + args[1], len(first))
        return take(
            first,
            slice(start, stop) if rows is None else slice(start + rows.start, start + rows.stop),
        )
    if rows is not None and func is aten.stack.default and dim == 0:
        return torch.stack([take(tensor) for tensor in first[rows]])
    of_rows = (
        func is aten._to_copy.default or dim > 0 and func in (aten.cat.default, aten.split.Tensor)
    )
    result = func(*values(args, rows if of_rows else None), **values(kwargs))
    return take(result if output is None else result[output], None if of_rows else rows)


def take(tensor, rows=None):
    """Return some rows of a tensor, or, where `rows` is None, the tensor."""
    if isinstance(tensor, Lazy):
        return tensor.make(rows)
    return tensor if rows is None else tensor[rows]


def blocks(tensor, rows=None):
    """Yield slices that cover the tensor's rows, or those of a slice, of at most BLOCK numbers where a row allows."""
    if tensor.dim() == 0:
        yield None
        return
    start, stop = (0, len(tensor)) if rows is None else (rows.start, rows.stop)
    count = max(1, BLOCK * len(tensor) // max(1, tensor.numel()))
    for first in range(start, stop, count):
        yield slice(first, min(first + count, stop))


def linear(x, weight, bias=None):
    result = torch.cat([F.linear(x, take(weight, rows)) for rows in blocks(weight)], dim=-1)
    return result if bias is None else result + take(bias, None)


def addmm(bias, x, weight):  # as GPT-2's Conv1D calls it
    return take(bias, None) + sum(x[:, rows] @ take(weight, rows) for rows in blocks(weight))


def embedding(
    ids, weight, *options, **more
):  # options that change the weight or its gradient, for training alone
    unique, positions = ids.unique(return_inverse=True)
    return torch.cat([take(weight, slice(row, row + 1)) for row in unique.tolist()])[positions]


def getitem(tensor, index):
    """Return `tensor[index]`, which for one expert reads that one."""
    number = isinstance(index, int) or (isinstance(index, torch.Tensor) and index.dim() == 0)
    return (
        take(tensor, slice(int(index), int(index) + 1))[0] if number else take(tensor, None)[index]
    )


IN_BLOCKS = {
    F.linear: linear,
    F.embedding: embedding,
    torch.addmm: addmm,
    torch.Tensor.__getitem__: getitem,
}


def without_values(tensor):
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


@contextlib.contextmanager
def recording():
    """Within, operations on Lazy tensors read nothing."""
    Lazy.recording = True
    try:
        yield
    finally:
        Lazy.recording = False


def fetch(name, revision, kind):
    """Return the folder of a local path or of a Hub id, fetched (or taken from the cache) without pickled weights."""
    if Path(name).is_dir():
        return Path(name)
    files = [
        "*.json",
        "*.model",
        "*.spm",
        "*.txt",
        "*.jinja",
        "model*.safetensors",
        "adapter_model.safetensors",
    ]
    flag = "--base_model_name_or_path" if kind == "base" else "the folder of an adapter"
    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=files))
    except HFValidationError:
        fail(f"there is no {kind} {name}: give {flag}")
    except Exception as error:  # no such repository, no network, offline without a cache
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        fail(
            f"the {kind} {name} is neither a folder nor to be had from the Hub, give {flag}: {reason}"
        )


def read_weights(folder, stem, kind, adapted=False):
    """Return name -> Lazy for the tensors of `folder/stem.safetensors`, or of the files that its index lists."""
    index = folder / f"{stem}.safetensors.index.json"
    names = {f"{stem}.safetensors"}
    if index.is_file():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (KeyError, TypeError, ValueError):
            fail(f"{index} is no list of weight files: copy or save it again")
    weights = {}
    for path in sorted(folder / name for name in names):
        if not path.is_file():
            fail(
                f"the {kind} {folder} lacks {path.name}: only safetensors are read, save it with safe_serialization"
            )
        try:
            with safe_open(path, framework="pt"):  # checks header and length, reads no values
                pass
        except SafetensorError as error:
            fail(f"{path} is truncated or no safetensors file, copy or save it again: {error}")
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(start - 8))
        header.pop("__metadata__", None)
        for key, entry in header.items():
            if entry["dtype"] not in DTYPES:
                fail(
                    f"{path} holds {key} in {entry['dtype']}: give a base in 16, 32 or bitsandbytes' 4 bit"
                )
            shape, dtype = entry["shape"], DTYPES[entry["dtype"]]
            make = functools.partial(
                read_tensor, path, start + entry["data_offsets"][0], shape, dtype
            )
            weights[key] = Lazy(shape, dtype, make, dtype, adapted)
    return weights


def read_tensor(path, start, shape, dtype, rows=None):
    """Return rows, or all, of a tensor that starts at a byte of a file: read, not mapped, so that no page stays."""
    if rows is not None:
        start += rows.start * math.prod(shape[1:]) * dtype.itemsize
        shape = [rows.stop - rows.start, *shape[1:]]
    tensor = torch.empty(shape, dtype=dtype)
    with path.open("rb") as file:
        file.seek(start)
        if file.readinto(tensor.reshape(-1).view(torch.uint8).numpy()) != tensor.nbytes:
            raise OSError(f"{path} became shorter while it was read")
    return tensor


def dequantized(weights):
    """Return name -> Lazy for a bitsandbytes 4-bit checkpoint, in the dtype that was quantized."""
    if sys.modules.get("bitsandbytes", True) is None:
        del sys.modules["bitsandbytes"]
    from bitsandbytes.functional import QuantState, dequantize_4bit

    plain = {key: weight for key, weight in weights.items() if not re.search(r"\.weight\.\w", key)}
    for key in plain:
        parts = {
            name.removeprefix(f"{key}."): w
            for name, w in weights.items()
            if name.startswith(f"{key}.")
        }
        if parts:

            def state(parts=parts):
                return QuantState.from_dict(
                    {name: part.make() for name, part in parts.items()}, torch.device("cpu")
                )

            def make(rows=None, packed=weights[key], state=state):
                # FSDP needs the packed bytes stored as floats
                return take(
                    dequantize_4bit(packed.make().reshape(-1).view(torch.uint8)[:, None], state()),
                    rows,
                )

            shape, dtype = state().shape, state().dtype
            plain[key] = Lazy(shape, dtype, make, dtype, False)
    return plain


def read_adapter_config(folder):
    """Return the LoraConfig of an adapter, or refuse what is no adapter, or none that a merge can hold exactly."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        fail(f"{folder} holds no adapter_config.json: give the folder that an adapter was saved in")
    try:
        kind = json.loads(path.read_text()).get("peft_type")
        if kind != "LORA":
            fail(
                f"{folder} is an adapter of type {kind}, and only LORA (also rsLoRA, DoRA) can be merged here"
            )
        config = LoraConfig.from_pretrained(folder)
    except (
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
    ) as error:  # half a file, a list, a foreign setting
        fail(f"{path} is no configuration of a LoRA: {error}")
    variants = [
        f.name
        for f in dataclasses.fields(config)
        if f.metadata.get("is_lora_variant") and f.name != "use_dora"
    ]
    for name in (*variants, "layer_replication", "use_qalora", "megatron_config"):
        if getattr(config, name):
            fail(
                f"{folder} was trained with {name}, which cannot be merged exactly: load it with peft instead"
            )
    if config.init_lora_weights not in (True, False, "gaussian", "eva", "orthogonal"):
        fail(
            f"{folder} was started with init_lora_weights={config.init_lora_weights!r}, which changed the base too: "
            "save it again with path_initial_model_for_weight_conversion"
        )
    config.init_lora_weights = True
    config.inference_mode = True
    return config


def build_model(model_class, config, weights):
    """Return the model in 32 bit, its parameters Lazy, loaded from name -> Lazy as `from_pretrained` does it."""
    with recording():
        model, found = model_class.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=torch.float32,
            experts_implementation="eager",  # one expert at a time
            ignore_mismatched_sizes=True,  # told in one line below
            output_loading_info=True,
        )
    missing = sorted(found["missing_keys"] | {key for key, *_ in found["mismatched_keys"]})
    if missing:
        fail(
            f"neither base nor adapter holds {missing[0]} in the shape that config.json says: give the base that the "
            "adapter was trained on, and an adapter saved with save_embedding_layers=True after a resize"
        )
    return model.eval()


def resize(model_class, config, base, adapter):
    """Give config and base the shapes of what the adapter replaces whole: a longer vocabulary, a head for classes.

    Returns:
        name of a weight -> name of the one that this class of model ties it to.
    """
    native = next(iter(base.values())).native
    replaced = {}
    for key, weight in list(adapter.items()):
        name = key.removeprefix("base_model.model.")
        if (
            ".modules_to_save." in name or ".original_module." in name
        ):  # after a resize PEFT saves a module thrice
            del adapter[key]
            continue
        if (
            ".token_adapter.base_layer." in name
        ):  # the resized embeddings below the tokens that are trained alone
            del adapter[key]
        name = name.replace(".token_adapter.", ".").replace(".base_layer.", ".")
        replaced[name] = Lazy(weight.shape, weight.dtype, weight.make, native, True)
        if name in ("score.weight", "classifier.weight", "classifier.out_proj.weight"):
            config.num_labels = weight.shape[0]
    with torch.device("meta"):
        model = model_class(config)
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    for name, module in model.named_modules(remove_duplicate=False):
        if module in embeddings and f"{name}.weight" in replaced:
            config.get_text_config().vocab_size = replaced[f"{name}.weight"].shape[0]
    for name in replaced.keys() & model.state_dict().keys():
        bare = name.removeprefix(
            f"{model.base_model_prefix}."
        )  # as some checkpoints, gpt2's among them, have it
        key = bare if bare in base else name
        if key not in base or base[key].shape != replaced[name].shape:
            base[key] = replaced[name]
    return dict(model.all_tied_weights_keys)


def add_adapter(model, config, adapter):
    """Put the adapter into the model with PEFT, its weights Lazy too, and refuse it unless each found its place."""
    with recording():
        try:
            with torch.device("meta"):  # what PEFT would start the adapter with is not needed
                peft_model = PeftModel(model, config)
            weights = {key: weight.float() for key, weight in adapter.items()}
            found = set_peft_model_state_dict(peft_model, weights, low_cpu_mem_usage=True)
        except KeyError as error:
            fail(f"the adapter lacks {error.args[0]}: save it again, gathered from every process")
        except (ValueError, RuntimeError, TypeError) as error:
            reason = next(
                (line for line in str(error).splitlines() if "size mismatch" in line), str(error)
            ).strip()
            fail(f"the adapter does not fit this base, give the one it was trained on: {reason}")
    missing = [key for key in found.missing_keys if ".lora_" in key]
    unexpected = [
        key for key in found.unexpected_keys if ".token_adapter." not in key
    ]  # the copy at the tied end
    if unexpected:
        fail(
            f"the adapter's {unexpected[0]} is of no module of this base, give the one it was trained on"
        )
    if missing:
        fail(f"the adapter lacks {missing[0]}: save it again, gathered from every process")
    return peft_model.eval()


def merge_unit(unit, rows=None):
    """Return name -> tensor, in 32 bit, of what PEFT's wrapper of a module becomes when it is merged.

    Of a LoRA of a linear layer some rows alone can be merged.
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
    if hasattr(
        unit, "unload_and_optionally_merge_module"
    ):  # as in PEFT's own _unload_and_optionally_merge
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
        model: with PEFT's wrappers in it.
        plain: name -> tensor, its state before they were put in.
    """
    wrappers = {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)
    }
    now = model.state_dict(keep_vars=True)
    last = {}  # one unit's tensors: all weights of a module, and all experts cut from one, come of a single merge

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
        path = next(
            (name[:end] for end in ends if name[:end] in wrappers), None
        )  # the outermost: wrappers nest
        native = tensor.native if isinstance(tensor, Lazy) else tensor.dtype
        if path is None:
            make, adapted = (
                functools.partial(take, now[name]),
                isinstance(now[name], Lazy) and now[name].adapted,
            )
        else:
            make, adapted = functools.partial(merged, path, name.removeprefix(f"{path}.")), True
        weights[name] = Lazy(tensor.shape, tensor.dtype, make, native, adapted)
    return weights


def untie(tied, config, weights):
    """Drop the copies of tied weights, or, where the adapter made them differ, keep them and untie the config.

    Args:
        tied: name of a copy -> name of what it is tied to.
    """
    pairs = [(weights[target], weights[source]) for target, source in tied.items()]
    if all(not (a.adapted or b.adapted) or equal(a, b) for a, b in pairs):
        for target in tied:
            del weights[target]
    elif (
        not config.is_encoder_decoder
    ):  # T5 and its kin scale logits by the flag: there unequal weights must suffice
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False


def equal(a, b):
    return a.shape == b.shape and all(torch.equal(a.make(rows), b.make(rows)) for rows in blocks(a))


def probe(model, ids):
    """Return the logits, in 32 bit, of one row of token ids, which an encoder-decoder gets on both sides."""
    batch = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids[None]
    return model(**batch)[0]


def probe_ids(rows, trained):
    """Return 16 token ids from all over a vocabulary of that many rows, and up to 8 of the tokens trained alone."""
    spread = torch.linspace(0, rows - 1, 16).long().tolist()
    return torch.tensor(spread + sorted(trained)[-8:])


def deviation(expected, logits, tolerance, what):
    """Return the largest deviation from the expected logits, over the largest of these; fail beyond the tolerance."""
    found = ((logits - expected).abs().max() / expected.abs().max()).item()
    if not found <= tolerance:
        fail(
            f"nothing was saved: the logits of {what} are off those of base + adapter by {found:.1e} of the largest, "
            f"more than {tolerance:.0e}; where rounding flips a choice of experts, --dtype float32 helps"
        )
    return found


def output_dtype(weight, wanted):
    return (wanted or weight.native) if weight.is_floating_point() else weight.dtype


def write_model(folder, weights, wanted, max_shard_size):
    """Write name -> Lazy as model.safetensors, or as several files of at most so many bytes and their index.

    Each tensor is made, cast to the wanted dtype (None: that of the base's file), written and dropped.
    """
    shards, room = [], 0
    for key, weight in weights.items():
        size = weight.numel() * output_dtype(weight, wanted).itemsize
        if not shards or size > room:
            shards.append({})
            room = max_shard_size
        shards[-1][key] = size
        room -= size
    total = sum(sum(shard.values()) for shard in shards)
    if shutil.disk_usage(folder).free < total:
        fail(
            f"{folder.parent} has no room for {total:,} bytes: free some, or give another --output_dir"
        )
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["model.safetensors"]
    codes = {dtype: code for code, dtype in DTYPES.items()}
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing") as bar:
        for name, shard in zip(names, shards):
            header, offset = {"__metadata__": {"format": "pt"}}, 0
            for key, size in shard.items():
                entry = {
                    "dtype": codes[output_dtype(weights[key], wanted)],
                    "shape": list(weights[key].shape),
                }
                header[key] = entry | {"data_offsets": [offset, offset + size]}
                offset += size
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)
            with (folder / name).open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                for key in shard:
                    for rows in blocks(weights[key]):
                        tensor = weights[key].make(rows).to(output_dtype(weights[key], wanted))
                        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                            raise ValueError(
                                f"{key} has values that {tensor.dtype} cannot hold, give another --dtype"
                            )
                        file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
                        bar.update(tensor.nbytes)
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards) for key in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def copy_tokenizer(folder, sources):
    """Copy the tokenizer's files from the first of the sources that has one."""
    for source in sources:
        if (source / "tokenizer_config.json").is_file():
            for path in {
                path for pattern in TOKENIZER for path in source.glob(pattern) if path.is_file()
            }:
                shutil.copyfile(path, folder / path.name)
            return


def byte_count(text):
    """Return the bytes of "5GB", "300 MB" or "1000": units of 1000, as transformers counts them."""
    form = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)B?", text.strip().upper())
    if not form or float(form[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size, say 5GB or 300MB")
    return int(float(form[1]) * 1000 ** " KMGT".index(form[2] or " "))


def merge(arguments):
    """Do what the command line asks for; every refusal is `error: ...` on one line, with exit code 1."""
    target = arguments.output_dir
    if target.exists():
        fail(f"{target} exists: give an --output_dir that does not")
    adapter_folder = fetch(arguments.adapter, None, "adapter")
    adapter_config = read_adapter_config(adapter_folder)
    adapter = read_weights(adapter_folder, "adapter_model", "adapter", adapted=True)
    base_name = arguments.base_model_name_or_path or adapter_config.base_model_name_or_path
    if not base_name:
        fail(f"{adapter_folder} does not name its base: give --base_model_name_or_path")
    base_folder = fetch(
        base_name, None if arguments.base_model_name_or_path else adapter_config.revision, "base"
    )
    if not (base_folder / "config.json").is_file():
        fail(
            f"the base {base_folder} holds no config.json: give the folder of a transformers model"
        )
    config = transformers.AutoConfig.from_pretrained(base_folder, trust_remote_code=False)
    base = read_weights(base_folder, "model", "base")
    if hasattr(config, "quantization_config"):
        if not config.quantization_config.get("load_in_4bit"):
            method = config.quantization_config.get("quant_method")
            fail(
                f"the base {base_name} is quantized by {method}: name the original with --base_model_name_or_path"
            )
        del config.quantization_config
        base = dequantized(base)
    if adapter_config.task_type in AUTO_CLASSES:
        try:
            with torch.device("meta"):
                model_class = type(AUTO_CLASSES[adapter_config.task_type].from_config(config))
        except ValueError:
            fail(
                f"the base {base_name} is a {config.model_type}, and the adapter one for {adapter_config.task_type}"
            )
    elif hasattr(transformers, (config.architectures or ["none"])[0]):
        model_class = getattr(transformers, config.architectures[0])
    else:
        fail(
            f"the base {base_name} names no class of transformers in its config.json: its own code is not run"
        )
    tied = resize(model_class, config, base, adapter)

    model = build_model(model_class, config, base)
    plain = model.state_dict(keep_vars=True)
    rows = model.get_input_embeddings().weight.shape[0]
    trained = adapter_config.trainable_token_indices or []
    trained = set(sum(trained.values(), []) if isinstance(trained, dict) else trained)
    if any(token >= rows for token in trained):
        fail(
            f"the adapter trains token {max(trained)} of {rows}: save it with save_embedding_layers=True"
        )
    add_adapter(model, adapter_config, adapter)  # in place
    ids = probe_ids(rows, trained)
    expected = probe(model, ids)

    weights = merge_lazily(model, plain)
    untie(tied, config, weights)
    with recording():
        weights = revert_weight_conversion(model, weights)
    exact = deviation(
        expected, probe(build_model(model_class, config, weights), ids), 1e-4, "the merged weights"
    )

    with new_folder(arguments) as folder:
        wanted = arguments.dtype and getattr(torch, arguments.dtype)
        config.dtype = wanted or max(
            (w.native for w in base.values()), key=[w.native for w in base.values()].count
        )
        config.architectures = [model_class.__name__]
        config.save_pretrained(folder)
        write_model(folder, weights, wanted, arguments.max_shard_size)
        if (base_folder / "generation_config.json").is_file():
            shutil.copyfile(
                base_folder / "generation_config.json", folder / "generation_config.json"
            )
        copy_tokenizer(folder, (adapter_folder, base_folder))
        config = transformers.AutoConfig.from_pretrained(folder)
        written = build_model(model_class, config, read_weights(folder, "model", "result"))
        found = deviation(expected, probe(written, ids), TOLERANCES[config.dtype], "the result")
    print(
        f"largest deviation of {expected.numel():,} logits from base + adapter, as a fraction of the largest, "
        f"{expected.abs().max():.4g}: {found:.1e} (tolerance {TOLERANCES[config.dtype]:.0e}); before rounding to "
        f"{str(config.dtype).removeprefix('torch.')}: {exact:.1e} (tolerance 1e-04)"
    )
    print(f"saved in {target}:")
    for path in sorted(target.iterdir()):
        print(f"  {path.stat().st_size:>14,} bytes  {path.name}")
    name = (
        AUTO_CLASSES[adapter_config.task_type].__name__
        if adapter_config.task_type in AUTO_CLASSES
        else model_class.__name__
    )
    print(f'from transformers import {name}\nmodel = {name}.from_pretrained("{target}")')


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m tools.merge_adapter", description=__doc__.splitlines()[0]
    )
    parser.add_argument("adapter", help="folder of the adapter, or its id on the Hub")
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="folder to make; it must not exist"
    )
    parser.add_argument(
        "--base_model_name_or_path", help="base to merge into (default: the one the adapter names)"
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="of the result (default: the base's)",
    )
    parser.add_argument(
        "--max_shard_size", type=byte_count, default="5GB", help="of a weight file (default: 5GB)"
    )
    parser.set_defaults(overwrite_output_dir=False)  # read by `new_folder`
    parser.error = lambda message: fail(f"{message}: --help lists the flags")
    parsed = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("peft").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # peft warns of ties and of what its own merge would do
        try:
            merge(parsed)
        except KeyboardInterrupt:
            fail("interrupted, nothing was saved")
        except (
            OSError,
            ValueError,
            SafetensorError,
            StrictDataclassError,
        ) as error:  # full disk, a bad config.json
            fail(f"nothing was saved: {' '.join(str(error).split())}")


if __name__ == "__main__":
    torch.set_num_threads(
        1
    )  # reading takes most of the time, and threads wait for each other on a busy machine
    main()
