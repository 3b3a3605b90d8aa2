"""Name the weights of a checkpoint as the files of a model or an adapter do, and check them."""

import json
from pathlib import Path

import torch
import transformers
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from transformers.core_model_loading import revert_weight_conversion

from tools.merge_adapter.lazy import Lazy, equal, recording
from tools.merge_adapter.model import build_model, choose_class
from tools.merge_adapter.read import DOWNLOADED, fetch, read_weights
from utils.errors import fail, first_line

SMALL = [pattern for pattern in DOWNLOADED if "safetensors" not in pattern]
ADAPTER = "base_model."  # begins the names of the weights of a PEFT model


def is_adapter(weights):
    """Return whether these are the weights of a PEFT model."""
    return any(name.startswith(ADAPTER) for name in weights)


def folder_of(name):
    """Return the folder of a local path; or of a Hub id, with its files but not the weights."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(str(name), allow_patterns=SMALL))
    except Exception as error:  # no such repository, no network, offline without a cache
        fail(f"{name} is neither a folder nor available from the Hub: {first_line(error)}")


def with_config(folders, file, remedy):
    """Return the first of the folders that holds a file; stop with the remedy if none does."""
    for folder in folders:
        if (folder / file).is_file():
            return folder
    fail(f"{' and '.join(map(str, folders))} without {file}: {remedy}")


# A full model -------------------------------------------------------------------------------------
def name_model(weights, config, source, base):
    """Return the weights under the names of a model's files.

    Changes the config: the size of the vocabulary, and ties that do not hold.

    Args:
        weights: name in the model -> Lazy.
        config: of transformers.
        source: folder of the config.
        base: folder or Hub id of a model with frozen weights that the checkpoint may lack; "" if
            it lacks none.
    """
    model_class = choose_class(config, None, source)
    with torch.device("meta"):
        model = model_class(config)
    if resize(config, model, weights):
        with torch.device("meta"):
            model = model_class(config)
    expected, tied = model.state_dict(), model.all_tied_weights_keys
    weights = untied(weights, tied, config)
    if unknown := [name for name in weights if name not in expected]:
        fail(
            f"{len(unknown)} weights are no part of a {model_class.__name__}, the first is "
            f"{unknown[0]}: give the --model_name_or_path that was trained"
        )
    for name, weight in weights.items():
        if weight.shape != expected[name].shape:
            fail(
                f"the checkpoint's {name} has shape {tuple(weight.shape)}, and that of {source} "
                f"{tuple(expected[name].shape)}: give the --model_name_or_path that was trained"
            )
    missing = [name for name in expected if name not in weights and name not in tied]
    if missing and not base:
        fail(
            f"the checkpoint lacks {len(missing)} weights of a {model_class.__name__}, the first "
            f"is {missing[0]}: save it from all processes, with its frozen weights"
        )
    if missing:
        files = read_weights(fetch(base, None, "base"), "model", "base")
        frozen = build_model(model_class, config, files).state_dict(keep_vars=True)
        weights |= {name: frozen[name] for name in missing}
        print(f"{len(missing)} frozen weights are not in the checkpoint: taken from {base}.")
    config.architectures = [model_class.__name__]
    with recording():
        return revert_weight_conversion(model, weights)


def resize(config, model, weights):
    """Give the config as many tokens as the checkpoint has; return whether it changed."""
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    found = weights.get(f"{name}.weight")
    if found is None or len(found) == len(embedding.weight):
        return False
    print(
        f"vocab_size is {len(found)}, as in the checkpoint, not {len(embedding.weight)} as in the "
        "config."
    )
    config.get_text_config().vocab_size = len(found)
    return True


def untied(weights, tied, config):
    """Return the weights without the copies of tied ones; a tie that does not hold is removed.

    Args:
        tied: name of a copy -> name of the weight that it is tied to.
    """
    weights = dict(weights)
    for copy, source in tied.items():
        if source not in weights and copy in weights:
            weights[source] = weights.pop(copy)
        elif copy in weights and equal(weights[copy], weights[source]):
            del weights[copy]
        elif copy in weights:
            print(f"{copy} and {source} differ: they are saved untied.")
            config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    return weights


# An adapter ---------------------------------------------------------------------------------------
def name_adapter(weights, trained, folder, base):
    """Return the weights of an adapter under the names of PEFT's file.

    Args:
        weights: name in the PEFT model -> Lazy.
        trained: names of the trained weights; None if the checkpoint does not say.
        folder: with adapter_config.json.
        base: folder or Hub id of the base; "" for the one that adapter_config.json names.
    """
    try:
        adapter = PeftConfig.from_pretrained(folder)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        fail(f"{folder / 'adapter_config.json'} cannot be read: {first_line(error)}")
    name = base or adapter.base_model_name_or_path
    if not name:
        fail(f"{folder / 'adapter_config.json'} names no base model: give --model_name_or_path")
    config = transformers.AutoConfig.from_pretrained(folder_of(name), trust_remote_code=False)
    model_class = choose_class(config, adapter.task_type, name)
    with torch.device("meta"), recording():
        model = PeftModel(model_class(config), adapter)
        expected = get_peft_model_state_dict(model, save_embedding_layers=False)
        found = get_peft_model_state_dict(model, weights, save_embedding_layers=False)
    if others := [key for key, one in found.items() if not isinstance(one, Lazy)]:
        fail(f"{others[0]} of a {adapter.peft_type} adapter is computed by PEFT: save it with peft")
    if missing := [key for key in expected if key not in found]:
        fail(f"the checkpoint lacks {missing[0]}: give the --adapter_config that was trained")
    saved = {id(one) for one in found.values()}
    if lost := [name for name in trained or () if id(weights[name]) not in saved]:
        fail(
            f"{len(lost)} trained weights are no part of the adapter, the first is {lost[0]}: give "
            "the --adapter_config that was trained"
        )
    for key, weight in found.items():
        if ".lora_" in key and weight.shape != expected[key].shape:
            fail(
                f"{key} has shape {tuple(weight.shape)}, and that of the adapter's config "
                f"{tuple(expected[key].shape)}: give the --adapter_config that was trained"
            )
    return found


def write_adapter_config(folder, out, base):
    """Copy adapter_config.json; it names the given base if it named none."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = settings.get("base_model_name_or_path") or base
    (out / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
