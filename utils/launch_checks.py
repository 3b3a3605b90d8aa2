"""Stop with one sentence where the launch config does not fit the script, or contradicts itself."""

import contextlib
import glob
import importlib.util
import os
import re
import sys
from pathlib import Path

import torch
from torch.utils import cpp_extension

from utils.environment import deepspeed_file, deepspeed_settings, is_enabled, launch_config
from utils.environment import launched_precision, launched_strategy, uses_gpu
from utils.errors import or_refuse, refuse, say

# flag of the script -> its name in a DeepSpeed config; the flag decides
OWN = {
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "max_grad_norm": "gradient_clipping",
    "per_device_train_batch_size": "train_micro_batch_size_per_gpu",
}
# What accelerate refuses to read beside a deepspeed_config_file. It also refuses mixed_precision,
# which does no harm: check_precision compares the two.
FIELDS = "ACCELERATE_CONFIG_DS_FIELDS"
BESIDE = {
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_stage",
    "zero3_save_16bit_model",
}
BESIDE |= {f"offload_{part}_device" for part in ("optimizer", "param")}
BESIDE |= {f"offload_{part}_nvme_path" for part in ("optimizer", "param")}
PARALLEL = ("TP", "CP", "SP")  # tensor, context and sequence parallelism
# keys of a deepspeed_config_file that change nothing in these scripts -> what to do instead
IDLE = {
    "activation_checkpointing": "give --gradient_checkpointing",
    "steps_per_print": "accelerate turns it off",
}


def check_launch(config, strategies, base):
    """Stop if the launch config does not fit the script or the machine."""
    strategy, precision = launched_strategy(), launched_precision()
    if strategy not in strategies:
        refuse(
            f"{Path(sys.argv[0]).name} runs with {', '.join(strategies)}, and was launched with "
            f"{strategy}: start it with `{launch_command()}`"
        )
    for part in PARALLEL:
        if os.environ.get(f"PARALLELISM_CONFIG_{part}_SIZE", "1") not in ("1", "None"):
            refuse(
                f"parallelism_config_{part.lower()}_size splits the model or its rows, which "
                "the scripts do not support: set it to 1"
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
            "with it: drop the flag, or unset ACCELERATE_DYNAMO_BACKEND"
        )
    if precision not in ("no", "bf16", "fp16"):
        refuse(
            f"mixed precision {precision} is not supported: launch with `--mixed_precision bf16`, "
            "fp16 or no"
        )
    if precision == "fp16" and not uses_gpu():
        refuse(
            "mixed precision fp16 needs a GPU: launch with `--mixed_precision bf16` or "
            "`--mixed_precision no`"
        )
    if strategy.startswith("fsdp"):
        check_fsdp(strategy)
    if vars(config).get("optim", "adamw_torch") != "adamw_torch":
        check_optimizer(config.optim, strategy)
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if uses_gpu() and processes > gpus:
        refuse(f"{processes} processes for {gpus} GPU(s): launch with fewer `--num_processes`")


def launch_command():
    """Return the command of the script's docstring, with the script's path as it was given."""
    text = Path(sys.argv[0]).read_text() if Path(sys.argv[0]).is_file() else ""
    config = re.search(r"^Run: .*--config_file (\S+)", text, re.MULTILINE)
    return f"accelerate launch --config_file {config[1] if config else 'FILE'} {sys.argv[0]}"


def check_deepspeed(config, precision):
    """Stop if DeepSpeed's launch config contradicts itself or the script's dtype."""
    if importlib.util.find_spec("deepspeed") is None:
        refuse(
            "the launch config asks for DeepSpeed, which is not installed: pip install deepspeed"
        )
    if str(launch_config().get("use_cpu")).lower() == "true":
        refuse(
            "the launch config says use_cpu: true, which accelerate ignores with DeepSpeed: set it "
            "to false"
        )
    if precision == "no" and config.dtype != "float32":
        refuse(
            f"--dtype {config.dtype} under DeepSpeed needs mixed precision: launch with "
            "`accelerate launch --mixed_precision`, bf16 or fp16"
        )
    check_deepspeed_file(config)
    if deepspeed_settings()["optimizer"] != "none":
        free_extension_lock("cpu_adam")


def check_deepspeed_file(config):
    """Stop if a deepspeed_config_file contradicts the script; print its keys without effect.

    Also prints the numbers of a launch config without such a file that are not used.
    """
    name, content = deepspeed_file()
    culprit = f"deepspeed_config_file {name}"
    fields = {*os.environ.get(FIELDS, "").split(",")}
    os.environ[FIELDS] = ",".join(sorted(fields - {"mixed_precision"}))
    if name and (beside := fields & BESIDE):
        refuse(
            f"the launch config has {culprit} and also {', '.join(sorted(beside))}, which "
            "accelerate takes from one place only: remove these keys from the YAML file"
        )
    if own := [key for key in ("optimizer", "scheduler") if key in content]:
        refuse(
            f"{culprit} has {' and '.join(own)}: remove them. The script's own optimizer and "
            "--lr_scheduler_type are used"
        )
    check_precision(culprit, content)
    numbers = {
        "gradient_accumulation_steps": os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS"),
        "gradient_clipping": os.environ.get("ACCELERATE_GRADIENT_CLIPPING"),
    } | {key: value for key, value in content.items() if key in ("train_batch_size", *OWN.values())}
    flags = {OWN[flag]: (flag, value) for flag, value in vars(config).items() if flag in OWN}
    size = int(os.environ.get("WORLD_SIZE", 1))
    for flag in ("gradient_accumulation_steps", "per_device_train_batch_size"):
        size *= vars(config).get(flag, 1)
    flags["train_batch_size"] = ("per_device_train_batch_size", size)
    for key, told in numbers.items():
        flag, value = flags.get(key, ("", None))
        if value is not None and told not in (None, "auto") and not is_equal(told, value):
            say(
                f"{key} {told} of the launch config is not used: --{flag} of the script "
                f"sets it to {value}."
            )
    for key, remedy in IDLE.items():
        if key in content:
            say(f"{key} of {culprit} has no effect: {remedy}.")


def is_equal(told, value):
    """Return whether the value in a config, of any type, equals this number."""
    try:
        return float(told) == value
    except (TypeError, ValueError):
        return False


def check_precision(culprit, content):
    """Stop if a deepspeed_config_file asks for two precisions, or for another than the launcher."""
    on = [name for name in ("fp16", "bf16") if is_enabled(content.get(name))]
    if is_enabled(content.get("bfloat16")):
        refuse(f"{culprit} enables bfloat16 by a name that accelerate does not read: call it bf16")
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if len(on) > 1:
        refuse(f"{culprit} enables {' and '.join(on)}: enable one of them")
    if on and launched not in ("no", *on):
        refuse(
            f"{culprit} enables {on[0]}, and accelerate was launched with --mixed_precision "
            f"{launched}: make them the same"
        )


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
    """Stop if an optimizer of bitsandbytes does not work under the strategy."""
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


def free_extension_lock(name):
    """Delete the lock that a killed compilation left, for which torch would wait forever.

    The first process of a machine does it. A process that compiles has its lock open.
    """
    lock = Path(cpp_extension._get_build_directory(name, verbose=False)).resolve() / "lock"
    # checked again: the process that held it may have ended
    if int(os.environ.get("LOCAL_RANK", 0)) or not lock.exists() or is_open(lock):
        return
    if lock.exists():
        culprit = f"{lock} was left by a killed compilation and cannot be deleted"
        or_refuse(culprit, lock.unlink, missing_ok=True)
        say(f"Deleted {lock}, which a killed compilation had left.")


def is_open(path):
    """Return whether a process has the file open; a running compilation has its lock open."""
    for link in glob.iglob("/proc/[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # another user's, or gone by now
            if os.readlink(link) == str(path):
                return True
    return False
