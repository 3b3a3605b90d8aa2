"""What a run of chat_sft takes over from the checkpoint that it resumes."""

from pathlib import Path

from utils.checkpoint import CheckpointError, check_same_run, checkpoints, find_checkpoint
from utils.checkpoint import read_state, remove_checkpoints
from utils.errors import refusing, say
from utils.launch import launched_precision, launched_strategy
from utils.saving import earlier_files

START = {"step": 0, "updates": [], "evaluations": [], "seconds": 0.0, "identity": {}}
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
)
FREE_PREFIXES = ("log", "eval", "save", "push", "hub")
# what an update was in checkpoints written before an update became a dict
CURVES = ("loss", "learning_rate", "grad_norm", "target_tokens", "input_tokens")


def find_run(config):
    """Return the checkpoint to resume, its update and its state; stop if it cannot be read.

    Returns:
        folder: the checkpoint, or None for a new run.
        step: number of updates made.
        state: step, updates, evaluations, seconds and identity, as `save_checkpoint` got them. For
            a new run those of START.
    """
    with refusing(CheckpointError):
        folder = find_checkpoint(config.output_dir, config.resume_from_checkpoint)
        if folder:
            state = read_state(folder, needed=tuple(START))
            return folder, state["step"], state
    if config.resume_from_checkpoint.lower() == "true":
        say(f"{config.output_dir} holds no complete checkpoint: the run starts from the beginning.")
    return None, 0, START


def identify(config, accelerator, data):
    """Return what a run must have in common with the one whose checkpoint it resumes.

    Args:
        data: `Data`, of which the line that counts the documents, with their checksum, and the date
            in the chat template are read.
    """
    dated = {"template_date": data.template_date} if data.template_date else {}
    free = {name for name in vars(config) if name in FREE or name.startswith(FREE_PREFIXES)}
    free |= set() if config.dataset_config else {"dataset_config"}  # checkpoints from before it
    if config.lr_scheduler_type.startswith("constant") and not config.warmup_ratio:
        free |= {"max_steps", "num_train_epochs"}  # no rate depends on the number of updates
    return (
        {name: value for name, value in vars(config).items() if name not in free}
        | dated
        | {
            "strategy": launched_strategy(),
            "num_processes": accelerator.num_processes,
            "data": data.facts,
            "mixed_precision": launched_precision(),
        }
    )


def check_resumed(folder, state, identity, max_steps):
    """Stop if this run cannot resume the checkpoint.

    Args:
        folder, state: from `find_run`; without a folder nothing is checked.
        identity: from `identify`, of this run.
        max_steps: number of updates after which this run ends.
    """
    if folder is None:
        return
    with refusing(CheckpointError):
        check_same_run(folder, state["identity"], identity)
        if state["step"] > max_steps:
            raise CheckpointError(
                f"{folder} is of update {state['step']}, and the run ends after {max_steps}: give "
                "more --max_steps"
            )


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
