"""Join the process group before accelerate does, on the process's own GPU or with gloo on CPUs."""

import ctypes
import ipaddress
import os
import signal
import socket
import sys
from datetime import timedelta
from functools import cache
from pathlib import Path

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed import distributed_c10d

from utils.environment import threads_of_the_user, uses_gpu
from utils.errors import say

PR_SET_PDEATHSIG = 1  # option of Linux's prctl: the signal that a process gets when its parent dies
# How long a collective waits for the other processes. NCCL's default is 10 minutes and gloo's 30,
# but one process may tokenize, save or hash for longer than that.
TIMEOUT = timedelta(hours=6)


def end_with_launcher():
    """Ask Linux to end this process when its launcher dies, even if the launcher is killed."""
    # `accelerate launch` sets the first one even for a single process
    was_launched = {"ACCELERATE_DYNAMO_BACKEND", "LOCAL_RANK"} & set(os.environ)
    if was_launched and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def join_group():
    """Create the process group for accelerate. Return the settings that were turned off."""
    use_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    # for groups that libraries create later: DeepSpeed's own copy, the meshes of hybrid FSDP
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = TIMEOUT
    if use_deepspeed:
        # DeepSpeed builds extensions with ninja, which is in the same folder as python
        folders = [str(Path(sys.executable).parent), os.environ["PATH"]]
        os.environ["PATH"] = os.pathsep.join(folders)
    if has_other_machines():
        choose_interface()
    if uses_gpu():
        join_group_on_gpu(use_deepspeed)
    elif use_deepspeed:
        import cpuinfo
        import deepspeed.ops

        # DeepSpeed calls this several times, and each call is slow
        cpuinfo.get_cpu_info = cache(cpuinfo.get_cpu_info)
        # optional, for collectives on CPUs; compiling it takes longer than a small run
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        PartialState(backend="gloo", timeout=TIMEOUT)
    elif os.environ.get("ACCELERATE_USE_FSDP") == "true":
        turned_off = turn_off_gpu_settings()
        state = PartialState(backend="gloo", timeout=TIMEOUT)
        state.distributed_type = DistributedType.MULTI_GPU  # accelerate needs this to turn on FSDP
        return turned_off
    else:
        PartialState(cpu=True, backend="gloo", timeout=TIMEOUT)
    return []


def join_group_on_gpu(use_deepspeed):
    """Set the process's GPU, then create the process group.

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


# Several machines ---------------------------------------------------------------------------------
def has_other_machines():
    """Return whether processes of the launch may run on other machines."""
    size, here = int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("LOCAL_WORLD_SIZE")
    if here is None:  # no launcher of torch or accelerate
        return size > 1 and not is_loopback(os.environ["MASTER_ADDR"])
    return size > int(here)


def choose_interface():
    """Let gloo use the network interface that reaches MASTER_ADDR, unless the user named one.

    gloo takes the address to which the host's name resolves, and 127.0.0.1 where it does not
    resolve. That is often not an address that other machines reach.
    """
    address = own_address()
    if "GLOO_SOCKET_IFNAME" in os.environ or address is None:
        return
    for name, addresses in psutil.net_if_addrs().items():
        if address in (one.address for one in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = name
            if not uses_gpu():  # with a GPU, NCCL connects the processes
                say(
                    f"Several machines: gloo uses {name} ({address}), which reaches "
                    f"{os.environ['MASTER_ADDR']}. Set GLOO_SOCKET_IFNAME to use another one."
                )
            return


def own_address():
    """Return this machine's address in the network of MASTER_ADDR; None where it has none.

    A name that means 127.0.0.1 on the machine that bears it is no such address. The route to other
    networks is taken then.
    """
    addresses = [os.environ["MASTER_ADDR"], "198.51.100.1"]  # for documentation, nobody's
    for address in addresses:
        try:
            family, *_, target = socket.getaddrinfo(address, 1, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(target)  # sends nothing
                own = probe.getsockname()[0]
        except OSError:
            continue
        if not ipaddress.ip_address(own).is_loopback or is_loopback(address):
            return own
    return None


def is_loopback(address):
    """Return whether an address, as it was given, means this machine on every machine."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def use_all_cores():
    """Divide the machine's cores among its processes.

    `accelerate launch` gives every process one thread (OMP_NUM_THREADS=1), unless the user set a
    number. With a GPU the CPU's threads pack 4-bit weights and step an offloaded optimizer. Returns
    the number of threads, or 0 if the user's number is kept.
    """
    if threads_of_the_user() is not None:
        return 0
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for CPU Adam, which brings its own OpenMP
    torch.set_num_threads(threads)
    return threads


def turn_off_gpu_settings():
    """Turn off the settings of FSDP that raise without a GPU; return those that were on."""
    settings = ["OFFLOAD_PARAMS", "ACTIVATION_CHECKPOINTING_OFFLOAD"]
    if os.environ.get("FSDP_VERSION", "1") == "1":
        settings += ["CPU_RAM_EFFICIENT_LOADING", "SYNC_MODULE_STATES"]
    found = [name for name in settings if os.environ.get(f"FSDP_{name}") == "true"]
    os.environ |= {f"FSDP_{name}": "false" for name in found}
    return [f"fsdp_{name.lower()}" for name in found]
