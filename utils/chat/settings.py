"""Read the settings of chat_sft, fill in the open ones, and stop where they cannot work.

All of this happens before any weights are loaded. The general checks are those of settings.py and
model_files.py; here are those of the flags that only chat_sft has.
"""

import dataclasses
import importlib.util
import json
import os
from pathlib import Path
from types import SimpleNamespace

import transformers
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from huggingface_hub.utils import validate_repo_id
from peft import PeftConfig
from transformers import AutoConfig
from transformers.utils import is_liger_kernel_available

from utils.activations import settle_checkpointing
from utils.checkpoint import checkpoints
from utils.environment import deepspeed_settings, launched_precision, launched_strategy
from utils.environment import shards_parameters, uses_gpu
from utils.errors import or_refuse, refuse, say
from utils.folders import check_output, lock_folder
from utils.lora import PATTERN
from utils.model_files import DTYPES, HALF, ONE_BY_ONE, adapter_base, check_model
from utils.chat.run_log import tracker_names
from utils.settings import check_launch, check_numbers, parse_arguments

STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp1", "fsdp2")
WHEN = ("no", "steps", "epoch")
LORA_FLAGS = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
LORA_FLAGS += ("lora_target_parameters",)
CHOICES = {
    "dtype": ("auto", *DTYPES),
    "train_on": ("assistant", "all"),
    "long_documents": ("truncate", "drop"),
    "logging_strategy": WHEN,
    "eval_strategy": WHEN,
    "save_strategy": WHEN,
    "hub_strategy": ("end", "every_save", "checkpoint", "all_checkpoints"),
    "bnb_4bit_quant_type": ("nf4", "fp4"),
    "bnb_4bit_compute_dtype": ("", *DTYPES),
    "log_level": ("debug", "info", "warning", "error", "critical"),
}


def read_chat_settings(Config, auto_model):
    """Return the settings of the command line; stop with an error where they cannot work.

    Settings that depend on others or on the machine are filled in: dtype, attn_implementation,
    use_liger_kernel and max_length. Sets the log level of transformers.

    Args:
        Config: the dataclass of chat_sft.
        auto_model: the Auto class of transformers that loads the model.
    """
    config = parse_arguments(Config)
    take_adapter(config)
    check_choices(config)
    check_template_choice(config.chat_template_format)
    check_combinations(config)
    check_trackers(config.report_to)
    say_what_is_unused(config)
    settle_checkpointing(config)
    resolve(config)
    view, base = as_lesson(config)
    check_numbers(view)
    check_launch(view, STRATEGIES, base)
    if config.use_8bit_quantization and shards_parameters():
        refuse(
            "--use_8bit_quantization: bitsandbytes keeps all 8-bit weights in every process, "
            f"whatever {launched_strategy()} does: give --use_4bit_quantization, or launch with "
            "configs/ddp.yaml"
        )
    check_run_folder(config)
    view.max_length = 1  # a longer one than the model allows is lowered (limit_length)
    check_model(view, auto_model, base, pads=False)
    limit_length(config)
    check_row_length(config)
    levels = transformers.utils.logging.log_levels
    transformers.utils.logging.set_verbosity(levels[config.log_level])
    return config


def as_lesson(config):
    """Return the settings by the names that the general checks know, and the kind of the base.

    The kind is that of `read_settings`: "trained", "frozen" or "4bit".
    """
    view = SimpleNamespace(**vars(config))
    del view.eval_strategy  # has more choices here (CHOICES)
    if config.use_4bit_quantization:
        view.bnb_4bit_quant_storage = config.bnb_4bit_quant_storage_dtype or config.dtype
    view.lora_target_parameters = []
    if config.use_peft_lora:
        view.target_modules = ["all-linear"]
        if not config.adapter_name_or_path:  # else the adapter names them
            view.target_modules = split_names(config.lora_target_modules)
            view.lora_target_parameters = split_names(config.lora_target_parameters)
        return view, "4bit" if config.use_4bit_quantization else "frozen"
    del view.lora_r, view.lora_alpha, view.lora_dropout
    return view, "trained"


def take_adapter(config):
    """Let the run continue an adapter's training; --model_name_or_path may name the adapter.

    Then --model_name_or_path becomes the adapter's base, unless it is one that the user names.
    """
    is_adapter, base = adapter_base(config.model_name_or_path)
    if is_adapter and not base:
        refuse(
            f"{config.model_name_or_path} holds an adapter that does not name its base: give it as "
            "--adapter_name_or_path, and the base as --model_name_or_path"
        )
    if is_adapter and not config.adapter_name_or_path:
        config.adapter_name_or_path, config.model_name_or_path = config.model_name_or_path, base
    place = config.adapter_name_or_path
    if not place:
        return
    culprit = f"--adapter_name_or_path {place}"
    adapter = or_refuse(f"{culprit} cannot be read", PeftConfig.from_pretrained, place)
    kind, named = adapter.peft_type, adapter.base_model_name_or_path
    if kind != "LORA":
        refuse(
            f"{culprit} is an adapter of type {kind.value}, and chat_sft continues only type LORA: "
            "give one, or train a new adapter"
        )
    base = config.model_name_or_path
    told = "" if base == named else f", although it names {named} as its base"
    say(f"The training of the adapter {place} continues, on {base}{told}.")
    config.use_peft_lora = True


def split_names(text):
    """Return the names that a flag lists, comma separated; a regular expression is not split."""
    if PATTERN.search(text):
        return [text.strip()]
    return [name.strip() for name in text.split(",") if name.strip()]


def check_choices(config):
    """Stop if a flag has none of its values."""
    for name, known in CHOICES.items():
        value = getattr(config, name)
        if value not in known:
            refuse(f"--{name} is {value!r}: choose one of {', '.join(filter(None, known))}")


def check_template_choice(template):
    """Stop if --chat_template_format names a file that cannot be read.

    `build_tokenizer` checks whether another name is a template of the tokenizer.
    """
    if template.endswith(".jinja"):
        or_refuse(f"--chat_template_format {template} cannot be read", Path(template).read_text)


def check_combinations(config):
    """Stop if flags contradict each other, or where one needs another."""
    if config.bf16 and config.fp16:
        refuse("--bf16 and --fp16 contradict each other: give one of them")
    quantizes = config.use_4bit_quantization or config.use_8bit_quantization
    if config.use_4bit_quantization and config.use_8bit_quantization:
        refuse(
            "--use_4bit_quantization and --use_8bit_quantization contradict each other: give one "
            "of them"
        )
    if quantizes and not config.use_peft_lora:
        refuse("quantized weights cannot be trained: add --use_peft_lora, or drop the quantization")
    if config.lora_target_parameters and config.lora_dropout:
        refuse(
            f"--lora_dropout {config.lora_dropout} with --lora_target_parameters: PEFT adds LoRA "
            "to the fused weights of experts, where there is no input to drop: give 0"
        )
    if config.streaming and config.max_steps < 1:
        refuse("--streaming has no length: give --max_steps, the number of updates")
    moments = (config.save_strategy, config.eval_strategy, config.logging_strategy)
    if config.streaming and "epoch" in moments:
        refuse(
            "--streaming has no epochs: give --save_strategy, --eval_strategy and "
            "--logging_strategy steps, or no"
        )
    if config.hub_model_id and not config.push_to_hub:
        refuse(
            "--hub_model_id names a repository, but nothing is pushed: add --push_to_hub, or drop "
            "it"
        )
    if resumes(config) and config.overwrite_output_dir:
        refuse(
            "--resume_from_checkpoint continues the run that --overwrite_output_dir would replace: "
            "give one of them"
        )


def check_trackers(report_to):
    """Stop if --report_to names a tracker that is unknown or not installed."""
    known, installed = LoggerType.list(), [str(name) for name in get_available_trackers()]
    for name in tracker_names(report_to) or ():
        if name not in known:
            refuse(
                f"--report_to {report_to}: {name!r} is not a tracker of accelerate: choose one of "
                f"{', '.join(sorted(known))}, or none"
            )
        if name not in installed and not (name == "all" and installed):
            needs = "a tracker" if name == "all" else f"the package of {name}"
            refuse(
                f"--report_to {report_to} needs {needs}, which is not installed: install it, or "
                "give none"
            )


def say_what_is_unused(config):
    """Print each flag that was given but has no effect, because of another flag."""
    evaluates, saves = config.eval_strategy != "no", config.save_strategy != "no"
    groups = (  # the flag that decides, whether the others have an effect, the others
        (
            "--use_peft_lora",
            config.use_peft_lora,
            LORA_FLAGS,
        ),
        ("a new adapter", not config.adapter_name_or_path, LORA_FLAGS),
        (
            "--use_4bit_quantization",
            config.use_4bit_quantization,
            (
                "use_nested_quant",
                "bnb_4bit_quant_type",
                "bnb_4bit_compute_dtype",
                "bnb_4bit_quant_storage_dtype",
            ),
        ),
        ("--gradient_checkpointing", config.gradient_checkpointing, ("use_reentrant",)),
        ("--push_to_hub", config.push_to_hub, ("hub_strategy", "hub_private_repo")),
        ("--logging_strategy steps", config.logging_strategy == "steps", ("logging_steps",)),
        ("--eval_strategy steps", config.eval_strategy == "steps", ("eval_steps",)),
        (
            "an --eval_strategy",
            evaluates,
            ("num_samples", "max_new_tokens", "per_device_eval_batch_size"),
        ),
        ("--save_strategy steps", config.save_strategy == "steps", ("save_steps",)),
        ("a --save_strategy", saves, ("save_total_limit",)),
        ("a strategy that shards the model", shards_parameters(), ("layerwise_generation",)),
    )
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for decider, has_effect, names in groups:
        given = [f"--{name}" for name in names if getattr(config, name) != defaults[name]]
        if given and not has_effect:
            say(f"{', '.join(given)}: unused without {decider}.")


def resolve(config):
    """Fill in the settings that depend on others and on the machine; print which have no effect."""
    half = HALF.get(choose_precision(config), "float32")
    is_gpu, strategy = uses_gpu(), launched_strategy()
    if strategy == "zero3" and deepspeed_settings()["optimizer"] == "nvme":
        refuse(
            "the launch config offloads the optimizer to NVMe, and chat_sft's checkpoints cannot "
            "hold it then: launch with configs/zero3_offload.yaml, or train with "
            "examples/causal_lm_full_zero3.py, which saves no checkpoints"
        )
    has_liger = is_gpu and is_liger_kernel_available()
    if config.use_liger_kernel is None:
        config.use_liger_kernel = has_liger
    elif config.use_liger_kernel and not has_liger:
        needs = "the package liger-kernel, which is not installed" if is_gpu else "a GPU"
        refuse(f"--use_liger_kernel needs {needs}: drop the flag")
    if config.torch_compile and strategy in ("fsdp1", "zero3"):
        refuse(
            f"--torch_compile has no effect under {strategy}, whose hooks break the graphs: launch "
            "with configs/fsdp2.yaml, or drop the flag"
        )
    if config.dtype == "auto":
        config.dtype = half if config.use_peft_lora else "float32"
    has_flash = is_gpu and importlib.util.find_spec("flash_attn") is not None
    if config.use_flash_attn and has_flash and half != "float32":
        config.attn_implementation = "flash_attention_2"
    elif config.use_flash_attn:
        kernel = "torch's own for variable lengths" if is_gpu else "SDPA, one document at a time"
        say(
            "--use_flash_attn needs a GPU, bf16 or fp16, and the package flash-attn. Attention is "
            f"computed by {kernel} instead."
        )


def choose_precision(config):
    """Return the mixed precision; --bf16 and --fp16 override the launch config."""
    launched = launched_precision()
    precision = "bf16" if config.bf16 else "fp16" if config.fp16 else launched
    if precision != launched:
        say(f"--{precision} overrides mixed_precision {launched} of the launch config.")
        os.environ["ACCELERATE_MIXED_PRECISION"] = precision
        if launched_precision() != precision:
            refuse(
                f"--{precision} contradicts {launched_precision()} in the deepspeed_config_file: "
                "change that file"
            )
    return precision


def limit_length(config):
    """Lower --max_length to the number of the model's positions, and print it."""
    model_config = AutoConfig.from_pretrained(config.model_name_or_path).get_text_config()
    positions = getattr(model_config, "max_position_embeddings", None)
    if positions is not None and config.max_length > positions:
        say(
            f"--max_length {config.max_length} exceeds the model's {positions} positions: "
            f"{positions} is used."
        )
        config.max_length = positions


def check_row_length(config):
    """Stop if a row would be longer than this attention, or this model, allows.

    Llama 4 attends within chunks of a document, which only its mask defines. From a certain
    position on it also scales its attention, by the position in the row, not in the document.
    """
    model_config = AutoConfig.from_pretrained(config.model_name_or_path).get_text_config()
    if config.attn_implementation != "documents":
        return
    chunk = getattr(model_config, "attention_chunk_size", None)
    if chunk and "chunked_attention" in (getattr(model_config, "layer_types", None) or ()):
        if config.max_length > chunk:
            refuse(
                f"--max_length {config.max_length} exceeds {chunk} tokens, the size of the "
                "model's attention chunks, which --attn_implementation documents lacks: give "
                f"--max_length {chunk}, or --attn_implementation sdpa"
            )


def describe(config):
    """Return the model with the settings that matter, and what to try instead, for an error."""
    what = f"--model_name_or_path {config.model_name_or_path}"
    what += f" with --attn_implementation {config.attn_implementation}"
    tries = ["another model"]
    if config.use_peft_lora and not config.adapter_name_or_path:
        what += f" and --lora_target_modules {config.lora_target_modules}"
        tries.insert(0, "other --lora_target_modules")
    strategy = launched_strategy()
    if strategy not in ("single", "ddp"):
        what += f" under {strategy}"
        tries.insert(0, "configs/ddp.yaml")
    return what, f"try {' or '.join(tries)}"


def loss_remedy(attention, is_joined):
    """Return what to do about a model whose loss is wrong.

    Args:
        attention: an attn_implementation with which it is right; None: there is none.
        is_joined: whether a row may hold several documents.
    """
    if attention:
        return f"give --attn_implementation {attention}"
    return f"give {ONE_BY_ONE}" if is_joined else "take another model"


def resumes(config):
    """Return whether a checkpoint is asked for."""
    return config.resume_from_checkpoint.lower() not in ("", "false")


def check_run_folder(config):
    """Stop if output_dir holds another run or foreign files. The run to resume may be there."""
    if config.hub_model_id:
        or_refuse("--hub_model_id", validate_repo_id, config.hub_model_id)
    folder = lock_folder("output_dir", config.output_dir)
    wanted = config.resume_from_checkpoint
    is_run = or_refuse(f"--output_dir {folder}", (folder / "log.jsonl").is_file)
    if not is_run and not any(folder.glob("checkpoint-*/state.json")):
        if wanted and folder.is_dir() and not any(folder.iterdir()):
            return  # the first start of a job that always asks to resume
        return check_output(config)
    is_own = Path(wanted).resolve().parent == folder.resolve()
    continues = resumes(config) and (wanted.lower() == "true" or is_own)
    metrics = folder / "metrics.json"
    if config.overwrite_output_dir and metrics.is_file():
        culprit = f"--output_dir {folder} has a metrics.json that cannot be read, choose another"
        or_refuse(culprit, lambda: list(json.loads(metrics.read_text())["saved"]))
    if continues and wanted.lower() == "true" and metrics.is_file() and not checkpoints(folder):
        refuse(
            f"--output_dir {folder} holds a finished run and no checkpoint to resume: choose "
            "another, or give --overwrite_output_dir in place of --resume_from_checkpoint"
        )
    if not continues and not config.overwrite_output_dir:
        refuse(
            f"--output_dir {folder} holds a run: add --resume_from_checkpoint True to resume it, "
            "--overwrite_output_dir to replace it, or choose another"
        )
