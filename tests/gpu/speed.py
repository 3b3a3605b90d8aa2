"""Tokens per second of chat_sft and of TRL on the shape of Llama 3.1 8B, on one GPU.

`tests/gpu/run.sh OUT speed` runs the parts one after the other as `speed.py PART WORK OUT`. The
part `build` runs first. It writes a bfloat16 model of random weights, which the others load.

  eager, compile, liger   chat_sft: LoRA r = 8 on all linear layers, bf16, no dropout, documents
                          packed into 4,096 tokens, 16,384 tokens per update; without Liger, with
                          --torch_compile, with --use_liger_kernel
  checkpointing           the fastest of these, with activation checkpointing
  trl                     TRL's SFTTrainer on the same documents, packed, with Liger's kernels

The first WARMUP updates are not counted. Utilisation is 4 x parameters (without the embedding
look-up) x tokens per second / peak FLOPS of the data sheet. The factor is 4 because frozen weights
have no gradients; recomputation by activation checkpointing is not counted. Peak memory is that of
torch's allocator. After the measured updates, another one is profiled, and the table shows how its
time was spent. speed.json and speed.txt in OUT contain all results so far.
"""

import argparse
import gc
import importlib.metadata
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests/gpu"
sys.path[1:1] = [str(ROOT)]

import torch  # noqa: E402
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM  # noqa: E402

from benchmarks import sft  # noqa: E402
from profiled import CAUSES  # noqa: E402

PARTS = ("build", "eager", "compile", "liger", "checkpointing", "trl")
WARMUP, MEASURED = 3, 4  # updates
PACKS, LENGTH = 4, 4096  # packed sequences per update, tokens per sequence
GPU = torch.cuda.is_available()
# Llama 3.1 8B; without a GPU, a small shape, which shows only that the parts run
SHAPE = sft.GPU.shape if GPU else sft.CPU.shape | {"num_hidden_layers": 2, "hidden_size": 64}
WORDS = 128_256 if GPU else 2_000
FLAGS = {
    "eager": ("--use_liger_kernel", False),
    "compile": ("--use_liger_kernel", False, "--torch_compile"),
    "liger": ("--use_liger_kernel", True),
}
GOALS = {"utilisation": 0.45, "times TRL": 1.3}  # on an H100


def build(work):
    """Write the model, its tokenizer and documents of one to eight word problems each."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/tiny-causal-lm")
    names = [f"{name}_token_id" for name in ("bos", "eos", "pad")]
    settings = SHAPE | {name: getattr(tokenizer, name) for name in names}
    settings |= {"max_position_embeddings": 131_072, "vocab_size": WORDS, "dtype": "bfloat16"}
    config = LlamaConfig(**settings)
    torch.manual_seed(sft.SEED)
    torch.set_default_dtype(torch.bfloat16)
    begin = time.monotonic()
    with torch.device("cuda" if GPU else "cpu"):
        model = LlamaForCausalLM(config)
    count = model.num_parameters()
    print(f"{count:,} parameters after {time.monotonic() - begin:.1f} s", flush=True)
    model.save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")
    draw = random.Random(sft.SEED)
    rows = []
    for _ in range(500 if GPU else 60):
        problems = [sft.problem(draw) for _ in range(draw.randint(1, 8))]
        keys = ("prompt", "completion")
        rows.append({key: "\n".join(one[key] for one in problems) for key in keys})
    (work / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    count -= WORDS * config.hidden_size  # the embedding look-up needs no FLOPs
    (work / "facts.json").write_text(json.dumps({"parameters": count}))
    print(f"model and documents written after {time.monotonic() - begin:.1f} s")


def command(part, work, flags, micro_batch):
    """Return the command that runs chat_sft under profiled.py, which records another update."""
    updates = WARMUP + MEASURED
    settings = dict(model_name_or_path=work / "model")
    settings |= dict(dataset_name=work / "train.jsonl", splits="train")
    settings |= dict(packing=True, max_length=LENGTH if GPU else 512, max_steps=updates + 2)
    settings |= dict(per_device_train_batch_size=micro_batch, learning_rate=1e-4)
    settings |= dict(gradient_accumulation_steps=PACKS // micro_batch, logging_steps=1)
    settings |= dict(use_peft_lora=True, lora_r=8, lora_alpha=16, lora_dropout=0)
    settings |= dict(lora_target_modules="all-linear", eval_strategy="no", save_strategy="no")
    settings |= dict(output_dir=work / part, overwrite_output_dir=True)
    words = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    words += ["--config_file", "configs/single.yaml", "--mixed_precision", "bf16"]
    words += [HERE / "profiled.py", work / f"{part}_profile.json", updates + 1]
    words += ["examples/chat_sft.py"]
    words += [word for name, value in settings.items() for word in (f"--{name}", value)]
    return [str(word) for word in (*words, *flags)]


def chat_sft(part, work, out):
    """Run a variant of chat_sft and return its results."""
    micro_batch, flags = 1, FLAGS.get(part)
    if part == "checkpointing":
        known = {name: entry for name, entry in read(out).items() if name in FLAGS}
        best = max(known, key=lambda name: known[name]["tokens_per_second"], default="eager")
        micro_batch, flags = PACKS, (*FLAGS[best], "--gradient_checkpointing")
    done = command(part, work, flags, micro_batch)
    print(shlex.join(done), flush=True)
    shutil.rmtree(work / part, ignore_errors=True)
    variables = os.environ | {"TORCH_LOGS": "recompiles"}  # expected during the warm-up only
    subprocess.run(done, cwd=ROOT, env=variables, check=True)
    log = [json.loads(line) for line in (work / part / "log.jsonl").read_text().splitlines()]
    log = {entry["step"]: entry for entry in log if "tokens_per_second" in entry}
    updates, tokens, seconds = WARMUP + MEASURED + 2, 0, []
    for step in range(WARMUP + 1, WARMUP + MEASURED + 1):
        # the duration of this update alone, because every update is logged
        seconds.append(log[step]["seconds_left"] / (updates - step))
        tokens += log[step]["tokens_per_second"] * seconds[-1]
    print("seconds of the measured updates:", " ".join(f"{one:.3f}" for one in seconds))
    memory = json.loads((work / part / "metrics.json").read_text())["memory"]["train"]
    found = {"tokens_per_second": tokens / sum(seconds), "gpu_peak": memory[0]["gpu_peak"]}
    found |= {"seconds": seconds, "settings": " ".join(map(str, flags)), "micro_batch": micro_batch}
    profile = work / f"{part}_profile.json"
    return found | {"profile": json.loads(profile.read_text()) if profile.exists() else None}


def trl(work):
    """Train with TRL's SFTTrainer on the same documents and return the results.

    If the memory does not suffice, it trains again with activation checkpointing.
    """
    try:
        return train_trl(work)
    except torch.OutOfMemoryError as error:
        print(f"again with activation checkpointing: {error}", flush=True)
    sft.GPU.checkpointing = True
    gc.collect()
    torch.cuda.empty_cache()
    return train_trl(work)


def train_trl(work):
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    setting = sft.GPU if GPU else sft.CPU
    model, tokenizer = sft.load_model(work, setting)
    data = load_dataset("json", data_files=str(work / "train.jsonl"), split="train")
    overrides = {"packing": True, "max_length": LENGTH if GPU else 512, "learning_rate": 1e-4}
    overrides |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": PACKS}
    options = {"model": model, "processing_class": tokenizer, "train_dataset": data}
    updates = (WARMUP, WARMUP + MEASURED)
    classes = (SFTTrainer, SFTConfig)
    _, seconds, trainer = sft.run_trainer(work, setting, *classes, overrides, updates, **options)
    rows = trainer.train_dataset["input_ids"]
    rows = rows[PACKS * WARMUP : PACKS * (WARMUP + MEASURED)]
    found = {"tokens_per_second": sum(map(len, rows)) / seconds, "micro_batch": 1}
    found["gpu_peak"] = torch.cuda.max_memory_allocated() if GPU else 0
    liger = "with Liger's kernels" if trainer.args.use_liger_kernel else "without Liger's kernels"
    again = "activations computed again" if setting.checkpointing else "activations kept"
    settings = f"trl {importlib.metadata.version('trl')}, {setting.attention}, {liger}, {again}"
    return found | {"settings": settings, "profile": None}


def read(out):
    """Return the results so far: part -> entry."""
    file = out / "speed.json"
    return json.loads(file.read_text()) if file.exists() else {}


def table(results, parameters):
    """Return the lines of a table with all results and with the time spent by cause."""
    name = torch.cuda.get_device_name() if GPU else "cpu"
    lines = [f"{name}, torch {torch.__version__}, {parameters:,} parameters without the look-up"]
    goals = f"{GOALS['utilisation']:.0%} utilisation, {GOALS['times TRL']} x TRL"
    lines += [f"goals on an H100: {goals}", ""]
    lines.append(f"{'':14} {'tokens/s':>9} {'peak GB':>8} {'utilisation':>12}  settings")
    for part, entry in results.items():
        share = 4 * parameters * entry["tokens_per_second"] / sft.PEAK_FLOPS
        numbers = f"{entry['tokens_per_second']:9,.0f} {entry['gpu_peak'] / 1e9:8.1f}"
        numbers += f" {share:12.1%}"
        settings = f"{entry['settings']}, micro-batch {entry['micro_batch']}"
        each = entry.get("seconds") or [1]
        if max(each) > 1.2 * min(each):
            settings += f"; updates of {min(each):.2f} to {max(each):.2f} s"
        lines.append(f"{part:14} {numbers}  {settings}")
    if "trl" in results:
        best = max(entry["tokens_per_second"] for part, entry in results.items() if part != "trl")
        lines.append(f"best of chat_sft / TRL: {best / results['trl']['tokens_per_second']:.2f}")
    lines += ["", "where an update's time went, of what was profiled:"]
    lines.append(f"{'':14} {'ms':>6} {'useful':>7} " + " ".join(f"{cause:>11}" for cause in CAUSES))
    for part, entry in results.items():
        if profile := entry["profile"]:
            useful = 4 * parameters * PACKS * LENGTH / sft.PEAK_FLOPS / profile["seconds"]
            shares = dict(profile["causes"])
            shares["matmul"] -= useful  # the rest is the gap between kernels and peak FLOPS
            cells = " ".join(f"{shares[cause]:11.1%}" for cause in CAUSES)
            lines.append(f"{part:14} {1000 * profile['seconds']:6.0f} {useful:7.1%} {cells}")
    lines.append("useful: time of the counted FLOPs at peak; matmul: the rest of matrix products")
    for part, entry in results.items():
        for name, seconds in (entry["profile"] or {"longest": []})["longest"][:12]:
            lines.append(f"  {part:14} {1000 * seconds:8.1f} ms  {name[:90]}")
    return lines


def show(work, part):
    """Print the launch of a part, if it has one. Raise if the script does not have a flag of it."""
    from steps import check_flags

    if part in (*FLAGS, "checkpointing"):
        flags = FLAGS.get(part, (*FLAGS["compile"], "--gradient_checkpointing"))
        words = command(part, work, flags, 1)
        print(f"{part}: {shlex.join(words[1:])}", flush=True)
        check_flags("chat_sft", words[words.index("examples/chat_sft.py") + 1 :])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    part, work, out = options.part, options.work, options.out
    if part == "build":
        for name in ("speed.json", "speed.txt"):  # from an earlier run, maybe on another GPU
            (out / name).unlink(missing_ok=True)
        return build(work)
    for name, package in (("trl", "trl"), ("liger", "liger_kernel")):
        if part == name and find_spec(package) is None:
            return print(f"{part}: not measured, {package} is not installed")
    results = read(out) | {part: trl(work) if part == "trl" else chat_sft(part, work, out)}
    (out / "speed.json").write_text(json.dumps(results, indent=1))
    parameters = json.loads((work / "facts.json").read_text())["parameters"]
    text = "\n".join(table(results, parameters))
    (out / "speed.txt").write_text(text + "\n")
    print(text)
    share = 4 * parameters * results[part]["tokens_per_second"] / sft.PEAK_FLOPS
    print(f"{part}: {results[part]['tokens_per_second']:,.0f} tokens/s, {share:.1%} utilisation")


if __name__ == "__main__":
    main()
