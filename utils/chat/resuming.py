"""What a run of chat_sft takes over from the checkpoint that it resumes."""

import os
from pathlib import Path

from torch.optim.lr_scheduler import LambdaLR

from utils.checkpoint import CheckpointError, check_same_run, checkpoints, find_checkpoint
from utils.checkpoint import read_state, remove_checkpoints
from utils.content import content_of
from utils.environment import launched_precision, launched_strategy
from utils.errors import refusing, say
from utils.saving import earlier_files

START = {"step": 0, "updates": [], "evaluations": [], "seconds": 0.0, "identity": {}}
START |= {"sequences": 0, "folder": None}
# How an update is split among processes. A resumed run may split it in another way, if as many
# sequences are read per update.
PER_UPDATE = "sequences_per_update"
SPLIT = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_processes", "strategy")
# Settings that may differ between a run and the one whose checkpoint it resumes: they do not change
# what is trained.
FREE = (
    "output_dir",
    "resume_from_checkpoint",
    "overwrite_output_dir",
    "per_device_eval_batch_size",
    "report_to",
    "dataloader_num_workers",
    "num_samples",
    "max_new_tokens",
    "layerwise_generation",
    "gradient_checkpointing_every_n_layers",
    "gradient_checkpointing_offload",
)
FREE_PREFIXES = ("log", "eval", "save", "push", "hub")
# Settings that name files or folders -> the name of their content in a run's identity. A resumed
# run needs the same content, which may have moved.
PLACES = {
    "model_name_or_path": "model_content",
    "adapter_name_or_path": "adapter_content",
    "dataset_name": "stream_content",  # else the checksum of the documents decides
    "chat_template_format": "template_content",
}
# what an update was in checkpoints written before an update became a dict
CURVES = ("loss", "learning_rate", "grad_norm", "target_tokens", "input_tokens")


def find_run(config):
    """Return the state of the checkpoint to resume; stop if it cannot be read.

    The state is a dict. Its keys are step (number of updates made), updates, evaluations, seconds,
    identity and sequences (how many were read), as `save_checkpoint` got them, and folder: the
    checkpoint, or None for a new run. A new run gets the values of START.
    """
    with refusing(CheckpointError):
        folder = find_checkpoint(config.output_dir, config.resume_from_checkpoint)
        if folder:
            needed = ("updates", "evaluations", "seconds", "identity")
            # each machine checks all files: it may have a copy of its own
            names = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
            rank, local, processes = (int(os.environ.get(n, n != "LOCAL_RANK")) for n in names)
            state = read_state(folder, needed, rank, local)
            check_split(folder, state["identity"], config, processes)
            # older checkpoints lack it
            state.setdefault("sequences", state["step"] * per_update(config, processes))
            return state | {"folder": folder}
    if config.resume_from_checkpoint.lower() == "true":
        say(f"{config.output_dir} holds no complete checkpoint: the run starts from the beginning.")
    return dict(START)


def per_update(config, processes):
    """Return how many sequences an update reads, on all processes together."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * processes


def check_split(folder, then, config, processes):
    """Stop if an update would read more or fewer sequences than in the interrupted run.

    Args:
        then: identity of that run.
        processes: number of processes of this run.
    """
    found = per_update(config, processes)
    wanted = then.get(PER_UPDATE, found)  # older checkpoints lack it
    if wanted == found:
        return
    fits = wanted // processes
    pairs = [f"{one} and {fits // one}" for one in range(fits, 0, -1) if fits % one == 0]
    divisors = [str(one) for one in range(1, wanted + 1) if wanted % one == 0]
    if wanted % processes:
        remedy = f"launch a number of processes that divides {wanted}: {', '.join(divisors)}"
    else:
        remedy = f"give {' or '.join(pairs)}"
    raise CheckpointError(
        f"{folder} was made with {wanted} sequences per update, and --per_device_train_batch_size "
        f"{config.per_device_train_batch_size} --gradient_accumulation_steps "
        f"{config.gradient_accumulation_steps} on {processes} processes make {found}: {remedy}"
    )


def identify(config, accelerator, data):
    """Return what a run must have in common with the one whose checkpoint it resumes.

    Args:
        data: `Data`; read are the line that counts the documents, with their checksum, and the
            date in the chat template.
    """
    dated = {"template_date": data.template_date} if data.template_date else {}
    free = {name for name in vars(config) if name in FREE or name.startswith(FREE_PREFIXES)}
    free |= set() if config.dataset_config else {"dataset_config"}  # older checkpoints lack it
    if config.lr_scheduler_type.startswith("constant") and not config.warmup_ratio:
        free |= {"max_steps", "num_train_epochs"}  # no rate depends on the number of updates
    contents = {
        known: "documents"  # their checksum is in the facts
        if data.facts and place == "dataset_name"
        else content_of(getattr(config, place))
        for place, known in PLACES.items()
    }
    return {name: value for name, value in vars(config).items() if name not in free} | {
        **contents,
        **dated,
        PER_UPDATE: per_update(config, accelerator.num_processes),
        "strategy": launched_strategy(),
        "num_processes": accelerator.num_processes,
        "data": data.facts,
        "mixed_precision": launched_precision(),
    }


def by_content(then, now):
    """Return both identities without what may differ, such as names of files of the same content.

    Older checkpoints hold only the names. Then both names must lead to the same place.
    """
    then, now = dict(then), dict(now)
    if PER_UPDATE in then:
        for name in SPLIT:
            del then[name], now[name]
    else:  # an older checkpoint, which does not say which part each process holds
        del now[PER_UPDATE]
    for place, known in PLACES.items():
        old, new = then.pop(known, None), now.pop(known)
        was, is_now = then.get(place, ""), now.get(place, "")
        is_known = old == new or (old is None and (new == "documents" or same_place(was, is_now)))
        if is_known:
            then.pop(place, None), now.pop(place, None)
        elif old is not None:
            then[place], now[place] = f"{was} with content {old}", f"{is_now} with content {new}"
    # a setting that a checkpoint does not know was off, or empty
    return [{name: one[name] for name in one if one[name] not in ("", None)} for one in (then, now)]


def same_place(one, other):
    """Return whether two names are equal, or lead to the same file or folder."""
    return one == other or (Path(one).exists() and Path(one).resolve() == Path(other).resolve())


def check_resumed(config, accelerator, data, state):
    """Return this run's identity (see `identify`); stop if it cannot resume the checkpoint.

    Args:
        data: the run's `Data`.
        state: from `find_run`; a new run is not checked.
    """
    identity, folder, max_steps = (
        identify(config, accelerator, data),
        state["folder"],
        data.max_steps,
    )
    if folder is None:
        return identity
    with refusing(CheckpointError):
        check_same_run(folder, *by_content(state["identity"], identity))
        if state["step"] > max_steps:
            raise CheckpointError(
                f"{folder} is of update {state['step']}, and the run ends after {max_steps}: give "
                "more --max_steps"
            )
    then = state["identity"]
    if names := [name for name in SPLIT if then[name] != identity[name]]:
        told = ", ".join(f"{name} {then[name]} (now {identity[name]})" for name in names)
        say(
            f"{folder} was made with {told}: every update reads the same sequences, but the run is "
            "not bit-equal to one that was not stopped, as sums are rounded in another order and "
            "dropout draws other numbers."
        )
    return identity


def move_schedule(scheduler, step):
    """Return a schedule of the learning rate that goes on after `step` updates.

    The rate depends on the number of updates alone, so a checkpoint need not hold it.

    Args:
        scheduler: from `get_scheduler`, at the first update.
    """
    return LambdaLR(scheduler.optimizer, scheduler.lr_lambdas, last_epoch=step - 1)


def say_resumed(state, max_steps):
    """Print which checkpoint the run resumes."""
    say(f"Resumed from {state['folder']}, after update {state['step']} of {max_steps}.")


def restore_progress(progress, state):
    """Give a `Progress` the updates and evaluations of the checkpoint's state."""
    for step, update in enumerate(state["updates"], start=1):
        if isinstance(update, list):
            update = dict(zip(CURVES, update, strict=True))
            update |= {"step": step, "epoch": step * progress.epochs_per_update}
        progress.updates.append(update)
    progress.evaluations += state["evaluations"]


def remove_earlier_run(output_dir):
    """Delete the checkpoints and files of the run that a new one replaces. For one process."""
    remove_checkpoints(checkpoints(output_dir))
    for name in (*earlier_files(Path(output_dir)), "metrics.json"):
        Path(output_dir, name).unlink(missing_ok=True)
