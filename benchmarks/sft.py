"""Tokens per second and peak memory of supervised fine-tuning with LoRA: chat_sft.py, TRL, Trainer, a padded loop.

Run:  python benchmarks/sft.py [--repeats 3] [--legs chat_sft trl trainer padded] [--gpu]
Only the leg trl needs TRL: pip install trl.

The same model, data, batches, tokens and updates in turn, each leg a process of its own:
  chat_sft  examples/chat_sft.py through `accelerate launch`
  trl       TRL's SFTTrainer at its fastest options that keep the batches: padding_free. Others can be tried, such as
            --legs padded trl --trl '{"padding_free": false, "max_length": 512}'
  trainer   transformers' Trainer, batches padded to their longest row
  padded    the loop of PEFT's examples: every row padded to 512 tokens, the logits of all positions

Train seconds run from the first update's start to the last one's end, without imports and loading. Tokens per second
count the tokens of questions and answers, never padding. Peak memory is the largest resident set of the leg's process,
ru_maxrss, loading included; on a GPU that of torch's allocator. The losses, mean per answer token of each update, must
agree in all legs, and the counts of tokens be equal. Cores is the CPU time of a leg over its whole duration: far below
the number of threads, other work ran beside it, and its seconds tell nothing. Prints minimum and median of each leg
and of chat_sft's ratio to it within a round. On a GPU the first 2 updates are not counted, and
activations are not computed again unless --gradient_checkpointing says so. Utilisation is 4 x the
parameters without the embedding look-up x tokens per second, over the peak of an H100; the head is
counted for every token.
Goals on a CPU: 3.5 times the tokens per second of TRL and 4 times those of the padded loop, 0.6 and 0.3 times their
memory.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

# torch is imported in the legs only: a process that is started takes over the peak memory of the one that starts it

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(1, str(ROOT))
from benchmarks.first_run import cpu  # noqa: E402

LEGS = ["chat_sft", "trl", "trainer", "padded"]
UPDATES, MAX_LENGTH, SEED = 8, 512, 42
GOALS = {
    "trl": (3.5, 0.6),
    "padded": (4, 0.3),
}  # ratios of tokens per second, at least, and of memory, at most
# Largest relative difference of an update's losses. In float32 legs that agree differ by 3e-7; two swapped rows by
# 3e-4, no eos token by 4e-4, another seed of LoRA by 2e-3 (second update), losses of the questions, too, by 4e-3.
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2}  # the second is not measured
# warmup: the first updates, which no figure counts; checkpointing: activations are computed again
CPU = SimpleNamespace(batch=8, dtype="float32", attention="sdpa", learning_rate=1e-3)
CPU.warmup, CPU.checkpointing = 0, True
CPU.shape = dict(
    hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8
)
CPU.shape |= dict(
    num_key_value_heads=8, tie_word_embeddings=False
)  # 157 million parameters, 131 of them at the ends
GPU = SimpleNamespace(
    batch=24, dtype="bfloat16", attention="sdpa", learning_rate=1e-4
)  # 24 rows: about 4,096 tokens
GPU.warmup, GPU.checkpointing = 2, False
GPU.shape = dict(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32
)
GPU.shape |= dict(num_key_value_heads=8, tie_word_embeddings=False)  # Llama 3.1 8B
if importlib.util.find_spec("flash_attn"):
    GPU.attention = "flash_attention_2"
PEAK_FLOPS = 989e12  # of an H100 in bfloat16


def problem(draw):
    """Return a word problem and its solution, about as long as GSM8K's."""
    name, thing = (
        draw.choice(["Ben", "Ann", "Tom", "Mia"]),
        draw.choice(["apples", "cards", "pens", "books"]),
    )
    total = draw.randint(60, 99)
    question, answer = [f"{name} has {total} {thing}."], []
    for day in range(draw.choices(range(2, 9), (27, 28, 22, 13, 6, 3, 1))[0]):
        number = draw.randint(2, 9)
        verb, sign, after = draw.choice(
            [("gets", "+", total + number), ("gives away", "-", total - number)]
        )
        question.append(f"{name} {verb} {number} on day {day + 1}.")
        answer.append(
            f"Then {total} {sign} {number} = <<{total}{sign}{number}={after}>>{after} {thing}."
        )
        total = after
    question.append(f"How many {thing} does {name} have?")
    return {
        "prompt": " ".join(question) + "\nAnswer:",
        "completion": " " + "\n".join([*answer, f"#### {total}"]),
    }


def updates_of(setting):
    """Return the number of updates of a leg, those of the warm-up included."""
    return setting.warmup + UPDATES


def make_inputs(folder, setting):
    """Write a model of random weights with the shipped tokenizer, and the rows in the order of training."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/tiny-causal-lm")
    special = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    config = LlamaConfig(vocab_size=128_256, dtype=setting.dtype, **special, **setting.shape)
    torch.manual_seed(SEED)
    torch.set_default_dtype(getattr(torch, setting.dtype))
    with torch.device("cuda" if setting is GPU else "cpu"):
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    draw = random.Random(SEED)
    rows = [json.dumps(problem(draw)) for _ in range(updates_of(setting) * setting.batch)]
    (folder / "train.jsonl").write_text("\n".join(rows))
    look_up = model.get_input_embeddings().weight.numel()  # does no arithmetic
    return {"parameters": model.num_parameters(), "working": model.num_parameters() - look_up}


def load_model(folder, setting):
    """Return the model with its LoRA, and the tokenizer."""
    import torch
    from accelerate.utils import set_seed
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    set_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    options = dict(dtype=getattr(torch, setting.dtype), attn_implementation=setting.attention)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", **options)
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0, target_modules="all-linear"
    )
    return get_peft_model(model.cuda() if setting is GPU else model, lora), tokenizer


def load(folder, setting):
    """Return model and tokenizer, and the rows as ids and labels; only answers have labels."""
    model, tokenizer = load_model(folder, setting)
    rows = []
    for row in map(json.loads, (folder / "train.jsonl").read_text().splitlines()):
        ids = tokenizer(row["prompt"] + row["completion"]).input_ids + [tokenizer.eos_token_id]
        prompt = len(tokenizer(row["prompt"]).input_ids)
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return model, tokenizer, rows


def now():
    """Return the time at which all that was asked of a GPU is done."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def run_trainer(folder, setting, trainer_class, config_class, overrides, counted=None, **options):
    """Train with a Trainer; return the losses, the seconds of the counted updates, and the Trainer.

    Args:
        counted: the updates to skip first, and the number of the last counted update.
    """
    from transformers import TrainerCallback

    first, last = counted or (setting.warmup, updates_of(setting))
    times, losses = {}, []

    class Timer(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == first:
                times["begin"] = now()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == last:
                times["end"] = now()

        def on_log(self, args, state, control, logs, **kwargs):
            losses.extend([logs["loss"]] if "loss" in logs else [])

    config = dict(max_steps=last, per_device_train_batch_size=setting.batch)
    config |= dict(train_sampling_strategy="sequential")
    config |= dict(learning_rate=setting.learning_rate, lr_scheduler_type="constant")
    config |= dict(gradient_checkpointing=setting.checkpointing)
    config |= dict(
        bf16=setting is GPU,
        use_cpu=setting is CPU,
        seed=SEED,
        output_dir=folder / trainer_class.__name__,
    )
    config |= dict(logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True)
    config["use_liger_kernel"] = setting is GPU and bool(importlib.util.find_spec("liger_kernel"))
    args = config_class(**config | overrides)
    trainer = trainer_class(args=args, callbacks=[Timer()], **options)
    trainer.train()
    return losses, times["end"] - times["begin"], trainer


def train_trl(folder, setting, overrides):
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer, _ = load(folder, setting)
    data = load_dataset("json", data_files=str(folder / "train.jsonl"), split="train")
    overrides = dict(padding_free=True, max_length=None) | overrides
    options = dict(model=model, processing_class=tokenizer, train_dataset=data)
    classes = (SFTTrainer, SFTConfig)
    losses, seconds, trainer = run_trainer(folder, setting, *classes, overrides, **options)
    return losses, seconds, trainer.train_dataset


def train_trainer(folder, setting, _):
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    model, tokenizer, rows = load(folder, setting)
    options = dict(
        train_dataset=Dataset.from_list(rows), data_collator=DataCollatorForSeq2Seq(tokenizer)
    )
    options |= dict(model=model)
    losses, seconds, _ = run_trainer(folder, setting, Trainer, TrainingArguments, {}, **options)
    return losses, seconds, rows


def train_padded(folder, setting, _):
    import torch
    from torch.utils.data import DataLoader
    from transformers import DataCollatorForSeq2Seq

    model, tokenizer, rows = load(folder, setting)
    if setting.checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    model.config.use_cache = False
    model.train()
    collator = DataCollatorForSeq2Seq(tokenizer, padding="max_length", max_length=MAX_LENGTH)
    loader = DataLoader(rows, batch_size=setting.batch, collate_fn=collator)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=setting.learning_rate, weight_decay=0)
    losses, start = [], now()
    for number, batch in enumerate(loader):
        if number == setting.warmup:
            start = now()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=setting is GPU):
            loss = model(**batch.to(model.device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)  # the other legs' default
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, now() - start, rows


def run_leg(leg, folder, setting, overrides):
    """In a leg's own process: train, and return the measurements as chat_sft writes them."""
    import torch

    losses, seconds, rows = globals()[f"train_{leg}"](folder, setting, overrides)
    sizes = [len(row["input_ids"]) for row in rows]
    return {
        "losses": losses,
        "train_seconds": seconds,
        "input_tokens": sum(sizes),
        "counted_tokens": sum(sizes[setting.warmup * setting.batch :]),
        "target_tokens": sum(label != -100 for row in rows for label in row["labels"]),
        "memory": {
            "train": [
                {"gpu_peak": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0}
            ]
        },
    }


def chat_sft(folder, setting):
    """Return the command of the leg that the others are compared with."""
    flags = dict(
        model_name_or_path=folder / "model", dataset_name=folder / "train.jsonl", splits="train"
    )
    flags |= dict(dtype=setting.dtype, max_length=MAX_LENGTH, max_steps=updates_of(setting))
    flags |= dict(shuffle=False, seed=SEED, gradient_checkpointing=setting.checkpointing)
    flags |= dict(per_device_train_batch_size=setting.batch, report_to="none")
    flags |= dict(logging_steps=1) if setting.warmup else {}  # for the seconds of each update
    flags |= dict(learning_rate=setting.learning_rate, lr_scheduler_type="constant", warmup_ratio=0)
    flags |= dict(
        use_peft_lora=True,
        lora_r=8,
        lora_alpha=16,
        lora_dropout=0,
        lora_target_modules="all-linear",
    )
    flags |= dict(
        save_strategy="no", eval_strategy="no", use_flash_attn="flash" in setting.attention
    )
    flags |= dict(output_dir=folder / "chat_sft", overwrite_output_dir=True)
    command = [
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        "--config_file",
        ROOT / "configs/single.yaml",
    ]
    command += [
        "--mixed_precision",
        "bf16" if setting is GPU else "no",
        ROOT / "examples/chat_sft.py",
    ]
    return command + [word for name, value in flags.items() for word in (f"--{name}", value)]


def without_warmup(folder, metrics, setting):
    """Return chat_sft's metrics with the seconds and tokens of the counted updates."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    seconds, tokens = metrics["train_seconds"], metrics["input_tokens"]
    for entry in [entry for entry in entries if "tokens_per_second" in entry][: setting.warmup]:
        taken = entry["seconds_left"] / (updates_of(setting) - entry["step"])  # of one update
        seconds, tokens = seconds - taken, tokens - taken * entry["tokens_per_second"]
    return metrics | {"train_seconds": seconds, "counted_tokens": tokens}


def launch(leg, folder, options):
    """Run a leg, or `inputs`, and return what it wrote with the peak memory of its largest process."""
    output = folder / leg / "metrics.json"
    setting = GPU if options.gpu else CPU
    command = [__file__, "--leg", leg, "--folder", folder, "--trl", options.trl] + [
        "--gpu"
    ] * options.gpu
    command += [f"--{'' if setting.checkpointing else 'no-'}gradient_checkpointing"]
    if leg == "chat_sft":
        command = chat_sft(folder, setting)
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    with open(folder / f"{leg}.log", "w+") as log:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], env=environment, stdout=log, stderr=log
        )
        _, status, usage = os.wait4(
            process.pid, 0
        )  # the peak of the process and of those that it waited for
        if status:
            log.seek(0)
            sys.exit(f"error: {leg} failed:\n{log.read()}")
    cores = (usage.ru_utime + usage.ru_stime) / (time.perf_counter() - start)
    metrics = json.loads(output.read_text())
    if leg == "chat_sft":
        metrics = without_warmup(output.parent, metrics, setting)
    return metrics | {"peak": usage.ru_maxrss * 1024, "cores": cores}


def check(leg, found, reference, tolerance):
    """Stop where a leg trained on other tokens or got other losses; return the losses' largest relative difference."""
    for count in ("input_tokens", "target_tokens"):
        if found[count] != reference[count]:
            sys.exit(f"error: {leg} trained on {found[count]} {count}, not on {reference[count]}")
    pairs = list(zip(found["losses"], reference["losses"], strict=True))
    difference = max(abs(ours / theirs - 1) for ours, theirs in pairs)
    if difference > tolerance:
        sys.exit(
            f"error: the losses of {leg} differ by {difference:.1e}, more than {tolerance:.0e}: {pairs}"
        )
    return difference


def spread(values, form):
    return f"minimum {min(values):{form}}  median {statistics.median(values):{form}}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="runs of each leg, in turn")
    parser.add_argument(
        "--legs",
        nargs="+",
        default=LEGS,
        choices=LEGS,
        help="the first is compared with the others",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every leg")
    parser.add_argument("--gpu", action="store_true", help="Llama 3.1 8B in bfloat16, on one GPU")
    parser.add_argument(
        "--gradient_checkpointing",
        action=argparse.BooleanOptionalAction,
        help="compute activations again in the backward; without the flag on a CPU alone",
    )
    parser.add_argument(
        "--trl", default="{}", help="settings of SFTConfig instead of the fastest, as JSON"
    )
    parser.add_argument("--leg", help=argparse.SUPPRESS)  # in a leg's process
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    setting = GPU if options.gpu else CPU
    if options.gradient_checkpointing is not None:
        setting.checkpointing = options.gradient_checkpointing
    if options.leg:
        (options.folder / options.leg).mkdir(exist_ok=True)
        if options.leg == "inputs":
            metrics = make_inputs(options.folder, setting)
        else:
            metrics = run_leg(options.leg, options.folder, setting, json.loads(options.trl))
        (options.folder / options.leg / "metrics.json").write_text(json.dumps(metrics))
        return
    packages = ["torch", "transformers", "peft"] + ["trl"] * ("trl" in options.legs)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    print(f"{datetime.date.today()}, {os.cpu_count()} cores, {cpu()}, {', '.join(versions)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        inputs = launch("inputs", folder, options)
        rounds = []
        for _ in range(options.repeats):
            rounds.append(
                {leg: launch(leg, folder, options) for leg in options.legs}
            )  # in turn: noise meets all
            for leg, found in rounds[-1].items():
                found["difference"] = check(
                    leg, found, rounds[0][options.legs[0]], TOLERANCES[setting.dtype]
                )
                found["rate"] = found["counted_tokens"] / found["train_seconds"]
                peaks = [
                    device["gpu_peak"] for phase in found["memory"].values() for device in phase
                ]
                found["memory"] = max(peaks) if options.gpu else found["peak"]
    first, *others = options.legs
    one = rounds[0][first]
    tokens = f"{one['input_tokens']:,} tokens, of them {one['target_tokens']:,} of answers"
    print(f"{inputs['parameters']:,} parameters, {tokens},")
    print(f"{updates_of(setting)} updates, of which the first {setting.warmup} are not counted,")
    again = "computed again" if setting.checkpointing else "kept"
    print(f"activations {again}, {options.threads} threads, {options.repeats} runs of each leg")
    print(f"losses of {first}: {' '.join(f'{loss:.4f}' for loss in one['losses'])}")
    for leg in options.legs:
        runs = [each[leg] for each in rounds]
        print(f"{leg:8} seconds      {spread([run['train_seconds'] for run in runs], '8.1f')}")
        print(f"{leg:8} tokens/s     {spread([run['rate'] for run in runs], '8.1f')}")
        print(f"{leg:8} peak MB      {spread([run['memory'] / 1e6 for run in runs], '8.0f')}")
        print(f"{leg:8} cores        {spread([run['cores'] for run in runs], '8.2f')}")
        print(f"{leg:8} losses differ by at most {max(run['difference'] for run in runs):.1e}")
        if options.gpu:
            utilisation = [4 * inputs["working"] * run["rate"] / PEAK_FLOPS for run in runs]
            print(f"{leg:8} utilisation  {spread(utilisation, '8.1%')}")
    for leg in others:
        for goal, (what, key) in enumerate((("tokens/s", "rate"), ("memory", "memory"))):
            ratios = [each[first][key] / each[leg][key] for each in rounds]
            aim = (
                f"  goal {GOALS[leg][goal]}"
                if leg in GOALS and first == "chat_sft" and not options.gpu
                else ""
            )
            print(f"{first} / {leg}: {what:8} {spread(ratios, '6.2f')}{aim}")


if __name__ == "__main__":
    main()
