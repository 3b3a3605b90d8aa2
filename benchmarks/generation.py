"""Measure generation from a sharded model: gathered once, or gathered again for every token.

Run:  python benchmarks/generation.py [--repeat 3] [--hidden_size 1024]

Each sharded LoRA script runs through `accelerate launch` on two processes up to its first
evaluation. That is then done in turn with the full model gathered once, as the scripts do, and with
--layerwise_generation: `model.generate(..., synced_gpus=True)` on the sharded model, as in the loop
of PEFT's DeepSpeed guide. The model is a Llama with 8 layers and random weights (104 million
parameters with a hidden size of 1024, 27 million with 512). Batches are 8 prompts per process,
answers are 32 tokens. Prints minimum and median of the tokens per second, and the ratio of the
medians. Goal: 5.
"""

import argparse
import datetime
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from benchmarks.first_run import ACCELERATE, cpu

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {
    "zero3": "causal_lm_lora_zero3_offload",
    "fsdp1": "causal_lm_lora_fsdp1",
    "fsdp2": "causal_lm_lora_fsdp2",
}
ROWS, TOKENS = 16, 32  # prompts, and tokens of an answer
EVALUATE = "    before, _ = evaluate(accelerator, model, tokenizer, valid_loader, config)\n"
TIMED = """    import json, time
    seconds = {True: [], False: []}
    for turn in range(2 * (REPEAT + 1)):
        config.layerwise_generation = turn % 2 == 1
        accelerator.wait_for_everyone()
        start = time.perf_counter()
        evaluate(accelerator, model, tokenizer, valid_loader, config)
        accelerator.wait_for_everyone()
        seconds[turn % 2 == 0].append(time.perf_counter() - start)
    if accelerator.is_main_process:
        print("seconds", json.dumps([seconds[True][1:], seconds[False][1:]]))  # not the first
    accelerator.end_training()
    raise SystemExit
"""


def make_inputs(folder, hidden_size):
    """Write a random model with the shipped tokenizer, and rows for training and evaluation.

    The longest label has TOKENS tokens, the one that ends the sequence included.
    """
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/tiny-causal-lm")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    print(f"{model.num_parameters():,} parameters")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    words = [
        text for token in range(500, 600) if (text := tokenizer.decode([token]).strip()).isalpha()
    ]
    label = words[0]
    while len(tokenizer(f" {label}", add_special_tokens=False).input_ids) < TOKENS - 1:
        label += f" {random.choice(words)}"
    for split in ("train", "validation"):
        rows = [
            {"text": " ".join(random.choices(words, k=12)), "label": (label, "no")[i % 2]}
            for i in range(ROWS)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def run(config, folder, repeat):
    """Launch a timed copy of a script; return the seconds of its evaluations.

    Returns:
        two lists: gathered once, and gathered for every token.
    """
    text = (ROOT / "examples" / f"{SCRIPTS[config]}.py").read_text()
    assert text.count(EVALUATE) == 1
    copy = folder / f"{config}.py"
    copy.write_text(text.replace(EVALUATE, TIMED.replace("REPEAT", str(repeat))))
    command = [sys.executable, *ACCELERATE, "--config_file", f"configs/{config}.yaml", copy]
    command += ["--output_dir", folder / f"{config}_out"]
    command += ["--model_name_or_path", folder, "--dataset_name", folder, "--text_column", "text"]
    command += ["--label_column", "label", "--per_device_eval_batch_size", ROWS // 2]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = list(map(str, command))
    options = {"capture_output": True, "text": True}
    done = subprocess.run(command, cwd=ROOT, env=environment, **options)
    lines = [line for line in done.stdout.splitlines() if line.startswith("seconds ")]
    if done.returncode or not lines:
        sys.exit(f"error: {SCRIPTS[config]} failed:\n{done.stdout}{done.stderr}")
    return json.loads(lines[0].removeprefix("seconds "))


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--repeat",
        type=int,
        default=3,
        help="evaluations of each kind, after one that is not counted",
    )
    parser.add_argument("--hidden_size", type=int, default=1024, help="hidden size of the model")
    options = parser.parse_args()
    repeat = options.repeat
    machine = f"{datetime.date.today()}, {os.cpu_count()} cores, {cpu()}"
    print(f"{machine}, two processes, {repeat} evaluations of each kind in turn")
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder), options.hidden_size)
        for config in SCRIPTS:
            once, per_token = run(config, Path(folder), repeat)
            for name, seconds in (("once", once), ("per token", per_token)):
                rates = [ROWS * TOKENS / each for each in seconds]
                median = statistics.median(rates)
                figures = f"minimum {min(rates):7.1f}  median {median:7.1f} tokens/s"
                print(f"{config:6} gathered {name:9}  {figures}")
            ratio = statistics.median(per_token) / statistics.median(once)
            print(f"{config:6} ratio of the medians {ratio:.1f}, goal 5")


if __name__ == "__main__":
    main()
