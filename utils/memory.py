"""Measure memory in named phases, on the GPU and on the CPU, for every process.

    tracker = MemoryTracker()
    with tracker.phase("train"):
        ...
    memory = tracker.gather()

The method and the words of the report come from TorchTracemalloc in PEFT's guide to DeepSpeed. Its
sampling thread never sleeps, so it takes the GIL from the training loop again and again. The thread
here sleeps between two samples.
"""

import gc
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

MB = 2**20


class MemoryTracker:
    """Measures the memory of this process in named phases. Make it after the Accelerator.

    On the GPU torch counts the peak exactly. On the CPU a thread samples every `interval` seconds,
    and the end of the phase is always sampled. A peak that lasts two intervals is found. A shorter
    one may be missed, and so may one inside a C function that keeps the GIL (torch's operations
    release it).

    `entries` holds what this process measured, phase -> entry. An entry is a dict of int, in bytes:

        gpu_begin, gpu_end, gpu_peak     allocated by torch on the GPU of this process
        gpu_reserved_begin, gpu_reserved_end, gpu_reserved_peak     held by torch's allocator there
        cpu_begin, cpu_end, cpu_peak     resident set size of this process, without children

    Without a GPU the first six are 0. `seconds` holds how long each phase took.
    """

    def __init__(self, interval: float = 0.02):
        self.interval = interval
        self.entries: dict[str, dict[str, int]] = {}
        self.seconds: dict[str, float] = {}
        self.running: str | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the body of the `with`. At its end the main process prints its own figures.

        Not a collective. A body that raises is measured and printed, too, because running out of
        memory is a result; its exception continues.

        Raises:
            ValueError: the name was measured before, or another phase is still running.
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
                    print(report(name, self.entries[name], on_gpu), flush=True)

    def gather(self) -> dict[str, list[dict[str, int]]]:
        """Return phase -> one entry per process, in order of rank. Collective.

        Raises:
            KeyError: a process did not run a phase that this one ran.
        """
        processes = gather_object([self.entries])
        return {name: [entries[name] for entries in processes] for name in self.entries}


@contextmanager
def resident_memory() -> Iterator[Callable[[], int]]:
    """Yield a function that returns how many bytes of physical memory this process holds.

    Off Linux it returns the most that the process ever held.
    """
    if sys.platform == "linux":
        # pread on an open file releases the GIL once; open, read and close would do it three times
        with open("/proc/self/statm", "rb", buffering=0) as statm:
            page = os.sysconf("SC_PAGE_SIZE")
            yield lambda: int(os.pread(statm.fileno(), 128, 0).split()[1]) * page
    else:
        yield lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts it in bytes


def report(name: str, entry: dict[str, int], on_gpu: bool) -> str:
    """Return the printed lines of a phase, in MB of 2**20 bytes; those of the GPU only with one.

    The numbers are rounded first and subtracted after that, so that they add up.
    """
    lines = []
    for kind in ("gpu", "cpu") if on_gpu else ("cpu",):
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
