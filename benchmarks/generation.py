"""Tokens per second of generation from a sharded model: gathered once, against gathered anew for every token.

Run:  python benchmarks/generation.py [--repeat 3] [--hidden_size 1024]

Each sharded LoRA script runs through `accelerate launch` on two processes up to its first evaluation, which then is
done in turn with the whole model gathered once, as the scripts do, and with --layerwise_generation, which is the peer:
`model.generate(..., synced_gpus=True)` on the sharded model, as the loop of PEFT's DeepSpeed guide has it. The model
is a Llama of 8 layers and random weights (104 million at a hidden size of 1024, 27 million at 512), the batches are 8
prompts per process, the answers 32 tokens. Prints minimum and median of both and the ratio of the medians; goal: 5.
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
from benchmarks.first_run import cpu

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {
    "zero3": "causal_lm_lora_zero3_offload",
    "fsdp1": "causal_lm_lora_fsdp1",
    "fsdp2": "causal_lm_lora_fsdp2",
}
ROWS, TOKENS = 16, 32
EVALUATE = "    before, _, _ = evaluate(accelerator, model, tokenizer, valid_loader)\n"
TIMED = """    import json, time
    seconds = {True: [], False: []}
    for turn in range(2 * (REPEAT + 1)):
        model.gather_for_generation = turn % 2 == 0
        accelerator.wait_for_everyone()
        start = time.perf_counter()
        evaluate(accelerator, model, tokenizer, valid_loader)
        accelerator.wait_for_everyone()
        seconds[turn % 2 == 0].append(time.perf_counter() - start)
    if accelerator.is_main_process:
        print("seconds", json.dumps([seconds[True][1:], seconds[False][1:]]))  # without the first of each
    accelerator.end_training()
    raise SystemExit
"""


def make_inputs(folder, hidden_size):
    """Write a random model with the shipped tokenizer, and rows whose longest label has as many tokens as wanted."""
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
    while (
        len(tokenizer(f" {label}", add_special_tokens=False).input_ids) < TOKENS - 1
    ):  # and the end of the sequence
        label += f" {random.choice(words)}"
    for split in ("train", "validation"):
        rows = [
            {"text": " ".join(random.choices(words, k=12)), "label": (label, "no")[i % 2]}
            for i in range(ROWS)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def run(config, folder, repeat):
    """Launch a script's timed copy and return the seconds of its evaluations: gathered once, and per token."""
    text = (ROOT / "examples" / f"{SCRIPTS[config]}.py").read_text()
    assert text.count(EVALUATE) == 1
    copy = folder / f"{config}.py"
    copy.write_text(text.replace(EVALUATE, TIMED.replace("REPEAT", str(repeat))))
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        "--main_process_port",
        "0",
    ]
    command += [
        "--config_file",
        f"configs/{config}.yaml",
        copy,
        "--output_dir",
        folder / f"{config}_out",
    ]
    command += ["--model_name_or_path", folder, "--dataset_name", folder, "--text_column", "text"]
    command += ["--label_column", "label", "--per_device_eval_batch_size", ROWS // 2]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("seconds ")]
    if done.returncode or not lines:
        sys.exit(f"error: {SCRIPTS[config]} failed:\n{done.stdout}{done.stderr}")
    return json.loads(lines[0].removeprefix("seconds "))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--repeat", type=int, default=3, help="evaluations each way, after one that is not counted"
    )
    parser.add_argument("--hidden_size", type=int, default=1024, help="of the model")
    options = parser.parse_args()
    repeat = options.repeat
    print(
        f"{datetime.date.today()}, {os.cpu_count()} cores, {cpu()}, two processes, {repeat} times each way in turn"
    )
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder), options.hidden_size)
        for config in SCRIPTS:
            once, anew = run(config, Path(folder), repeat)
            for name, seconds in (("once", once), ("per token", anew)):
                rates = [ROWS * TOKENS / each for each in seconds]
                median = statistics.median(rates)
                print(
                    f"{config:6} gathered {name:9}  minimum {min(rates):7.1f}  median {median:7.1f} tokens/s"
                )
            print(
                f"{config:6} ratio of the medians {statistics.median(anew) / statistics.median(once):.1f}, goal 5"
            )


if __name__ == "__main__":
    main()
