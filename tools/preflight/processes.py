"""What the launched processes check: they connect as for a training, with short time-outs."""

import os
import re
import sys
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from tools.preflight.facts import Report, differences, folders, gather_facts, mark, sees
from tools.preflight.report import GIB, print_report
from utils import process_group
from utils.environment import uses_gpu
from utils.errors import first_line
from utils.heartbeat import start_heartbeat, stop_heartbeat
from utils.process_group import end_with_launcher, join_group, own_address

TIMEOUT = 10  # seconds for one collective
LIMIT = 25  # seconds for everything
STRATEGIES = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")  # all of them connect alike
SMALL, LARGE = 2**22, 2**28  # bytes of the first all-reduce, and at most of the second


def check_processes(output, with_facts):
    """Connect all processes and print what was found; return the exit code. Runs in each of them.

    Args:
        output: the script's output folder, or "".
        with_facts: also compare the machines, which `meet` has not done.
    """
    process_group.TIMEOUT = timedelta(seconds=TIMEOUT)
    for name in STRATEGIES:
        os.environ.pop(name, None)
    end_with_launcher()
    log = Path(tempfile.gettempdir(), f"preflight-nccl-{os.getpid()}.txt")
    if uses_gpu():
        os.environ |= {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": str(log)}
    alarm = threading.Timer(LIMIT, give_up, [f"no answer for {LIMIT} s"])
    alarm.daemon = True
    alarm.start()
    is_same = True
    try:
        join_group()
        if with_facts:
            reports = compare_machines(output)
            is_same = not differences(reports)
        start_heartbeat()
        speed = measure_all_reduce()
        processes = gather_object([describe_process(log)])
        if PartialState().is_main_process:
            if with_facts:
                print_report(reports)
            print_processes(processes, speed)
        torch.distributed.barrier()
        stop_heartbeat()
    except Exception as error:  # of the store, gloo, NCCL or CUDA
        return give_up(first_line(error))
    finally:
        log.unlink(missing_ok=True)
    return 0 if is_same else 1


def give_up(reason):
    """Print once per machine that the processes do not reach each other; end with code 1."""
    if int(os.environ["LOCAL_RANK"]) == 0:
        named = os.environ.get("GLOO_SOCKET_IFNAME", "the one of the host's name")
        print(
            f"error: the processes of {os.uname().nodename} do not reach those of other machines: "
            f"{reason}. The address here is {own_address()}, gloo's interface {named}. Open all "
            "ports between the machines, or name another interface in GLOO_SOCKET_IFNAME and "
            "NCCL_SOCKET_IFNAME",
            file=sys.stderr,
            flush=True,
        )
    os._exit(1)


def compare_machines(output):
    """Return a Report of each machine, in the order of the machines. Collective."""
    [word] = broadcast_object_list([f"{os.getpid()}-{time.time_ns()}"])
    is_first = PartialState().is_main_process
    rank = int(os.environ.get("GROUP_RANK", 0))
    marks = {name: mark(folder, word) for name, folder in folders(output).items() if is_first}
    PartialState().wait_for_everyone()
    [begin], now = broadcast_object_list([time.time()]), time.time()
    clock = 0.0 if is_first else now - begin  # too large by the time of the broadcast
    shared = {name: sees(folder, word) for name, folder in folders(output).items()}
    machines = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    facts = gather_facts(machines, PartialState().num_processes)
    found = gather_object([Report(rank, own_address(), facts, clock, shared)])
    for file in marks.values():
        if isinstance(file, Path):
            file.unlink(missing_ok=True)
    return [
        report for number, report in enumerate(found) if report.rank not in ranks(found[:number])
    ]


def ranks(reports):
    return {report.rank for report in reports}


def measure_all_reduce():
    """Return bytes, seconds, and the bus bandwidth in bytes per second of an all-reduce.

    The bus bandwidth, bytes x 2 (n - 1) / n / seconds for n processes, is what each process sends
    and receives, and does not depend on n. The formula is that of nccl-tests. Collective.
    """
    processes = PartialState().num_processes
    time_all_reduce(SMALL)  # connects
    size = int(min(LARGE, max(SMALL, SMALL * 0.5 / time_all_reduce(SMALL)))) // 4 * 4
    seconds = min(time_all_reduce(size) for _ in range(3))
    return size, seconds, size * 2 * (processes - 1) / processes / seconds


def time_all_reduce(size):
    """Return the seconds of an all-reduce of float32 of so many bytes, the same everywhere."""
    device = PartialState().device
    values = torch.ones(size // 4, device=device)
    torch.distributed.barrier()
    begin = time.perf_counter()
    torch.distributed.all_reduce(values)
    values[0].item()  # waits for a GPU
    seconds = torch.tensor(time.perf_counter() - begin, device=device)
    torch.distributed.all_reduce(seconds, torch.distributed.ReduceOp.MAX)
    return seconds.item()


def describe_process(log):
    """Return machine, host, device, addresses and NCCL's networks of this process."""
    device, memory = "CPU", ""
    if PartialState().device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        device = torch.cuda.get_device_name()
        memory = f" ({free / GIB:.0f} of {total / GIB:.0f} GiB free)"
    text = log.read_text(errors="replace") if log.exists() else ""
    return {
        "machine": int(os.environ.get("GROUP_RANK", 0)),
        "host": os.uname().nodename,
        "device": device + memory,
        "connected from": sorted(used_interfaces()),
        "networks": nccl_networks(text),
    }


def nccl_networks(log):
    """Return what NCCL's log, of level INFO, says about the networks that it uses."""
    return list(dict.fromkeys(re.findall(r"NCCL INFO ((?:NET/)?\w+ ?: Using .*)", log)))


def used_interfaces():
    """Return the interfaces, with addresses, of this process's connections to other machines."""
    names = {one.address: name for name, group in psutil.net_if_addrs().items() for one in group}
    port = int(os.environ["MASTER_PORT"])  # of the launcher's store, not of a collective
    found = set()
    for one in psutil.Process().net_connections("tcp"):
        address = one.laddr.ip.removeprefix("::ffff:")
        if one.raddr and port not in (one.laddr.port, one.raddr.port) and address in names:
            found.add(f"{names[address]} ({address})")
    return found


def print_processes(processes, speed):
    """Print how the processes of each machine are connected, and how fast."""
    backend = torch.distributed.get_backend()
    for machine in sorted({process["machine"] for process in processes}):
        own = [process for process in processes if process["machine"] == machine]
        devices = [process["device"] for process in own]
        told = ", ".join(f"{devices.count(one)} x {one}" for one in dict.fromkeys(devices))
        used = sorted({name for process in own for name in process["connected from"]})
        networks = "".join(f"; {one}" for one in own[0]["networks"])
        print(
            f"machine {machine} ({own[0]['host']}): {told}; {backend} connected from "
            f"{', '.join(used) or 'no address'}{networks}"
        )
    size, seconds, bandwidth = speed
    print(
        f"all-reduce of {size / 2**20:.0f} MiB over {len(processes)} processes: {seconds:.3f} s, "
        f"bus bandwidth {bandwidth / 1e9:.2f} GB/s",
        flush=True,
    )
