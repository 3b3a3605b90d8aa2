"""Log a run, and write its weights and results."""

import contextlib
import math
import os
import shutil
import time
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError
from safetensors.torch import save_file
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
from utils.errors import fail, fail_together, first_line, refuse, say
from utils.heartbeat import stop_heartbeat
from utils.loading import base_model, load_lines
from utils.run_files import find_state as find_state  # a lesson takes these two from here
from utils.run_files import save_state as save_state
from utils.run_files import write_adapter_config, write_beside
from utils.saving import AdapterLayout, check_adapter, check_model, free_bytes, holding_signals
from utils.saving import has_weights, keep_unchecked, move_into_place, plain_name, share

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
            The facts about the strategy are read from them, not from the launch config.
        config: the script's Config, with per_device_train_batch_size, gradient_accumulation_steps,
            output_dir and hub_model_id.
        max_steps: number of updates.
        num_rows: number of training rows, which make an epoch; infinity if it is unknown.
    """

    def __init__(self, accelerator, model, config, max_steps, num_rows):
        check_sharding(accelerator, model)
        self.accelerator, self.model, self.config = accelerator, model, config
        self.max_steps = max_steps
        rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
        self.epochs_per_update = rows * accelerator.num_processes / num_rows
        self.updates, self.evaluations, self.bar = [], [], None
        wanted, epochs = vars(config), max_steps * self.epochs_per_update
        given = wanted.get("num_train_epochs", epochs)
        if wanted.get("max_steps", -1) < 1 and abs(epochs - given) > self.epochs_per_update:
            say(
                f"--num_train_epochs is {given:g}, but the training loader holds {epochs:.4g} "
                "epoch(s)."
            )

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
        self.check_gradients()
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

    def check_gradients(self):
        """Fail if the gradient norm was 0 in each of the first updates: then nothing is trained."""
        count, norms = len(self.updates), [one.get("grad_norm") for one in self.updates[:3]]
        if count == min(3, self.max_steps) and not any(norm != 0 for norm in norms):
            self.close()
            fail_together(
                self.accelerator,
                f"the gradient norm is 0 in the first {count} update(s), so no parameter is "
                "trained: check that compute_loss depends on the trainable parameters, and that "
                "the batches have labels",
            )

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
        # `collect_metrics` leaves this time out of the seconds of the training
        self.updates[-1]["evaluation_seconds"] = time.perf_counter() - self.logged_at
        last = {name: self.updates[-1][name] for name in ("step", "epoch")}
        scores = {name: as_number(score) for name, score in scores.items()}
        self.evaluations.append(last | scores)
        if self.accelerator.is_main_process:
            told = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
            tqdm.write(f"held-out after epoch {last['epoch']:.4g}: {told}")

    def collect_metrics(self, tracker, before, after):
        """Return the content of metrics.json. Collective: every process must call it.

        "target_tokens" and "input_tokens" of the updates count the tokens of all processes, without
        padding.

        Args:
            tracker: a `MemoryTracker` that has measured the phase train.
            before, after: name -> held-out score, before and after the training. A name that is
                missing before is recorded as NaN there.
        """
        accelerator, updates = self.accelerator, self.updates
        unwrapped = accelerator.unwrap_model(self.model)
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
            "config": asdict(self.config),
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
                name: {"before": as_number(before.get(name, math.nan)), "after": as_number(score)}
                for name, score in after.items()
            },
            **tokens,
            "train_seconds": seconds,
        }
        if "input_tokens" in tokens:
            metrics["tokens_per_second"] = tokens["input_tokens"] / seconds
        return metrics | {"memory": tracker.gather()}

    def finish(self, metrics, samples=()):
        """Print samples and results, end the process group, push to the Hub if asked.

        Every process calls it. The files are pushed if `config.hub_model_id` names a repository.

        Args:
            metrics: from `collect_metrics`; "saved" was added when the files were written.
            samples: (prediction, label) pairs of held-out rows. Up to ten are printed.
        """
        is_main_process = self.accelerator.is_main_process
        if is_main_process:
            print_samples(samples)
            print_scores(metrics)
            print_saved(self.config, metrics)
        end_run(self.accelerator)
        if is_main_process and self.config.hub_model_id:  # alone: a long upload blocks no other
            push_to_hub(self.config)


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


# What is left behind ------------------------------------------------------------------------------
class WeightFiles:
    """The weights that a run saves: under which keys, with which shapes, and how they are written.

    Made from the model before `prepare`, while every process has the full model. After `prepare`
    PEFT would read shards, or wait for processes that do not take part.

    Stops the run if a trainable parameter would not be saved, or if the disk has too little space.

    Args:
        accelerator: made by `start_accelerator`.
        config: its output_dir and overwrite_output_dir are read.
        model: a model of PEFT, of which the adapter is saved; or a model that is saved in full.
        tokenizer: is saved beside the weights; None saves none.
        checkpoints: number of checkpoints that are on the disk at once.
        state_bytes: bytes per trainable parameter of a checkpoint, beside the weights.
    """

    def __init__(self, accelerator, config, model, tokenizer, checkpoints=0, state_bytes=0):
        self.accelerator, self.model, self.tokenizer = accelerator, model, tokenizer
        self.config, self.target = config, Path(config.output_dir)
        self.is_adapter = hasattr(model, "peft_config")
        self.base = model.get_base_model() if self.is_adapter else model
        self.base_class = type(self.base)  # FSDP2 replaces it by one of its own
        self.adapter = AdapterLayout(model) if self.is_adapter else None
        self.total_parameters = count_elements(model)
        weights = () if self.is_adapter else model.parameters()
        needed = sum(math.prod(full_shape(one)) * one.element_size() for one in weights)
        needed += self.adapter.num_bytes if self.is_adapter else 0
        state = state_bytes * count_elements(model, trainable_only=True)
        needed, free = needed + checkpoints * (needed + state), free_bytes(self.target)
        if needed > free:
            refuse(
                f"--output_dir {self.target}: saving needs {needed:,} bytes, and {free:,} are free "
                "on that disk: free some, or give a folder on another one"
            )

    def write(self, folder, state_dict):
        """Write the weights, what loads them, and the tokenizer. For one process.

        Args:
            folder: where to write.
            state_dict: name -> trained parameter, in full; for a full model all of its state.
        """
        state_dict = {plain_name(name): value for name, value in state_dict.items()}
        if self.is_adapter:
            tensors = self.adapter.file_content(state_dict)
            save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
            write_adapter_config(folder, self.model.peft_config["default"], self.base_class)
            if getattr(self.base, "generation_config", None) is not None:
                self.base.generation_config.save_pretrained(folder)  # names the end tokens
        else:
            self.model.save_pretrained(folder, state_dict=state_dict)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        share(folder)

    def check(self, folder, learning_rates=()):
        """Open the written files and fail unless they hold all that was trained."""
        if self.is_adapter:
            check_adapter(folder, self.adapter, learning_rates)
        else:
            check_model(folder, self.total_parameters)

    def new_folder(self, metrics, progress, with_log=True, overwrite=False):
        """Return `new_folder` for this run. With `overwrite` output_dir may hold files already."""
        overwrite = overwrite or self.config.overwrite_output_dir
        target = SimpleNamespace(output_dir=self.target, overwrite_output_dir=overwrite)
        return new_folder(target, metrics, self, progress, with_log)

    def try_writing(self, state_dict):
        """Write the weights as `write` does, check and delete them, so that a fault shows early.

        Call it after an evaluation, as at the end of the run: after an update DeepSpeed still has
        small parameters gathered, and a script that does not gather would pass.
        """
        if not self.accelerator.is_main_process:
            return
        folder = self.target.parent / f".{self.target.name}.{os.getpid()}.trial"
        try:
            folder.mkdir(parents=True)
            self.write(folder, state_dict)
            self.check(folder)
        except Exception as error:  # of the disk, PEFT, transformers or safetensors
            fail(f"a trial before the training could not save the weights: {first_line(error)}")
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def new_folder(config, metrics=None, files=None, progress=None, with_log=True):
    """Yield a folder to save the weights into; at the end it becomes `config.output_dir`.

    With metrics the weights are checked after the body, and the model card, memory.png, losses.png,
    log.jsonl and metrics.json are written beside them. Weights that were written are kept, whatever
    fails: as `<output_dir>.unchecked` if the body or the check fails, in the hidden folder if
    something fails after that. The console names the folder. Only if the weights themselves cannot
    be written, as on a full disk, nothing is left. SIGINT and SIGTERM are handled after the body.
    With overwrite_output_dir the files that an earlier run lists in its metrics.json are replaced;
    others stay.

    Args:
        config: its output_dir and overwrite_output_dir are read.
        metrics: from `Progress.collect_metrics`.
        files: the run's `WeightFiles`, which check what was written.
        progress: the run's `Progress`, for log.jsonl and losses.png.
        with_log: write log.jsonl; a script that writes it while it trains does not need this.
    """
    target = Path(config.output_dir)
    folder = target.parent / f".{target.name}.{os.getpid()}"
    # without metrics nothing was trained, and an interrupt may end it at once
    with holding_signals() if metrics is not None else contextlib.nullcontext():
        written = False
        try:
            folder.mkdir(parents=True)
            yield folder
            written = True
            if metrics is not None:
                files.check(folder, metrics.get("learning_rates", ()))
        except BaseException as error:
            kept = None
            if metrics is not None and (written or has_weights(folder)):
                kept = keep_unchecked(folder, target, metrics, progress, with_log)
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError | SafetensorError) or "(os error " in str(error):
                done = "read back" if written else "written"
                told = (
                    f"not all files could be {done}" if kept else f"nothing was saved in {target}"
                )
                fail(f"{told}: {first_line(error)}")
            raise
        try:
            if metrics is not None:
                write_beside(folder, metrics, progress, with_log)
            move_into_place(folder, target, config.overwrite_output_dir)
        except Exception as error:  # a plot, a full disk, a folder that cannot be replaced
            fail(f"{target} was not completed, the weights are in {folder}: {first_line(error)}")


# The end ------------------------------------------------------------------------------------------
def print_samples(samples):
    """Print up to ten of the (prediction, label) pairs; nothing if there are none."""
    if samples:
        print(f"{min(10, len(samples))} of {len(samples)} held-out rows:")
        width = max(len(repr(prediction)) for prediction, _ in samples[:10])
        for prediction, label in samples[:10]:
            print(f"  prediction {prediction!r:<{width}}  label {label!r}")


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
    print(f"Load the result with:\n{load_lines(folder, folder, metrics)}", flush=True)


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
    stop_heartbeat()
    if torch.distributed.is_initialized():
        ENDED.append(torch.distributed.group.WORLD)
    if wrapped := getattr(accelerator, "deepspeed_engine_wrapped", None):
        # left alive, it sometimes aborts the process at exit
        wrapped.engine.destroy()
    accelerator.end_training()
