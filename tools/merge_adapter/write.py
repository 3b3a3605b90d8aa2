"""Write the weight files and the tokenizer of the merged model."""

import json
import shutil

import torch
from tqdm import tqdm

from tools.merge_adapter.lazy import blocks
from tools.merge_adapter.read import DTYPES
from utils.errors import fail

CODES = {dtype: code for code, dtype in DTYPES.items()}
TOKENIZER = ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"]
TOKENIZER += [
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "spiece.model",
    "sentencepiece*.model",
    "source.spm",
    "target.spm",
]


def output_dtype(weight, wanted):
    """Return the dtype to write a weight in: the wanted one, or that in the base's file if None."""
    return (wanted or weight.native) if weight.is_floating_point() else weight.dtype


def split_into_files(weights, wanted, max_shard_size):
    """Return name of a file -> {name of a weight: its bytes}, in the order of the weights."""
    shards, room = [], 0
    for key, weight in weights.items():
        size = weight.numel() * output_dtype(weight, wanted).itemsize
        if not shards or size > room:
            shards.append({})
            room = max_shard_size
        shards[-1][key] = size
        room -= size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    count = len(shards)
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    return dict(zip(names, shards))


def write_model(folder, weights, wanted, max_shard_size):
    """Write model.safetensors, or several files and their index.

    Each tensor is made, cast, written and dropped.

    Args:
        weights: name -> Lazy.
        wanted: dtype of the floating-point weights; None keeps that of the base's file.
        max_shard_size: bytes of weights in a file, at most.
    """
    files = split_into_files(weights, wanted, max_shard_size)
    total = sum(sum(sizes.values()) for sizes in files.values())
    if shutil.disk_usage(folder).free < total:
        remedy = "free some, or give a folder on another disk"
        fail(f"{folder.parent} has no room for {total:,} bytes: {remedy}")
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing") as bar:
        for name, sizes in files.items():
            with (folder / name).open("wb") as file:
                file.write(make_header(weights, sizes, wanted))
                for key in sizes:
                    for tensor in read_blocks(key, weights[key], wanted):
                        file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
                        bar.update(tensor.nbytes)
    if len(files) > 1:
        weight_map = {key: name for name, sizes in files.items() for key in sizes}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def make_header(weights, sizes, wanted):
    """Return the bytes before the data of a safetensors file: the header and its length."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for key, size in sizes.items():
        code = CODES[output_dtype(weights[key], wanted)]
        entry = {"dtype": code, "shape": list(weights[key].shape)}
        header[key] = entry | {"data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_blocks(key, weight, wanted):
    """Yield a weight's values, cast, block by block; ValueError if one is not finite then."""
    for rows in blocks(weight):
        made = weight.make(rows)
        tensor = made.to(output_dtype(weight, wanted))
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            if not torch.isfinite(made).all():
                raise ValueError(f"{key} has NaN or infinite values: take an earlier checkpoint")
            reason = f"{key} has values that {tensor.dtype} cannot hold"
            raise ValueError(f"{reason}, give another --dtype")
        yield tensor


def copy_tokenizer(folder, sources):
    """Copy the tokenizer's files from the first of the source folders that has a tokenizer."""
    for source in sources:
        if (source / "tokenizer_config.json").is_file():
            paths = {path for pattern in TOKENIZER for path in source.glob(pattern)}
            for path in paths:
                if path.is_file():
                    target = folder / path.relative_to(source)
                    target.parent.mkdir(exist_ok=True)
                    shutil.copyfile(path, target)
            return
