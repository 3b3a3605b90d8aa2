"""Run a script, and record what the GPU does in one of its updates.

    python tests/gpu/profiled.py RESULT.json UPDATE SCRIPT [FLAG ...]

RESULT.json contains the duration of the update in seconds, the share of each cause, and the slowest
kernels. An update is the time between two optimizer steps. CPU activity is not recorded, because
that would slow the update down. Idle is the time in which no kernel ran.
"""

import json
import re
import runpy
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile

# cause -> regular expression for the names of its kernels; the first match counts. Elementwise
# comprises all other kernels: norms, RoPE, activations, additions, casts.
CAUSES = {
    "attention": "flash|fmha|attention|attn",
    "matmul": r"gemm|cutlass|nvjet|xmma|cublas|wgmma|aten::(mm|addmm|bmm|linear|matmul)$",
    "optimizer": "adam|multi_tensor|foreach|lpnorm",
    "loss": "softmax|scatter|gather|nll|argmax",
    "copies": "memcpy|memset",
    "elementwise": "",
    "idle": "$^",
}


def cause_of(kernel):
    """Return the cause of a kernel."""
    return next(cause for cause, words in CAUSES.items() if re.search(words, kernel.lower()))


def summarize(kernels, seconds):
    """Return the share of each cause and the kernels that take the most time.

    Args:
        kernels: tuples (name, begin, end), in seconds.
        seconds: the duration of the update.
    """
    busy, at, causes, names = 0.0, 0.0, Counter(), Counter()
    for name, begin, end in sorted(kernels, key=lambda kernel: kernel[1]):
        own = max(0.0, end - max(begin, at))  # an overlap counts for the kernel that began first
        busy, at = busy + own, max(at, end)
        causes[cause_of(name)] += own
        names[name] += own
    causes["idle"] = max(0.0, seconds - busy)
    shares = {cause: causes[cause] / seconds for cause in CAUSES}
    return {"seconds": seconds, "causes": shares, "longest": names.most_common(20)}


class Recorder:
    """A hook that runs after every optimizer step and records one update.

    Args:
        result: the file to write.
        update: the number of the update, counted from 1.
    """

    def __init__(self, result, update):
        self.result, self.update, self.steps = Path(result), int(update), 0
        on_gpu = torch.cuda.is_available()
        self.device = DeviceType.CUDA if on_gpu else DeviceType.CPU
        activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
        self.profile = profile(activities=[activity])

    def __call__(self, optimizer, args, kwargs):
        self.steps += 1
        if self.steps not in (self.update - 1, self.update):
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if self.steps == self.update - 1:
            self.profile.start()
            self.begin = time.perf_counter()
            return
        seconds = time.perf_counter() - self.begin
        self.profile.stop()
        kernels = []
        for event in self.profile.events():
            if event.device_type == self.device and not getattr(event, "is_user_annotation", False):
                times = (event.time_range.start / 1e6, event.time_range.end / 1e6)
                kernels.append((event.name, *times))
        self.result.write_text(json.dumps(summarize(kernels, seconds)))


def main():
    result, update, *rest = sys.argv[1:]
    register_optimizer_step_post_hook(Recorder(result, update))
    sys.argv[:] = rest
    runpy.run_path(rest[0], run_name="__main__")


if __name__ == "__main__":
    main()
