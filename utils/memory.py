"""Memory per phase and per process, on the GPU and on the CPU: measured, printed, gathered, drawn.

    tracker = MemoryTracker()
    with tracker.phase("train"):
        ...
    memory = tracker.gather()
    if accelerator.is_main_process:
        plot_memory(memory, "memory.png")

The method and the words of the report come from TorchTracemalloc in PEFT's guide to DeepSpeed. Its sampling thread
never sleeps and so takes the GIL from the training loop again and again; this one sleeps between two samples.
"""

import gc
import os
import re
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

MB = 2**20


class MemoryTracker:
    """Measures the memory of this process in named phases. Make it after the Accelerator.

    torch counts the peak of the GPU, exactly. A thread samples the CPU every `interval` seconds, and the end of the
    phase is always sampled: a peak that lives for two intervals is found, a shorter one may be missed, and so may one
    inside a C function that keeps the GIL (torch's operations release it).

    `entries` holds what this process measured, phase -> entry. An entry is a dict of int, in bytes:

        gpu_begin, gpu_end, gpu_peak                             allocated by torch on the GPU of this process
        gpu_reserved_begin, gpu_reserved_end, gpu_reserved_peak  held by torch's caching allocator there
        cpu_begin, cpu_end, cpu_peak                             resident set size of this process, not of children

    Where the process has no GPU the first six are 0. `seconds` holds how long each phase took.
    """

    def __init__(self, interval: float = 0.02):
        self.interval = interval
        self.entries: dict[str, dict[str, int]] = {}
        self.seconds: dict[str, float] = {}
        self.running: str | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the body of the `with`; at its end the main process prints its own figures. Not a collective.

        A body that raises is measured, printed and kept like any other, for out of memory is a result, and its
        exception goes on. ValueError: the name was measured before, or another phase is still running.
        """
        if self.running is not None:
            raise ValueError(
                f"phase {name!r} cannot begin inside phase {self.running!r}: phases do not nest"
            )
        if name in self.entries:
            raise ValueError(
                f"phase {name!r} was measured before: give every phase a name of its own"
            )
        self.running = name

        gc.collect()
        on_gpu = (
            PartialState().device.type == "cuda"
        )  # of this run: a machine with GPUs can also train on its CPU
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        gpu_begin = torch.cuda.memory_allocated() if on_gpu else 0
        gpu_reserved_begin = torch.cuda.memory_reserved() if on_gpu else 0

        with resident_memory() as resident:
            cpu_begin = cpu_peak = resident()
            stop = threading.Event()

            def sample() -> None:
                nonlocal cpu_peak
                while not stop.wait(self.interval):
                    cpu_peak = max(cpu_peak, resident())

            thread = threading.Thread(target=sample, name="MemoryTracker", daemon=True)
            thread.start()
            start = time.perf_counter()
            try:
                yield
            finally:
                self.seconds[name] = time.perf_counter() - start
                stop.set()
                thread.join()
                cpu_peak = max(
                    cpu_peak, resident()
                )  # before the collection: what it frees still lived in the phase
                gc.collect()
                if on_gpu:
                    torch.cuda.empty_cache()
                self.entries[name] = {
                    "gpu_begin": gpu_begin,
                    "gpu_end": torch.cuda.memory_allocated() if on_gpu else 0,
                    "gpu_peak": torch.cuda.max_memory_allocated() if on_gpu else 0,
                    "gpu_reserved_begin": gpu_reserved_begin,
                    "gpu_reserved_end": torch.cuda.memory_reserved() if on_gpu else 0,
                    "gpu_reserved_peak": torch.cuda.max_memory_reserved() if on_gpu else 0,
                    "cpu_begin": cpu_begin,
                    "cpu_end": resident(),
                    "cpu_peak": cpu_peak,
                }
                self.running = None
                if PartialState().is_main_process:
                    print(report(name, self.entries[name]), flush=True)

    def gather(self) -> dict[str, list[dict[str, int]]]:
        """Phase -> one entry per process, in order of rank, the same everywhere. Collective: every process calls it.

        KeyError: a process did not run a phase that this one ran.
        """
        processes = gather_object([self.entries])
        return {name: [entries[name] for entries in processes] for name in self.entries}


@contextmanager
def resident_memory() -> Iterator[Callable[[], int]]:
    """A function that returns the bytes of physical memory held by this process; off Linux, the most it ever held."""
    if sys.platform == "linux":
        # A pread on a file that stays open gives up the GIL once; open, read and close would each queue for it again.
        with open("/proc/self/statm", "rb", buffering=0) as statm:
            page = os.sysconf("SC_PAGE_SIZE")
            yield lambda: int(os.pread(statm.fileno(), 128, 0).split()[1]) * page
    else:
        yield lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts it in bytes


def report(name: str, entry: dict[str, int]) -> str:
    """The eight printed lines of a phase, in MB of 2**20 bytes; rounded, then subtracted, so that they add up."""
    lines = []
    for kind in ("gpu", "cpu"):
        begin, end, peak = (
            round(entry[f"{kind}_{moment}"] / MB) for moment in ("begin", "end", "peak")
        )
        lines += [
            f"{kind.upper()} Memory before entering the {name} : {begin}",
            f"{kind.upper()} Memory consumed at the end of the {name} (end-begin): {end - begin}",
            f"{kind.upper()} Peak Memory consumed during the {name} (max-begin): {peak - begin}",
            f"{kind.upper()} Total Peak Memory consumed during the {name} (max): {peak}",
        ]
    return "\n".join(lines)


def gpu_total() -> int:
    """Bytes of memory of the GPU of this process; 0 without one."""
    on_gpu = PartialState().device.type == "cuda"
    return (
        torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory if on_gpu else 0
    )


def fits_whole(accelerator, model) -> bool:
    """Return whether every process has memory for the whole of a sharded model, and say so where one has not.

    Compares the bytes of the whole parameters with 80 % of what is free: on the process's GPU, or of the machine's
    memory, shared among its processes. The rest is for what generation keeps. Collective.
    """
    needed = 0
    for parameter in model.parameters():
        whole = getattr(
            parameter, "ds_shape", getattr(parameter, "_unpadded_unsharded_size", parameter.shape)
        )
        needed += whole.numel() * parameter.element_size()
    if accelerator.device.type == "cuda":
        free = (
            torch.cuda.mem_get_info()[0]
            + torch.cuda.memory_reserved()
            - torch.cuda.memory_allocated()
        )
    else:
        available = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
        free = int(available[1]) * 1024 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    free = min(gather_object([free]))
    if needed > 0.8 * free:
        accelerator.print(
            f"The whole model has {needed:,} bytes, and a process has {free:,} free: the answers are generated from "
            "a layer at a time, gathered anew for every token."
        )
    return needed <= 0.8 * free


def plot_memory(memory: dict[str, list[dict[str, int]]], path: str | os.PathLike) -> None:
    """Write what gather() returned as a PNG. Not a collective: call it on one process."""
    draw_memory(memory, gpu_total()).savefig(path, format="png")


def draw_memory(memory: dict[str, list[dict[str, int]]], limit: int = 0):
    """A matplotlib Figure: a group of bars per process, a bar per phase; a panel for the GPU only where one was used.

    `limit`, in bytes, is drawn as a line in the panel of the GPU; 0 draws none. `memory` has at least one phase.
    """
    from matplotlib.figure import (
        Figure,
    )  # without pyplot: it chooses no backend and needs no closing

    processes = len(next(iter(memory.values())))
    used_gpu = any(entry["gpu_peak"] for entries in memory.values() for entry in entries)
    kinds = ("gpu", "cpu") if used_gpu else ("cpu",)
    inches = min(max(6.5, 0.15 * processes * len(memory)), 24)  # a PNG 650 to 2400 pixels wide
    figure = Figure(figsize=(inches, 1 + 3 * len(kinds)), layout="constrained")
    panels = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
    width = 0.8 / len(memory)
    for kind, panel in zip(kinds, panels):
        for number, (name, entries) in enumerate(memory.items()):
            begin, end, peak = (
                [entry[f"{kind}_{moment}"] / MB for entry in entries]
                for moment in ("begin", "end", "peak")
            )
            center = [rank + (number + 0.5) * width - 0.4 for rank in range(processes)]
            panel.bar(center, peak, width, color=f"C{number}", alpha=0.6, label=name)
            panel.hlines(begin, [x - width / 2 for x in center], center, color="black")
            panel.hlines(end, center, [x + width / 2 for x in center], color="black")
        if kind == "gpu" and limit:
            panel.axhline(limit / MB, color="red", linestyle="--", label="GPU total")
        panel.set_ylabel(f"{kind.upper()} memory (MB)")
        panel.set_ylim(bottom=0)
        panel.margins(x=0.01)
        panel.set_xticks(range(0, processes, 1 + processes // 17))
    panels[-1].set_xlabel("process")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=5,
        title="bar: peak of the phase; its left line: at the begin, its right line: at the end",
    )
    return figure
