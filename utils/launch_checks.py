"""Stop with one sentence where the launch config does not fit the script, or contradicts itself."""

import contextlib
import glob
import os
import re
import sys
from pathlib import Path

import torch
from torch.utils import cpp_extension
from transformers.modeling_layers import GradientCheckpointingLayer

from utils.deepspeed_checks import check_deepspeed
from utils.environment import deepspeed_settings, launched_precision, launched_strategy, uses_gpu
from utils.errors import or_refuse, refuse, say

PARALLEL = ("TP", "CP", "SP")  # tensor, context and sequence parallelism


def check_launch(config, strategies, base, optimizer_in_config=False):
    """Stop if the launch config does not fit the script or the machine.

    The arguments are those of `read_settings`.
    """
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
        check_deepspeed(config, precision, optimizer_in_config)
        if deepspeed_settings()["optimizer"] != "none":
            free_extension_lock("cpu_adam")
        if optimizer_in_config:
            free_extension_lock("fused_adam")
    elif config.dtype != "float32" and base in ("trained", "new"):
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


def check_wrap_classes(culprit, skeleton):
    """Stop if FSDP's wrap policy finds none of its layer classes in the model.

    Where the launch config names none, those that the model names are taken. A model may name
    classes of a part that it does not have, such as a vision tower; accelerate would stop at
    these. For a model that names none, the layers that can recompute their activations are taken.
    """
    kinds = {type(module) for module in skeleton.modules()}
    classes = {kind.__name__ for kind in kinds}
    layers = {kind.__name__ for kind in kinds if issubclass(kind, GradientCheckpointingLayer)}
    known = sorted(layers or {name for name in classes if name.endswith(("Layer", "Block"))})
    remedy = f"name one of {', '.join(known)}"
    if not known:
        remedy = "train under zero3 or ddp, with a script that runs there"
    if named := os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP"):
        missing = sorted(set(named.split(",")) - classes)
        if missing:
            refuse(
                f"{culprit} has no {missing[0]}, which fsdp_transformer_layer_cls_to_wrap names: "
                f"{remedy}"
            )
        return
    wanted = set(skeleton._no_split_modules or ())
    if not (found := wanted & classes or layers):
        refuse(
            f"{culprit} does not tell which layers FSDP can gather one by one, for "
            f"fsdp_transformer_layer_cls_to_wrap: {remedy}"
        )
    if found != wanted:
        os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = ",".join(sorted(found))
    if not found <= wanted:
        say(
            f"{culprit} names no layers for FSDP: {', '.join(sorted(found))} are taken. "
            "fsdp_transformer_layer_cls_to_wrap can name others."
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
