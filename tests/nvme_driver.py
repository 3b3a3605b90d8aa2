"""Run a lesson under NVMe; before it ends, compare the swap files with the weights they stand for.

Usage: nvme_driver.py FACTS SCRIPT FLAGS... Process 0 writes FACTS, a JSON file.
"""

import json
import os
import runpy
import sys

import deepspeed
import numpy
import torch

from utils import results

FACTS, *sys.argv = sys.argv[1:]
end_run = results.end_run


def compare(accelerator):
    """Compare, write the facts, and end the run as usual."""
    engine = accelerator.deepspeed_engine_wrapped.engine
    rank, world = accelerator.process_index, accelerator.num_processes
    weights = [p for p in engine.module.parameters()]
    on_drive = [p for p in weights if p.ds_tensor.final_location == "nvme"]
    slices, equal = [], []
    for weight in weights:
        with deepspeed.zero.GatheredParameters([weight]):
            flat = weight.detach().flatten().clone()
        size = weight.partition_numel()
        flat = torch.nn.functional.pad(flat, (0, size * world - len(flat)))
        slices.append(flat[size * rank : size * (rank + 1)])
        if any(weight is one for one in on_drive):
            file = weight.nvme_swapper.get_path(weight, True)
            stored = torch.from_numpy(numpy.fromfile(file, numpy.float32)[:size].copy())
            equal.append(torch.equal(stored, slices[-1]))
    swapper = engine.optimizer.optimizer_swapper
    [info] = swapper.swap_params_info.values()
    paths = [tensor.swap_path for tensor in info.tensors]
    masters = torch.from_numpy(numpy.fromfile(paths[0], numpy.float32))
    state = torch.cat(slices)
    folder = swapper.swap_folder.partition("/zero_stage_3")[0]
    files = [os.path.join(place, name) for place, _, names in os.walk(folder) for name in names]
    facts = {
        "folder": folder,
        "on_drive": len(on_drive),
        "equal": all(equal),
        "states": len(paths),
        "masters_equal": torch.equal(masters[: len(state)], state),
        "state_bytes": [os.path.getsize(path) for path in paths],
        "own_bytes": 4 * len(state),
        "files_bytes": sum(os.path.getsize(file) for file in files if f"/rank{rank}/" in file),
    }
    if rank == 0:
        with open(FACTS, "w") as file:
            json.dump(facts, file)
    end_run(accelerator)


results.end_run = compare
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
