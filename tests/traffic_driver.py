"""Train a small model on DDP with each communication hook, and write what was sent to a JSON file.

Run `accelerate launch --config_file configs/ddp.yaml tests/traffic_driver.py FILE`. The keys of the
file are the hooks. Each value has the keys `losses` (list), `norms` (gradient norms, list), `sent`
(bytes that the first process handed to its sockets in the last update), `equal` (whether the
weights of the processes are equal, bit for bit) and `compressed` (numbers before and after, by
PowerSGD's own count of an update; null for other hooks).
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

from benchmarks.traffic import bytes_sent
from utils import traffic
from utils.launch import configure_deepspeed, start_accelerator

WIDTH, UPDATES, ACCUMULATED = 256, 6, 2
SETTINGS = SimpleNamespace(gradient_accumulation_steps=ACCUMULATED, max_grad_norm=1.0)
SHAPES = [(300, WIDTH)] + [(WIDTH, WIDTH)] * 7 + [(1, WIDTH)]  # 2 MB: several buckets of DDP


class Model(torch.nn.Module):
    """Linear layers, one of them without an effect, and experts that few rows reach."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(n, m) for m, n in SHAPES[1:])
        self.first = torch.nn.Linear(*SHAPES[0])
        self.mute = torch.nn.Linear(WIDTH, WIDTH, bias=False)  # its gradient is 0
        self.experts = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, inputs, expert):
        hidden = self.experts[expert](self.first(inputs).tanh())
        hidden = hidden + 0 * self.mute(hidden)
        for layer in self.layers[:-1]:
            hidden = hidden + layer(hidden).tanh()
        return self.layers[-1](hidden)


class Config(SimpleNamespace):
    power_sgd_rank = 2


def train(accelerator, hook):
    traffic.compress_gradients(accelerator, Config(comm_hook=hook, power_sgd_rank=2))
    model = Model()
    configure_deepspeed(accelerator, SETTINGS, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    model, optimizer = accelerator.prepare(model, optimizer)
    generator = torch.Generator().manual_seed(accelerator.process_index)
    batches = [torch.randn(8, SHAPES[0][0], generator=generator) for _ in range(ACCUMULATED)]
    found, losses, norms = {}, [], []
    for _ in range(UPDATES):
        before = bytes_sent()
        for inputs in batches:
            with accelerator.accumulate(model):
                loss = (model(inputs, accelerator.process_index) - inputs[:, :1]).square().mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), SETTINGS.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
        found["sent"] = bytes_sent() - before
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
        norms.append(norm.item())
    weights = torch.cat([weight.detach().flatten() for weight in model.parameters()])
    every = accelerator.gather(weights[None])
    accelerator.free_memory()
    found["equal"] = bool((every == every[0]).all())
    return found | {"losses": losses, "norms": norms}


def main():
    accelerator = start_accelerator(ACCUMULATED)
    states, make = [], powerSGD_hook.PowerSGDState.__init__

    def remember(state, *args, **kwargs):
        make(state, *args, **kwargs)
        states.append(state)

    powerSGD_hook.PowerSGDState.__init__ = remember
    found = {hook: train(accelerator, hook) for hook in traffic.HOOKS}
    [state] = states
    _, before, after = state.compression_stats()
    updates = UPDATES - traffic.FIRST
    found["power_sgd"]["compressed"] = [before / updates, after / updates]
    if accelerator.is_main_process:
        Path(sys.argv[1]).write_text(json.dumps(found))
    accelerator.end_training()


if __name__ == "__main__":
    main()
