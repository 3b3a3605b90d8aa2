"""Compare the AdamW optimizers that can update weights on a CPU, on 100 million parameters.

Run:  python benchmarks/adam.py [--repeat 5] [--threads 1]

DeepSpeedCPUAdam updates offloaded weights under ZeRO. torch.optim.AdamW exists as one kernel
(`fused`), with operations on lists of tensors (`foreach`) and as a plain loop over the tensors. The
parameters are those of 8 layers of a Llama (width 1024) without its embedding, in float32. All
optimizers step the same weights in turn, so that a busy machine slows all of them alike. Prints the
CPU time of a step, minimum and median, and the ratio of each median to that of DeepSpeedCPUAdam.
CPU time counts all threads, and not the time in which other programs ran. The first run compiles
DeepSpeedCPUAdam.
"""

import argparse
import datetime
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from benchmarks.first_run import cpu

LAYERS, WIDTH, INNER = 8, 1024, 2736
SHAPES = [(WIDTH, WIDTH)] * 4 + [(INNER, WIDTH)] * 2 + [(WIDTH, INNER)] + [(WIDTH,)] * 2


def measure(repeat, threads):
    """Return the number of parameters, and name of an optimizer -> CPU seconds of its steps."""
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    torch.set_num_threads(threads)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES * LAYERS]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    options = {"lr": 1e-6, "weight_decay": 0.01}
    optimizers = {
        "DeepSpeedCPUAdam": DeepSpeedCPUAdam(parameters, adamw_mode=True, **options),
        "torch.optim.AdamW, fused": torch.optim.AdamW(parameters, fused=True, **options),
        "torch.optim.AdamW, foreach": torch.optim.AdamW(parameters, foreach=True, **options),
        "torch.optim.AdamW, loop": torch.optim.AdamW(parameters, foreach=False, **options),
    }
    seconds = {name: [] for name in optimizers}
    for turn in range(repeat + 1):
        for name, optimizer in optimizers.items():
            start = time.process_time()
            optimizer.step()
            if turn:  # the first step allocates the states
                seconds[name].append(time.process_time() - start)
    return sum(parameter.numel() for parameter in parameters), seconds


def main():
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--repeat", type=int, default=5, help="steps of each optimizer (default: 5)"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of a step (default: 1)")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # read when the libraries start
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    count, seconds = measure(arguments.repeat, arguments.threads)
    print(f"{count:,} parameters, {arguments.threads} thread(s), {cpu()}, {datetime.date.today()}")
    base = statistics.median(seconds["DeepSpeedCPUAdam"])
    print("| | CPU seconds of a step, minimum | Median | Ratio of the medians |\n|---|---|---|---|")
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"| {name} | {min(times):.3f} | {median:.3f} | {median / base:.1f} |")


if __name__ == "__main__":
    main()
