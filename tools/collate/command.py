"""The command line of tools/collate: find the checkpoint's kind, read, name, check, write."""

import argparse
import json
import shutil
from pathlib import Path

import torch
import transformers

from tools import collate
from tools.collate import model
from tools.collate.deepspeed import find_deepspeed, read_deepspeed
from tools.collate.fsdp import find_fsdp, read_fsdp
from tools.collate.plain import find_plain, read_file, read_plain
from tools.merge_adapter.console import add_output_flags, print_saved, run_quietly
from tools.merge_adapter.read import read_weights
from tools.merge_adapter.write import copy_tokenizer, write_model
from utils.checkpoint import digest
from utils.errors import fail
from utils.results import new_folder
from utils.saving import plain_name

LOADERS = {"CAUSAL_LM": "AutoPeftModelForCausalLM", "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM"}
LOADERS["SEQ_CLS"] = "AutoPeftModelForSequenceClassification"
LOADERS["TOKEN_CLS"] = "AutoPeftModelForTokenClassification"
KINDS = "those of DeepSpeed, FSDP, accelerate and chat_sft are known"
PREFIX = "module."  # DDP's, before every name


def read_checkpoint(path):
    """Return name -> Lazy of a checkpoint, the names of the trained weights, and its kind.

    The names are None where the checkpoint does not say what was trained.
    """
    weights, trained, kind = read_any(path)
    if not weights and path.is_file():
        fail(f"{path} holds no weights: give the checkpoint's folder, or another file")
    if not weights:
        fail(
            f"{path} holds no weights, as transformers' Trainer leaves it for a PEFT model under "
            "FSDP1: load adapter_model.safetensors in it with peft if there is one, or train under "
            "FSDP2"
        )
    is_prefixed = all(plain_name(name).startswith(PREFIX) for name in weights)

    def name_of(name):
        return plain_name(name).removeprefix(PREFIX if is_prefixed else "")

    trained = trained and {name_of(name) for name in trained}
    return {name_of(name): weight for name, weight in weights.items()}, trained, kind


def read_any(path):
    """Return what `read_checkpoint` returns, under the names in the files."""
    if path.is_file():
        return read_file(path), None, "one file"
    if (path / "state.json").is_file():
        check_own(path)
        stem = "adapter_model" if (path / "adapter_config.json").is_file() else "model"
        return read_weights(path, stem, "checkpoint"), None, "chat_sft"
    if found := find_deepspeed(path):
        try:
            return *read_deepspeed(found), "DeepSpeed"
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            fail(f"{found} is not of DeepSpeed's form, or of another version of it: {error!r}")
    if found := find_fsdp(path):
        return read_fsdp(found), None, "FSDP"
    if found := find_plain(path):
        return read_plain(found), None, "one file"
    inside = sorted(one.name for one in path.glob("checkpoint*") if one.is_dir())
    hint = f", such as {path / inside[-1]}" if inside else ""
    fail(f"{path} is no sharded checkpoint ({KINDS}): give the folder of one{hint}")


def check_own(folder):
    """Stop if a file of a checkpoint of chat_sft is missing or changed, but for its processes'."""
    try:
        files = json.loads((folder / "state.json").read_text())["files"].items()
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        fail(f"{folder / 'state.json'} cannot be read: {error}")
    for name, facts in files:
        if not (folder / name).is_file():
            fail(f"{folder} lacks {name}: copy all of its files")
        # what the processes need to resume is not read here
        if not name.startswith("process-") and digest(folder / name) != facts:
            fail(f"{folder / name} is not what was written: copy the checkpoint again")


def collate_model(arguments, weights, trained, kind, out):
    """Write a full model into the folder `out`; return the class that loads it."""
    places = [arguments.checkpoint]
    if arguments.model_name_or_path:
        places.insert(0, model.folder_of(arguments.model_name_or_path))
    remedy = "give --model_name_or_path, a folder or Hub id with the model's config.json"
    source = model.with_config(places, "config.json", remedy)
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    if kind != "chat_sft":
        # only DeepSpeed leaves out frozen weights, if it is asked to
        base = arguments.model_name_or_path if trained is not None else ""
        weights = model.name_model(weights, config, source, base)
    wanted = arguments.dtype and getattr(torch, arguments.dtype)
    dtypes = [one.native for one in weights.values() if one.is_floating_point()]
    config.dtype = wanted or max(dtypes, key=dtypes.count)
    config.save_pretrained(out)
    write_model(out, weights, wanted, arguments.max_shard_size)
    for place in places:  # the last one wins: the checkpoint's has the run's end tokens
        if (file := place / "generation_config.json").is_file():
            shutil.copyfile(file, out / file.name)
    copy_tokenizer(out, reversed(places))
    return config.architectures[0]


def collate_adapter(arguments, weights, trained, kind, out):
    """Write an adapter into the folder `out`; return the class that loads it."""
    places = [arguments.checkpoint]
    if arguments.adapter_config:
        given = Path(arguments.adapter_config)
        places.insert(0, given.parent if given.name == "adapter_config.json" else given)
    remedy = "give --adapter_config, a folder with the adapter_config.json of the run"
    source = model.with_config(places, "adapter_config.json", remedy)
    base = arguments.model_name_or_path
    if kind != "chat_sft":
        weights = model.name_adapter(weights, trained, source, base)
    wanted = arguments.dtype and getattr(torch, arguments.dtype)
    write_model(out, weights, wanted, float("inf"))  # PEFT loads one file
    (out / "model.safetensors").rename(out / "adapter_model.safetensors")
    model.write_adapter_config(source, out, base)
    places = [model.folder_of(base), *places] if base else places
    copy_tokenizer(out, reversed(places))
    task = json.loads((out / "adapter_config.json").read_text()).get("task_type")
    return LOADERS.get(task, "AutoPeftModel")


def run(arguments):
    """Do what the command line asks for; an error is one line `error: ...` and exit code 1."""
    if arguments.output_dir.exists():
        fail(f"{arguments.output_dir} exists: give a folder that does not")
    if not arguments.checkpoint.exists():
        fail(f"{arguments.checkpoint} does not exist: give the folder of a checkpoint")
    weights, trained, kind = read_checkpoint(arguments.checkpoint)
    if arguments.checkpoint.is_file():
        arguments.checkpoint = arguments.checkpoint.parent  # may hold its configuration
    for flag in ("model_name_or_path", "adapter_config") if kind == "chat_sft" else ():
        if getattr(arguments, flag):
            print(f"--{flag} is unused: a checkpoint of chat_sft holds what is needed.")
            setattr(arguments, flag, "")
    with new_folder(arguments) as out:
        if model.is_adapter(weights):
            known = collate_adapter(arguments, weights, trained, kind, out)
        else:
            known = collate_model(arguments, weights, trained, kind, out)
    print_saved(arguments.output_dir, known)


def parse(arguments):
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.collate", description=collate.__doc__.splitlines()[0]
    )
    parser.add_argument(
        "checkpoint", type=Path, help="the checkpoint's folder, or its file of weights"
    )
    parser.add_argument(
        "output_dir", metavar="out", type=Path, help="folder to create; it must not exist"
    )
    parser.add_argument(
        "--model_name_or_path",
        default="",
        help="folder or Hub id of the model that was trained: for its configuration and tokenizer, "
        "and for frozen weights that the checkpoint lacks",
    )
    parser.add_argument(
        "--adapter_config",
        default="",
        help="adapter_config.json of the run, or its folder (default: the checkpoint's)",
    )
    add_output_flags(parser, "the checkpoint's, float32 if trained")
    return parser.parse_args(arguments)


def main(arguments=None):
    """Run the command line."""
    run_quietly(run, parse(arguments))
