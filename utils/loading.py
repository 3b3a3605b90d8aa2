"""Write the Python that loads what a run saved: by the right class, quantized where the run was."""

import json
import sys
from pathlib import Path

from transformers import PreTrainedModel


def library(folder):
    """Return the library that loads what is in the folder."""
    return "peft" if (Path(folder) / "adapter_config.json").is_file() else "transformers"


def base_model(unwrapped):
    """Return what `load_lines` must know of the model, without its adapter.

    Returns:
        own_class: "module.Name" of a class that is not transformers' own, else "".
        num_labels: number of classes that a head for classification has. It is not in an adapter's
            files. transformers' default is 2.
    """
    model = unwrapped.get_base_model() if hasattr(unwrapped, "get_base_model") else unwrapped
    kinds = [kind for kind in type(model).__mro__ if issubclass(kind, PreTrainedModel)]
    # FSDP2 derives a class of its own from the model's
    kind = next((kind for kind in kinds if not kind.__module__.startswith("torch.")), None)
    if kind is None:  # not a model of transformers
        return {"own_class": "", "num_labels": 2}
    module = kind.__module__
    if module == "__main__":
        module = Path(sys.argv[0]).stem
    return {
        "own_class": "" if module.startswith("transformers") else f"{module}.{kind.__name__}",
        "num_labels": model.config.num_labels,
    }


def load_lines(folder, output_dir, metrics):
    """Return the Python that loads what was saved, as the trained model was loaded.

    Quantized where that was, with as many labels, and by its own class where it is not one of
    transformers'.
    """
    folder, base = Path(folder), metrics.get("base_model", {})
    module, _, own_class = base.get("own_class", "").rpartition(".")
    if library(folder) == "peft":
        adapter = json.loads((folder / "adapter_config.json").read_text())
        name = auto_peft_class(adapter.get("task_type"))
    else:
        name = json.loads((folder / "config.json").read_text())["architectures"][0]
    lines, options = [f"from {library(folder)} import {name}"], ""
    quantized = metrics.get("quantization") or {}
    if quantized.get("load_in_4bit"):
        dtype = metrics["config"]["dtype"]
        lines += [
            "from transformers import BitsAndBytesConfig",
            "four = BitsAndBytesConfig(load_in_4bit=True, "
            f'bnb_4bit_quant_type="{quantized["bnb_4bit_quant_type"]}", '
            f"bnb_4bit_use_double_quant={quantized['bnb_4bit_use_double_quant']},",
            f'                          bnb_4bit_compute_dtype="{dtype}")',
        ]
        options += f', quantization_config=four, dtype="{dtype}"'
    if library(folder) == "peft" and base.get("num_labels", 2) != 2:
        options += f", num_labels={base['num_labels']}"
    if own_class:
        lines[0] = f"from {module} import {own_class}"
        name = own_class
    if own_class and library(folder) == "peft":
        path = metrics["config"]["model_name_or_path"]
        lines = ["from peft import PeftModel", *lines]
        lines += [f'base = {own_class}.from_pretrained("{path}"{options})']
        lines += [f'model = PeftModel.from_pretrained(base, "{output_dir}")']
    else:
        lines += [f'model = {name}.from_pretrained("{output_dir}"{options})']
    if library(folder) == "peft" and (folder / "generation_config.json").is_file():
        # else `generate` has the end tokens, and all other settings, of the base model; peft reads
        # the settings of the wrapper for causal models alone
        lines.insert(1, "from transformers import GenerationConfig")
        settings = f'GenerationConfig.from_pretrained("{output_dir}")'
        lines += [f"model.get_base_model().generation_config = {settings}"]
    return "\n".join(lines)


def auto_peft_class(task):
    """Return the name of peft's Auto class for a task type such as CAUSAL_LM or SEQ_CLS."""
    import peft  # a large import

    wanted = peft.mapping_func.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(task)
    for name, one in vars(peft.auto).items():
        if wanted is not None and getattr(one, "_target_peft_class", None) is wanted:
            return name
    return "AutoPeftModel"
