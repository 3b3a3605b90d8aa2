"""Run a script and write what DeepSpeed did to a JSON file.

Run `accelerate launch --config_file CONFIG tests/deepspeed_driver.py FILE SCRIPT ARGUMENT ...`. The
keys of the file are `rates` (the learning rate that torch's AdamW used in each update), `group`
(number of processes that share the second copy of the parameters; null without hpZ), `second_copy`
(bytes of it that the first process holds) and `sizes` (elements, as the engine's optimizer holds
them).
"""

import json
import os
import runpy
import sys
from pathlib import Path

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import groups

RATES = []
STEP = torch.optim.AdamW.step


def step(optimizer, *args, **kwargs):
    RATES.append(optimizer.param_groups[0]["lr"])
    return STEP(optimizer, *args, **kwargs)


def note_group(found):
    """Note the size of a group of hpZ once it exists."""
    create = groups._create_zero_param_parallel_group

    def noting(size):
        create(size)
        found["group"] = groups._get_zero_param_intra_parallel_group_world_size()

    groups._create_zero_param_parallel_group = noting


def note_sizes(found):
    """Note the sizes that an engine's optimizer is made with."""
    configure = DeepSpeedEngine._configure_zero_optimizer

    def noting(engine, optimizer):
        zero = configure(engine, optimizer)
        offload = getattr(zero, "parameter_offload", None)
        copies = [getattr(one, "ds_secondary_tensor", None) for one in engine.module.parameters()]
        found["second_copy"] = sum(copy.nbytes for copy in copies if copy is not None)
        found["sizes"] = {
            "reduce_bucket_size": zero.reduce_bucket_size,
            "stage3_prefetch_bucket_size": getattr(zero, "prefetch_elements", None),
            "stage3_param_persistence_threshold": getattr(
                offload, "param_numel_persistence_threshold", None
            ),
        }
        return zero

    DeepSpeedEngine._configure_zero_optimizer = noting


def main():
    file, *sys.argv = sys.argv[1:]
    found = {"rates": RATES, "group": None}
    torch.optim.AdamW.step = step
    note_group(found)
    note_sizes(found)
    runpy.run_path(sys.argv[0], run_name="__main__")
    if os.environ["RANK"] == "0":
        Path(file).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
