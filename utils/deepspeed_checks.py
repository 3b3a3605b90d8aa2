"""Stop with one sentence where DeepSpeed's config contradicts itself, the launch or the script.

The config is that of `accelerate launch` (a YAML file, a JSON file that it names, a JSON file that
ACCELERATE_DEEPSPEED_CONFIG_FILE names) or a dict in the script (`start_accelerator`).
"""

import importlib.util
import inspect
import logging
import math
import os

import torch

from utils.environment import FIELDS, deepspeed_file, deepspeed_settings, is_enabled, launch_config
from utils.environment import launched_precision, launched_strategy, uses_gpu
from utils.errors import first_line, refuse, say

# flag of the script -> its name in a DeepSpeed config; the flag decides
OWN = {
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "max_grad_norm": "gradient_clipping",
    "per_device_train_batch_size": "train_micro_batch_size_per_gpu",
}
# key of the YAML file and flag of accelerate -> its place in zero_optimization, DeepSpeed's default
PLACES = {
    "zero_stage": ("stage", 0),
    "offload_optimizer_device": ("offload_optimizer.device", "none"),
    "offload_param_device": ("offload_param.device", "none"),
    "offload_optimizer_nvme_path": ("offload_optimizer.nvme_path", "none"),
    "offload_param_nvme_path": ("offload_param.nvme_path", "none"),
}
LESSON = "examples/causal_lm_full_zero2_config.py"
ZERO = "zero_optimization."
MICS = "; configs/zero3_hpz.yaml and configs/fsdp2_hybrid.yaml also gather within a node"
QUANTIZED_MODEL = "; examples/causal_lm_qlora.py trains a quantized model"
REMOVED = {  # key of a DeepSpeed config that DeepSpeed has removed -> what does the job today
    "elasticity": "; --num_processes of accelerate sets the number of processes",
    "compression_training": QUANTIZED_MODEL,
    "curriculum_learning": "; give the rows' `order` to make_loaders in section 2 of a lesson",
    "amp": "; `accelerate launch --mixed_precision bf16` trains in bf16",
    "sparse_gradients": "",
    "sparse_attention": "",
    "quantize_training": QUANTIZED_MODEL,
    "eigenvalue": "",
    "progressive_layer_drop": "",
    "graph_harvesting": "",
    "nebula": "",
    "zero_optimization.mics_shard_size": MICS,
    "zero_optimization.mics_hierarchical_params_gather": MICS,
    "zero_optimization.zeropp_loco_param": "; zero_quantized_gradients works without it",
}
# what DeepSpeed 0.19.8 reads from the first level of its config; it drops other keys in silence
KNOWN = """
activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger
communication_data_type compile csv_monitor data_efficiency data_types dataloader_drop_last
datastates_ckpt disable_allgather disable_python_gc dump_state expert_parallel flops_profiler fp16
gradient_accumulation_steps gradient_allreduce_op gradient_clipping gradient_predivide_factor
hybrid_engine log_level managed_gradient_accumulation memory_breakdown optimizer pipeline
prescale_gradients scheduler seq_parallel_communication_data_type steps_per_print tensor_parallel
tensorboard timers torch_autocast train_batch_size train_micro_batch_size_per_gpu
use_data_before_expert_parallelism vocabulary_size wall_clock_breakdown wandb weight_quantization
zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
"""
OF_ZERO3 = ("stage3_", "zero_hpz", "zero_quantized")
QUANTIZED = ("weights", "nontrainable_weights", "gradients")  # zero_quantized_...
# optimizers that DeepSpeed has removed. Without this check, their names would be looked up in
# torch.optim.
ONE_BIT = ("onebitadam", "zerooneadam", "onebitlamb")
LESS_TRAFFIC = (
    "examples/causal_lm_full_ddp_compressed.py sends fewer bytes per update under DDP, and "
    "configs/zero3_plus.yaml under ZeRO-3 on GPUs"
)
DEEPSPEED_OPTIMIZERS = "Adam AdamW Adagrad Lamb Lion MuAdam MuAdamW MuSGD Muon".split()
# schedule -> the key that holds its highest rate; None: that of the optimizer
SCHEDULES = {
    "WarmupLR": "warmup_max_lr",
    "WarmupDecayLR": "warmup_max_lr",
    "WarmupCosineLR": None,
    "OneCycle": "cycle_max_lr",
    "LRRangeTest": "lr_range_test_min_lr",
}
FILLED = {  # "auto" values that accelerate fills from DummyOptim and DummyScheduler
    "optimizer": {"lr", "weight_decay"},
    "scheduler": {"warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"},
}
OF_ADAM = ("adam_w_mode", "fp32_optimizer_states")  # params that DeepSpeed takes out for Adam
SCRIPT = {}  # what check_deepspeed was given, for a dict that the script passes later


def check_deepspeed(config, precision, optimizer_in_config):
    """Stop if the launch config contradicts itself, the machine or the script.

    Args:
        config: the script's Config.
        precision: the launched mixed precision.
        optimizer_in_config: whether the script takes optimizer and scheduler from DeepSpeed's
            config.
    """
    SCRIPT.update(config=config, optimizer_in_config=optimizer_in_config)
    if importlib.util.find_spec("deepspeed") is None:
        refuse(
            "the launch config asks for DeepSpeed, which is not installed: pip install deepspeed"
        )
    if str(launch_config().get("use_cpu")).lower() == "true" and torch.cuda.is_available():
        refuse(
            "the launch config says use_cpu: true, which accelerate ignores with DeepSpeed: set it "
            "to false"
        )
    if precision == "no" and config.dtype != "float32":
        refuse(
            f"--dtype {config.dtype} under DeepSpeed needs mixed precision: launch with "
            "`accelerate launch --mixed_precision`, bf16 or fp16"
        )
    os.environ[FIELDS] = ""  # accelerate refuses even equal values; they are compared below
    told = {key: os.environ.get(f"ACCELERATE_{key.upper()}") for key in OWN.values()}
    compare_numbers("the launch config", told)
    culprit, content = deepspeed_file()
    if content:
        check_content(culprit, content)
    elif optimizer_in_config:
        refuse(
            "the launch config names no optimizer and no scheduler for DeepSpeed: launch with "
            "configs/zero2_optimizer.yaml"
        )


def check_plugin(plugin):
    """Stop if the DeepSpeedPlugin of a script contradicts the launch config or the script.

    What the script has checked for the launch must also be true of the plugin: stage, offload and
    precision.
    """
    culprit, content = "the DeepSpeedPlugin of the script", plugin.deepspeed_config
    strategy, launched = f"zero{plugin.zero_stage}", launched_strategy()
    if strategy != launched:
        refuse(
            f"{culprit} asks for {strategy}, and the script was launched with {launched}: launch "
            "with a config of that stage, or change the stage"
        )
    if file := deepspeed_file()[0]:
        refuse(f"{culprit} and {file} are two configs for DeepSpeed: remove one of them")
    offload = get(content, "zero_optimization.offload_optimizer.device", "none")
    if offload != deepspeed_settings()["optimizer"]:
        refuse(
            f"{culprit} offloads the optimizer to {offload}, and the launch config to "
            f"{deepspeed_settings()['optimizer']}: make them the same"
        )
    for precision in ("fp16", "bf16"):
        if is_enabled(content.get(precision)) and launched_precision() != precision:
            refuse(f"{culprit} enables {precision}: launch with `--mixed_precision {precision}`")
    if SCRIPT:  # set by read_settings
        check_content(culprit, content)


def check_content(culprit, content):
    """Stop if a DeepSpeed config cannot run or contradicts the launch; print what has no effect.

    Args:
        culprit: where the config is from, to begin a sentence with.
        content: the config, a dict.
    """
    zero = content["zero_optimization"]
    known = check_keys(culprit, content)
    compare_places(culprit, zero)
    check_precision(culprit, content)
    if "activation_checkpointing" in content:
        refuse(
            f"activation_checkpointing of {culprit} has no effect on models of Hugging Face: "
            "remove it, and give --gradient_checkpointing"
        )
    check_optimizer_blocks(culprit, content)
    check_zero_plus_plus(culprit, known)
    compare_numbers(culprit, content)
    idle = {key: "DeepSpeed does not know it" for key in content if key not in KNOWN.split()}
    if content.get("steps_per_print", math.inf) != math.inf:  # accelerate's own value
        idle["steps_per_print"] = "accelerate turns it off"
    if "allgather_bucket_size" in zero:
        idle["allgather_bucket_size"] = "torch gathers all parameters in one collective"
    if zero.get("stage") in (0, 1, 2):
        idle |= {key: "only ZeRO-3 reads it" for key in zero if key.startswith(OF_ZERO3)}
    for key, reason in idle.items():
        say(f"{key} of {culprit} has no effect: {reason}.")


def get(content, path, default=None):
    """Return the value at a path such as "offload_param.device"."""
    for name in path.split("."):
        content = content.get(name) if isinstance(content, dict) else None
    return default if content is None else content


def check_keys(culprit, content):
    """Stop if a config has keys that DeepSpeed has removed or does not know, or wrong values.

    Returns zero_optimization with its defaults, as DeepSpeed reads it.
    """
    zero = content["zero_optimization"]
    for key, remedy in REMOVED.items():
        if key.removeprefix(ZERO) in (zero if key.startswith(ZERO) else content):
            refuse(f"{culprit} has {key}, which DeepSpeed has removed: remove it{remedy}")
    for part in ("optimizer", "param"):
        old = "cpu_offload" if part == "optimizer" else "cpu_offload_param"
        if zero.get(old):
            refuse(
                f'{culprit} has {old}, which accelerate does not read: write "offload_{part}": '
                '{"device": "cpu"}'
            )
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # takes seconds
    from pydantic import ValidationError

    logger = logging.getLogger("DeepSpeed")
    logger.disabled = True  # it names older keys again when the engine reads the config
    try:
        known = DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        refuse(f"{culprit} has {ZERO}{place} {first['input']!r}: {first['msg']}")
    except AssertionError as error:  # an old key beside the one that has replaced it
        refuse(f"{culprit} has a wrong zero_optimization: {first_line(error)}")
    finally:
        logger.disabled = False
    if zero.get("stage") in (1, 2) and known.allgather_bucket_size % 2:
        refuse(f"{culprit} has allgather_bucket_size {known.allgather_bucket_size}: make it even")
    return known


def compare_places(culprit, zero):
    """Stop if the YAML file or a flag of accelerate contradicts a DeepSpeed config."""
    yaml, pairs, keys = launch_config().get("deepspeed_config") or {}, [], []
    for key, (place, default) in PLACES.items():
        variable = f"ACCELERATE_DEEPSPEED_{key.upper()}"
        told, value = os.environ.get(variable, yaml.get(key)), get(zero, place, default)
        if told is not None and value != "auto" and str(told).lower() != str(value).lower():
            pairs.append(f"{key} {told} and {place} {value}")
            keys.append(key)
    if pairs:
        refuse(
            f"the launch config and {culprit} contradict each other: {', '.join(pairs)}: make them "
            f"the same, or remove {', '.join(keys)} from the launch config"
        )


def compare_numbers(culprit, told):
    """Print the numbers of a launch config for which the script has flags of its own."""
    config = SCRIPT["config"]
    flags = {OWN[flag]: (flag, value) for flag, value in vars(config).items() if flag in OWN}
    size = int(os.environ.get("WORLD_SIZE", 1))
    for flag in ("gradient_accumulation_steps", "per_device_train_batch_size"):
        size *= vars(config).get(flag, 1)
    flags["train_batch_size"] = ("per_device_train_batch_size", size)
    for key, (flag, value) in flags.items():
        if told.get(key) not in (None, "auto") and not is_equal(told[key], value):
            say(
                f"{key} {told[key]} of {culprit} is not used: --{flag} of the script "
                f"sets it to {value}."
            )


def is_equal(told, value):
    """Return whether the value in a config, of any type, equals this number."""
    try:
        return float(told) == value
    except (TypeError, ValueError):
        return False


def check_precision(culprit, content):
    """Stop if a DeepSpeed config asks for two precisions, or for another than the launcher."""
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


def check_zero_plus_plus(culprit, zero):
    """Stop if what ZeRO++ adds to ZeRO-3 does not run on these processes."""
    on = [key for key in (f"zero_quantized_{part}" for part in QUANTIZED) if getattr(zero, key)]
    if on and not uses_gpu():
        refuse(
            f"{culprit} has {', '.join(on)}, which DeepSpeed computes on a GPU only: use "
            "configs/zero3_hpz.yaml, the part of ZeRO++ that runs on CPUs, too"
        )
    size, processes = zero.zero_hpz_partition_size, int(os.environ.get("WORLD_SIZE", 1))
    if size > 1 and processes % min(size, processes):
        refuse(
            f"{culprit} has zero_hpz_partition_size {size}, which does not divide {processes} "
            "processes: set it to the number of GPUs per node"
        )


def check_optimizer_blocks(culprit, content):
    """Stop if optimizer and scheduler of a DeepSpeed config are not for this script, or unknown.

    Prints which numbers of the config decide instead of a flag of the script.
    """
    blocks = {name: content[name] for name in ("optimizer", "scheduler") if name in content}
    for name, block in blocks.items():
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            refuse(f'{culprit} has {name} {block!r}: write {{"type": NAME, "params": {{...}}}}')
    optimizer = get(content, "optimizer.type", "")
    if optimizer.lower() in ONE_BIT:
        refuse(f"{culprit} asks for {optimizer}, which DeepSpeed has removed: {LESS_TRAFFIC}")
    if blocks and not SCRIPT["optimizer_in_config"]:
        refuse(
            f"{culprit} has {' and '.join(blocks)}, and this script has its own: remove them, or "
            f"run {LESSON}, which takes both from the config"
        )
    if not SCRIPT["optimizer_in_config"]:
        return
    if missing := {"optimizer", "scheduler"} - {*blocks}:
        refuse(
            f"{culprit} has no {' and no '.join(sorted(missing))}: start from "
            "configs/deepspeed/zero2_optimizer.json"
        )
    known = [name.lower() for name in DEEPSPEED_OPTIMIZERS]
    found = getattr(torch.optim, optimizer, None)
    is_torch = inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)
    if optimizer.lower() not in known and not is_torch:
        refuse(
            f"{culprit} asks for the optimizer {optimizer}: choose one of "
            f"{', '.join(DEEPSPEED_OPTIMIZERS)}, or a class of torch.optim"
        )
    check_optimizer_params(culprit, content, found if is_torch else None)
    check_schedule(culprit, content)


def check_optimizer_params(culprit, content, optimizer):
    """Stop if AdamW or an optimizer of torch does not take the params of a DeepSpeed config.

    Args:
        optimizer: a class of torch.optim; None if torch has none of that name.
    """
    name, params = content["optimizer"]["type"], {**get(content, "optimizer.params", {})}
    if name.lower() in ("adam", "adamw"):
        from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam  # takes seconds

        is_torch = params.pop("torch_adam", False)
        offloads = get(content, "zero_optimization.offload_optimizer.device", "none") != "none"
        optimizer = DeepSpeedCPUAdam if offloads else FusedAdam
        optimizer = torch.optim.AdamW if is_torch else optimizer
        params = {key: params[key] for key in params if key not in OF_ADAM}
        if optimizer is FusedAdam:
            say(
                f"{culprit} asks for {name}: FusedAdam, which DeepSpeed compiles in the first run. "
                '"torch_adam": true in its params is the AdamW of torch instead.'
            )
    if optimizer is not None:
        bind(f"{culprit} has wrong params for {optimizer.__name__}", optimizer, params)


def bind(culprit, function, params):
    """Return the arguments of a call with a first argument and these; stop if they do not fit."""
    try:
        plan = inspect.signature(function).bind(None, **params)
    except TypeError as error:
        refuse(f"{culprit}: {first_line(error)}")
    plan.apply_defaults()
    return plan.arguments


def check_schedule(culprit, content):
    """Stop if the scheduler of a DeepSpeed config is unknown or lacks a parameter."""
    name = content["scheduler"]["type"]
    if name not in SCHEDULES:
        refuse(f"{culprit} asks for the scheduler {name}: choose one of {', '.join(SCHEDULES)}")
    params = {part: get(content, f"{part}.params", {}) for part in FILLED}
    for part, fillable in FILLED.items():
        for key, value in params[part].items():
            if value == "auto" and key not in fillable:
                refuse(f'{culprit} has {part}.params.{key} "auto", which nothing fills: set it')
    from deepspeed.runtime import lr_schedules  # takes seconds

    schedule = getattr(lr_schedules, name)
    plan = bind(f"{culprit} has wrong params for {name}", schedule, params["scheduler"])
    config = SCRIPT["config"]
    rate = plan.get(SCHEDULES[name]) if SCHEDULES[name] else None
    rate = params["optimizer"].get("lr", 0.001) if rate is None else rate
    decay = params["optimizer"].get("weight_decay", "the optimizer's default")
    warmup = plan.get("warmup_num_steps", 0)
    used = {
        "learning_rate": (f"the learning rate of {name} is {rate}", rate, config.learning_rate),
        "weight_decay": (f"the weight decay is {decay}", decay, config.weight_decay),
        "warmup_ratio": (f"the warmup of {name} takes {warmup} updates", warmup, None),
    }
    for flag, (told, value, of_flag) in used.items():
        if value != "auto" and not is_equal(value, of_flag):
            say(f"{culprit}: {told}. --{flag} {vars(config)[flag]} of the script is not used.")
