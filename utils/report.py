"""Write what a run leaves behind, open it again before calling it saved, and say so on the console.

This file imports no other file of the project and can be copied along with a script.
"""

import contextlib
import io
import json
import math
import os
import shutil
import sys
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate.utils import DistributedType, gather_object
from huggingface_hub import HfApi
from safetensors import SafetensorError, safe_open
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import ShardingStrategy
from torch.distributed.tensor import DTensor
from tqdm import tqdm

LIBRARIES = ("torch", "accelerate", "deepspeed", "peft", "transformers", "datasets", "bitsandbytes")
# Process groups that have ended, kept until the interpreter ends. If the last reference to a gloo
# group goes right after a collective, torch holds the GIL and waits for a thread of the group, and
# that thread may be waiting for the GIL.
ENDED = []


def fail(message):
    """Print `error: message` and end this process with exit code 1; the launcher then ends the others."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(1)


def fail_together(accelerator, message):
    """Print `error: message` from the main process and end every process with exit code 1. Every process calls it."""
    if accelerator.is_main_process:
        fail(message)
    raise SystemExit(1)


def full_shape(parameter):
    """Return the whole shape of a parameter, of which a sharding strategy leaves a process only a slice."""
    if hasattr(parameter, "ds_shape"):  # ZeRO-3
        return tuple(parameter.ds_shape)
    if hasattr(
        parameter, "_unpadded_unsharded_size"
    ):  # FSDP1 flattens the parameters of a unit into one
        return tuple(parameter._unpadded_unsharded_size)
    return tuple(parameter.shape)


def held_part(parameter):
    """Return the tensor of a parameter that this process holds: all of it, or its shard with its padding."""
    if hasattr(parameter, "ds_tensor"):  # ZeRO-3
        return parameter.ds_tensor
    if hasattr(parameter, "_local_shard"):  # FSDP1
        return parameter._local_shard
    return (
        parameter.to_local() if isinstance(parameter, DTensor) else parameter.data
    )  # FSDP2, or whole


def count_bytes(tensors):
    """Return dtype -> bytes of the tensors, of which each is a (dtype, number of elements)."""
    sizes = {}
    for dtype, numel in tensors:
        name = str(dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + numel * dtype.itemsize
    return sizes


def bytes_held(parameters):
    """Return, per process, dtype -> bytes of the parameters that it holds, and dtype -> bytes of whole parameters."""
    parts = list(map(held_part, parameters))
    held = gather_object([count_bytes((part.dtype, part.numel()) for part in parts)])
    return held, count_bytes((p.dtype, math.prod(full_shape(p))) for p in parameters)


def count_elements(model, trained_alone=False):
    """Return how many numbers a model has; of a 4-bit weight, which packs several into one element, all of them."""
    count = sum(
        math.prod(full_shape(p)) for p in model.parameters() if p.requires_grad or not trained_alone
    )
    if not trained_alone:
        for module in model.modules():
            if getattr(module, "quant_state", None) is not None:  # of a bitsandbytes.nn.Linear4bit
                packed = (
                    math.ceil(module.quant_state.shape.numel() / 2) // module.quant_storage.itemsize
                )
                count += module.quant_state.shape.numel() - packed
    return count


def check_sharding(accelerator, model):
    """Print how many bytes of parameters each process holds, and fail where a strategy that shards has not sharded.

    Read from the live parameters, for libraries replicate some of them in silence. Collective.
    """
    parameters = list(accelerator.unwrap_model(model).parameters())
    held, whole = bytes_held(parameters)
    total, most = sum(whole.values()), max(sum(sizes.values()) for sizes in held)
    sizes = [
        ", ".join(f"{dtype} {size:,}" for dtype, size in sorted(one.items()))
        for one in (*held, whole)
    ]
    accelerator.print(
        f"bytes of parameters per process: {' | '.join(sizes[:-1])}; of the whole model: {sizes[-1]}"
    )
    if (
        most > 1.1 * total / shards(accelerator) + 2**16
    ):  # the rest is padding, of which small models have much
        fail_together(
            accelerator,
            f"a process holds {most:,} of {total:,} bytes of parameters, and {strategy(accelerator)} should spread "
            f"them over {shards(accelerator)}: check the wrap policy, and bnb_4bit_quant_storage of 4-bit weights",
        )


def save_optimizer_once(accelerator, model, optimizer):
    """Have the optimizer's state saved, to memory, right after its first step, and fail where that cannot be done.

    bitsandbytes' states are not tensors as the strategies know them; it is better to see that in the first minute than
    at the first checkpoint. torch's and DeepSpeed's own need no such trial.
    """
    inner = stepping_optimizer(optimizer)
    if not type(inner).__module__.startswith("bitsandbytes"):
        return

    def save(*_):
        hook.remove()
        try:
            state, buffer = optimizer_state(accelerator, model, optimizer), io.BytesIO()
            torch.save(state, buffer)
            buffer.seek(0)
            if (
                accelerator.distributed_type != DistributedType.DEEPSPEED
            ):  # which pickles objects of its own
                torch.load(buffer, weights_only=True)
        except Exception as error:  # whatever a strategy raises about a state that it does not know
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            fail(
                f"the state of {type(inner).__name__} cannot be saved under {strategy(accelerator)}, so that no "
                f"checkpoint could be: give --optim adamw_torch [{reason}]"
            )

    hook = inner.register_step_post_hook(save)


def stepping_optimizer(optimizer):
    """Return the optimizer that steps, below accelerate's wrapper and DeepSpeed's."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def optimizer_state(accelerator, model, optimizer):
    """Return what a checkpoint of the optimizer holds under the strategy. Collective."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return accelerator.deepspeed_engine_wrapped.engine.optimizer.state_dict()
    if strategy(accelerator) == "fsdp1":
        state = FSDP.optim_state_dict(model, optimizer.optimizer)
        if any(
            isinstance(value, dict) for entry in state["state"].values() for value in entry.values()
        ):
            raise ValueError(
                "FSDP gathers no tensors that lie in a dict, each process would save its slice alone"
            )
        return state
    return optimizer.state_dict()


def shards(accelerator):
    """Return over how many processes the strategy spreads the parameters; 1 where each holds all of them."""
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version == 2:
            mesh = accelerator.torch_device_mesh
            return (
                accelerator.num_processes
                if mesh is None
                else accelerator.parallelism_config.dp_shard_size
            )
        if plugin.sharding_strategy in (
            ShardingStrategy.FULL_SHARD,
            ShardingStrategy.SHARD_GRAD_OP,
        ):
            return accelerator.num_processes
    return accelerator.num_processes if strategy(accelerator) == "zero3" else 1


def begin_log(output_dir, start):
    """Open log.jsonl in the folder, without the lines of updates that a run from update `start` on makes again."""
    path = Path(output_dir, "log.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines(keepends=True) if start and path.is_file() else []
    path.write_text(
        "".join(
            line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= start
        )
    )


def note(accelerator, output_dir, values):
    """Write measurements, among them `step`, to the console, to log.jsonl and to the trackers."""
    accelerator.log(values, step=values["step"])
    if accelerator.is_main_process:
        with Path(output_dir, "log.jsonl").open("a") as file:
            file.write(json.dumps(values) + "\n")
        tqdm.write(", ".join(f"{name} {value:.5g}" for name, value in values.items()))


def read_numbers(device, *values):
    """Return the numbers that lie in tensors on the device, as a list of floats.

    Every read of a tensor on a GPU makes the CPU wait until the GPU has done all its work. So read
    all numbers of an update at once. Collective under FSDP2, where a value is a DTensor: every
    process must call it.

    Args:
        device: where the tensors lie; others are moved there.
        values: tensors of no or one dimension, DTensors of FSDP2 among them, or numbers.
    """
    values = [value.full_tensor() if isinstance(value, DTensor) else value for value in values]
    values = [torch.as_tensor(value, dtype=torch.float64, device=device) for value in values]
    return torch.hstack(values).tolist()


def collect_metrics(accelerator, model, config, tracker, score, updates, metric="accuracy"):
    """Return the content of metrics.json. Collective: every process must call it.

    Args:
        accelerator, model: as prepared; what is said of the strategy is read from them, not from the launch config.
        config: the script's Config.
        tracker: a `MemoryTracker` that has measured the phase train.
        score: accuracy on the held-out rows before and after training, 0 to 1; or, under its name, another measure.
        updates: for each, its loss (mean per target token), its learning rate, its gradient's norm before clipping,
            and how many tokens were targets and how many were input, in all processes and without padding.
    """
    parameters = list(accelerator.unwrap_model(model).parameters())
    engine = engine_facts(accelerator, parameters)
    *curves, target_tokens, input_tokens = zip(*updates)
    seconds = tracker.seconds["train"]
    return {
        "config": asdict(config),
        "versions": {library: version(library) for library in LIBRARIES if find_spec(library)},
        "strategy": strategy(accelerator),
        "offload": engine["offload_param"]
        if engine["offload_optimizer"] == "none"
        else engine["offload_optimizer"],
        "device": torch.cuda.get_device_name()
        if accelerator.device.type == "cuda"
        else accelerator.device.type,
        "num_processes": accelerator.num_processes,
        "mixed_precision": mixed_precision(accelerator),
        "trained_dtype": str(trained_dtype(accelerator, parameters)).removeprefix("torch."),
        "engine": engine,
        "trainable_parameters": count_elements(accelerator.unwrap_model(model), trained_alone=True),
        "total_parameters": count_elements(accelerator.unwrap_model(model)),
        # null for what is no number, as the gradient norm of an update that fp16 overflowed: JSON has no other word
        **{
            key: [value if math.isfinite(value) else None for value in values]
            for key, values in zip(("losses", "learning_rates", "grad_norms"), curves)
        },
        "score": {"metric": metric, "before": score[0], "after": score[1]},
        "target_tokens": sum(target_tokens),
        "input_tokens": sum(input_tokens),
        "train_seconds": seconds,
        "tokens_per_second": sum(input_tokens) / seconds,
        "memory": tracker.gather(),
    }


def strategy(accelerator):
    """Return "single", "ddp", "zero1", "zero2", "zero3", "fsdp1" or "fsdp2"."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"zero{accelerator.deepspeed_engine_wrapped.engine.zero_optimization_stage()}"
    if accelerator.distributed_type == DistributedType.FSDP:
        return f"fsdp{accelerator.state.fsdp_plugin.fsdp_version}"
    return "single" if accelerator.distributed_type == DistributedType.NO else "ddp"


def mixed_precision(accelerator):
    """Return "no", "bf16" or "fp16", from DeepSpeed's engine where it does the casting."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return accelerator.mixed_precision
    engine = accelerator.deepspeed_engine_wrapped.engine
    return "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "no"


def trained_dtype(accelerator, parameters):
    """Return the dtype of the values that the optimizer steps: under DeepSpeed, of the engine's master copy."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return next(p.dtype for p in parameters if p.requires_grad)
    zero = accelerator.deepspeed_engine_wrapped.engine.optimizer
    stage3 = hasattr(zero, "fp32_partitioned_groups_flat")
    return (zero.fp32_partitioned_groups_flat if stage3 else zero.single_partition_of_fp32_groups)[
        0
    ].dtype


def engine_facts(accelerator, parameters):
    """Return what the live optimizer and engine say of themselves. Collective.

    Keys: optimizer (class name), adamw_mode, offload_optimizer and offload_param ("none", "cpu", "nvme"),
    parameters_held (per process: how many elements of the parameters it holds, padding included), bytes_held (per
    process: dtype -> bytes), frozen_gradients (how many frozen parameters have storage for a gradient anywhere).
    """
    optimizer = stepping_optimizer(accelerator._optimizers[0])
    facts = {"offload_optimizer": "none", "offload_param": "none"}
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        engine = accelerator.deepspeed_engine_wrapped.engine
        for part, offload in (
            ("optimizer", engine.zero_offload_optimizer()),
            ("param", engine.zero_offload_param()),
        ):
            facts[f"offload_{part}"] = "none" if offload is None else str(offload.device)
    elif (
        accelerator.device.type != "cpu" and held_part(parameters[0]).device.type == "cpu"
    ):  # FSDP's
        facts = {"offload_optimizer": "cpu", "offload_param": "cpu"}
    gradients = sum(not p.requires_grad and p.grad is not None for p in parameters)
    return facts | {
        "optimizer": type(optimizer).__name__,
        "adamw_mode": optimizer.adam_w_mode if hasattr(optimizer, "adam_w_mode") else True,
        "parameters_held": gather_object([sum(held_part(p).numel() for p in parameters)]),
        "bytes_held": bytes_held(parameters)[0],
        "frozen_gradients": sum(gather_object([gradients])),
    }


@contextlib.contextmanager
def new_folder(config):
    """Yield a folder to write into that becomes `config.output_dir` when the body ends well, and vanishes when not.

    With overwrite_output_dir the files that an earlier run lists in its metrics.json give way; others stay. A full
    disk, and whatever else the system refuses, is one line `error: ...` and leaves output_dir as it was.
    """
    target = Path(config.output_dir)
    folder = target.parent / f".{target.name}.{os.getpid()}"
    complete = False
    try:
        folder.mkdir(parents=True)
        yield folder
        complete = True
        if target.exists() and not config.overwrite_output_dir:
            spare = folder.replace(target.with_name(f"{target.name}.{os.getpid()}"))
            fail(f"{target} was made by somebody else during the run, whose results are in {spare}")
        if target.exists():
            for name in (*earlier_files(target), "metrics.json"):
                (target / name).unlink(missing_ok=True)
            for file in sorted(file for file in folder.rglob("*") if file.is_file()):
                (target / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
                file.replace(target / file.relative_to(folder))
            shutil.rmtree(folder)
        else:
            folder.replace(target)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        if complete:  # written and checked, but not to be moved: it stays where it is
            fail(f"{target} could not be replaced, the run is in {folder}: {error}")
        fail(f"nothing was saved in {target}: {error}")
    finally:
        if not complete:
            shutil.rmtree(folder, ignore_errors=True)


def earlier_files(target):
    """Return the files that the run before listed as its own; none in an empty folder."""
    metrics = target / "metrics.json"
    return json.loads(metrics.read_text())["saved"] if metrics.is_file() else ()


def name_in_file(name):
    """Return the key that PEFT's files have for a trained parameter: its name without the adapter's and wrappers'."""
    for part in (
        "_fsdp_wrapped_module.",
        "_checkpoint_wrapped_module.",
        ".modules_to_save.default",
        ".default",
    ):
        name = name.replace(part, "")
    return name


def check_adapter(folder, trained, learning_rates):
    """Open the written adapter again and fail unless it holds all that was trained.

    Args:
        folder: where `save_pretrained` wrote adapter_model.safetensors.
        trained: name -> parameter, of the model before FSDP1 flattened it, for what was trained.
        learning_rates: those of all updates; where one is above 0 every lora_B must have left its start, which is 0.
    """
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        keys = set(file.keys())
        for name, parameter in trained.items():
            key = name_in_file(name)
            if key not in keys:
                fail(
                    f"the written adapter lacks {key}: every process must gather it before one saves"
                )
            tensor = file.get_tensor(key)
            if tuple(tensor.shape) != full_shape(parameter):
                fail(
                    f"the written adapter's {key} is {tuple(tensor.shape)}, not {full_shape(parameter)}: gather it"
                )
            if not torch.isfinite(tensor).all():
                fail(
                    f"the written adapter has values in {key} that are no numbers: lower --learning_rate"
                )
            if "lora_B" in key and any(learning_rates) and not tensor.any():
                fail(f"the written adapter has {key} at its start, 0: it was not trained")


def check_model(folder, num_elements):
    """Open the written model again and fail unless its files hold every element of the model, and each a number."""
    found = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                tensor = file.get_tensor(key)
                found += tensor.numel()
                if not torch.isfinite(tensor).all():
                    fail(
                        f"the written model has values in {key} that are no numbers: lower --learning_rate"
                    )
    if found < num_elements:  # buffers that are saved count on top
        fail(
            f"the written model holds {found} of {num_elements} elements: every process must gather before one saves"
        )


def write_metrics(folder, metrics):
    """Write README.md, the model card, and metrics.json with the size of every other file in it."""
    config, score = metrics["config"], metrics["score"]
    name = config["model_name_or_path"]
    base_model = (
        "" if Path(name).is_dir() else f"base_model: {name}\n"
    )  # the Hub refuses a card with a path
    columns = (
        f", column `{config['label_column']}` from `{config['text_column']}`"
        if "label_column" in config
        else ""
    )
    measure = "exact-match accuracy" if score["metric"] == "accuracy" else score["metric"]
    held_out = ""
    if score["after"] is not None:
        held_out = f"On held-out rows {measure}: {score['before']:.4f} before, {score['after']:.4f} after. "
    (folder / "README.md").write_text(
        f"---\n{base_model}library_name: {library(folder)}\n---\n\n"
        f"Trained by `{Path(sys.argv[0]).name}` from `{config['model_name_or_path']}` on `{config['dataset_name']}`"
        f"{columns}: {metrics['strategy']} on {metrics['num_processes']} process(es), {len(metrics['losses'])} "
        f"updates.\n\n{held_out}"
        "All settings and measurements are in metrics.json.\n\n"
        f"```python\n{load_lines(folder, config['output_dir'], config)}\n```\n"
    )
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    metrics["saved"] = {str(file.relative_to(folder)): file.stat().st_size for file in files}
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")


def library(folder):
    """Return the library that loads what is in the folder."""
    return "peft" if (folder / "adapter_config.json").is_file() else "transformers"


def load_lines(folder, output_dir, config):
    """Return the lines of Python that load what was saved, on a base in 4 bits where it was trained on such a one."""
    if library(folder) == "peft":
        task = json.loads((folder / "adapter_config.json").read_text())["task_type"]
        name = "AutoPeftModelForSeq2SeqLM" if task == "SEQ_2_SEQ_LM" else "AutoPeftModelForCausalLM"
    else:
        name = json.loads((folder / "config.json").read_text())["architectures"][0]
    lines, options = [f"from {library(folder)} import {name}"], f'"{output_dir}"'
    if config.get("use_4bit_quantization", "bnb_4bit_quant_storage" in config):
        kind, nested = (
            config.get("bnb_4bit_quant_type", "nf4"),
            config.get("use_nested_quant", True),
        )
        lines += [
            "from transformers import BitsAndBytesConfig",
            f'four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="{kind}", '
            f"bnb_4bit_use_double_quant={nested},",
            f'                          bnb_4bit_compute_dtype="{config["dtype"]}")',
        ]
        options += f', quantization_config=four, dtype="{config["dtype"]}"'
    return "\n".join([*lines, f"model = {name}.from_pretrained({options})"])


def print_results(config, metrics, predictions, labels):
    """Print the score, ten predictions beside their labels, what was saved with its bytes, and how to load it."""
    score = metrics["score"]
    print(
        f"accuracy={score['after']:.4f} on {len(labels)} held-out rows (before training {score['before']:.4f})"
    )
    width = max(len(repr(prediction)) for prediction in predictions[:10])
    for prediction, label in zip(predictions[:10], labels[:10]):
        print(f"  prediction {prediction!r:<{width}}  label {label!r}")
    print_saved(config, metrics)


def print_saved(config, metrics):
    """Print what was saved with its bytes, and how to load it."""
    folder = Path(config.output_dir)
    print(f"saved in {folder}:")
    for name, size in metrics["saved"].items():
        print(f"  {size:>12,} bytes  {name}")
    print(load_lines(folder, folder, vars(config)), flush=True)


def push_to_hub(config):
    """Upload output_dir to config.hub_model_id, made private where it is new, or fail with a sentence."""
    hub = HfApi()
    try:
        hub.create_repo(config.hub_model_id, private=True, exist_ok=True)
        print(
            "pushed to",
            hub.upload_folder(repo_id=config.hub_model_id, folder_path=config.output_dir).repo_url,
        )
    except Exception as error:  # no network, no token, no rights: the files stay where they are
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        fail(
            f"not pushed to {config.hub_model_id}: {reason}. Nothing is lost: "
            f"`hf upload {config.hub_model_id} {config.output_dir}` does it later"
        )


def end_run(accelerator):
    """End trackers, engine and process group. Every process calls it."""
    accelerator.wait_for_everyone()
    if torch.distributed.is_initialized():
        ENDED.append(torch.distributed.group.WORLD)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.deepspeed_engine_wrapped.engine.destroy()  # left alive, it now and then aborts the process at exit
    accelerator.end_training()


def finish_run(accelerator, config, metrics, predictions, labels):
    """Print the results, push them where config.hub_model_id says so, end the process group. Every process calls it.

    Args:
        predictions, labels: texts, of all held-out rows.
    """
    is_main_process = accelerator.is_main_process
    if is_main_process:
        print_results(config, metrics, predictions, labels)
    end_run(accelerator)
    if (
        is_main_process and config.hub_model_id
    ):  # alone: a long upload must not run into a collective's time limit
        push_to_hub(config)
