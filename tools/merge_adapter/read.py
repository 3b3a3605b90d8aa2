"""Read the files of a base model and of an adapter, as Lazy tensors and checked configurations."""

import dataclasses
import functools
import json
import math
import re
import sys
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from peft import LoraConfig
from safetensors import SafetensorError, safe_open

from tools.merge_adapter.lazy import Lazy, take
from utils.errors import fail

DTYPES = {  # safetensors' name -> torch's
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DOWNLOADED = ["*.json", "*.model", "*.spm", "*.txt", "*.jinja"]  # no pickled weights
DOWNLOADED += ["model*.safetensors", "adapter_model.safetensors"]
# other values of init_lora_weights change the base's weights, too
KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal")


def fetch(name, revision, kind):
    """Return the folder of a local path, or of a Hub id: downloaded, or taken from the cache.

    Args:
        revision: of the Hub id; None is its newest.
        kind: "base" or "adapter", for the error message.
    """
    if Path(name).is_dir():
        return Path(name)
    flag = "--base_model_name_or_path" if kind == "base" else "the folder of an adapter"
    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=DOWNLOADED))
    except HFValidationError:
        fail(f"there is no {kind} {name}: give {flag}")
    except Exception as error:  # no such repository, no network, offline without a cache
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        where = "neither a folder nor available from the Hub"
        fail(f"the {kind} {name} is {where}, give {flag}: {reason}")


def read_weights(folder, stem, kind, adapted=False):
    """Return name -> Lazy of `folder/stem.safetensors`, or of the files that its index lists.

    Args:
        kind: "base", "adapter" or "result", for the error message.
        adapted: value of the attribute of the same name.
    """
    index = folder / f"{stem}.safetensors.index.json"
    names = {f"{stem}.safetensors"}
    if index.is_file():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (KeyError, TypeError, ValueError):
            fail(f"{index} is not a valid index of weight files: copy or save it again")
    weights = {}
    for path in sorted(folder / name for name in names):
        if not path.is_file():
            remedy = "only safetensors files are read, save it with safe_serialization"
            if index.is_file():
                remedy = f"{index.name} names it, copy all files"
            fail(f"the {kind} {folder} lacks {path.name}: {remedy}")
        for key, entry, start in read_header(path):
            if entry["dtype"] not in DTYPES:
                remedy = "give a base in 16 or 32 bits, or in bitsandbytes' 4 bits"
                fail(f"{path} stores {key} as {entry['dtype']}: {remedy}")
            shape, dtype = entry["shape"], DTYPES[entry["dtype"]]
            make = functools.partial(read_tensor, path, start, shape, dtype)
            weights[key] = Lazy(shape, dtype, make, dtype, adapted)
    return weights


def read_header(path):
    """Return (name, {"dtype", "shape", ...}, first byte in the file) of each tensor of a file."""
    try:
        with safe_open(path, framework="pt"):  # checks header and length, reads no values
            pass
    except SafetensorError as error:
        fail(f"{path} is truncated or not a safetensors file, copy or save it again: {error}")
    with path.open("rb") as file:
        data = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(data - 8))
    header.pop("__metadata__", None)
    return [(key, entry, data + entry["data_offsets"][0]) for key, entry in header.items()]


def read_tensor(path, start, shape, dtype, rows=None):
    """Return some rows, or all, of a tensor that starts at byte `start` of a file.

    The file is read, not memory-mapped: mapped pages would count as memory of this process.
    """
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
    """Return name -> Lazy of a bitsandbytes 4-bit checkpoint, in the dtype before quantization."""
    if sys.modules.get("bitsandbytes", True) is None:
        del sys.modules["bitsandbytes"]  # set by __main__.py
    from bitsandbytes.functional import QuantState, dequantize_4bit

    plain = {key: weight for key, weight in weights.items() if not re.search(r"\.weight\.\w", key)}
    for key in plain:
        prefix = f"{key}."
        parts = {name: weight for name, weight in weights.items() if name.startswith(prefix)}
        if not parts:
            continue

        def state(prefix=prefix, parts=parts):
            made = {name.removeprefix(prefix): part.make() for name, part in parts.items()}
            return QuantState.from_dict(made, torch.device("cpu"))

        def make(rows=None, packed=weights[key], state=state):
            # stored as floats where FSDP was to shard them
            packed_bytes = packed.make().reshape(-1).view(torch.uint8)[:, None]
            return take(dequantize_4bit(packed_bytes, state()), rows)

        shape, dtype = state().shape, state().dtype
        plain[key] = Lazy(shape, dtype, make, dtype, adapted=False)
    return plain


def read_adapter_config(folder):
    """Return the LoraConfig of an adapter; stop with an error if it cannot be merged exactly."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        fail(f"{folder} has no adapter_config.json: give the folder of a saved adapter")
    try:
        kind = json.loads(path.read_text()).get("peft_type")
        if kind != "LORA":
            only = "only LORA, which includes rsLoRA and DoRA, can be merged here"
            fail(f"{folder} is an adapter of type {kind}: {only}")
        config = LoraConfig.from_pretrained(folder)
    # a truncated file, a list, an unknown setting
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        fail(f"{path} is not a valid LoRA configuration: {error}")
    fields = dataclasses.fields(config)
    variants = [field.name for field in fields if field.metadata.get("is_lora_variant")]
    variants = [name for name in variants if name != "use_dora"]
    for name in (*variants, "layer_replication", "use_qalora", "megatron_config"):
        if getattr(config, name):
            reason = f"was trained with {name}, which cannot be merged exactly"
            fail(f"{folder} {reason}: load it with peft instead")
    if config.init_lora_weights not in KEEPS_BASE:
        reason = f"init_lora_weights={config.init_lora_weights!r}, which changed the base too"
        remedy = "save it again with path_initial_model_for_weight_conversion"
        fail(f"{folder} was initialised with {reason}: {remedy}")
    config.init_lora_weights = True
    config.inference_mode = True
    return config
