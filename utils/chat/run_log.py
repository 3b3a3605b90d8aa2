"""Log a run while it trains: to the console, to log.jsonl and to accelerate's trackers."""

import json
import math
import sys
import time
from pathlib import Path

from tqdm import tqdm

from utils.environment import launched_precision
from utils.errors import fail_together, say
from utils.chat.flops import flop_per_token as flop_per_token  # chat_sft takes it from here
from utils.chat.flops import peak_flop_per_second


def is_due(strategy, every, progress):
    """Return whether something is due after the last update.

    Args:
        strategy: "steps": after every `every` updates and the last one; "epoch": after each epoch
            and the last update; "no": never.
        progress: the run's `Progress`.
    """
    step = len(progress.updates)
    is_last = step == progress.max_steps
    if strategy == "epoch":
        return progress.ended_epoch() or is_last
    return strategy == "steps" and (step % every == 0 or is_last)


def tracker_options(config):
    """Return the arguments of the Accelerator for the trackers that --report_to names."""
    trackers = tracker_names(config.report_to)
    return {"log_with": trackers, "project_dir": f"{config.output_dir}/runs"}


def tracker_names(report_to):
    """Return the trackers that --report_to names, comma separated; None for none."""
    return None if report_to == "none" else [name.strip() for name in report_to.split(",")]


class RunLog:
    """Writes means over several updates, and held-out scores, one line of JSON each.

    `seconds` holds how long all updates took, without evaluations and checkpoints.

    Args:
        accelerator: made with `tracker_options`. Starts its trackers.
        config: the script's Config. Lines of an earlier log.jsonl in its output_dir are removed
            where they are of updates that the run will make again.
        progress: the run's `Progress`, with the updates made so far.
        flop: floating-point operations per input token and per label token, from `flop_per_token`.
        seconds: how long the updates made so far took.
    """

    def __init__(self, accelerator, config, progress, flop, seconds=0.0):
        self.accelerator, self.config, self.progress = accelerator, config, progress
        self.flop_per_input, self.flop_per_label = flop
        self.peak = peak_flop_per_second(accelerator)
        self.seconds, self.seconds_unwritten = seconds, 0.0
        # of the updates before a resume only the total time is known
        self.num_resumed = self.num_written = len(progress.updates)
        self.path = Path(config.output_dir, "log.jsonl")
        if config.report_to != "none":
            texts = {name: str(value) for name, value in vars(config).items()}
            accelerator.init_trackers(Path(sys.argv[0]).stem, texts)
        if accelerator.is_main_process:
            self.remove_later_lines()

    def is_due(self):
        """Return whether --logging_strategy asks for a line after the last update."""
        return is_due(self.config.logging_strategy, self.config.logging_steps, self.progress)

    def is_evaluation_due(self):
        """Return whether --eval_strategy asks for an evaluation after the last update."""
        return is_due(self.config.eval_strategy, self.config.eval_steps, self.progress)

    def remove_later_lines(self):
        """Remove the lines of updates that the run will make again.

        The next line with a loss follows the last one that is kept: it also has the mean of the
        updates that the interrupted run had made, and not yet written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = []
        if self.num_resumed and self.path.is_file():
            lines = self.path.read_text().splitlines(keepends=True)
        complete = [(line, json.loads(line)) for line in lines if line.endswith("}\n")]
        kept = [(line, values) for line, values in complete if values["step"] <= self.num_resumed]
        self.path.write_text("".join(line for line, _ in kept))
        if kept:
            steps = [values["step"] for _, values in kept if "loss" in values]
            self.num_written = max(steps, default=0)

    def check_last_update(self, last_good):
        """Stop if the last update's loss is NaN or infinite, or its gradient norm is NaN.

        A loss of exactly 0 is printed once: the update changes nothing, and the next one may.

        Args:
            last_good: the checkpoint to name in the error, or None. Its weights are finite.
        """
        progress = self.progress
        loss, grad_norm = (progress.updates[-1][name] for name in ("loss", "grad_norm"))
        # the loss scaler of fp16 skips an update whose gradients overflow
        is_nan = math.isnan(grad_norm) and launched_precision() != "fp16"
        if math.isfinite(loss) and not is_nan:
            if loss == 0 and all(update["loss"] for update in progress.updates[:-1]):
                say(
                    f"The loss of update {len(progress.updates)} is exactly 0: the model predicts "
                    "its label tokens with certainty, or a loss of your own is wrong."
                )
            return
        progress.close()
        fail_together(
            self.accelerator,
            f"the loss of update {len(progress.updates)} is {loss}, and its gradient norm is "
            f"{grad_norm}: lower --learning_rate, or look at the data; the last good checkpoint is "
            f"{last_good or 'none'}",
        )

    def begin_update(self):
        """Begin to measure the time of an update."""
        self.begin = time.perf_counter()

    def end_update(self):
        """Count the time since `begin_update`."""
        self.add_seconds(time.perf_counter() - self.begin)

    def add_seconds(self, seconds):
        """Count the time of an update."""
        self.seconds += seconds
        self.seconds_unwritten += seconds

    def write_updates(self):
        """Write the mean loss and the speed of the updates since the last such line."""
        part, seconds = self.progress.updates[self.num_written :], self.seconds_unwritten
        timed = [update for update in part if update["step"] > self.num_resumed]
        labels = sum(update["target_tokens"] for update in part)
        timed_labels = sum(update["target_tokens"] for update in timed)
        inputs = sum(update["input_tokens"] for update in timed)
        last = part[-1]
        values = {
            "step": last["step"],
            "loss": sum(update["loss"] * update["target_tokens"] for update in part) / labels,
            "learning_rate": last["learning_rate"],
            "grad_norm": last["grad_norm"],
            "epoch": last["epoch"],
            "tokens_per_second": inputs / seconds,
        }
        if self.peak:
            flop = self.flop_per_input * inputs + self.flop_per_label * timed_labels
            values["flops_utilisation"] = flop / seconds / self.peak
        updates_left = self.progress.max_steps - last["step"]
        values["seconds_left"] = updates_left * seconds / len(timed)
        self.write(values)
        self.num_written, self.seconds_unwritten = last["step"], 0.0

    def write_scores(self, scores):
        """Write held-out scores after the last update, and keep them in `progress.evaluations`."""
        values = {"step": len(self.progress.updates), **scores}
        self.progress.evaluations.append(values)
        self.write(values)

    def scores(self):
        """Return two dicts, name -> score: of the first and of the last evaluation, or empty."""
        evaluations = self.progress.evaluations or [{}]
        ends = evaluations[0], evaluations[-1]
        return [{name: end[name] for name in end if name != "step"} for end in ends]

    def write(self, values):
        """Write numbers, `step` among them, to the console, log.jsonl and the trackers."""
        self.accelerator.log(values, step=values["step"])
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps(values) + "\n")
            tqdm.write(", ".join(f"{name} {value:.5g}" for name, value in values.items()))
