"""Run what the launch config asks for, with GPUs or without.

`accelerate launch` with a DeepSpeed, FSDP or multi-GPU config silently runs separate
single-process jobs on a machine without a GPU. Each of them believes that it is alone. The
libraries can do better: DeepSpeed, FSDP and DDP all run on CPU processes with gloo, if the process
group exists before the Accelerator is created. `start_accelerator` creates it.
"""

import dataclasses
import gc
import importlib
import os
import sys
import warnings
from functools import partial

import accelerate
import torch
import transformers
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, GradientAccumulationPlugin, gather_object
from datasets import disable_progress_bars
from torch.distributed import DistNetworkError
from transformers.integrations import is_deepspeed_zero3_enabled

from utils.deepspeed_checks import check_plugin
from utils.environment import FIELDS, uses_gpu
from utils.environment import launched_precision as launched_precision  # chat_sft takes these
from utils.environment import launched_strategy as launched_strategy
from utils.environment import shards_parameters as shards_parameters
from utils.errors import first_line, refuse
from utils.experts import allow_skipping
from utils.generation import generating as generating  # lessons take it from here
from utils.heartbeat import start_heartbeat
from utils.nvme import fit_nvme, start_nvme
from utils.process_group import end_with_launcher, join_group, use_all_cores
from utils.sharded_loading import load_sharded as load_sharded  # lessons take it from here
from utils.sharded_loading import shard_from_files
from utils.traffic import compress_gradients as compress_gradients  # a lesson takes it from here

BUCKET = 500_000_000  # DeepSpeed's default for its two bucket sizes, in elements
# What was imported until now stays until the end: collections of garbage, of which each phase of
# the memory tracker makes two, need not search it.
gc.freeze()


# The Accelerator ----------------------------------------------------------------------------------
def start_accelerator(
    gradient_accumulation_steps=1, tf32=False, deterministic=False, **kwargs
) -> Accelerator:
    """Return an `accelerate.Accelerator`, running the launched strategy on GPUs or CPUs.

    What it does, in this order:

    1. silence warnings and progress bars that are of no use to the user;
    2. set what CUDA reads when it starts: deterministic kernels, expandable memory segments;
    3. ask the system to end this process when its launcher dies;
    4. set TF32, and divide the CPU's cores among the processes, if there is a GPU;
    5. create the process group: on the process's own GPU, or with gloo on CPUs;
    6. create the Accelerator, and check that it runs as many processes as were launched;
    7. start a heartbeat between several machines, which ends the run if one is lost;
    8. keep FSDP's mixed precision from rounding gradients, buffers and the loss;
    9. check the path of an offload to NVMe, and give the run a folder there (utils/nvme.py);
    10. build DeepSpeed's CPU Adam if the optimizer is offloaded; if that fails, use torch's AdamW.

    Prints what really runs, read from the Accelerator.

    Args:
        gradient_accumulation_steps: micro-batches per update. The end of a loader does not end an
            update early, because the loaders of the scripts hold all epochs.
        tf32: let GPUs multiply float32 matrices in TF32, with 10 bits of mantissa instead of 23.
        deterministic: only use operations that give the same bits in every run. A GPU is slower
            then, and an operation without such a variant raises RuntimeError
            (torch.use_deterministic_algorithms).
        kwargs: further arguments of Accelerator. A `deepspeed_plugin` with a config of its own is
            checked like the launch config.

    Raises:
        RuntimeError: the Accelerator runs on a different number of processes than were launched.
    """
    quiet_libraries()
    if plugin := kwargs.get("deepspeed_plugin"):
        check_plugin(plugin)
    # accelerate refuses a DeepSpeed config beside this key, which its own launcher asks for
    fields = [key for key in os.environ.get(FIELDS, "").split(",") if key != "mixed_precision"]
    os.environ[FIELDS] = ",".join(fields)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    # reduces fragmentation when batches differ in length
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the name until torch 2.9
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    end_with_launcher()
    threads, turned_off = 0, []
    if uses_gpu():
        threads = use_all_cores()
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    if "LOCAL_RANK" in os.environ:
        try:
            turned_off = join_group()
        except DistNetworkError as error:
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            refuse(
                f"no process group at {address}: {first_line(error)}; launch with another port, or "
                "check the address"
            )
    accumulation = GradientAccumulationPlugin(
        gradient_accumulation_steps, sync_with_dataloader=False
    )
    try:
        accelerator = Accelerator(gradient_accumulation_plugin=accumulation, **kwargs)
    except (ValueError, NotImplementedError, ImportError) as error:
        refuse(f"accelerate cannot run the launch config, change it: {first_line(error)}")
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != launched:
        raise RuntimeError(
            f"{launched} processes were launched, but accelerate runs {accelerator.num_processes}"
        )
    start_heartbeat()
    if accelerator.distributed_type == DistributedType.FSDP:
        keep_float32(accelerator.state.fsdp_plugin)
        find_tied_weights()
    if plugin := accelerator.deepspeed_plugin:
        # accelerate reads the batch size from the loader; a file's own would contradict it
        batch = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu"), "auto")
        plugin.deepspeed_config |= batch | {"gradient_accumulation_steps": accumulation.num_steps}
        start_nvme(accelerator)
        plugin.set_deepspeed_weakref()  # zero.Init reads it while the model loads
    if offloads_optimizer(accelerator) and (reason := cpu_adam_failure(accelerator)):
        accelerator.deepspeed_plugin.deepspeed_config["zero_force_ds_cpu_optimizer"] = False
        accelerator.print(
            "DeepSpeedCPUAdam cannot be built: install a C++ compiler and Python's headers (g++, "
            f"python3-dev). torch.optim.AdamW is used instead, with the same losses. [{reason}]"
        )
    if turned_off:
        accelerator.print(f"Turned off, because FSDP needs GPUs for it: {', '.join(turned_off)}.")
    accelerator.print(describe(accelerator))
    if threads:
        accelerator.print(f"CPU threads per process: {threads} (OMP_NUM_THREADS is unset).")
    if hint := precision_hint(accelerator.device.type, accelerator.mixed_precision, tf32):
        accelerator.print(hint)
    return accelerator


def quiet_libraries():
    """Turn off progress bars, and warnings about how libraries call each other."""
    # names that torch and transformers deprecate, used by deepspeed 0.19 and by peft 0.21
    deprecated = r"`torch\.distributed\.\w+` is deprecated"
    warnings.filterwarnings("ignore", deprecated, FutureWarning)
    deprecated = "`is_gradient_checkpointing` is deprecated"
    warnings.filterwarnings("ignore", deprecated, FutureWarning)
    # peft warns when tied layers are trained in full: they are untied, and the file holds both
    tied = "Model has `tie_word_embeddings=True` and a tied layer is part of"
    warnings.filterwarnings("ignore", tied, UserWarning)
    disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found none
        if "bitsandbytes" in sys.modules:
            # On CPUs with AVX512-BF16 it would repack 4-bit weights in place, less exactly.
            sys.modules["bitsandbytes.nn.modules"].has_avx512bf16 = lambda: False


def keep_float32(plugin):
    """Keep FSDP's mixed precision from rounding what must stay in float32.

    accelerate's policy rounds gradients while they are reduced; under FSDP1 it also rounds buffers
    (the frequencies of the rotary embedding), and under FSDP2 the output (the loss).
    """
    policy = plugin.mixed_precision_policy
    if policy is None:
        return
    is_fsdp1 = hasattr(policy, "buffer_dtype")
    kept = {"buffer_dtype": torch.float32} if is_fsdp1 else {"output_dtype": None}
    policy = dataclasses.replace(policy, reduce_dtype=torch.float32, **kept)
    plugin.mixed_precision_policy = policy


def find_tied_weights():
    """Let accelerate look for tied weights under FSDP1 in the model inside of a PeftModel.

    It takes their names from that model, looks in the wrapper, and so fails for Marian.
    """
    retied = accelerate.accelerator.ensure_weights_retied

    def ensure_weights_retied(param_init_fn, model, device):
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        return retied(param_init_fn, inner, device)

    accelerate.accelerator.ensure_weights_retied = ensure_weights_retied


def offloads_optimizer(accelerator):
    """Return whether DeepSpeed offloads the optimizer states."""
    plugin, key = accelerator.deepspeed_plugin, "zero_optimization.offload_optimizer.device"
    return plugin is not None and plugin.get_value(key, "none") != "none"


def cpu_adam_failure(accelerator):
    """Compile DeepSpeed's CPU Adam (once, about a minute) or load it.

    Returns why a process could not, or None.
    """
    from deepspeed.ops.op_builder import CPUAdamBuilder

    with accelerator.local_main_process_first():  # one compiles, the others load
        try:
            CPUAdamBuilder().load(verbose=False)
            reason = None
        except Exception as error:  # whatever a compiler, a linker or their absence raises
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:80]
    return next(filter(None, gather_object([reason])), None)


def describe(accelerator):
    """Return one sentence that says what really runs, read from the Accelerator."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        config = accelerator.deepspeed_plugin.hf_ds_config
        strategy = f"DeepSpeed ZeRO stage {accelerator.deepspeed_plugin.zero_stage}"
        for part in ("param", "optimizer"):
            device = config.get_value(f"zero_optimization.offload_{part}.device", "none")
            strategy += f", {part} offload to {device}" if device != "none" else ""
        size = config.get_value("zero_optimization.zero_hpz_partition_size", 1)
        strategy += f", parameters also sharded in groups of {size}" if size != 1 else ""
        for part in ("weights", "nontrainable_weights", "gradients"):
            is_on = config.is_true(f"zero_optimization.zero_quantized_{part}")
            strategy += f", quantized {part.replace('_', ' ')}" if is_on else ""
    elif accelerator.distributed_type == DistributedType.FSDP:
        strategy = f"FSDP version {accelerator.state.fsdp_plugin.fsdp_version}"
    elif accelerator.distributed_type == DistributedType.NO:
        strategy = "no distribution"
    else:
        strategy = "DistributedDataParallel"
    is_group = torch.distributed.is_initialized()
    backend = torch.distributed.get_backend() if is_group else "no"
    count = accelerator.num_processes
    processes = "1 process" if count == 1 else f"{count} processes"
    device = accelerator.device.type
    precision = accelerator.mixed_precision
    told = "" if precision == "no" else f", {precision} mixed precision"
    return f"Running {strategy} on {processes}, {device} device, {backend} backend{told}."


def precision_hint(device, mixed_precision, tf32):
    """Return a line that names a faster precision, or "" where there is nothing to say."""
    if tf32 and device != "cuda":
        return "--tf32: unused without a GPU."
    if device == "cuda" and mixed_precision == "no" and not tf32:
        return (
            "No mixed precision and no TF32: float32 matrix products are slow on a GPU. Launch "
            "with --mixed_precision bf16, or give the script --tf32."
        )
    return ""


# Between the Accelerator and `prepare` ------------------------------------------------------------
def configure_deepspeed(accelerator, config, model, **settings):
    """Write the script's settings into DeepSpeed's config before `prepare`.

    DeepSpeed accumulates and clips by its own config, not by accelerate's. The numbers of the
    launch config are replaced (`check_launch` has named them). Also lowers two bucket sizes to the
    number of trainable parameters. Every GPU holds a buffer of `reduce_bucket_size` elements, by
    default 5e8 elements (2 GB in float32), even for a small adapter. DeepSpeed reads
    `allgather_bucket_size` only where torch cannot gather into one tensor. A number in a config of
    the user is kept. `shard_4bit_model` and `allow_skipping` are called if needed.

    Args:
        config: its gradient_accumulation_steps and max_grad_norm are read.
        model: with its trainable parameters, sharded by zero.Init or not.
        settings: further keys of DeepSpeed's config.
    """
    allow_skipping(accelerator, model)
    if accelerator.deepspeed_plugin is None:
        return
    deepspeed_config = accelerator.deepspeed_plugin.deepspeed_config
    deepspeed_config.update(
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        gradient_clipping=config.max_grad_norm,
        **settings,
    )
    fit_nvme(accelerator, model)
    is_4bit = any(getattr(layer, "quant_state", None) is not None for layer in model.modules())
    if is_4bit and accelerator.deepspeed_plugin.zero_stage == 3:
        shard_4bit_model(accelerator, model)
    elif accelerator.deepspeed_plugin.zero_stage == 3:
        shard_from_files(accelerator, model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in trainable)
    even = total + total % 2  # even, as ZeRO-1 and 2 require of allgather_bucket_size
    for key in ("reduce_bucket_size", "allgather_bucket_size"):
        deepspeed_config["zero_optimization"].setdefault(key, min(BUCKET, even))


OPTIMIZERS = {
    "adamw_torch": "torch.optim.AdamW",
    "adamw_8bit": "bitsandbytes.optim.AdamW8bit",
    "paged_adamw_8bit": "bitsandbytes.optim.PagedAdamW8bit",
    "paged_adamw_32bit": "bitsandbytes.optim.PagedAdamW32bit",
}


def state_bytes(name):
    """Return the bytes of a checkpoint per trainable parameter: its value and AdamW's two means."""
    return 4 + 2 * (1 if name.endswith("8bit") else 4)


def adamw(name):
    """Return the class of an AdamW, by the name that transformers gives it.

    The 8-bit and the paged ones are from bitsandbytes. All take the arguments of torch.optim.AdamW:
    parameters, lr, weight_decay. On a GPU torch's own runs as one kernel (`fused`). Paged states
    move to the CPU while the GPU is full; without a GPU they are not paged.
    """
    if name == "adamw_torch":
        return partial(torch.optim.AdamW, fused=PartialState().device.type == "cuda")
    module, _, class_name = OPTIMIZERS[name].rpartition(".")
    return getattr(importlib.import_module(module), class_name)


def device_map():
    """Return the `device_map` for `from_pretrained`, which decides where it loads the weights.

    It is the process's own device if that holds the full model. It is None under FSDP and
    ZeRO-3, which shard the weights before they move them.
    """
    if is_deepspeed_zero3_enabled() or os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return None
    return {"": PartialState().device}


def move_quant_states(model, device):
    """Move the scales and code books of 4-bit weights to the device that computes.

    They are not parameters, so FSDP and ZeRO-3 do not shard or offload them. Every GPU holds all of
    them, 1/16 byte per weight, or 1/64 with nested quantization.
    """
    for layer in model.modules():
        if getattr(layer, "quant_state", None) is not None:
            layer.quant_state.to(device)


def shard_4bit_model(accelerator, model):
    """Shard a 4-bit model on the CPU with ZeRO-3's `zero.Init`, before `accelerator.prepare`.

    Each parameter in turn is moved to the GPU, broadcast by the first process and sliced. Without
    this, DeepSpeed's engine moves the full model to every GPU before it shards it. Collective.
    """
    import deepspeed
    from transformers.integrations.deepspeed import deepspeed_config

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    half = dtypes.get(accelerator.mixed_precision)
    for weight in model.parameters():
        # packed weights already have this dtype (check_quantization); a cast would destroy them
        if half is not None and weight.is_floating_point():
            weight.data = weight.data.to(half)  # the engine does not cast sharded parameters
    # undoes unset_hf_deepspeed_config: transformers must know that ZeRO-3 is on
    accelerator.deepspeed_plugin.set_deepspeed_weakref()
    deepspeed.zero.Init(module=model, config_dict_or_path=deepspeed_config())
    for layer in model.modules():
        for name, buffer in layer.named_buffers(recurse=False):
            setattr(layer, name, buffer.to(accelerator.device))
    move_quant_states(model, accelerator.device)
