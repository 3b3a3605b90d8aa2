"""The steps of tests/gpu/run.sh that launch scripts: `python tests/gpu/steps.py WORK NAME ...`.

A step is a list of runs and a check of their metrics. WORK is a folder that the steps share. It
contains the small models and data, and the runs that several steps compare with.

All steps except zero3_plus and those with fp16 also run without a GPU, so that they can be tried on
a CPU first.
"""

import argparse
import fcntl
import re
import shlex
import shutil
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import launches
from launches import GPUS, ROOT, Run, compare, difference

# modules that import torch are imported in functions: most steps do not need them, and start faster
sys.path[1:1] = [str(ROOT / "tests"), str(ROOT)]

CLIP = 0.2  # between the gradient norms of the updates, so that some gradients are clipped
TOLERANCE = {"no": 1e-3, "bf16": 1e-2}
HALF = {"bf16": "bfloat16", "fp16": "float16", "no": "float32"}
LARGE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 14, "head_dim": 64}
LARGE |= {"num_attention_heads": 12, "num_key_value_heads": 12}  # 100 million weights

# name -> (script that two processes run, its config, script of the run on one process)
LESSONS = {
    "ddp": ("causal_lm_lora", "ddp", "causal_lm_lora"),
    "zero1": ("causal_lm_lora", "zero1", "causal_lm_lora"),
    "zero2": ("causal_lm_lora", "zero2", "causal_lm_lora"),
    "zero2_offload": ("causal_lm_lora", "zero2_offload", "causal_lm_lora"),
    "zero3": ("causal_lm_lora_zero3_offload", "zero3", "causal_lm_lora"),
    "zero3_offload": ("causal_lm_lora_zero3_offload", "zero3_offload", "causal_lm_lora"),
    "zero3_full": ("causal_lm_full_zero3", "zero3", "causal_lm_full"),
    "zero3_qlora": ("causal_lm_qlora_zero3", "zero3_qlora", "causal_lm_qlora"),
    "fsdp1": ("causal_lm_lora_fsdp1", "fsdp1", "causal_lm_lora"),
    "fsdp1_offload": ("causal_lm_lora_fsdp1", "fsdp1_offload", "causal_lm_lora"),
    "fsdp1_qlora": ("causal_lm_qlora_fsdp1", "fsdp1_qlora", "causal_lm_qlora"),
    "fsdp2": ("causal_lm_lora_fsdp2", "fsdp2", "causal_lm_lora"),
    "fsdp2_offload": ("causal_lm_lora_fsdp2", "fsdp2_offload", "causal_lm_lora"),
    "fsdp2_qlora": ("causal_lm_qlora_fsdp2", "fsdp2_qlora", "causal_lm_qlora"),
    "seq2seq_fsdp1": ("seq2seq_lora_fsdp1", "fsdp1", "seq2seq_lora"),
}
CHATS = {"ddp": "ddp", "zero2": "zero2", "zero3": "zero3", "fsdp1": "fsdp1", "fsdp2": "fsdp2"}
CHAT = ("--packing", "--max_length", 128, "--num_samples", 1, "--max_new_tokens", 8)
CHAT += ("--save_strategy", "no")
LORA, QLORA = ("--use_peft_lora",), ("--use_peft_lora", "--use_4bit_quantization")
CHAT_WHOLE = ("--per_device_train_batch_size", 8, "--gradient_accumulation_steps", 2)
CHAT_HALF = ("--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2)

CHAT_8 = ("--max_steps", 8, *CHAT)
BFLOAT16 = ("--dtype", "bfloat16")
# name -> (script, config, precision, flags) of a run on one process
ALONE = {
    "chat_lora": ("chat_sft", "single", "no", (*LORA, *CHAT_8)),
    "chat_lora_bf16": ("chat_sft", "single", "bf16", (*LORA, *CHAT_8)),
    "chat_lora_fp16": ("chat_sft", "single", "fp16", (*LORA, *CHAT_8)),
    "chat_qlora_bf16": ("chat_sft", "single", "bf16", (*QLORA, *CHAT_8)),
    "chat_full_bf16": ("chat_sft", "single", "bf16", CHAT_8),
    "chat_compile_bf16": ("chat_sft", "single", "bf16", (*LORA, *CHAT_8, "--torch_compile")),
    "chat_zero1_bf16": ("chat_sft", "zero1", "bf16", (*LORA, *CHAT_8)),
    "chat_zero2_bf16": ("chat_sft", "zero2", "bf16", (*LORA, *CHAT_8)),
    "chat_zero3_bf16": ("chat_sft", "zero3", "bf16", (*LORA, *CHAT_8)),
    "causal_lm_full": ("causal_lm_full", "single", "bf16", ()),
    "causal_lm_full_zero2_config": ("causal_lm_full_zero2_config", "zero2_optimizer", "bf16", ()),
    "causal_lm_full_zero3": ("causal_lm_full_zero3", "zero3", "bf16", ()),
    "zero3_plus": ("causal_lm_full_zero3", "zero3_plus", "bf16", ()),
    "causal_lm_lora": ("causal_lm_lora", "single", "bf16", ()),
    "causal_lm_lora_resume": ("causal_lm_lora_resume", "single", "bf16", ()),
    "causal_lm_lora_fp16": ("causal_lm_lora", "single", "fp16", ()),
    "causal_lm_lora_tf32": ("causal_lm_lora", "single", "no", ("--tf32",)),
    "causal_lm_lora_zero3_offload": ("causal_lm_lora_zero3_offload", "zero3_offload", "bf16", ()),
    "causal_lm_qlora": ("causal_lm_qlora", "single", "bf16", BFLOAT16),
    "causal_lm_qlora_zero3": ("causal_lm_qlora_zero3", "zero3_qlora", "bf16", BFLOAT16),
    "seq2seq_lora": ("seq2seq_lora", "single", "bf16", ()),
    "seq2seq_lora_zero3_offload": ("seq2seq_lora_zero3_offload", "zero3_offload", "bf16", ()),
}
GUIDES = ("lora_fsdp", "lora_zero3", "qlora_fsdp", "qlora_zero3")
DETERMINISTIC = ("--deterministic",)
HOOKED = "causal_lm_full_ddp_compressed"


def alone(name, work):
    """One process trains the model in assets/. Its loss must fall."""
    script, config, precision, flags = ALONE[name]
    flags = flags if script == "chat_sft" else ("--max_steps", 8, *flags)
    if script == "causal_lm_lora_resume":
        flags += ("--checkpoint_dir", work / "checkpoints" / name)

    def check(metrics):
        losses = metrics["losses"]
        assert min(losses[1:]) < losses[0], losses
        what = f"{metrics['strategy']}, {metrics['device']}"
        return f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, {what}"

    return [Run(name, script, config, flags, precision=precision)], check


def small(work, model="llama"):
    """Return the flags of a small, briefly trained model and of small data."""
    inputs = work / "inputs"
    return ("--model_name_or_path", inputs / model, "--dataset_name", inputs / "data")


def lesson(work, script, precision):
    """Return the flags of a run to compare. They exercise warmup, weight decay and clipping."""
    flags = ("--max_steps", 8, "--learning_rate", 1e-2, "--warmup_ratio", 0.25)
    if precision != "no":  # fewer and smaller updates, because rounding errors grow with each
        flags = ("--max_steps", 4, "--learning_rate", 1e-3)
    flags += ("--weight_decay", 0.1, "--max_grad_norm", CLIP)
    model = "t5" if script.startswith("seq2seq") else "llama"
    dtype = () if "full" in script else ("--dtype", HALF[precision])
    return (*small(work, model), *flags, *dtype, "--gradient_accumulation_steps", 2)


def two(name, precision, work):
    """Two processes train a lesson. Losses, scores and memory must match a run on one process."""
    script, config, base = LESSONS[name]
    whole = (*lesson(work, base, precision), "--per_device_train_batch_size", 4)
    half = (*lesson(work, script, precision), "--per_device_train_batch_size", 2)
    runs = [
        Run(f"{base}_{precision}", base, "single", whole, precision=precision, shared=True),
        Run(f"two_{name}_{precision}", script, config, half, 2, precision),
    ]

    def check(reference, metrics):
        assert metrics["strategy"] == config.split("_")[0], metrics["strategy"]
        line = compare(metrics, reference, TOLERANCE[precision])
        if precision == "no":
            assert metrics["scores"] == reference["scores"], metrics["scores"]
        if not (GPUS == 0 and config.startswith("fsdp")):  # without a GPU, FSDP does not offload
            text = (ROOT / "configs" / f"{config}.yaml").read_text()
            offload = "offload_params: true" in text or "_device: cpu" in text
            assert metrics["offload"] == ("cpu" if offload else "none"), metrics["offload"]
        if config.startswith(("zero3", "fsdp")):
            share = sum(reference["engine"]["bytes_held"][0].values()) / 2
            held = [sum(sizes.values()) for sizes in metrics["engine"]["bytes_held"]]
            assert max(abs(one / share - 1) for one in held) < 0.1, (held, share)
        return line

    return runs, check


def two_chats(strategy, precision, work):
    """Two processes train chat_sft. Losses and perplexities must match a run on one process."""
    flags = (*LORA, *CHAT, "--max_steps", 4)
    whole, half = (*flags, *CHAT_WHOLE), (*flags, *CHAT_HALF)
    name = f"two_chat_{strategy}_{precision}"
    runs = [
        Run(f"chat_{precision}", "chat_sft", "single", whole, 1, precision, shared=True),
        Run(name, "chat_sft", strategy, half, 2, precision),
    ]

    def check(reference, metrics):
        assert metrics["strategy"] == strategy, metrics["strategy"]
        assert metrics["target_tokens"] == reference["target_tokens"]
        both = (metrics["evaluations"], reference["evaluations"])
        scores = [[one["perplexity"] for one in each] for each in both]
        apart = difference(*scores)
        assert apart <= 2 * TOLERANCE[precision], f"perplexities differ by {apart:.1e}: {scores}"
        return compare(metrics, reference, TOLERANCE[precision])

    return runs, check


def guide(name, work):
    """Run a command of PEFT's guides from its file, with another output folder only."""
    text = (ROOT / "docs/commands" / f"{name}.sh").read_text()
    words = shlex.split(text.replace("\\\n", " "))
    config = words[words.index("--config_file") + 1]
    at = words.index("--output_dir")
    arguments = (*words[words.index("examples/chat_sft.py") + 1 : at], *words[at + 2 :])

    def check(metrics):
        assert metrics["strategy"] == ("zero3" if "zero3" in name else "fsdp1"), metrics["strategy"]
        score = metrics["scores"]["perplexity"]
        assert score["after"] < score["before"], score
        return f"perplexity {score['before']:.2f} -> {score['after']:.2f}"

    # the precision of the command overrides that of the launch config
    return [Run(f"guide_{name}", "chat_sft", config, arguments, 2, "bf16")], check


def resume_lesson(work):
    """Resume the lesson on checkpoints. The result must equal that of an uninterrupted run."""
    flags = (*small(work), "--max_steps", 6, "--lora_dropout", 0.1, *DETERMINISTIC)
    flags += ("--gradient_accumulation_steps", 2, "--per_device_train_batch_size", 4)
    flags += ("--learning_rate", 1e-2, "--dtype", "bfloat16", "--save_steps", 2)
    checkpoints = work / "checkpoints"
    first = ("--checkpoint_dir", checkpoints / "whole")
    second = ("--checkpoint_dir", checkpoints / "resumed")
    second += ("--resume_from_checkpoint", checkpoints / "whole/checkpoint-2")
    script = "causal_lm_lora_resume"
    runs = [
        Run("lesson_whole", script, "single", (*flags, *first), precision="bf16"),
        Run("lesson_resumed", script, "single", (*flags, *second), precision="bf16"),
    ]

    def check(whole, resumed):
        for key in ("losses", "learning_rates", "grad_norms", "scores"):
            assert whole[key] == resumed[key], f"{key}: {whole[key]} and {resumed[key]}"
        assert_equal_files(work, "lesson_whole", "lesson_resumed", "adapter_model.safetensors")
        return "6 updates, resumed after 2: losses and adapter are bit-identical"

    return runs, check


def assert_equal_files(work, one, other, file):
    from safetensors.torch import load_file

    left, right = (load_file(work / "runs" / name / file) for name in (one, other))
    assert left.keys() == right.keys()
    unequal = [key for key in left if not left[key].equal(right[key])]
    assert unequal == [], f"{len(unequal)} of {len(left)} tensors of {file} differ: {unequal[:3]}"


def resume_chat(work):
    """Resume chat_sft. The result, with the optimizer, must equal that of an uninterrupted run."""
    flags = (*LORA, "--packing", "--max_length", 128, *DETERMINISTIC, "--lora_dropout", 0.1)
    flags += ("--gradient_accumulation_steps", 2, "--max_steps", 8, "--eval_steps", 4)
    flags += ("--eval_strategy", "steps", "--save_strategy", "steps", "--save_steps", 3)
    flags += ("--num_samples", 1, "--max_new_tokens", 4)
    on = ("--resume_from_checkpoint", True)
    runs = [
        Run("chats_whole", "chat_sft", "single", flags, precision="bf16"),
        Run("chats_resumed", "chat_sft", "single", (*flags, *on), precision="bf16"),
    ]
    first, second = work / "runs/chats_whole", work / "runs/chats_resumed"

    def before():
        """Make an output folder with only the first checkpoint and the log."""
        second.mkdir()
        shutil.copytree(first / "checkpoint-3", second / "checkpoint-3")
        shutil.copy(first / "log.jsonl", second)

    runs[1].before = before

    def check(whole, resumed):
        from test_resume import assert_same

        assert_same(second, first, processes=1)
        return "8 updates, resumed after 3: losses, adapter and optimizer are bit-identical"

    return runs, check


def peaks(metrics, phase="train"):
    return max(entry["gpu_peak"] for entry in metrics["memory"][phase])


def mb(count):
    return f"{count / 1e6:.0f}"


def large(work, *flags):
    inputs = work / "inputs"
    flags += ("--max_steps", 2, "--per_device_train_batch_size", 1)
    return ("--model_name_or_path", inputs / "large", "--dataset_name", inputs / "few", *flags)


def memory_falls(work):
    """GPU memory decreases from ddp to zero3, and further with offload."""
    runs = [
        Run("large_ddp", "causal_lm_full", "ddp", large(work), 2),
        Run("large_zero3", "causal_lm_full_zero3", "zero3", large(work), 2),
        Run("large_zero3_offload", "causal_lm_full_zero3", "zero3_offload", large(work), 2),
    ]

    def check(*metrics):
        ddp, zero3, offload = map(peaks, metrics)
        line = f"GPU peak MB: ddp {mb(ddp)}, zero3 {mb(zero3)}, offload {mb(offload)}"
        # ZeRO-3 shards weights, gradients and states over two processes, but allocates a buffer as
        # large as all gradients
        assert GPUS == 0 or (zero3 < 0.9 * ddp and offload < 0.75 * zero3), line
        return line

    return runs, check


def memory_qlora(work):
    """Offload reduces the GPU memory of QLoRA under FSDP1; no GPU ever holds all 4-bit weights."""
    text = (ROOT / "configs/fsdp1_qlora.yaml").read_text()
    assert "fsdp_offload_params: true" in text
    kept = work / "fsdp1_qlora_kept.yaml"
    script, flags = "causal_lm_qlora_fsdp1", large(work, "--dtype", "bfloat16")
    single = large(work, "--dtype", "bfloat16")
    runs = [
        Run("large_single", "causal_lm_qlora", "single", single, precision="bf16"),
        Run("large_kept", script, str(kept), flags, 2, "bf16"),
        Run("large_offload", script, "fsdp1_qlora", flags, 2, "bf16"),
    ]
    on_gpu = text.replace("fsdp_offload_params: true", "fsdp_offload_params: false")
    runs[1].before = lambda: kept.write_text(on_gpu)

    def check(single, kept, offload):
        packed = sum(single["engine"]["bytes_held"][0].values())
        line = f"GPU peak MB of training: kept {mb(peaks(kept))}, offload {mb(peaks(offload))}; "
        line += f"of loading: kept {mb(peaks(kept, 'load'))}, "
        line += f"offload {mb(peaks(offload, 'load'))}, all parameters {mb(packed)}"
        if GPUS:
            assert peaks(offload) < peaks(kept), line
            assert peaks(kept, "load") < 0.9 * packed, line
        return line

    return runs, check


def offload_checkpoints(work):
    """Layer inputs in CPU memory reduce the GPU's, and change no loss. So does every second layer.

    Compared are no checkpointing, every second layer, every layer, and every layer with offload.
    """
    flags = ("--model_name_or_path", work / "inputs" / "large", *LORA, *CHAT, "--max_steps", 2)
    flags += ("--max_length", 512, "--eval_strategy", "no", "--gradient_checkpointing")
    variants = {"none": ("--gradient_checkpointing", False)}
    variants |= {"second": ("--gradient_checkpointing_every_n_layers", 2), "every": ()}
    variants |= {"offload": ("--gradient_checkpointing_offload",)}
    runs = [
        Run(f"checkpoints_{name}", "chat_sft", "single", (*flags, *more), precision="bf16")
        for name, more in variants.items()
    ]

    def check(none, *others):
        for one in others:
            compare(one, none, TOLERANCE["bf16"])
        found = list(map(peaks, (none, *others)))
        told = ", ".join(f"{name} {mb(peak)}" for name, peak in zip(variants, found))
        assert GPUS == 0 or found == sorted(found, reverse=True), told
        return f"GPU peak MB of training: {told}"

    return runs, check


def hooks(work):
    """DDP's communication hooks on two processes: the losses stay close to those of plain DDP."""
    flags = (*lesson(work, "causal_lm_full", "no"), "--per_device_train_batch_size", 2)
    runs = [
        Run(f"hook_{hook}", HOOKED, "ddp", (*flags, "--comm_hook", hook), 2)
        for hook in ("no", "bf16", "power_sgd")
    ]

    def check(plain, bf16, power_sgd):
        line = compare(bf16, plain, 5e-2)
        # PowerSGD compresses from the third update on
        first = difference(power_sgd["losses"][:3], plain["losses"][:3])
        assert first < 1e-3 and power_sgd["losses"][-1] < power_sgd["losses"][0], power_sgd
        return f"bf16: {line}; PowerSGD: last loss {power_sgd['losses'][-1]:.3f}"

    return runs, check


def liger(work):
    """chat_sft must have the same losses with Liger's kernels and without."""
    runs = []
    for value in (True, False):
        flags = (*LORA, *CHAT_8, "--use_liger_kernel", value)
        runs.append(Run(f"liger_{value}", "chat_sft", "single", flags, precision="bf16"))
    return runs, lambda with_it, without: compare(with_it, without, TOLERANCE["bf16"])


STEPS = {name: partial(alone, name) for name in ALONE}
STEPS |= {f"two_{name}": partial(two, name, "no") for name in LESSONS}
STEPS |= {f"two_{name}_bf16": partial(two, name, "bf16") for name in LESSONS}
STEPS |= {f"two_chat_{name}": partial(two_chats, name, "no") for name in CHATS}
STEPS |= {f"two_chat_{name}_bf16": partial(two_chats, name, "bf16") for name in CHATS}
STEPS |= {f"guide_{name}": partial(guide, name) for name in GUIDES}
STEPS |= {"resume_lesson": resume_lesson, "resume_chat": resume_chat, "liger": liger}
STEPS |= {"memory_falls": memory_falls, "memory_qlora": memory_qlora}
STEPS |= {"offload_checkpoints": offload_checkpoints, "two_hooks": hooks}


def make(name, folder):
    """Make a model or data set with the name of its folder."""
    from models import make_data, make_model, teach

    if name == "data":
        make_data(folder, validation=7, noise=0.3)
    elif name == "few":
        make_data(folder, train=32, validation=4)
    elif name == "large":
        make_model(folder, "llama", **LARGE)
    else:
        teach(make_model(folder, name), steps=60)


def make_inputs(work, runs):
    """Make the models and data inputs/NAME in the runs' arguments that do not exist yet."""
    words = " ".join(map(str, sum((one.arguments for one in runs), ())))
    for name in sorted(set(re.findall(rf"{re.escape(str(work))}/inputs/(\w+)", words))):
        folder = work / "inputs" / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.with_suffix(".done").exists():
                continue
            shutil.rmtree(folder, ignore_errors=True)
            make(name, folder)
            folder.with_suffix(".done").touch()


def do(work, name):
    """Run a step and return a line with its result. Raise AssertionError if it does not pass."""
    if name == "liger" and find_spec("liger_kernel") is None:
        return "not compared: liger-kernel is not installed"
    runs, check = STEPS[name](work)
    make_inputs(work, runs)
    results = []
    for one in runs:
        if one.before:
            one.before()
        results.append(launches.run(work, one))
    return check(*results)


def check_flags(script, words):
    """Raise if a script does not have one of the flags or does not accept its value."""
    from test_models import load
    from transformers import HfArgumentParser

    module = load(script)
    parser = HfArgumentParser(module.Config)
    words = [str(word) for word in words]
    options = {"return_remaining_strings": True, "look_for_args_file": False}
    _, unknown = parser.parse_args_into_dataclasses(words, **options)
    assert not unknown, f"{script}.py has no flag {unknown}"


def show(work, name):
    """Print the launches of a step. Raise if a script does not have one of the flags."""
    runs, _ = STEPS[name](work)
    for one in runs:
        check_flags(one.script, one.arguments)
        for command in one.commands(work):
            print(f"{name}: {shlex.join(command[1:])}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("names", nargs="+", choices=STEPS, metavar="NAME")
    options = parser.parse_args()
    for name in options.names:
        print(do(options.work, name), flush=True)


if __name__ == "__main__":
    main()
