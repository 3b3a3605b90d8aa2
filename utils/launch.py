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
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, gather_object
from datasets import disable_progress_bars


PR_SET_PDEATHSIG = 1  # of Linux' prctl: the signal that a process gets when its parent dies


def start_accelerator(**kwargs):
    """Return `accelerate.Accelerator(**kwargs)`, running the launched strategy also where there is no GPU.

    Prints one line that says what really runs, read from the Accelerator: strategy, processes, device, backend.

    Raises:
        RuntimeError: the Accelerator runs another number of processes than were launched, as happens when a
            strategy was dropped in silence.
    """
    # names that torch and transformers deprecate, called by deepspeed 0.19 in every collective and by peft 0.21
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    # peft's, where both of two tied layers are trained whole: they part, and the file holds both
    warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True` and a tied layer is part of", UserWarning)
    disable_progress_bars()  # of datasets and of transformers: the one bar is that of the training
    transformers.utils.logging.disable_progress_bar()
    # both set by `accelerate launch`, the first for one process, too
    if {"ACCELERATE_DYNAMO_BACKEND", "LOCAL_RANK"} & set(os.environ) and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # a launcher that is killed leaves no process behind
    use_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    use_fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if use_deepspeed:
        # DeepSpeed builds its extensions with ninja, which lies beside python in an environment that is not activated
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    turned_off = []
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # said here, DeepSpeed need not warn that it found none
        if "bitsandbytes" in sys.modules:  # some CPUs would repack 4-bit weights to answer, in place and coarser
            sys.modules["bitsandbytes.nn.modules"].has_avx512bf16 = lambda: False
    if not torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        if use_deepspeed:
            import deepspeed.ops

            # an optional extension for CPU collectives that takes longer to compile than a small run takes in all
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            PartialState(backend="gloo")
        elif use_fsdp:
            turned_off = turn_off_gpu_settings()
            PartialState(backend="gloo").distributed_type = DistributedType.MULTI_GPU  # what FSDP is made from
        else:
            PartialState(cpu=True, backend="gloo")

    accelerator = Accelerator(**kwargs)
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != launched:
        raise RuntimeError(f"{launched} processes were launched, but accelerate runs {accelerator.num_processes}")
    if use_fsdp and (policy := accelerator.state.fsdp_plugin.mixed_precision_policy) is not None:
        # accelerate's rounds to bf16 or fp16 what must not be: gradients on their way, the rotary embedding's
        # frequencies (a buffer) under version 1, and the loss (an output) under version 2
        kept = {"buffer_dtype": torch.float32} if hasattr(policy, "buffer_dtype") else {"output_dtype": None}
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
    return accelerator


def adamw(name):
    """Return the class of an AdamW, by the name that transformers gives it; those in few bits are bitsandbytes'.

    Its arguments are those of torch.optim.AdamW: parameters, lr, weight_decay. Paged states move to the CPU while the
    GPU is full; without a GPU they are not paged.
    """
    if name == "adamw_torch":
        return torch.optim.AdamW
    import bitsandbytes

    classes = {"adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit", "paged_adamw_32bit": "PagedAdamW32bit"}
    return getattr(bitsandbytes.optim, classes[name])


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
    return plugin is not None and plugin.get_value("zero_optimization.offload_optimizer.device", "none") != "none"


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
    processes = f"{accelerator.num_processes} process{'es' if accelerator.num_processes > 1 else ''}"
    return f"Running {strategy} on {processes}, {accelerator.device.type} device, {backend} backend."
