"""Compress the gradients that DDP sends: in bf16, or as products of thin matrices (PowerSGD).

The hooks are PyTorch's (torch.distributed.algorithms.ddp_comm_hooks), registered by accelerate.
PowerSGD is described in https://arxiv.org/abs/1905.13727.
"""

import torch
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from utils.errors import refuse, say

HOOKS = {"no": None, "bf16": bf16_compress_hook, "power_sgd": powerSGD_hook}
# PyTorch's default is 1000 updates, so a short run would compress nothing. DDP needs two, because
# it sorts the gradients into new buckets after the first.
FIRST = 2  # updates that send full gradients
MIN_RATE = 2  # PowerSGD compresses a matrix only if it sends fewer than 1 / MIN_RATE of its numbers


def compress_gradients(accelerator, config):
    """Let DDP compress the gradients that it sends. Call it before `prepare` wraps the model.

    Stops with an error where the hook cannot work, and prints which flags have no effect. `prepare`
    then prints the bytes that an update sends.

    Args:
        config: read are comm_hook ("no", "bf16" or "power_sgd") and power_sgd_rank.
    """
    name, rank = config.comm_hook, config.power_sgd_rank
    if name not in HOOKS:
        refuse(f"--comm_hook is {name!r}: choose one of {', '.join(HOOKS)}")
    if rank < 1:
        refuse(f"--power_sgd_rank is {rank}: give a number above 0")
    if name == "power_sgd" and accelerator.mixed_precision == "fp16":
        refuse(
            "--comm_hook power_sgd adds what an update did not send to the next update, and fp16 "
            "lets some gradients become infinite: launch with --mixed_precision bf16, or give "
            "--comm_hook bf16"
        )
    if name != "power_sgd" and rank != type(config).power_sgd_rank:
        say(f"--power_sgd_rank {rank}: unused without --comm_hook power_sgd.")
    if name != "no" and accelerator.num_processes == 1:
        say(f"--comm_hook {name}: unused, because a single process sends no gradients.")
    # a string in place of the member of the enum would be ignored without a message
    handler = GradientHandler(comm_hook=DDPCommunicationHookType(name))
    if name == "power_sgd":
        handler.comm_state_option = {
            "matrix_approximation_rank": rank,
            "start_powerSGD_iter": FIRST,
            "min_compression_rate": MIN_RATE,
            "orthogonalization_epsilon": 1e-8,  # else a gradient of zeros would become NaN
        }
    # Accelerator(kwargs_handlers=...) does not take a class derived from one of its own
    accelerator.ddp_handler = handler


class GradientHandler(DistributedDataParallelKwargs):
    """accelerate's settings of DDP, whose hooks also work on CPUs. Made by `compress_gradients`."""

    def register_comm_hook(self, model):
        """Register the hook on a model that DDP has wrapped, and print what an update sends."""
        rank = self.comm_state_option.get("matrix_approximation_rank", 0)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        say(describe(str(self.comm_hook), rank, parameters))
        hook = HOOKS[str(self.comm_hook)]
        if hook is None or torch.distributed.get_backend(model.process_group) != "gloo":
            return super().register_comm_hook(model)
        state = PowerSGDState(None, **self.comm_state_option) if rank else None
        model.register_comm_hook(state, one_at_a_time(hook))


def one_at_a_time(hook):
    """Return the hook for gloo: each bucket of gradients is reduced before the next one begins.

    PowerSGD reduces three times per bucket, the second and third time from a callback. With several
    buckets gloo's threads would do this in another order on each process, which aborts the run.
    DDP does not accept PyTorch's bf16 hook where NCCL is missing, although gloo can add bf16.
    """

    def reduce_bucket(state, bucket):
        future = hook(state, bucket)
        future.wait()
        return future

    return reduce_bucket


def describe(name, rank, parameters):
    """Return one line: the bytes of an update's gradients, and the bytes that the hook makes of it.

    Args:
        name: "no", "bf16" or "power_sgd".
        rank: of PowerSGD's matrices.
        parameters: the trained ones; DDP sends gradients in their dtype.
    """
    full = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    told = f"Gradients of an update: {full:,} bytes, sent "
    if name == "no":
        return f"{told}uncompressed."
    if name == "bf16":
        return f"{told}as {sum(2 * parameter.numel() for parameter in parameters):,} bytes in bf16."
    sent, count = 0, 0
    for parameter in parameters:
        numbers = compressed_numel(parameter, rank)
        sent += (numbers or parameter.numel()) * parameter.element_size()
        count += numbers > 0
    told += f"as {sent:,} bytes from update {FIRST + 1} on by PowerSGD with rank {rank}, which "
    told += f"compresses {count} of {len(parameters)} tensors"
    if count:
        return f"{told}."
    highest = max(map(highest_rank, parameters), default=0)
    remedy = f"give {highest} or less" if highest else "they are too small for any rank"
    return f"{told}: {remedy}."


def compressed_numel(parameter, rank):
    """Return how many numbers PowerSGD sends of a gradient; 0 where it does not compress it."""
    rows = parameter.shape[0] if parameter.dim() else 1
    columns = parameter.numel() // max(rows, 1)
    numbers = (rows + columns) * min(rows, columns, rank)
    return numbers if numbers * MIN_RATE < rows * columns else 0


def highest_rank(parameter):
    """Return the highest rank with which PowerSGD compresses a gradient; 0 where none does."""
    ranks = range(1, min(parameter.shape, default=0) + 1)
    return next((rank for rank in reversed(ranks) if compressed_numel(parameter, rank)), 0)
