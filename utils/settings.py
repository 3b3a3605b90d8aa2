"""Read the command line, and stop with one sentence if a setting is invalid.

All of this happens before a model is loaded. A flag is checked if the Config has a field of its
name; the names are Hugging Face's. Data columns are checked in data.py.
"""

import contextlib
import glob
import json
import math
import os
import re
import sys
import tempfile
from pathlib import Path

import torch
from huggingface_hub.utils import validate_repo_id
from torch.utils import cpp_extension
from transformers import HfArgumentParser

from utils.errors import or_refuse, refuse
from utils.launch import OPTIMIZERS, deepspeed_settings, launched_precision, launched_strategy
from utils.model_files import DTYPES, check_model

SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")
POSITIVE = (
    "max_length",
    "max_target_length",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "num_train_epochs",
    "logging_steps",
    "eval_steps",
    "save_steps",
    "max_new_tokens",
    "lora_r",
    "lora_alpha",
)
SHARES = ("warmup_ratio", "lora_dropout")
NOT_NEGATIVE = (
    "weight_decay",
    "max_grad_norm",
    "save_total_limit",
    "num_samples",
    "dataloader_num_workers",
)
CHOICES = {
    "lr_scheduler_type": SCHEDULES,
    "dtype": DTYPES,
    "eval_strategy": ("no", "epoch"),
    "optim": tuple(OPTIMIZERS),
}


def read_settings(Config, strategies, auto_model, base):
    """Return the settings of the command line; stop with an error if they are invalid.

    Checks the numbers, the launch config, the output folder and the model's files. A ValueError
    that the Config raises in `__post_init__` is reported in the same way.

    Args:
        Config: a dataclass with the fields model_name_or_path, dtype, output_dir,
            overwrite_output_dir, hub_model_id and whatever else the script needs.
        strategies: those that the script can run. All are "single", "ddp", "zero1", "zero2",
            "zero3", "fsdp1" and "fsdp2".
        auto_model: the Auto class of transformers that loads the model.
        base: how the model's own weights are used: "trained"; "frozen", with an adapter; or "4bit",
            quantized and frozen.
    """
    config = parse_arguments(Config)
    check_numbers(config)
    check_launch(config, strategies, base)
    check_output(config)
    check_model(config, auto_model, base)
    return config


def parse_arguments(Config):
    """Return an instance of the dataclass with the values of the command line."""
    parser = HfArgumentParser(Config)
    parser.error = lambda message: refuse(f"{message}: --help lists the flags")
    parser.allow_abbrev = False
    if {"-h", "--help"} & set(sys.argv) and int(os.environ.get("RANK", 0)) > 0:
        raise SystemExit(0)
    try:
        config, unknown = parser.parse_args_into_dataclasses(
            return_remaining_strings=True, look_for_args_file=False
        )
    except ValueError as error:  # of the Config's __post_init__
        refuse(str(error))
    if unknown:
        parser.error(f"{' '.join(unknown)} is not a flag of this script")
    return config


def check_numbers(config):
    """Stop if a value is out of range."""
    values = vars(config)
    for name in POSITIVE:
        if name in values and not 0 < values[name] < math.inf:
            refuse(f"--{name} is {values[name]}: give a number above 0")
    for name in SHARES:
        if name in values and not 0 <= values[name] < 1:
            refuse(f"--{name} is {values[name]}: give a fraction of at least 0 and below 1")
    for name, limit in (*((name, math.inf) for name in NOT_NEGATIVE), ("seed", 2**32)):
        if name in values and not 0 <= values[name] < limit:
            refuse(f"--{name} is {values[name]}: give a number of at least 0 and below {limit}")
    for name, known in CHOICES.items():
        if name in values and values[name] not in known:
            refuse(f"--{name} is {values[name]!r}: choose one of {', '.join(known)}")
    if values.get("max_steps", -1) != -1 and config.max_steps < 1:
        refuse(
            f"--max_steps is {config.max_steps}: give the number of updates, or -1 to train for "
            "--num_train_epochs"
        )
    if values.get("lr_scheduler_type") == "constant" and config.warmup_ratio:
        refuse(
            "--lr_scheduler_type constant has no warmup: give constant_with_warmup, or "
            "--warmup_ratio 0"
        )


def check_launch(config, strategies, base):
    """Stop if the launch config does not fit the script or the machine."""
    strategy, precision = launched_strategy(), launched_precision()
    if strategy not in strategies:
        refuse(
            f"{Path(sys.argv[0]).name} runs with {', '.join(strategies)}, and was launched with "
            f"{strategy}: start it with `{launch_command()}`"
        )
    if strategy.startswith("zero"):
        check_deepspeed(config, precision)
    elif config.dtype != "float32" and base == "trained":
        refuse(
            f"--dtype {config.dtype} would also keep the trained weights in {config.dtype}, which "
            "loses small updates: keep float32 and launch with --mixed_precision bf16"
        )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        refuse(
            f"--dynamo_backend {backend} compiles the model; generating and saving were not tested "
            "with it: drop the flag"
        )
    if precision not in ("no", "bf16", "fp16"):
        refuse(
            f"mixed precision {precision} is not supported: launch with `--mixed_precision bf16`, "
            "fp16 or no"
        )
    if precision == "fp16" and not torch.cuda.is_available():
        refuse(
            "mixed precision fp16 needs a GPU: launch with `--mixed_precision bf16` or "
            "`--mixed_precision no`"
        )
    if strategy.startswith("fsdp"):
        check_fsdp(strategy)
    if vars(config).get("optim", "adamw_torch") != "adamw_torch":
        check_optimizer(config.optim, strategy)
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if torch.cuda.is_available() and processes > gpus:
        refuse(f"{processes} processes for {gpus} GPU(s): launch with fewer `--num_processes`")


def launch_command():
    """Return the command of the script's docstring, with the script's path as it was given."""
    text = Path(sys.argv[0]).read_text() if Path(sys.argv[0]).is_file() else ""
    config = re.search(r"^Run: .*--config_file (\S+)", text, re.MULTILINE)
    return f"accelerate launch --config_file {config[1] if config else 'FILE'} {sys.argv[0]}"


def check_deepspeed(config, precision):
    """Stop if DeepSpeed's launch config contradicts itself or the script's dtype."""
    if re.search(r"^use_cpu:\s*['\"]?true", launch_config(), re.IGNORECASE | re.MULTILINE):
        refuse(
            "the launch config says use_cpu: true, which accelerate ignores with DeepSpeed: set it "
            "to false"
        )
    if precision == "no" and config.dtype != "float32":
        refuse(
            f"--dtype {config.dtype} under DeepSpeed needs mixed precision: launch with "
            "`accelerate launch --mixed_precision`, bf16 or fp16"
        )
    if deepspeed_settings()["optimizer"] != "none":
        check_extension_lock("cpu_adam")


def launch_config():
    """Return the text of the YAML file that `accelerate launch` was given; "" where unknown.

    The launcher is this process's parent.
    """
    parent = Path(f"/proc/{os.getppid()}/cmdline")
    if not parent.is_file():
        return ""
    command = parent.read_text().replace("--config_file=", "--config_file\0").split("\0")
    has_file = "--config_file" in command
    file = Path(command[command.index("--config_file") + 1]) if has_file else Path()
    return file.read_text() if file.is_file() else ""


def check_fsdp(strategy):
    """Stop if FSDP would shard nothing, or would not gather layer by layer."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        refuse(
            "FSDP on one process shards nothing: launch with more --num_processes, or use a "
            "script for configs/single.yaml"
        )
    if strategy == "fsdp1" and os.environ.get("FSDP_USE_ORIG_PARAMS") == "true":
        refuse(
            "fsdp_use_orig_params is true, its default; frozen weights would get gradients: set it "
            "to false"
        )
    sharding = os.environ.get("FSDP_SHARDING_STRATEGY", "FULL_SHARD")
    if strategy == "fsdp1" and sharding not in ("FULL_SHARD", "SHARD_GRAD_OP", "1", "2"):
        refuse(
            f"fsdp_sharding_strategy {sharding} copies the model to every process or node: set "
            "FULL_SHARD, or use configs/fsdp2_hybrid.yaml"
        )
    policy = os.environ.get("FSDP_AUTO_WRAP_POLICY")
    if strategy == "fsdp2" and policy != "TRANSFORMER_BASED_WRAP":
        refuse(
            f"fsdp_auto_wrap_policy {policy} does not gather layer by layer: set it to "
            "TRANSFORMER_BASED_WRAP"
        )


def check_optimizer(optim, strategy):
    """Stop if a bitsandbytes optimizer does not work here, or its state cannot be saved."""
    if strategy.startswith("zero") and deepspeed_settings()["optimizer"] != "none":
        refuse(
            f"--optim {optim} cannot be offloaded, because DeepSpeed then uses its CPU Adam: give "
            "--optim adamw_torch"
        )
    if strategy == "fsdp2":
        refuse(
            f"--optim {optim} cannot step the DTensors of fsdp2: give adamw_torch, or use zero2 or "
            "zero3"
        )


def check_extension_lock(name):
    """Stop if a killed compilation left its lock: torch would wait for it forever."""
    lock = Path(cpp_extension._get_build_directory(name, verbose=False)).resolve() / "lock"
    # checked again: the process that held it may have ended
    if lock.exists() and not is_open(lock) and lock.exists():
        refuse(
            f"{lock} was left by a compilation that was killed, and DeepSpeed would wait for it "
            "forever: delete that file"
        )


def is_open(path):
    """Return whether a process has the file open; a running compilation has its lock open."""
    for link in glob.iglob("/proc/[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # another user's, or gone by now
            if os.readlink(link) == str(path):
                return True
    return False


def check_output(config):
    """Stop if the output folder exists and may not be replaced, or cannot be created."""
    if config.hub_model_id:
        or_refuse("--hub_model_id", validate_repo_id, config.hub_model_id)
    folder = Path(config.output_dir)
    if or_refuse(f"--output_dir {folder}", folder.is_dir):
        if not config.overwrite_output_dir:
            refuse(f"--output_dir {folder} exists: choose another, or add --overwrite_output_dir")
        if any(folder.iterdir()):
            check_earlier_run(folder)
    elif folder.exists():
        refuse(f"--output_dir {folder} is a file: choose another")
    parent = next(path for path in folder.absolute().parents if path.exists())
    culprit = f"--output_dir {folder} cannot be created, choose another"
    name = f".{folder.name}."  # the run is first written into a folder with this prefix
    or_refuse(culprit, lambda: tempfile.TemporaryDirectory(prefix=name, dir=parent).cleanup())


def check_earlier_run(folder):
    """Stop unless the folder's metrics.json lists the files of an earlier run."""
    culprit = f"--output_dir {folder} holds no metrics.json of an earlier run, choose another"
    or_refuse(culprit, lambda: list(json.loads((folder / "metrics.json").read_text())["saved"]))
