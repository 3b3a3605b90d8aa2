"""Stop with one sentence where a folder or Hub id holds no usable model of the script's kind.

Judged by config.json, the tokenizer and the headers of the safetensors; no weights are loaded.
"""

import contextlib
import importlib.util
import json
import os
import ssl
import urllib.request
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import ParamWrapper
from safetensors import safe_open
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.core_model_loading import WeightConverter, rename_source_key
from transformers.integrations.hub_kernels import is_kernel

from utils.activations import check_checkpointing
from utils.environment import launched_precision, launched_strategy
from utils.errors import first_line, or_refuse, refuse, say
from utils.experts import skipping_blocks
from utils.launch_checks import check_wrap_classes
from utils.vocabulary import check_end, check_tokens_used
from utils.lora import (
    LINEAR,
    check_target_parameters,
    expert_targets,
    lora_targets,
    matching,
    say_layers,
)

DTYPES = ("float32", "bfloat16", "float16")
# how to train a model that does not keep the documents of a row apart
ONE_BY_ONE = (
    "--per_device_train_batch_size 1 --per_device_eval_batch_size 1, without --packing (raise "
    "--gradient_accumulation_steps instead)"
)
HALF = {"bf16": "bfloat16", "fp16": "float16"}
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")


def check_model(config, auto_model, base, pads=True):
    """Stop if `config.model_name_or_path` is not a usable model, or its layers do not fit a flag.

    Args:
        config: the script's Config. Read are model_name_or_path, dtype, attn_implementation and, if
            it has them, max_length, target_modules, lora_target_parameters, modules_to_save and
            bnb_4bit_quant_storage.
        auto_model: the class that loads the model, an Auto class or another.
        base: "trained", "frozen" or "4bit", as for `read_settings`; or "new" if the script makes
            a model from the config alone, and trains it.
        pads: whether the script pads and ends its texts with the tokenizer's own tokens.
    """
    name = config.model_name_or_path
    culprit, folder = f"--model_name_or_path {name}", Path(name)
    check_place(name, culprit, is_new=base == "new")
    check_code(name, culprit)
    unreadable = f"{culprit} cannot be read, check the path"
    model_config = or_refuse(unreadable, AutoConfig.from_pretrained, name)
    saved = getattr(model_config, "quantization_config", None) or {}
    check_quantization(config, culprit, saved, base)
    check_kind(auto_model.__name__, model_config, culprit)
    no_tokenizer = f"{culprit} has no usable tokenizer, save one with it"
    tokenizer = or_refuse(no_tokenizer, AutoTokenizer.from_pretrained, name)
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    length = vars(config).get("max_length", 1)
    if positions is not None and length > positions:
        refuse(
            f"--max_length {length} exceeds the model's {positions} positions: give {positions} or "
            "less"
        )
    skeleton = build_skeleton(config, auto_model, model_config, culprit)
    if pads:
        if "CausalLM" in auto_model.__name__ or "Seq2Seq" in auto_model.__name__:
            check_end(name, tokenizer)
        check_tokens_used(culprit, skeleton, tokenizer)
    if folder.is_dir():
        if (folder / "generation_config.json").is_file():
            unreadable = f"{culprit}: generation_config.json cannot be read, correct or delete it"
            or_refuse(unreadable, GenerationConfig.from_pretrained, folder)
        if not saved and base != "new":
            check_weight_names(folder, culprit, skeleton)
    check_layers(config, culprit, skeleton)
    dropped = {name: rate for name, rate in vars(model_config).items() if "layerdrop" in name}
    if any(dropped.values()):
        told = ", ".join(f"{name} {rate}" for name, rate in dropped.items() if rate)
        say(f"{told} of the model's config is unused: all processes must run the same layers.")


def check_code(name, culprit):
    """Stop if transformers lacks the model's class, and the checkpoint brings code for it."""
    file = Path(name) / "config.json"
    if not file.is_file():
        return
    broken = f"{culprit}: config.json is not valid JSON, save the model again"
    settings = or_refuse(broken, lambda: dict(json.loads(file.read_text())))
    kind = settings.get("model_type")
    if settings.get("auto_map") and kind not in CONFIG_MAPPING:
        refuse(
            f"{culprit} is a {kind}, which transformers does not have; the checkpoint brings code "
            "of its own (auto_map), which is not run: take a checkpoint of a class of transformers"
        )


def check_place(name, culprit, is_new=False):
    """Stop if a model's name is neither a folder with its files nor a Hub id in reach.

    Args:
        is_new: no weights are needed.
    """
    folder = Path(name)
    if or_refuse(culprit, folder.is_dir):
        is_adapter, base = adapter_base(folder)
        if is_adapter:
            refuse(
                f"{culprit} holds an adapter of {base or 'an unnamed model'}: give that model, "
                "continue its training with chat_sft.py, or merge both with tools.merge_adapter"
            )
        if not (folder / "config.json").is_file():
            refuse(
                f"{culprit} holds no config.json: give the folder of a model, as save_pretrained "
                "writes it"
            )
        if not is_new:
            check_weight_files(folder, culprit)
    elif folder.exists() or name.count("/") > 1 or name.startswith((".", "/", "~")):
        refuse(f"{culprit} is neither a folder nor a Hub id: check the path")
    else:
        check_hub(culprit)


def adapter_base(folder):
    """Return whether a folder holds an adapter and no model, and the base that it names."""
    file = Path(folder) / "adapter_config.json"
    if (Path(folder) / "config.json").is_file() or not file.is_file():
        return False, None
    settings = or_refuse(f"{file} cannot be read", lambda: dict(json.loads(file.read_text())))
    return True, settings.get("base_model_name_or_path")


def check_hub(culprit):
    """Stop if the Hub cannot be reached; the libraries would try for half a minute per file."""
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return
    try:
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        urllib.request.urlopen(endpoint, timeout=3).close()
    except OSError as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, OSError) and not isinstance(reason, ssl.SSLError):  # else it answered
            refuse(
                f"{culprit} does not exist here, and the Hub cannot be reached ({reason}): check "
                "the path or the network, or set HF_HUB_OFFLINE=1 to use an earlier download"
            )


def check_weight_files(folder, culprit):
    """Stop if safetensors are missing or truncated, judged by their headers."""
    endings = (*WEIGHTS, ".index.json")
    if not any(file.name.endswith(endings) for file in folder.glob("*")):
        refuse(
            f"{culprit} holds config.json but no weights: give a model with weights; 'A new model' "
            "in docs/deepspeed.md says how to train one from its config"
        )
    for file in weight_files(folder, culprit):
        if not file.is_file():
            refuse(
                f"{culprit} holds no {file.name}: only safetensors are read, save the model again "
                "in that format"
            )
        damaged = (
            f"{culprit}: {file.name} is damaged or truncated, save the model or download it again"
        )
        with or_refuse(damaged, safe_open, file, framework="pt"):
            pass


def weight_files(folder, culprit):
    """Return the safetensors of a model: one, or those that the index names."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    unreadable = f"{culprit}: {index.name}"
    weight_map = or_refuse(unreadable, lambda: json.loads(index.read_text())["weight_map"])
    return [folder / file for file in sorted(set(weight_map.values()))]


def check_kind(class_name, model_config, culprit):
    """Stop if a script for causal models gets a sequence-to-sequence one, or the reverse."""
    if model_config.model_type == "fsmt":
        refuse(
            f"{culprit} is an FSMT model, whose decoder does not read the labels, so it cannot be "
            "trained: take another one, such as Marian or M2M100"
        )
    kinds = {"CausalLM": "a causal language model", "Seq2Seq": "a sequence-to-sequence model"}
    for part, kind in kinds.items():
        if part in class_name and model_config.is_encoder_decoder != (part == "Seq2Seq"):
            refuse(
                f"{culprit} is not {kind}, which this script trains: take another model or script"
            )


def build_skeleton(config, auto_model, model_config, culprit):
    """Return the model on the meta device: shapes alone, no memory, no weights."""
    attention, kind = config.attn_implementation, type(model_config)
    build = getattr(auto_model, "from_config", None) or auto_model._from_config
    try:
        with torch.device("meta"):
            skeleton = build(model_config, attn_implementation=attention)
        if attention != "documents" or skeleton._can_set_attn_implementation():
            return skeleton
        error = None
    except Exception as raised:  # an unknown model, an unknown attention, a setting out of range
        error = raised.__cause__ or raised
    for other in ("sdpa", "eager"):
        with contextlib.suppress(Exception), torch.device("meta"):
            name = type(build(model_config, attn_implementation=other)).__name__
            # a missing package, or a kernel of the Hub that is not trusted or not there
            is_reason = isinstance(error, (ImportError, OSError)) or is_kernel(attention)
            told = f"is a {name}, which has no attention {attention}"
            told = f"cannot use {attention} ({first_line(error)})" if is_reason else told
            remedy = f"give --attn_implementation {other}"
            if attention == "documents":
                remedy += f", and, if that mixes the documents of a row, {ONE_BY_ONE}"
            break
    else:
        is_image = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        also = ": it also reads images; save its language model alone and give that, or another"
        refuse(
            f"{culprit} cannot be made by {auto_model.__name__} ({first_line(error)})"
            f"{also if is_image else ''}"
        )
    refuse(f"{culprit} {told}: {remedy}")


def check_weight_names(folder, culprit, skeleton):
    """Stop if the files hold none of the model's weights, or weights of other shapes.

    transformers renames the weights of older checkpoints as it loads them, and so does this.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    mapping = get_model_conversion_mapping(skeleton)
    converters = [one for one in mapping if isinstance(one, WeightConverter)]  # fuse experts
    renamings = [one for one in mapping if not isinstance(one, WeightConverter)]
    prefix, found = skeleton.base_model_prefix, 0
    for path in weight_files(folder, culprit):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                name, fused = rename_source_key(key, renamings, converters, prefix, shapes)
                shape = tuple(file.get_slice(key).get_shape())
                if fused is None and name in shapes and shape != shapes[name]:
                    refuse(
                        f"{culprit}: {path.name} holds {key} with shape {shape}, and config.json "
                        f"says {shapes[name]}: save the two together"
                    )
                found += name in shapes
    if not found:
        refuse(
            f"{culprit} holds no weight of a {type(skeleton).__name__}, which config.json names: "
            "save them together"
        )


def check_layers(config, culprit, skeleton):
    """Stop if the model lacks the layers that the launch config or the flags name."""
    strategy, flags = launched_strategy(), vars(config)
    if strategy.startswith("fsdp"):
        check_wrap_classes(culprit, skeleton)
    if strategy == "fsdp1" and config.dtype == "float16" and skeleton._keep_in_fp32_modules:
        refuse(
            f"{culprit} keeps some weights in float32 beside --dtype float16; fsdp1 cannot put two "
            "dtypes into one flat parameter: give bfloat16"
        )
    if flags.get("target_modules") == [] and not flags.get("lora_target_parameters"):
        refuse("--target_modules is empty: name layers that get LoRA, or all-linear")
    if flags.get("target_modules", ["all-linear"]) != ["all-linear"]:
        check_target_modules(config.target_modules, skeleton)
    if flags.get("lora_target_parameters"):
        check_target_parameters(config.lora_target_parameters, skeleton)
    if flags.get("modules_to_save"):
        check_modules_to_save(config, skeleton)
    if strategy == "fsdp1" and skipping_blocks(skeleton):
        refuse(
            f"{culprit} has experts that a process calls only for some rows; fsdp1 would wait for "
            "the other processes forever: train under zero3 or ddp, with a script that runs there"
        )
    check_checkpointing(config, culprit, skeleton)
    if {"target_modules", "lora_dropout"} <= set(flags):  # not a script with another method
        check_lora(config, skeleton)


def check_target_modules(target_modules, skeleton):
    """Stop if a LoRA target, a name or a regular expression, names no linear layer."""
    modules = dict(skeleton.named_modules())
    linear = {n.rpartition(".")[2] for n, module in modules.items() if isinstance(module, LINEAR)}
    known = f"the model has {', '.join(sorted(linear))}"
    for target in target_modules:
        found = or_refuse(f"--target_modules {target}", matching, target, modules)
        others = [name for name in found if not isinstance(modules[name], LINEAR)]
        if found and others and len(others) < len(found):
            refuse(
                f"--target_modules {target} also names {others[0]}, a "
                f"{type(modules[others[0]]).__name__}, which is no linear layer: {known}"
            )
        if not found or others:
            refuse(f"--target_modules {target} names no linear layer: {known}")


def check_lora(config, skeleton):
    """Stop if PEFT cannot add the adapter to this model. Changes the skeleton.

    all-linear or a regular expression in `config.target_modules` becomes what PEFT understands.
    """
    if config.target_modules == ["all-linear"]:
        say_layers(skeleton)
    dropout, parameters = config.lora_dropout, vars(config).get("lora_target_parameters", [])
    wanted, targets = config.target_modules, lora_targets(skeleton, config.target_modules)
    lora = LoraConfig(
        target_modules=targets,
        target_parameters=expert_targets(skeleton, parameters) or None,
        lora_dropout=dropout,
    )
    culprit = f"LoRA on {', '.join(wanted)} cannot be added to this model, "
    culprit += "give --lora_dropout 0 or other layers" if dropout else "give other layers"
    with torch.device("meta"):
        model = or_refuse(culprit, get_peft_model, skeleton, lora)
    if isinstance(targets, str) and targets != "all-linear":
        config.target_modules = targets
    strategy, is_lesson = launched_strategy(), "lora_target_parameters" not in vars(config)
    if not any(isinstance(module, ParamWrapper) for module in model.modules()):
        return
    if strategy == "fsdp1" or (strategy == "zero3" and is_lesson):
        refuse(
            f"LoRA on fused experts under {strategy}: PEFT reads its matrices without calling "
            "them, so they would stay sharded: train with chat_sft.py and configs/fsdp2.yaml or "
            "zero3.yaml, or name other --target_modules"
        )


def check_modules_to_save(config, skeleton):
    """Stop if a layer to train in full does not exist, has no weights, or is a LoRA target."""
    modules = dict(skeleton.named_modules(remove_duplicate=False))
    heads = (skeleton.get_input_embeddings(), skeleton.get_output_embeddings())
    ends = {name.rpartition(".")[2] for name, module in modules.items() if module in heads}
    for wanted in config.modules_to_save:
        found = [
            next(module.parameters(recurse=False), None) is not None
            for name, module in modules.items()
            if name == wanted or name.endswith(f".{wanted}")
        ]
        if not found or not all(found):
            refuse(
                f"--modules_to_save {wanted} names no layer with weights: the model has "
                f"{', '.join(sorted(ends))}"
            )
        if launched_strategy() == "fsdp2" and config.dtype != "float32" and wanted not in ends:
            refuse(
                f"--modules_to_save {wanted} would be trained in {config.dtype} beside LoRA in "
                "float32; fsdp2 cannot put two dtypes into one unit: give --dtype float32, or only "
                f"{' '.join(sorted(ends))}"
            )
        if wanted in config.target_modules:
            refuse(
                f"{wanted} is in --modules_to_save and in --target_modules: name it in one of them"
            )


def check_quantization(config, culprit, saved, base):
    """Stop if quantized weights would be trained, cast, or copied to every process.

    Args:
        saved: the checkpoint's own `quantization_config`; empty where it is not quantized.
        base: "4bit" where the script quantizes what the checkpoint holds.
    """
    strategy, quantizes = launched_strategy(), base == "4bit"
    if saved and saved.get("quant_method") != "bitsandbytes":
        refuse(
            f"{culprit} is quantized by {saved.get('quant_method')}, not bitsandbytes: take the "
            "original model, or a copy in bfloat16 where the original is quantized"
        )
    if saved and base in ("trained", "new"):
        refuse(
            f"{culprit} holds quantized weights, which cannot be trained: take the original, or a "
            "script with LoRA"
        )
    if not (saved or quantizes):
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        refuse(
            "4-bit and 8-bit weights need bitsandbytes, which is not installed: pip install "
            "bitsandbytes"
        )
    is_sharded = strategy in ("zero3", "fsdp1", "fsdp2")
    qlora = f"causal_lm_qlora_{strategy}.py"
    if saved.get("load_in_8bit"):
        if is_sharded:
            refuse(
                f"{culprit} holds 8-bit weights; bitsandbytes keeps all of them in every process, "
                f"whatever {strategy} does: train the original with {qlora}, or launch with "
                "configs/ddp.yaml"
            )
        if quantizes:
            refuse(
                f"{culprit} holds 8-bit weights already: take the original, or causal_lm_lora.py"
            )
        return
    if is_sharded and not quantizes:
        has_flag = "use_4bit_quantization" in vars(config)
        remedy = "add --use_4bit_quantization" if has_flag else f"take {qlora}"
        refuse(f"{culprit} holds 4-bit weights, which cannot be sharded so: {remedy}")
    check_storage(config, culprit, saved, strategy)


def check_storage(config, culprit, saved, strategy):
    """Stop if the dtype that holds the packed 4-bit weights does not fit the strategy."""
    precision = launched_precision()
    if saved:
        storage = saved.get("bnb_4bit_quant_storage", "uint8")
        source = f"{culprit}: its bnb_4bit_quant_storage"
    else:
        storage = config.bnb_4bit_quant_storage or config.dtype
        source = "--bnb_4bit_quant_storage"
    if storage not in (*DTYPES, "uint8"):
        refuse(f"{source} is {storage!r}: choose one of uint8, {', '.join(DTYPES)}")
    if strategy.startswith("fsdp") and storage != config.dtype:
        refuse(
            f"{source} is {storage}, and --dtype {config.dtype}: {strategy} shards both in one "
            "unit, so make them the same"
        )
    if strategy in ("single", "ddp") or precision not in HALF:
        return
    if storage not in ("uint8", HALF[precision]):
        refuse(
            f"{source} is {storage}; {strategy} in mixed precision {precision} would cast and so "
            f"destroy the packed weights: give --dtype {HALF[precision]}"
        )
