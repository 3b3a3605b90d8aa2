"""Build the base model, and add the adapter to it, with Lazy tensors as parameters."""

from functools import partial

import torch
import transformers
from peft import PeftModel, set_peft_model_state_dict
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

from tools.merge_adapter.lazy import Lazy, recording
from utils.errors import fail

AUTO_CLASSES = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
}
HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")  # one row per class


def choose_class(config, task_type, base_name):
    """Return the model class of transformers for the adapter's task, or else for the base."""
    if task_type in AUTO_CLASSES:
        try:
            with torch.device("meta"):
                return type(AUTO_CLASSES[task_type].from_config(config))
        except ValueError:
            reason = f"is a {config.model_type} model, which has no class for {task_type}"
            fail(f"the base {base_name} {reason}, the task of the adapter: give another base")
    architecture = (config.architectures or ["none"])[0]
    if not hasattr(transformers, architecture):
        reason = "names no class of transformers in its config.json"
        fail(f"the base {base_name} {reason}, and code that comes with a model is not run")
    return getattr(transformers, architecture)


def build_model(model_class, config, weights):
    """Return the model in 32 bits with Lazy parameters, loaded as `from_pretrained` loads it.

    Args:
        weights: name in the files -> Lazy.
    """
    with recording():
        model, found = model_class.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=torch.float32,
            experts_implementation="eager",  # one expert at a time
            ignore_mismatched_sizes=True,  # reported below, in one line
            output_loading_info=True,
        )
    missing = sorted(found["missing_keys"] | {key for key, *_ in found["mismatched_keys"]})
    if missing:
        fail(
            f"neither base nor adapter holds {missing[0]} in the shape that config.json asks for: "
            "give the base that the adapter was trained on, and after a resize an adapter saved "
            "with save_embedding_layers=True"
        )
    return model.eval()


def resize(model_class, config, base, adapter):
    """Give the base the shapes of the weights that the adapter replaces in full.

    Those are the embeddings of a resized vocabulary, and the head of a classifier. The config and
    the dicts are changed in place.

    Args:
        base: name -> Lazy.
        adapter: name -> Lazy.

    Returns:
        name of a weight -> name of the one that this class of model ties it to.
    """
    native = next(iter(base.values())).native
    replaced = {}
    for key, weight in list(adapter.items()):
        name = key.removeprefix("base_model.model.")
        if ".modules_to_save." in name or ".original_module." in name:
            del adapter[key]  # after a resize PEFT saves a module three times
            continue
        if ".token_adapter.base_layer." in name:
            del adapter[key]  # the resized embedding under separately trained tokens
        name = name.replace(".token_adapter.", ".").replace(".base_layer.", ".")
        replaced[name] = Lazy(weight.shape, weight.dtype, weight.make, native, adapted=True)
        if name in HEADS:
            config.num_labels = weight.shape[0]
    with torch.device("meta"):
        model = model_class(config)
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    for name, module in model.named_modules(remove_duplicate=False):
        if module in embeddings and f"{name}.weight" in replaced:
            config.get_text_config().vocab_size = replaced[f"{name}.weight"].shape[0]
    state = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    renamings = [one for one in mapping if not isinstance(one, WeightConverter)]
    # name in the model -> name in the file: some checkpoints have older names, as those of vision
    # and language, or names without the prefix, as gpt2's
    rename = partial(rename_source_key, meta_state_dict=state)
    prefix = model.base_model_prefix
    in_file = {rename(key, renamings, converters, prefix)[0]: key for key in base}
    for name in replaced.keys() & state.keys():
        key = in_file.get(name, name)
        if key not in base or base[key].shape != replaced[name].shape:
            base[key] = replaced[name]
    return dict(model.all_tied_weights_keys)


def add_adapter(model, config, adapter):
    """Put PEFT's wrappers into the model, in place, and load the adapter's Lazy tensors into them.

    Stops with an error unless every tensor belongs to a module and every module has its tensors.
    """
    with recording():
        try:
            with torch.device("meta"):  # PEFT's initial values are not needed
                peft_model = PeftModel(model, config)
            weights = {key: weight.float() for key, weight in adapter.items()}
            found = set_peft_model_state_dict(peft_model, weights, low_cpu_mem_usage=True)
        except KeyError as error:
            fail(f"the adapter lacks {error.args[0]}: save it again, gathered from every process")
        except (ValueError, RuntimeError, TypeError) as error:
            lines = str(error).splitlines()
            reason = next((line for line in lines if "size mismatch" in line), str(error)).strip()
            fail(f"the adapter does not fit this base, give the one it was trained on: {reason}")
    missing = [key for key in found.missing_keys if ".lora_" in key]
    # a token adapter also has a copy at the tied end
    unexpected = [key for key in found.unexpected_keys if ".token_adapter." not in key]
    if unexpected:
        reason = f"the adapter's {unexpected[0]} belongs to no module of this base"
        fail(f"{reason}: give the one it was trained on")
    if missing:
        fail(f"the adapter lacks {missing[0]}: save it again, gathered from every process")
    peft_model.eval()
