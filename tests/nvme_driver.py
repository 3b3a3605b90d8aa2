"""Run a lesson under NVMe; before it ends, compare the swap files with the weights they stand for.

Usage: nvme_driver.py FACTS SCRIPT FLAGS... Process 0 writes FACTS, a JSON file.
"""

import json
import os
import runpy
import sys
from pathlib import Path

import deepspeed
import torch

from utils import results

FACTS, *sys.argv = sys.argv[1:]
end_run = results.end_run


def read(file, dtype):
    """Return the elements of a swap file."""
    return torch.frombuffer(bytearray(Path(file).read_bytes()), dtype=dtype)


def compare(accelerator):
    """Compare, write the facts, and end the run as usual."""
    engine = accelerator.deepspeed_engine_wrapped.engine
    rank, world = accelerator.process_index, accelerator.num_processes
    slices, equal = [], []
    for weight in engine.module.parameters():
        with deepspeed.zero.GatheredParameters([weight]):
            flat = weight.detach().flatten().clone()
        size = weight.partition_numel()
        flat = torch.nn.functional.pad(flat, (0, size * world - len(flat)))
        slices.append(flat[size * rank : size * (rank + 1)])
        if weight.ds_tensor.final_location == "nvme":
            file = weight.nvme_swapper.get_path(weight, True)
            equal.append(torch.equal(read(file, weight.dtype)[:size], slices[-1]))
    own = torch.cat(slices)
    swapper = engine.optimizer.optimizer_swapper
    groups = [*swapper.swap_params_info.values()] if swapper else []
    paths = [tensor.swap_path for info in groups for tensor in info.tensors]
    folder = os.environ["NVME_PATH"]
    files = [os.path.join(place, name) for place, _, names in os.walk(folder) for name in names]
    facts = {
        "folders": [name for name in os.listdir(folder) if name.startswith("run-")],
        "on_drive": len(equal),
        "equal": all(equal),
        "states": len(paths),
        "state_bytes": [os.path.getsize(path) for path in paths],
        "own_bytes": 4 * len(own),
        "files_bytes": sum(os.path.getsize(file) for file in files if f"/rank{rank}/" in file),
    }
    if groups:
        masters = read(paths[0], torch.float32)[: len(own)]
        facts["masters_equal"] = torch.equal(masters.to(own.dtype), own)
    if rank == 0:
        with open(FACTS, "w") as file:
            json.dump(facts, file)
    end_run(accelerator)


results.end_run = compare
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
