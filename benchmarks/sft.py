"""Compare supervised fine-tuning with LoRA: chat_sft.py, TRL, Trainer, and a padded loop.

Run:  python benchmarks/sft.py [--repeats 3] [--legs chat_sft trl trainer padded] [--gpu]
Only the leg trl needs TRL: pip install trl.

The legs train the same model on the same data, batches and tokens, for the same number of updates.
Each leg is a process of its own, and they run in turn:
  chat_sft  examples/chat_sft.py through `accelerate launch`
  trl       TRL's SFTTrainer with padding_free, its fastest option that keeps the batches. To try
            others: --legs padded trl --trl '{"padding_free": false, "max_length": 512}'
  trainer   transformers' Trainer, batches padded to their longest row
  padded    the loop of PEFT's examples: rows padded to 512 tokens, logits of all positions

Train seconds: from the start of the first update to the end of the last, without imports and
loading. Tokens per second: tokens of questions and answers, without padding. Peak memory: the
largest resident set of the leg's process (ru_maxrss), loading included; on a GPU the peak of
torch's allocator. Cores: CPU time of a leg over its duration. If it is far below the number of
threads, other work ran at the same time, and the seconds mean nothing.

The losses of every update (mean per answer token) must agree in all legs, and the numbers of tokens
must be equal. Prints minimum and median for each leg, and for the ratio of chat_sft to the leg
within a round.

On a GPU the first 2 updates are not counted, and activations are recomputed only with
--gradient_checkpointing. Utilisation is 4 x the parameters without the embedding look-up x tokens
per second, over the peak of an H100; the head is counted for every token.

Goals on a CPU: 3.5 times the tokens per second of TRL with 0.6 times its memory, and 4 times the
tokens per second of the padded loop with 0.3 times its memory.
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

# only the legs import torch: a new process starts with the peak memory of the one that starts it

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(1, str(ROOT))
from benchmarks.first_run import cpu  # noqa: E402

LEGS = ["chat_sft", "trl", "trainer", "padded"]
UPDATES, MAX_LENGTH, SEED = 8, 512, 42
# ratios of chat_sft to a leg: tokens per second, at least, and memory, at most
GOALS = {"trl": (3.5, 0.6), "padded": (4, 0.3)}
# Largest relative difference of an update's losses. In float32, legs that agree differ by 3e-7, two
# swapped rows by 3e-4, a missing eos token by 4e-4, another seed of LoRA by 2e-3 (second update),
# and a loss that includes the questions by 4e-3. The tolerance of bfloat16 is not measured.
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2}
# warmup: the first updates, which are not counted; checkpointing: activations are recomputed
CPU = SimpleNamespace(batch=8, dtype="float32", attention="sdpa", learning_rate=1e-3)
CPU.warmup, CPU.checkpointing = 0, True
# 157 million parameters, 131 million of them in the embedding and the head
CPU.shape = dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=8)
CPU.shape |= dict(num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=False)
# 24 rows are about 4,096 tokens
GPU = SimpleNamespace(batch=24, dtype="bfloat16", attention="sdpa", learning_rate=1e-4)
GPU.warmup, GPU.checkpointing = 2, False
# Llama 3.1 8B
GPU.shape = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
GPU.shape |= dict(num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False)
if importlib.util.find_spec("flash_attn"):
    GPU.attention = "flash_attention_2"
PEAK_FLOPS = 989e12  # FLOP per second of an H100 in bfloat16


def problem(draw):
    """Return a word problem and its solution, about as long as those of GSM8K."""
    name = draw.choice(["Ben", "Ann", "Tom", "Mia"])
    thing = draw.choice(["apples", "cards", "pens", "books"])
    total = draw.randint(60, 99)
    question, answer = [f"{name} has {total} {thing}."], []
    for day in range(draw.choices(range(2, 9), (27, 28, 22, 13, 6, 3, 1))[0]):
        number = draw.randint(2, 9)
        changes = [("gets", "+", total + number), ("gives away", "-", total - number)]
        verb, sign, after = draw.choice(changes)
        question.append(f"{name} {verb} {number} on day {day + 1}.")
        calculation = f"{total} {sign} {number} = <<{total}{sign}{number}={after}>>{after}"
        answer.append(f"Then {calculation} {thing}.")
        total = after
    question.append(f"How many {thing} does {name} have?")
    completion = " " + "\n".join([*answer, f"#### {total}"])
    return {"prompt": " ".join(question) + "\nAnswer:", "completion": completion}


def updates_of(setting):
    """Return the number of updates of a leg, warm-up included."""
    return setting.warmup + UPDATES


def make_inputs(folder, setting):
    """Write a random model with the shipped tokenizer, and the rows in the order of training.

    Returns:
        the numbers of parameters: all, and those that do arithmetic for every token.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/tiny-causal-lm")
    names = [f"{name}_token_id" for name in ("bos", "eos", "pad")]
    special = {name: getattr(tokenizer, name) for name in names}
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
    """Return the model with LoRA, and the tokenizer."""
    import torch
    from accelerate.utils import set_seed
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    set_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    options = dict(dtype=getattr(torch, setting.dtype), attn_implementation=setting.attention)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", **options)
    options = dict(r=8, lora_alpha=16, lora_dropout=0, target_modules="all-linear")
    lora = LoraConfig(task_type="CAUSAL_LM", **options)
    return get_peft_model(model.cuda() if setting is GPU else model, lora), tokenizer


def load(folder, setting):
    """Return model, tokenizer, and the rows as token ids and labels (-100 in the questions)."""
    model, tokenizer = load_model(folder, setting)
    rows = []
    for row in map(json.loads, (folder / "train.jsonl").read_text().splitlines()):
        ids = tokenizer(row["prompt"] + row["completion"]).input_ids + [tokenizer.eos_token_id]
        prompt = len(tokenizer(row["prompt"]).input_ids)
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return model, tokenizer, rows


def now():
    """Return the time, after waiting for the GPU if there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def run_trainer(folder, setting, trainer_class, config_class, overrides, counted=None, **options):
    """Train with a Trainer; return the losses, the seconds of the counted updates, and the Trainer.

    Args:
        overrides: settings of config_class that replace the ones here.
        counted: number of updates to skip, and number of the last one to count.
        options: arguments of trainer_class.
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
    config |= dict(bf16=setting is GPU, use_cpu=setting is CPU, seed=SEED)
    config |= dict(output_dir=folder / trainer_class.__name__)
    config |= dict(logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True)
    config["use_liger_kernel"] = setting is GPU and bool(importlib.util.find_spec("liger_kernel"))
    args = config_class(**config | overrides)
    trainer = trainer_class(args=args, callbacks=[Timer()], **options)
    trainer.train()
    return losses, times["end"] - times["begin"], trainer


def train_trl(folder, setting, overrides):
    """Train with TRL's SFTTrainer; return losses, seconds and rows."""
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
    """Train with transformers' Trainer; return losses, seconds and rows."""
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    model, tokenizer, rows = load(folder, setting)
    options = dict(model=model, train_dataset=Dataset.from_list(rows))
    options |= dict(data_collator=DataCollatorForSeq2Seq(tokenizer))
    losses, seconds, _ = run_trainer(folder, setting, Trainer, TrainingArguments, {}, **options)
    return losses, seconds, rows


def train_padded(folder, setting, _):
    """Train with the loop of PEFT's examples; return losses, seconds and rows."""
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
    """Train, in the leg's own process; return the measurements in chat_sft's format."""
    import torch

    losses, seconds, rows = globals()[f"train_{leg}"](folder, setting, overrides)
    sizes = [len(row["input_ids"]) for row in rows]
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {
        "losses": losses,
        "train_seconds": seconds,
        "input_tokens": sum(sizes),
        "counted_tokens": sum(sizes[setting.warmup * setting.batch :]),
        "target_tokens": sum(label != -100 for row in rows for label in row["labels"]),
        "memory": {"train": [{"gpu_peak": peak}]},
    }


def chat_sft(folder, setting):
    """Return the command of the leg chat_sft, as arguments of Python."""
    data = folder / "train.jsonl"
    flags = dict(model_name_or_path=folder / "model", dataset_name=data, splits="train")
    flags |= dict(dtype=setting.dtype, max_length=MAX_LENGTH, max_steps=updates_of(setting))
    flags |= dict(shuffle=False, seed=SEED, gradient_checkpointing=setting.checkpointing)
    flags |= dict(per_device_train_batch_size=setting.batch, report_to="none")
    flags |= dict(logging_steps=1) if setting.warmup else {}  # for the seconds of each update
    flags |= dict(learning_rate=setting.learning_rate, lr_scheduler_type="constant", warmup_ratio=0)
    flags |= dict(use_peft_lora=True, lora_r=8, lora_alpha=16, lora_dropout=0)
    flags |= dict(lora_target_modules="all-linear", save_strategy="no", eval_strategy="no")
    flags |= dict(use_flash_attn="flash" in setting.attention)
    flags |= dict(output_dir=folder / "chat_sft", overwrite_output_dir=True)
    command = ["-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", ROOT / "configs/single.yaml"]
    command += ["--mixed_precision", "bf16" if setting is GPU else "no"]
    command += [ROOT / "examples/chat_sft.py"]
    return command + [word for name, value in flags.items() for word in (f"--{name}", value)]


def without_warmup(folder, metrics, setting):
    """Return chat_sft's metrics with the seconds and tokens of the counted updates."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    seconds, tokens = metrics["train_seconds"], metrics["input_tokens"]
    for entry in [entry for entry in entries if "tokens_per_second" in entry][: setting.warmup]:
        taken = entry["seconds_left"] / (updates_of(setting) - entry["step"])  # by one update
        seconds, tokens = seconds - taken, tokens - taken * entry["tokens_per_second"]
    return metrics | {"train_seconds": seconds, "counted_tokens": tokens}


def launch(leg, folder, options):
    """Run a leg, or `inputs`; return what it wrote, with its peak memory and its cores."""
    output = folder / leg / "metrics.json"
    setting = GPU if options.gpu else CPU
    command = [__file__, "--leg", leg, "--folder", folder, "--trl", options.trl]
    command += ["--gpu"] if options.gpu else []
    command += [f"--{'' if setting.checkpointing else 'no-'}gradient_checkpointing"]
    if leg == "chat_sft":
        command = chat_sft(folder, setting)
    command = [sys.executable, *map(str, command)]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    with open(folder / f"{leg}.log", "w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        # the usage of the process, and of the processes that it waited for
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            log.seek(0)
            sys.exit(f"error: {leg} failed:\n{log.read()}")
    cores = (usage.ru_utime + usage.ru_stime) / (time.perf_counter() - start)
    metrics = json.loads(output.read_text())
    if leg == "chat_sft":
        metrics = without_warmup(output.parent, metrics, setting)
    return metrics | {"peak": usage.ru_maxrss * 1024, "cores": cores}


def check(leg, found, reference, tolerance):
    """Return the largest relative difference of the losses from the reference's.

    Stops with an error if it is above the tolerance, or if the numbers of tokens differ.
    """
    for count in ("input_tokens", "target_tokens"):
        if found[count] != reference[count]:
            sys.exit(f"error: {leg} trained on {found[count]} {count}, not on {reference[count]}")
    pairs = list(zip(found["losses"], reference["losses"], strict=True))
    difference = max(abs(ours / theirs - 1) for ours, theirs in pairs)
    if difference > tolerance:
        reason = f"differ by {difference:.1e}, more than {tolerance:.0e}"
        sys.exit(f"error: the losses of {leg} {reason}: {pairs}")
    return difference


def spread(values, form):
    """Return minimum and median as text."""
    return f"minimum {min(values):{form}}  median {statistics.median(values):{form}}"


def measure(folder, setting, options):
    """Run all legs in turn, so that noise affects all; return a list of leg -> measurements."""
    rounds = []
    for _ in range(options.repeats):
        rounds.append({leg: launch(leg, folder, options) for leg in options.legs})
        for leg, found in rounds[-1].items():
            reference = rounds[0][options.legs[0]]
            found["difference"] = check(leg, found, reference, TOLERANCES[setting.dtype])
            found["rate"] = found["counted_tokens"] / found["train_seconds"]
            peaks = [device["gpu_peak"] for phase in found["memory"].values() for device in phase]
            found["memory"] = max(peaks) if options.gpu else found["peak"]
    return rounds


def report(rounds, inputs, setting, options):
    """Print the figures of all legs, and the ratios of the first leg to the others."""
    first, *others = options.legs
    one = rounds[0][first]
    tokens = f"{one['input_tokens']:,} tokens, {one['target_tokens']:,} of them in answers"
    print(f"{inputs['parameters']:,} parameters, {tokens},")
    print(f"{updates_of(setting)} updates, the first {setting.warmup} of them not counted,")
    kept = "recomputed" if setting.checkpointing else "kept"
    print(f"activations {kept}, {options.threads} threads, {options.repeats} runs of each leg")
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
        has_goal = leg in GOALS and first == "chat_sft" and not options.gpu
        for number, (what, key) in enumerate((("tokens/s", "rate"), ("memory", "memory"))):
            ratios = [each[first][key] / each[leg][key] for each in rounds]
            goal = f"  goal {GOALS[leg][number]}" if has_goal else ""
            print(f"{first} / {leg}: {what:8} {spread(ratios, '6.2f')}{goal}")


def parse():
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="runs of each leg, in turn")
    legs = "legs to run; the first is compared with the others"
    parser.add_argument("--legs", nargs="+", default=LEGS, choices=LEGS, help=legs)
    threads = "threads of every leg"
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help=threads)
    parser.add_argument("--gpu", action="store_true", help="Llama 3.1 8B in bfloat16, on one GPU")
    parser.add_argument(
        "--gradient_checkpointing",
        action=argparse.BooleanOptionalAction,
        help="recompute activations in the backward pass (default: only on a CPU)",
    )
    settings = "settings of TRL's SFTConfig as JSON, in addition to the fastest ones"
    parser.add_argument("--trl", default="{}", help=settings)
    parser.add_argument("--leg", help=argparse.SUPPRESS)  # in the process of a leg
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    """Run the command line, or a leg in its own process."""
    options = parse()
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
    packages = ["torch", "transformers", "peft", *(["trl"] if "trl" in options.legs else [])]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    print(f"{datetime.date.today()}, {os.cpu_count()} cores, {cpu()}, {', '.join(versions)}")
    with tempfile.TemporaryDirectory() as temporary:
        inputs = launch("inputs", Path(temporary), options)
        rounds = measure(Path(temporary), setting, options)
    report(rounds, inputs, setting, options)


if __name__ == "__main__":
    main()
