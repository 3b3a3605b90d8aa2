"""Reduce a number on all processes, again and again; see tests/test_machines.py.

Run `accelerate launch ... tests/machine_driver.py PART`. PART says what happens at step 20:
nothing: it goes on; killed, raised: to process 1; failed: in process 0; ended: all end, process 0
last; saved: process 0 writes its results.
"""

import os
import signal
import sys
import time

import torch

from utils.errors import fail
from utils.launch import start_accelerator
from utils.saving import holding_signals

STEPS, AT = 6000, 20


def main(part):
    accelerator = start_accelerator()
    process = accelerator.process_index
    for step in range(STEPS):
        accelerator.reduce(torch.ones(10))
        print(f"step {step} of process {process}, {os.getpid()}", flush=True)
        time.sleep(0.05)
        if step != AT:
            continue
        if part == "killed" and process == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if part == "raised" and process == 1:
            raise ValueError("planted")
        if part == "failed" and process == 0:
            fail("planted")
        if part == "saved" and process == 0:
            with holding_signals():
                print("writing", flush=True)
                time.sleep(12)
            print("written", flush=True)
        if part == "ended":
            break
    accelerator.end_training()
    if part == "ended" and process == 0:
        time.sleep(8)
        print("the last", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
