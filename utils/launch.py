"""Start an Accelerator that runs what the launch config asks for, with a GPU or without.

`accelerate launch` with a DeepSpeed, FSDP or multi-GPU config runs separate single-process jobs, in silence, on a
machine without a GPU: each of them believes that it is alone. The libraries themselves can do better: DeepSpeed, FSDP
and DDP all run on CPU processes over gloo, once the process group is there before the Accelerator is made.

This file imports no other file of the project and can be copied along with a script.
"""

import ctypes
import dataclasses
import os
import signal
import sys
import warnings
from datetime import timedelta
from functools import cache, partial
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, gather_object, parse_flag_from_env
from datasets import disable_progress_bars
from torch.distributed import distributed_c10d
from transformers.integrations import is_deepspeed_zero3_enabled


PR_SET_PDEATHSIG = 1  # of Linux' prctl: the signal that a process gets when its parent dies
# How long a collective waits for the other processes. NCCL's default is 10 minutes and gloo's 30,
# but one process may tokenize, save or hash for longer than that.
TIMEOUT = timedelta(hours=6)
BUCKET = 500_000_000  # DeepSpeed's default for reduce_bucket_size, in elements


def start_accelerator(tf32=False, deterministic=False, **kwargs):
    """Return `accelerate.Accelerator(**kwargs)`, running the launched strategy also where there is no GPU.

    Prints one line that says what really runs, read from the Accelerator: strategy, processes, device, backend.

    Args:
        tf32: let GPUs multiply float32 matrices in TF32, with 10 bits of mantissa in place of 23.
        deterministic: only use operations that give the same bits in every run. A GPU is slower
            then, and an operation without such a variant raises RuntimeError
            (torch.use_deterministic_algorithms).

    Raises:
        RuntimeError: the Accelerator runs another number of processes than were launched, as happens when a
            strategy was dropped in silence.
    """
    # names that torch and transformers deprecate, called by deepspeed 0.19 in every collective and by peft 0.21
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    # peft's, where both of two tied layers are trained whole: they part, and the file holds both
    warnings.filterwarnings(
        "ignore", "Model has `tie_word_embeddings=True` and a tied layer is part of", UserWarning
    )
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    # against fragmentation when packed rows differ in length; read when CUDA starts
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the name until torch 2.9
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    disable_progress_bars()  # of datasets and of transformers: the one bar is that of the training
    transformers.utils.logging.disable_progress_bar()
    # both set by `accelerate launch`, the first for one process, too
    if {"ACCELERATE_DYNAMO_BACKEND", "LOCAL_RANK"} & set(os.environ) and sys.platform == "linux":
        ctypes.CDLL(None).prctl(
            PR_SET_PDEATHSIG, signal.SIGTERM
        )  # a launcher that is killed leaves no process behind
    use_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    use_fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if use_deepspeed:
        # DeepSpeed builds its extensions with ninja, which lies beside python in an environment that is not activated
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # for groups that libraries make later: DeepSpeed's copy of the world, the meshes of hybrid FSDP
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = TIMEOUT
    turned_off = []
    if not torch.cuda.is_available():
        os.environ.setdefault(
            "DS_ACCELERATOR", "cpu"
        )  # said here, DeepSpeed need not warn that it found none
        if (
            "bitsandbytes" in sys.modules
        ):  # some CPUs would repack 4-bit weights to answer, in place and coarser
            sys.modules["bitsandbytes.nn.modules"].has_avx512bf16 = lambda: False
    on_gpu = uses_gpu()
    threads = use_all_cores() if on_gpu else 0
    if on_gpu:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    if on_gpu and "LOCAL_RANK" in os.environ:
        join_group_on_gpu(use_deepspeed)
    elif "LOCAL_RANK" in os.environ:
        if use_deepspeed:
            import cpuinfo
            import deepspeed.ops

            # DeepSpeed calls this several times, and each call is slow
            cpuinfo.get_cpu_info = cache(cpuinfo.get_cpu_info)
            # an optional extension for CPU collectives that takes longer to compile than a small run takes in all
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            PartialState(backend="gloo", timeout=TIMEOUT)
        elif use_fsdp:
            turned_off = turn_off_gpu_settings()
            state = PartialState(backend="gloo", timeout=TIMEOUT)
            state.distributed_type = DistributedType.MULTI_GPU  # what accelerate makes FSDP from
        else:
            PartialState(cpu=True, backend="gloo", timeout=TIMEOUT)

    accelerator = Accelerator(**kwargs)
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != launched:
        raise RuntimeError(
            f"{launched} processes were launched, but accelerate runs {accelerator.num_processes}"
        )
    if use_fsdp and (policy := accelerator.state.fsdp_plugin.mixed_precision_policy) is not None:
        # accelerate's rounds to bf16 or fp16 what must not be: gradients on their way, the rotary embedding's
        # frequencies (a buffer) under version 1, and the loss (an output) under version 2
        kept = (
            {"buffer_dtype": torch.float32}
            if hasattr(policy, "buffer_dtype")
            else {"output_dtype": None}
        )
        policy = dataclasses.replace(policy, reduce_dtype=torch.float32, **kept)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    if offloads_optimizer(accelerator) and (reason := cpu_adam_failure(accelerator)):
        accelerator.deepspeed_plugin.deepspeed_config["zero_force_ds_cpu_optimizer"] = False
        accelerator.print(
            "DeepSpeedCPUAdam cannot be built here: install a C++ compiler and Python's headers (g++, python3-dev). "
            f"torch.optim.AdamW does its steps, with the same losses. [{reason}]"
        )
    if turned_off:
        accelerator.print(f"Turned off, for FSDP knows them only on GPUs: {', '.join(turned_off)}.")
    accelerator.print(describe(accelerator))
    if threads:
        accelerator.print(f"CPU threads per process: {threads} (OMP_NUM_THREADS was 1 or unset).")
    if hint := precision_hint(accelerator.device.type, accelerator.mixed_precision, tf32):
        accelerator.print(hint)
    return accelerator


def uses_gpu():
    """Return whether this process runs on a GPU: there is one, and no `use_cpu` in the config."""
    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


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


def join_group_on_gpu(use_deepspeed):
    """Set the process's GPU, then make the process group; accelerate finds both.

    Without this order FSDP's plugin asks for the current device too early, and every process starts
    CUDA on GPU 0. The environment variable TESTS_GPU_BACKEND is for tests: with gloo, two processes
    that are launched as two machines can share one GPU, which NCCL refuses.
    """
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    options = {"timeout": TIMEOUT}
    if backend := os.environ.get("TESTS_GPU_BACKEND"):
        options["backend"] = backend
    elif not use_deepspeed:  # DeepSpeed sets device_id itself; with it NCCL connects at once
        options["device_id"] = torch.device("cuda", rank)
    PartialState(**options)


def use_all_cores():
    """Share the machine's cores among its processes.

    `accelerate launch` gives every process one thread (OMP_NUM_THREADS=1), unless the user set
    another number. With a GPU the CPU's threads pack 4-bit weights and do the optimizer's steps in
    offload. Returns the number of threads, or 0 where the user's stays.
    """
    if os.environ.get("OMP_NUM_THREADS", "1") != "1":
        return 0
    threads = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for CPU Adam, which brings its own OpenMP
    torch.set_num_threads(threads)
    return threads


def size_buckets(accelerator, trained):
    """Make DeepSpeed's buffer for gradients as large as all trained gradients, if that is smaller.

    ZeRO-3 allocates `reduce_bucket_size` elements on every GPU: 5e8 by default, 1 to 2 GB, also for
    a small adapter. A number in the user's own deepspeed_config_file stays. Call it before
    `prepare`.

    Args:
        trained: the trained parameters, sharded by zero.Init or not.
    """
    if accelerator.deepspeed_plugin is not None:
        total = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in trained)
        settings = accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]
        even = total + total % 2  # to be safe: ZeRO-1 and 2 assert it of another bucket
        settings.setdefault("reduce_bucket_size", min(BUCKET, even))


def adamw(name):
    """Return the class of an AdamW, by the name that transformers gives it; those in few bits are bitsandbytes'.

    Its arguments are those of torch.optim.AdamW: parameters, lr, weight_decay. On a GPU torch's own
    does a step in one kernel (`fused`). Paged states move to the CPU while the GPU is full; without
    a GPU they are not paged.
    """
    if name == "adamw_torch":
        return partial(torch.optim.AdamW, fused=PartialState().device.type == "cuda")
    import bitsandbytes

    classes = {
        "adamw_8bit": "AdamW8bit",
        "paged_adamw_8bit": "PagedAdamW8bit",
        "paged_adamw_32bit": "PagedAdamW32bit",
    }
    return getattr(bitsandbytes.optim, classes[name])


def device_map():
    """Return the `device_map` with which `from_pretrained` loads weights to where they are needed.

    The process's own device where it holds the whole model. None under FSDP and ZeRO-3, which shard
    the weights before they move them.
    """
    if is_deepspeed_zero3_enabled() or os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return None
    return {"": PartialState().device}


def move_quant_states(model, device):
    """Move the scales and code books of 4-bit weights to the device that computes.

    They are not parameters, so FSDP and ZeRO-3 do not shard or offload them: every GPU holds all of
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

    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    for weight in model.parameters():
        # packed weights already have this dtype (check_quantization); a cast would destroy them
        if half is not None and weight.is_floating_point():
            weight.data = weight.data.to(half)  # the engine casts no parameter that is sharded
    # undoes unset_hf_deepspeed_config: transformers must know that ZeRO-3 is on
    accelerator.deepspeed_plugin.set_deepspeed_weakref()
    deepspeed.zero.Init(module=model, config_dict_or_path=deepspeed_config())
    for layer in model.modules():
        for name, buffer in layer.named_buffers(recurse=False):
            setattr(layer, name, buffer.to(accelerator.device))
    move_quant_states(model, accelerator.device)


def turn_off_gpu_settings():
    """Turn off what FSDP can do only beside a GPU, and raises for without one; return the settings that were on."""
    settings = ["OFFLOAD_PARAMS"]
    if os.environ.get("FSDP_VERSION", "1") == "1":
        settings += ["CPU_RAM_EFFICIENT_LOADING", "SYNC_MODULE_STATES"]
    found = [name for name in settings if os.environ.get(f"FSDP_{name}") == "true"]
    os.environ |= {f"FSDP_{name}": "false" for name in found}
    return [f"fsdp_{name.lower()}" for name in found]


def offloads_optimizer(accelerator):
    """Return whether DeepSpeed keeps the optimizer off the device, where it wants to step with its own CPU Adam."""
    plugin = accelerator.deepspeed_plugin
    return (
        plugin is not None
        and plugin.get_value("zero_optimization.offload_optimizer.device", "none") != "none"
    )


def cpu_adam_failure(accelerator):
    """Compile (once, in a minute or so) or load DeepSpeed's CPU Adam; return why a process could not, or None."""
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
    elif accelerator.distributed_type == DistributedType.FSDP:
        strategy = f"FSDP version {accelerator.state.fsdp_plugin.fsdp_version}"
    elif accelerator.distributed_type == DistributedType.NO:
        strategy = "no distribution"
    else:
        strategy = "DistributedDataParallel"
    backend = torch.distributed.get_backend() if torch.distributed.is_initialized() else "no"
    processes = (
        f"{accelerator.num_processes} process{'es' if accelerator.num_processes > 1 else ''}"
    )
    return (
        f"Running {strategy} on {processes}, {accelerator.device.type} device, {backend} backend."
    )
