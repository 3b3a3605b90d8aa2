"""Log a run, write its results, and check the written files."""

import contextlib
import json
import math
import os
import shutil
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate.utils import DistributedType
from huggingface_hub import HfApi
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from utils.engine import (
    check_sharding,
    count_elements,
    engine_facts,
    full_shape,
    mixed_precision,
    quantization,
    strategy,
    trained_dtype,
)
from utils.errors import fail, first_line, say
from utils.loading import base_model, library, load_lines
from utils.run_files import write_beside

LIBRARIES = ("torch", "accelerate", "deepspeed", "peft", "transformers", "datasets", "bitsandbytes")
CURVES = {"loss": "losses", "learning_rate": "learning_rates", "grad_norm": "grad_norms"}
# Process groups that have ended, kept until the interpreter ends. If the last reference to a gloo
# group is dropped right after a collective, torch holds the GIL and waits for a thread of the
# group, and that thread may be waiting for the GIL.
ENDED = []


# While it trains ----------------------------------------------------------------------------------
class Progress:
    """The progress bar of a run, and its list of updates with the values that the script logs.

    `updates` holds a dict per update: step, epoch and whatever `log` was given. `evaluations` holds
    a dict per evaluation during the training: step, epoch and the scores.

    Args:
        accelerator, model: from `prepare`. Prints how many bytes of parameters each process holds.
        config: the script's Config, with per_device_train_batch_size and
            gradient_accumulation_steps.
        max_steps: number of updates.
        num_rows: number of training rows, which make an epoch; infinity if it is unknown.
    """

    def __init__(self, accelerator, model, config, max_steps, num_rows):
        check_sharding(accelerator, model)
        self.accelerator, self.max_steps = accelerator, max_steps
        rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
        self.epochs_per_update = rows * accelerator.num_processes / num_rows
        self.updates, self.evaluations, self.bar = [], [], None

    def log(self, **values):
        """Record an update. Tensors among the values are read from the device all at once.

        Raises:
            ValueError: a value is not one number.
        """
        tensors = {name: one for name, one in values.items() if isinstance(one, torch.Tensor)}
        for name, value in values.items():
            if value.numel() != 1 if name in tensors else not isinstance(value, int | float):
                raise ValueError(f"{name} is {value!r}, but an update is logged in single numbers")
        numbers = read_numbers(self.accelerator.device, *tensors.values())
        step = len(self.updates) + 1
        entry = {"step": step, "epoch": step * self.epochs_per_update}
        self.updates.append(entry | values | dict(zip(tensors, numbers, strict=True)))
        self.logged_at = time.perf_counter()
        if not self.accelerator.is_main_process:
            return
        if self.bar is None:
            self.bar = tqdm(total=self.max_steps, initial=step - 1)
        shown = {"loss": "loss", "learning_rate": "lr", "grad_norm": "grad_norm"}
        postfix = {shown[k]: f"{v:.4g}" for k, v in self.updates[-1].items() if k in shown}
        self.bar.set_postfix(postfix, refresh=step == self.max_steps)
        self.bar.update()
        if self.ended_epoch() or step == self.max_steps:
            self.print_epoch()
        if step == self.max_steps:
            self.close()

    def close(self):
        """Close the bar, before an error is printed or the run ends early."""
        if self.bar is not None:
            self.bar.close()

    def ended_epoch(self):
        """Return whether the last update was the last of an epoch."""
        last = len(self.updates) * self.epochs_per_update + 1e-9
        return math.floor(last - self.epochs_per_update) < math.floor(last)

    def is_between_epochs(self):
        """Return whether the last update ended an epoch and more updates follow."""
        return self.ended_epoch() and len(self.updates) < self.max_steps

    def print_epoch(self):
        """Print the mean loss and the perplexity of the epoch that ended with the last update.

        An update belongs to the epoch in which it began.
        """
        last, length = self.updates[-1]["epoch"], self.epochs_per_update
        number = math.floor(last + 1e-9) if self.ended_epoch() else math.ceil(last)
        begin = max(number, 1) - 1 - 1e-9
        part = [update for update in self.updates if update["epoch"] - length >= begin]
        part = part or self.updates[-1:]  # an update may be longer than an epoch
        weights = [update.get("target_tokens", 1) for update in part]
        loss = sum(u["loss"] * w for u, w in zip(part, weights)) / max(sum(weights), 1)
        perplexity = math.exp(min(loss, 700)) if math.isfinite(loss) else math.nan
        name = f"epoch {number}" if length else "all updates"
        tqdm.write(f"{name}: mean loss {loss:.4f}, perplexity exp(loss) {perplexity:.4g}")

    def log_scores(self, scores):
        """Record and print held-out scores, measured since the last update was logged."""
        # collect_metrics leaves this time out of the seconds of the training
        self.updates[-1]["evaluation_seconds"] = time.perf_counter() - self.logged_at
        last = {name: self.updates[-1][name] for name in ("step", "epoch")}
        scores = {name: as_number(score) for name, score in scores.items()}
        self.evaluations.append(last | scores)
        if self.accelerator.is_main_process:
            told = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
            tqdm.write(f"held-out after epoch {last['epoch']:.4g}: {told}")

    def show_samples(self, samples):
        """Print up to ten of the (prediction, label) pairs; nothing if there are none."""
        if self.accelerator.is_main_process and samples:
            print(f"{min(10, len(samples))} of {len(samples)} held-out rows:")
            width = max(len(repr(prediction)) for prediction, _ in samples[:10])
            for prediction, label in samples[:10]:
                print(f"  prediction {prediction!r:<{width}}  label {label!r}")


def as_number(score):
    """Return a score as a float, also a tensor or a number of numpy; NaN if it is not one number.

    What a script returns as a score must not stop a run after its training.
    """
    try:
        return float(score)
    except (TypeError, ValueError, RuntimeError):
        say(f"Warning: a score is {score!r}, not one number, and is recorded as NaN")
        return math.nan


def read_numbers(device, *values):
    """Return the numbers in tensors on the device as a list of floats.

    Every read of a tensor on a GPU makes the CPU wait until the GPU has finished its work. So all
    numbers of an update are read at once. Collective under FSDP2, where a value is a DTensor.

    Args:
        device: where the tensors are; others are moved there.
        values: tensors with at most one dimension (or DTensors of FSDP2), or numbers.
    """
    values = [value.full_tensor() if isinstance(value, DTensor) else value for value in values]
    values = [torch.as_tensor(value, dtype=torch.float64, device=device) for value in values]
    return torch.hstack(values).tolist()


# What ran -----------------------------------------------------------------------------------------
def collect_metrics(accelerator, model, config, tracker, scores, updates):
    """Return the content of metrics.json. Collective: every process must call it.

    Args:
        accelerator, model: from `prepare`. The facts about the strategy are read from them, not
            from the launch config.
        config: the script's Config.
        tracker: a `MemoryTracker` that has measured the phase train.
        scores: name -> (before, after) training, on held-out data.
        updates: a dict per update with "loss" and whatever else was logged. "target_tokens" and
            "input_tokens" count the tokens of all processes, without padding.
    """
    unwrapped = accelerator.unwrap_model(model)
    parameters = list(unwrapped.parameters())
    engine = engine_facts(accelerator, parameters)
    offload = engine["offload_optimizer"]
    is_gpu, seconds = accelerator.device.type == "cuda", tracker.seconds["train"]
    seconds -= sum(update.get("evaluation_seconds", 0) for update in updates)
    tokens = {
        name: sum(int(update[name]) for update in updates)
        for name in ("target_tokens", "input_tokens")
        if updates and name in updates[0]
    }
    metrics = {
        "config": asdict(config),
        "versions": {library: version(library) for library in LIBRARIES if find_spec(library)},
        "strategy": strategy(accelerator),
        "offload": engine["offload_param"] if offload == "none" else offload,
        "device": torch.cuda.get_device_name() if is_gpu else accelerator.device.type,
        "num_processes": accelerator.num_processes,
        "mixed_precision": mixed_precision(accelerator),
        "trained_dtype": str(trained_dtype(accelerator, parameters)).removeprefix("torch."),
        "quantization": quantization(unwrapped),
        "base_model": base_model(unwrapped),
        "engine": engine,
        "trainable_parameters": count_elements(unwrapped, trainable_only=True),
        "total_parameters": count_elements(unwrapped),
        # null for NaN and infinity, which JSON does not have (an update that fp16 overflowed)
        **{
            plural: [update[key] if math.isfinite(update[key]) else None for update in updates]
            for key, plural in CURVES.items()
            if updates and key in updates[0]
        },
        "scores": {
            name: {"before": as_number(before), "after": as_number(after)}
            for name, (before, after) in scores.items()
        },
        **tokens,
        "train_seconds": seconds,
    }
    if "input_tokens" in tokens:
        metrics["tokens_per_second"] = tokens["input_tokens"] / seconds
    return metrics | {"memory": tracker.gather()}


# What is left behind ------------------------------------------------------------------------------
@contextlib.contextmanager
def new_folder(config, metrics=None, trained=None, progress=None, with_log=True):
    """Yield a folder to save the weights into; at the end it becomes `config.output_dir`.

    With metrics the weights are checked after the body, and the model card, memory.png, losses.png,
    log.jsonl and metrics.json are written beside them. Weights that were written are kept, whatever
    fails: as `<output_dir>.unchecked` if the body or the check fails, in the hidden folder if
    something fails after that. The console names the folder. Only if the weights themselves cannot
    be written, as on a full disk, nothing is left. With overwrite_output_dir the files that an
    earlier run lists in its metrics.json are replaced; others stay.

    Args:
        config: its output_dir and overwrite_output_dir are read.
        metrics: from `collect_metrics`.
        trained: name -> parameter, for every trainable parameter, before FSDP1 flattens it. The
            written adapter must hold each with its full shape.
        progress: the run's `Progress`, for log.jsonl and losses.png.
        with_log: write log.jsonl; a script that writes it while it trains does not need this.
    """
    target = Path(config.output_dir)
    folder = target.parent / f".{target.name}.{os.getpid()}"
    written = False
    try:
        folder.mkdir(parents=True)
        yield folder
        written = True
        if metrics is not None:
            check_files(folder, metrics, trained)
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for that
        if written:
            keep_unchecked(folder, target, metrics, progress, with_log)
            fail(f"the written files cannot be read back: {error}")
        shutil.rmtree(folder, ignore_errors=True)
        fail(f"nothing was saved in {target}: {error}")
    except BaseException:
        keep_unchecked(folder, target, metrics, progress, with_log)
        raise
    try:
        if metrics is not None:
            write_beside(folder, metrics, progress, with_log)
        move_into_place(folder, target, config.overwrite_output_dir)
    except Exception as error:  # a plot, a full disk, a folder that cannot be replaced
        fail(f"{target} was not completed, the weights are in {folder}: {first_line(error)}")


def keep_unchecked(folder, target, metrics, progress, with_log):
    """Keep the weights of a run that failed while they were saved or checked, and say where."""
    if metrics is None or not any(folder.rglob("*.safetensors")):
        shutil.rmtree(folder, ignore_errors=True)
        return
    kept = target.with_name(f"{target.name}.unchecked")
    if kept.exists():
        kept = target.with_name(f"{kept.name}.{os.getpid()}")
    folder.replace(kept)
    with contextlib.suppress(Exception):  # what can be written beside them is
        write_beside(kept, metrics, progress, with_log)
    print(f"The files are kept, unchecked, in {kept}", file=sys.stderr, flush=True)


def move_into_place(folder, target, overwrite):
    """Rename the folder to the target, or replace the files of the run that the target holds."""
    if not target.exists():
        folder.replace(target)
        return
    if not overwrite:
        spare = folder.replace(target.with_name(f"{target.name}.{os.getpid()}"))
        fail(f"another process created {target} during the run, the results are in {spare}")
    for name in (*earlier_files(target), "metrics.json"):
        (target / name).unlink(missing_ok=True)
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        (target / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        file.replace(target / file.relative_to(folder))
    shutil.rmtree(folder)


def earlier_files(target):
    """Return the files that an earlier run lists as its own; none in an empty folder."""
    metrics = target / "metrics.json"
    return json.loads(metrics.read_text())["saved"] if metrics.is_file() else ()


def check_files(folder, metrics, trained):
    """Open the written weights and fail if they differ from what was trained."""
    if library(folder) == "peft":
        check_adapter(folder, trained, metrics.get("learning_rates", [1.0]))
    else:
        check_model(folder, metrics["total_parameters"])


def name_in_file(name):
    """Return a trained parameter's key in PEFT's files: its name without adapter and wrappers."""
    wrappers = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
    for part in (*wrappers, ".modules_to_save.default", ".default"):
        name = name.replace(part, "")
    return name


def check_adapter(folder, trained, learning_rates):
    """Open the written adapter and fail unless it holds all that was trained.

    Args:
        folder: where `save_pretrained` wrote adapter_model.safetensors.
        trained: name -> parameter, for every trainable parameter.
        learning_rates: those of all updates. If one is above 0, a lora_B must differ from its
            initial value, 0. Those that do not are printed.
    """
    moved, unmoved = [], []
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        keys = set(file.keys())
        for name, parameter in trained.items():
            key, shape = name_in_file(name), full_shape(parameter)
            if key not in keys:
                fail(f"the written adapter lacks {key}: every process must gather before one saves")
            tensor = file.get_tensor(key)
            if tuple(tensor.shape) != shape:
                fail(
                    f"the written adapter's {key} has shape {tuple(tensor.shape)}, not {shape}: "
                    "gather it before saving"
                )
            if not torch.isfinite(tensor).all():
                fail(f"the written adapter has NaN or infinity in {key}: lower --learning_rate")
            if "lora_B" in key:
                (moved if tensor.any() else unmoved).append(key)
    if unmoved and any(learning_rates):
        told = (
            f"{len(unmoved)} of {len(moved + unmoved)} lora_B matrices are still 0, as at the start"
        )
        if not moved:
            fail(f"{told}: nothing was trained")
        print(f"Warning: {told}: {', '.join(unmoved)}")


def check_model(folder, num_elements):
    """Open the written model and fail unless it holds every parameter, and all are finite."""
    found = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                tensor = file.get_tensor(key)
                found += tensor.numel()
                if not torch.isfinite(tensor).all():
                    fail(f"the written model has NaN or infinity in {key}: lower --learning_rate")
    if found < num_elements:  # saved buffers are counted, too
        fail(
            f"the written model holds {found} of {num_elements} elements: every process must "
            "gather before one saves"
        )


# The end ------------------------------------------------------------------------------------------
def finish_run(accelerator, config, metrics):
    """Print the results, end the process group, push to the Hub if asked. Every process calls it.

    The files are pushed if `config.hub_model_id` names a repository.
    """
    is_main_process = accelerator.is_main_process
    if is_main_process:
        print_scores(metrics)
        print_saved(config, metrics)
    end_run(accelerator)
    if is_main_process and config.hub_model_id:  # alone: no collective waits for a long upload
        push_to_hub(config)


def print_scores(metrics):
    """Print the held-out scores before and after training by their names."""
    for name, score in metrics["scores"].items():
        before, after = score["before"], score["after"]
        print(f"held-out {name}: {after:.4f} (before training {before:.4f})")


def print_saved(config, metrics):
    """Print the saved files with their sizes, and how to load them."""
    folder = Path(config.output_dir)
    print(f"saved in {folder}:")
    for name, size in metrics["saved"].items():
        print(f"  {size:>12,} bytes  {name}")
    print(load_lines(folder, folder, metrics), flush=True)


def push_to_hub(config):
    """Upload output_dir to config.hub_model_id; a new repository is private."""
    hub = HfApi()
    try:
        hub.create_repo(config.hub_model_id, private=True, exist_ok=True)
        done = hub.upload_folder(repo_id=config.hub_model_id, folder_path=config.output_dir)
        print("pushed to", done.repo_url)
    except Exception as error:  # no network, no token, no rights: the files stay where they are
        fail(
            f"not pushed to {config.hub_model_id}: {first_line(error)}. Nothing is lost: "
            f"`hf upload {config.hub_model_id} {config.output_dir}` does it later"
        )


def end_run(accelerator):
    """End trackers, engine and process group. Every process calls it."""
    accelerator.wait_for_everyone()
    if torch.distributed.is_initialized():
        ENDED.append(torch.distributed.group.WORLD)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # left alive, it sometimes aborts the process at exit
        accelerator.deepspeed_engine_wrapped.engine.destroy()
    accelerator.end_training()
