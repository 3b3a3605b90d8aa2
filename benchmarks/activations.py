"""Measure what activation checkpointing saves: bytes kept for the backward pass, and time.

Run:  python benchmarks/activations.py [--layers 8] [--hidden_size 256] [--tokens 256] [--batch 4]

The model is a Llama with random weights, in one process; chat_sft and causal_lm_full_zero3 call the
same function of transformers. A row is a setting of --gradient_checkpointing and
--gradient_checkpointing_every_n_layers. The bytes are those of all tensors that autograd saves in a
forward pass, each storage counted once, weights left out. In the backward pass the activations of
one recomputed layer come on top. The seconds are those of forward and backward: on a GPU elapsed
time, else CPU time. The settings take turns, and the first round is not counted. On a GPU there is
a row with --gradient_checkpointing_offload, and its bytes are those that stay on the GPU.
"""

import argparse
import contextlib
import datetime
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from benchmarks.first_run import cpu


@contextlib.contextmanager
def saved_bytes(model):
    """Count what autograd saves in the block; the yielded function returns the bytes."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    sizes, kept = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # else another tensor could get its address
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(sizes.values())
    kept.clear()


def measure(model, batch, settings):
    """Return the bytes saved for the backward pass, and the seconds of forward and backward."""
    if settings is None:
        model.activation_checkpointing_disable()
    else:
        model.activation_checkpointing_enable(**settings)
    with saved_bytes(model) as saved:
        model(**batch).loss.backward()
    model.zero_grad()
    is_cuda = batch["input_ids"].is_cuda
    clock = time.perf_counter if is_cuda else time.process_time
    begin = clock()
    model(**batch).loss.backward()
    if is_cuda:
        torch.cuda.synchronize()
    seconds = clock() - begin
    model.zero_grad()
    return saved(), seconds


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8, help="decoder layers")
    parser.add_argument("--hidden_size", type=int, default=256, help="hidden size of the model")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=4, help="rows of a micro-batch")
    parser.add_argument("--repeat", type=int, default=3, help="rounds that are counted")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {"num_hidden_layers": options.layers, "hidden_size": options.hidden_size}
    sizes |= {"intermediate_size": 3 * options.hidden_size, "max_position_embeddings": 10**5}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, **heads, vocab_size=2000, use_cache=False)
    model = LlamaForCausalLM(config).to(device).train()
    ids = torch.randint(2000, (options.batch, options.tokens), device=device)
    batch = {"input_ids": ids, "labels": ids}
    rows = {"none": None, "every layer": {}}
    steps = [n for n in (2, 4, 8) if n < options.layers]
    rows |= {f"every {n}{'nd' if n == 2 else 'th'} layer": {"every_n_layers": n} for n in steps}
    if device == "cuda":
        rows["every layer, inputs on the CPU"] = {"offload": True}
    machine = f"{datetime.date.today()}, {os.cpu_count()} cores, {cpu()}, {device}"
    print(
        f"{machine}; {model.num_parameters():,} weights, {options.batch} x {options.tokens} tokens"
    )
    found = {name: [] for name in rows}
    for _ in range(options.repeat + 1):
        for name, settings in rows.items():  # in turn, so that noise affects all
            found[name].append(measure(model, batch, settings))
    base = found["none"][0][0]
    baseline = statistics.median(seconds for _, seconds in found["none"][1:])
    for name, pairs in found.items():
        seconds = [each for _, each in pairs[1:]]
        median = statistics.median(seconds)
        line = f"{name:30} {pairs[0][0] / 1e6:8.1f} MB saved ({pairs[0][0] / base:4.0%})"
        print(
            f"{line}  median {median:6.3f} s ({median / baseline:.2f} x)  min {min(seconds):6.3f} s"
        )


if __name__ == "__main__":
    main()
