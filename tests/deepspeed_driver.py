"""Run a script and write what DeepSpeed did to a JSON file.

Run `accelerate launch --config_file CONFIG tests/deepspeed_driver.py FILE SCRIPT ARGUMENT ...`. The
keys of the file are `rates` (the learning rate that torch's AdamW used in each update) and `group`
(number of processes that share the second copy of the parameters; null without hpZ).
"""

import json
import os
import runpy
import sys
from pathlib import Path

import torch
from deepspeed.utils import groups

RATES = []
STEP = torch.optim.AdamW.step


def step(optimizer, *args, **kwargs):
    RATES.append(optimizer.param_groups[0]["lr"])
    return STEP(optimizer, *args, **kwargs)


def main():
    file, *sys.argv = sys.argv[1:]
    torch.optim.AdamW.step = step
    create, sizes = groups._create_zero_param_parallel_group, []

    def created(size):
        create(size)
        sizes.append(groups._get_zero_param_intra_parallel_group_world_size())

    groups._create_zero_param_parallel_group = created
    runpy.run_path(sys.argv[0], run_name="__main__")
    if os.environ["RANK"] == "0":
        facts = {"rates": RATES, "group": sizes[0] if sizes else None}
        Path(file).write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
