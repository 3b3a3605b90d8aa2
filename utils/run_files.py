"""Write what lies beside the weights: log, plots, model card, metrics, a checkpoint's state."""

import copy
import json
import math
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from zlib import crc32

import torch

from utils.errors import or_refuse, refuse
from utils.loading import library, load_lines
from utils.plots import draw_losses, draw_memory, gpu_total


def write_beside(folder, metrics, progress, with_log):
    """Write the log, the plots, the model card and the metrics beside the weights."""
    if progress is not None:
        if with_log:
            write_log(folder / "log.jsonl", progress)
        draw_losses(progress).savefig(folder / "losses.png", format="png")
    draw_memory(metrics["memory"], gpu_total()).savefig(folder / "memory.png", format="png")
    write_metrics(folder, metrics)


def write_adapter_config(folder, peft_config, base_class):
    """Write adapter_config.json as PEFT's save_pretrained does.

    Args:
        peft_config: the adapter's config, which names the base model.
        base_class: class of the base model. Without a task type PEFT needs it to load the adapter.
    """
    peft_config, mapping = copy.copy(peft_config), None
    peft_config.inference_mode = True
    if peft_config.task_type is None:
        mapping = {"base_model_class": base_class.__name__, "parent_library": base_class.__module__}
    peft_config.save_pretrained(folder, auto_mapping_dict=mapping)


def write_log(path, progress):
    """Write a line of JSON per update and per evaluation, in their order."""
    entries = sorted((*progress.updates, *progress.evaluations), key=lambda entry: entry["step"])
    lines = [
        json.dumps({k: v if math.isfinite(v) else None for k, v in entry.items()})
        for entry in entries
    ]
    path.write_text("".join(f"{line}\n" for line in lines))


def write_metrics(folder, metrics):
    """Write README.md, the model card, and metrics.json with the size of every other file."""
    config, scores = metrics["config"], metrics["scores"]
    name = config["model_name_or_path"]
    # the Hub refuses a card whose base model is a path
    base_model = "" if Path(name).is_dir() else f"base_model: {name}\n"
    data = f" (--dataset_name `{config['dataset_name']}`)" if "dataset_name" in config else ""
    told = [
        f"Held-out {score}: {value['before']:.4f} before training, {value['after']:.4f} after.\n"
        for score, value in scores.items()
    ]
    (folder / "README.md").write_text(
        f"---\n{base_model}library_name: {library(folder)}\n---\n\n"
        f"Trained by `{Path(sys.argv[0]).name}` from `{name}`{data}, with {metrics['strategy']} on "
        f"{metrics['num_processes']} process(es), {len(metrics['losses'])} updates.\n\n"
        f"{''.join(told)}All settings and measurements are in metrics.json.\n\n"
        f"```python\n{load_lines(folder, config['output_dir'], metrics)}\n```\n"
    )
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    metrics["saved"] = {str(file.relative_to(folder)): file.stat().st_size for file in files}
    finite = {  # JSON has no NaN
        name: {when: one if math.isfinite(one) else None for when, one in score.items()}
        for name, score in scores.items()
    }
    text = json.dumps(metrics | {"scores": finite}, indent=1)
    (folder / "metrics.json").write_text(text + "\n")


# Checkpoints of the lesson about resuming ---------------------------------------------------------
def find_state(config, accelerator, rows):
    """Return the checkpoint folder to resume from, or "" for a new run, and the state in it.

    `state["run"]` holds what must be equal when the run is resumed: the number of processes, the
    precision, a checksum of the rows, and all settings but those whose names begin with a word of
    `free`. For a new run the state holds nothing else.

    Stops if checkpoints exist and none is asked for, if the state cannot be read, or if it was made
    by a run that differs.

    Args:
        config: its checkpoint_dir and resume_from_checkpoint are read. The latter is a folder, or
            "True" for the newest one.
        rows: those that are trained on and held out, anything with a `repr` that shows them.
    """
    free = ("save", "checkpoint", "resume", "output", "overwrite", "hub", "eval", "data", "model")
    run = {name: value for name, value in asdict(config).items() if not name.startswith(free)}
    run |= {name: getattr(accelerator, name) for name in ("num_processes", "mixed_precision")}
    run |= {"checksum of the rows": crc32(repr(rows).encode())}
    folders = Path(config.checkpoint_dir).glob("checkpoint-[0-9]*")
    newest = max(folders, key=lambda folder: (len(folder.name), folder.name), default="")
    wanted = config.resume_from_checkpoint
    resumed = {"true": newest, "false": ""}.get(wanted.lower(), wanted)
    if newest and not resumed:
        refuse(f"{newest} exists: give --resume_from_checkpoint True, or another --checkpoint_dir")
    if not resumed:
        return "", {"run": run}
    file = Path(resumed, "state.pt")
    culprit = f"{file} cannot be read, give the folder of another checkpoint, or True"
    # weights_only: runs no code from the file
    state = or_refuse(culprit, torch.load, file, weights_only=True, map_location="cpu")
    then = or_refuse(culprit, lambda: state["run"].get)
    changed = [f"{k} {then(k)} (now {run[k]})" for k in run if then(k, False) != run[k]]
    if changed:
        refuse(f"{resumed} was made with {', '.join(changed)}: give the same, or start a new run")
    return resumed, state


def save_state(config, step, state):
    """Write `checkpoint-<step>/state.pt` into config.checkpoint_dir. For one process.

    The folder is written under another name and renamed, so a checkpoint is complete or absent. One
    of the same step, from before the run resumed at an older checkpoint, is replaced.

    Args:
        state: what `torch.load` with `weights_only=True` can read: tensors, numbers, texts, lists,
            dicts.
    """
    folder = Path(config.checkpoint_dir, f"checkpoint-{step}")
    unfinished = folder.with_name(f"unfinished-{step}")
    unfinished.mkdir(exist_ok=True)
    file = unfinished / "state.pt"
    or_refuse(f"{file} cannot be written", torch.save, state, file)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
