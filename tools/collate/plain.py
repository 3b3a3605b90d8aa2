"""Read the weights of one file, safetensors or a state dict of `torch.save`, or of its parts."""

import json
import re

import torch
from torch.distributed.tensor import DTensor

from tools.collate.deepspeed import cut, joined, load
from tools.merge_adapter.read import read_weights
from utils.errors import fail

INDEX = ".index.json"  # ends the name of the file that lists the parts of a model
# as accelerate names the models of a run that shards nothing; a second one ends with _1
NAMES = ("model.safetensors", "model_[0-9]*.safetensors", f"model.safetensors{INDEX}")
NAMES += ("pytorch_model.bin", "pytorch_model_[0-9]*.bin", f"pytorch_model.bin{INDEX}")
PART = re.compile(r"(.+)-\d{5}-of-\d{5}(\.safetensors|\.bin)")  # names one part of a model


def find_plain(folder):
    """Return the file of the weights that accelerate wrote without shards; None without one.

    Stops if peft loads the folder as it is.
    """
    is_adapter = (folder / "adapter_config.json").is_file()
    if is_adapter and list(folder.glob("adapter_model*.safetensors")):
        fail(f"{folder} needs no collating: peft loads it as it is")
    return only_one(folder, sorted(path for name in NAMES for path in folder.glob(name)))


def only_one(folder, paths):
    """Return the only path, or None without one; stop if there are several."""
    if len(paths) > 1:
        fail(f"{folder} holds {', '.join(path.name for path in paths)}: give one of them")
    return next(iter(paths), None)


def read_file(path):
    """Return the weights of a file that the user gave: name -> Lazy; stop if it is one of several.

    Args:
        path: of the file, or of an index of several.
    """
    if part := PART.fullmatch(path.name):
        fail(f"{path} is one part of a model: give {''.join(part.groups())}{INDEX} beside it")
    return read_plain(path)


def read_plain(path):
    """Return the weights of a file: name -> Lazy. A tied weight may stand under two names."""
    if path.suffix == ".safetensors" and (index := path.with_name(f"{path.name}{INDEX}")).is_file():
        fail(f"{index} stands beside {path.name}: give the index, or a folder with one of them")
    if path.name.endswith((".safetensors", f".safetensors{INDEX}")):
        stem = path.name.removesuffix(INDEX).removesuffix(".safetensors")
        return read_weights(path.parent, stem, "checkpoint")
    if path.name.endswith(INDEX):
        return read_parts(path)
    content, remedy = load(path), "give a checkpoint's folder, or a file with a state_dict alone"
    if not isinstance(content, dict):
        fail(f"{path} holds no state_dict of a model: {remedy}")
    for name, value in content.items():
        if not isinstance(value, torch.Tensor):
            fail(f"{path} holds {name}, which is no tensor: {remedy}")
        if isinstance(value, DTensor):
            fail(f"{path} holds one process's piece of {name}: give a file with all of it")
    return {
        name: joined(cut([tensor.reshape(-1)], 0, tensor.numel()), tensor.shape)
        for name, tensor in content.items()
    }


def read_parts(index):
    """Return the weights of the files that an index names; stop if one is missing."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        fail(f"{index} is not a valid index of weight files: copy or save it again")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        fail(f"{index.parent} lacks {', '.join(missing)}, which {index.name} names: copy all files")
    return {
        name: weight for file in names for name, weight in read_plain(index.parent / file).items()
    }
