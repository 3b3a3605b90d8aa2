"""The checkpoints of a run of chat_sft: when they are due, what they hold, which ones are kept."""

from functools import partial

from safetensors import SafetensorError

from utils.checkpoint import CheckpointError, keep_newest, load_checkpoint, remove_checkpoints
from utils.checkpoint import gather_trained as gather_trained  # chat_sft takes it from here
from utils.checkpoint import save_checkpoint
from utils.errors import fail, refusing
from utils.hub import push_checkpoint, start_pusher
from utils.launch import state_bytes
from utils.results import WeightFiles
from utils.chat.resuming import PER_UPDATE
from utils.chat.run_log import is_due

NOT_PUSHED = ("checkpoint-*", "runs")  # in output_dir, at the end of the run


class Checkpoints:
    """Writes the checkpoints of a run, pushes them to the Hub and removes the oldest ones.

    `last` is the newest checkpoint that is complete and kept, as a path, or None.

    Args:
        log: the run's `RunLog`. Of its config the settings of saving and the Hub are read.
        optimizer: from `prepare`.
        files: the run's `WeightFiles`.
        state: from `find_run`, with the identity of this run.
    """

    def __init__(self, log, optimizer, files, state):
        self.accelerator, self.config, self.log = log.accelerator, log.config, log
        self.optimizer, self.files, self.identity = optimizer, files, state["identity"]
        self.last = state["folder"]
        self.hub = start_pusher(self.config) if self.accelerator.is_main_process else None
        self.num_resumed = len(log.progress.updates)

    def is_due(self):
        """Return whether to save after the last update.

        The first save is a trial, so that a fault shows early: `save` removes what it wrote, unless
        --save_strategy asks for it.
        """
        is_first = len(self.log.progress.updates) == self.num_resumed + 1
        return is_first or self.is_kept()

    def is_kept(self):
        """Return whether --save_strategy asks for a checkpoint after the last update."""
        return is_due(self.config.save_strategy, self.config.save_steps, self.log.progress)

    def save(self, weights):
        """Write a checkpoint of the last update; push or remove what the settings say. Collective.

        Args:
            weights: from `gather_trained`.
        """
        folder, is_kept = self.write(weights), self.is_kept()
        self.last = folder if is_kept else self.last
        if not self.accelerator.is_main_process:
            return
        if is_kept:
            push_checkpoint(self.hub, self.config.hub_strategy, folder)
            keep_newest(self.config.output_dir, self.config.save_total_limit)
        else:
            remove_checkpoints([folder])

    def save_before_stop(self, weights):
        """Write a checkpoint of the last update and remove none. Collective."""
        self.last = self.write(weights)

    def has_last_update(self):
        """Return whether the last update is in a checkpoint that is kept."""
        step = len(self.log.progress.updates)
        return self.last is not None and self.last.name == f"checkpoint-{step}"

    def write(self, weights):
        """Write a checkpoint of the last update and return its folder; stop if that fails."""
        progress = self.log.progress
        step = len(progress.updates)
        state = {
            "updates": progress.updates,
            "evaluations": progress.evaluations,
            "seconds": self.log.seconds,
            "identity": self.identity,
            "sequences": step * self.identity[PER_UPDATE],
        }
        if not all(value.isfinite().all() for value in weights.values()):
            progress.close()
            fail(
                f"weights are NaN or infinite after update {step}: lower --learning_rate; the last "
                f"good checkpoint is {self.last or 'none'}"
            )
        write_weights = partial(self.files.write, state_dict=weights)
        try:
            return save_checkpoint(
                self.accelerator,
                self.config.output_dir,
                step,
                self.optimizer,
                state,
                write_weights,
            )
        except (OSError, SafetensorError, CheckpointError) as error:
            progress.close()
            fail(
                f"no checkpoint of update {step} could be written ({error}); the last good one is "
                f"{self.last or 'none'}"
            )

    def push_results(self):
        """Queue the files of the finished run, if --push_to_hub is given. For one process."""
        if self.hub:
            self.hub.push(self.config.output_dir, "End of training", ignore=NOT_PUSHED)

    def finish_pushing(self):
        """Wait until all is pushed. Call it after the last collective: an upload may take long."""
        if self.hub:
            self.hub.finish()


def weight_files(accelerator, config, model, tokenizer, state):
    """Return the run's `WeightFiles`. Stop if the disk has too little space for its checkpoints.

    Args:
        state: from `find_run`.
    """
    # a new checkpoint is written beside the last one, which a resumed run already has
    checkpoints = 1 if config.save_strategy == "no" or state["folder"] else 2
    of_state = state_bytes(config.optim)
    return WeightFiles(accelerator, config, model, tokenizer, checkpoints, of_state)


def load(accelerator, folder, optimizer):
    """Load weights, optimizer and random states of a checkpoint, or stop with an error.

    Call it before the first forward pass, after which some units stay gathered. The model must be
    prepared.
    """
    with refusing(CheckpointError):
        load_checkpoint(accelerator, folder, optimizer)
