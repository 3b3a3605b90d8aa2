"""The command line of tools/merge_adapter: read, merge, check, write, check again, report."""

import argparse
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion

from tools import merge_adapter
from tools.merge_adapter.check import EXACT, TOLERANCES, deviation, exact_tolerance
from tools.merge_adapter.check import probe, probe_ids
from tools.merge_adapter.console import add_output_flags, print_saved, run_quietly
from tools.merge_adapter.lazy import Lazy, recording
from tools.merge_adapter.merging import merge_lazily, untie
from tools.merge_adapter.model import AUTO_CLASSES, add_adapter, build_model, choose_class, resize
from tools.merge_adapter.read import dequantized, fetch, read_adapter_config, read_weights
from tools.merge_adapter.write import copy_tokenizer, write_model
from utils.errors import fail
from utils.results import new_folder


class Base(NamedTuple):
    """The base model: its folder, its config, and name -> Lazy of its weights."""

    name: str
    folder: Path
    config: transformers.PretrainedConfig
    weights: dict[str, Lazy]


def read_base(arguments, adapter_config):
    """Return the Base that the command line names, or else the adapter."""
    named = arguments.base_model_name_or_path
    name = named or adapter_config.base_model_name_or_path
    if not name:
        fail(f"{arguments.adapter} does not name its base: give --base_model_name_or_path")
    folder = fetch(name, None if named else adapter_config.revision, "base")
    if not (folder / "config.json").is_file():
        fail(f"the base {folder} holds no config.json: give the folder of a transformers model")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    weights = read_weights(folder, "model", "base")
    if hasattr(config, "quantization_config"):
        if not config.quantization_config.get("load_in_4bit"):
            method = config.quantization_config.get("quant_method")
            remedy = "name the original with --base_model_name_or_path"
            fail(f"the base {name} is quantized by {method}: {remedy}")
        del config.quantization_config
        weights = dequantized(weights)
    return Base(name, folder, config, weights)


def trained_tokens(adapter_config, vocab_size):
    """Return the ids of the tokens whose embeddings the adapter trains separately."""
    trained = adapter_config.trainable_token_indices or []
    trained = set(sum(trained.values(), []) if isinstance(trained, dict) else trained)
    if any(token >= vocab_size for token in trained):
        reason = f"the adapter trains token {max(trained)}, but the vocabulary ends at {vocab_size}"
        fail(f"{reason}: save it with save_embedding_layers=True")
    return trained


def merge(arguments):
    """Do what the command line asks for; an error is one line `error: ...` and exit code 1."""
    if arguments.output_dir.exists():
        fail(f"{arguments.output_dir} exists: give an --output_dir that does not")
    adapter_folder = fetch(arguments.adapter, None, "adapter")
    adapter_config = read_adapter_config(adapter_folder)
    adapter = read_weights(adapter_folder, "adapter_model", "adapter", adapted=True)
    base = read_base(arguments, adapter_config)
    config = base.config
    model_class = choose_class(config, adapter_config.task_type, base.name)
    tied = resize(model_class, config, base.weights, adapter)

    model = build_model(model_class, config, base.weights)
    plain = model.state_dict(keep_vars=True)
    vocab_size = model.get_input_embeddings().weight.shape[0]
    ids = probe_ids(vocab_size, trained_tokens(adapter_config, vocab_size))
    add_adapter(model, adapter_config, adapter)  # in place
    expected = probe(model, ids)

    weights = merge_lazily(model, plain)
    untie(tied, config, weights)
    with recording():
        weights = revert_weight_conversion(model, weights)
    merged = build_model(model_class, config, weights)
    logits = probe(merged, ids)
    tolerance = exact_tolerance(merged, ids, expected, logits)
    exact = deviation(expected, logits, tolerance, "the merged weights")

    with new_folder(arguments) as folder:
        wanted = arguments.dtype and getattr(torch, arguments.dtype)
        natives = [weight.native for weight in base.weights.values()]
        config.dtype = wanted or max(natives, key=natives.count)
        config.architectures = [model_class.__name__]
        config.save_pretrained(folder)
        write_model(folder, weights, wanted, arguments.max_shard_size)
        for source in (base.folder, adapter_folder):  # the adapter's has the new end tokens
            if (file := source / "generation_config.json").is_file():
                shutil.copyfile(file, folder / file.name)
        copy_tokenizer(folder, (adapter_folder, base.folder))
        config = transformers.AutoConfig.from_pretrained(folder)
        written = build_model(model_class, config, read_weights(folder, "model", "result"))
        result = probe(written, ids)
        tolerances = (max(tolerance, TOLERANCES[config.dtype]), tolerance)
        found = deviation(expected, result, tolerances[0], "the result")
        if config.dtype == torch.float32:  # nothing was rounded: the files hold what was merged
            deviation(logits, result, EXACT, "the result", other="the merged weights")
    known = AUTO_CLASSES.get(adapter_config.task_type, model_class)
    differences = (found, exact)
    report(arguments.output_dir, config.dtype, expected, differences, tolerances, known.__name__)


def report(folder, dtype, expected, differences, tolerances, class_name):
    """Print how far the logits differ, the files that were written, and how to load them.

    Args:
        expected: logits of base + adapter.
        differences: of the written files, and of the merged weights before they were rounded.
        tolerances: of both.
    """
    largest, (found, exact) = expected.abs().max(), differences
    print(
        f"largest difference of {expected.numel():,} logits from base + adapter, divided by the "
        f"largest logit, {largest:.4g}: {found:.1e} (tolerance {tolerances[0]:.0e}); before "
        f"rounding to {str(dtype).removeprefix('torch.')}: {exact:.1e} (tolerance "
        f"{tolerances[1]:.0e})"
    )
    print_saved(folder, class_name)


def parse(arguments):
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.merge_adapter",
        description=merge_adapter.__doc__.splitlines()[0],
    )
    parser.add_argument("adapter", help="folder of the adapter, or its id on the Hub")
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="folder to create; it must not exist"
    )
    parser.add_argument(
        "--base_model_name_or_path", help="base to merge into (default: the one the adapter names)"
    )
    add_output_flags(parser, "the base's")
    return parser.parse_args(arguments)


def main(arguments=None):
    """Run the command line."""
    run_quietly(merge, parse(arguments))
