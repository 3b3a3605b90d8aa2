"""Print the buffers that DeepSpeed's bucket sizes allocate: by formula, and in the live engine.

Run:  python benchmarks/buckets.py

Trains one update of a small Llama with 1 of its 2 layers frozen, on two CPU processes in float32,
under ZeRO-2 and ZeRO-3: with the sizes that the scripts choose, and with 2e8 and 5e8 elements. The
bytes of the formula are elements times bytes per element. Those of the engine are read from its
buffers during the backward pass. On a CPU the buffers of 5e8 elements do not fill memory, because
nobody writes to most of it. On a GPU they do.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from benchmarks.first_run import ACCELERATE

ROOT = Path(__file__).resolve().parents[1]
SIZES = (None, 200_000_000, 500_000_000)  # elements; None: the scripts decide
SETTINGS = SimpleNamespace(gradient_accumulation_steps=1, max_grad_norm=1.0)
MODEL = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEAD = "| Stage | reduce_bucket_size | Bytes by formula | Bytes in the engine |"


def read_engine():
    """Run as a process of a launch: train one update and print what the engine holds."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from utils.launch import configure_deepspeed, start_accelerator

    accelerator = start_accelerator()
    model = LlamaForCausalLM(LlamaConfig(**MODEL, num_attention_heads=4, num_key_value_heads=4))
    model.model.layers[0].requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    accelerator.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
    configure_deepspeed(accelerator, SETTINGS, model)
    model, optimizer = accelerator.prepare(model, optimizer)
    engine = accelerator.deepspeed_engine_wrapped.engine
    found = {}

    def read(gradient):
        for bucket in engine.optimizer.ipg_buckets.values():
            buffers = bucket.buffer if isinstance(bucket.buffer, list) else [bucket.buffer]
            found["held"] = sum(buffer.nbytes for buffer in buffers)

    model.module.model.norm.weight.register_hook(read)
    tokens = torch.arange(16)[None]
    accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
    found["stage"] = engine.zero_optimization_stage()
    found["elements"] = engine.zero_reduce_bucket_size()
    if accelerator.is_main_process:
        print("engine", json.dumps(found))
    accelerator.end_training()


def launch(folder, stage, size):
    """Launch this file with a bucket size and return what the engine held."""
    zero = {"stage": stage} | ({} if size is None else {"reduce_bucket_size": size})
    file = Path(folder) / f"zero{stage}_{size}.json"
    file.write_text(json.dumps({"zero_optimization": zero}))
    words = [
        *ACCELERATE,
        "--use_deepspeed",
        "--deepspeed_config_file",
        file,
        "--num_processes",
        "2",
    ]
    words = [sys.executable, *words, "--num_machines", "1", "--mixed_precision", "no", __file__]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(list(map(str, words)), env=variables, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("engine ")]
    if not lines:
        raise SystemExit(done.stdout + done.stderr)
    return json.loads(lines[0].removeprefix("engine "))


def main():
    """Measure and print the table."""
    print(HEAD + "\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for stage in (2, 3):
            for size in SIZES:
                found = launch(folder, stage, size)
                told = f"{found['elements']:,}" + (" (the scripts' choice)" if size is None else "")
                formula = 4 * found["elements"]
                print(
                    f"| {found['stage']} | {told} | {formula:,} | {found['held']:,} |", flush=True
                )


if __name__ == "__main__":
    read_engine() if "LOCAL_RANK" in os.environ else main()
