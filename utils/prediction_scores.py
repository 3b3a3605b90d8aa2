"""Score what was predicted: perplexity, and metrics of the library `evaluate`."""

import math
import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from utils.errors import fail, first_line, or_refuse, refuse

COUNTS = ("predicted", "ended_by_length", "scored", "tokens", "bad_lines")


class Scores:
    """The scores of a run. Only the main process needs them.

    Args:
        config: the Config of predict.py.
        folder: where this project's own metrics are, beside utils/.
    """

    def __init__(self, config, folder):
        self.config = config
        self.metrics = load_metrics(config.metrics, folder)
        self.counts, self.loss, self.pairs = Counter(), 0.0, []

    def add(self, entry, read):
        """Count a line of the output; `read` returns the line number and the `Example`."""
        if "prediction" in entry:
            self.counts.update(predicted=1, ended_by_length=entry["finish_reason"] == "length")
            if self.metrics:
                self.pairs.append((entry["prediction"], read()[1].reference))
        elif "loss" in entry:
            self.loss += math.nan if entry["loss"] is None else entry["loss"] * entry["tokens"]
            self.counts.update(scored=1, tokens=entry["tokens"])
        else:
            self.counts.update(bad_lines=1)

    def report(self):
        """Print the counts and scores, and return the content of the metrics file."""
        counts, scores = {name: self.counts[name] for name in COUNTS}, self.compute()
        print(
            "written to {}: {predicted} predictions, {ended_by_length} of them ended by "
            "--max_new_tokens; {scored} scored rows with {tokens} label tokens; {bad_lines} bad "
            "lines".format(self.config.output_file, **counts)
        )
        for name, value in scores.items():
            print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
        return {"config": asdict(self.config), "counts": counts, "scores": scores}

    def compute(self):
        """Return name -> score."""
        scores = {}
        if self.counts["tokens"]:
            loss = self.loss / self.counts["tokens"]
            scores["loss"] = finite(loss)
            scores["perplexity"] = math.exp(min(loss, 700)) if math.isfinite(loss) else None
        predictions, references = [one for one, _ in self.pairs], [one for _, one in self.pairs]
        lists = [[one] if isinstance(one, str) else one for one in references]
        has_lists = any(isinstance(one, list) for one in references)
        for name, (metric, wants_lists) in self.metrics.items() if self.pairs else ():
            wanted = lists if has_lists or wants_lists else references  # all texts or all lists
            try:
                found = metric.compute(predictions=predictions, references=wanted)
            except Exception as error:  # a metric may raise anything
                output = self.config.output_file
                fail(f"{output} is complete, but --metrics {name} failed: {first_line(error)}")
            scores |= {key if key == name else f"{name}.{key}": one for key, one in found.items()}
        return scores


def finite(number):
    """Return a number, or None for NaN and infinity, which JSON does not have."""
    return number if math.isfinite(number) else None


def load_metrics(names, folder):
    """Return name -> metric of the library `evaluate`, and whether it wants lists of references.

    Args:
        names: comma separated: names of this project's metrics, paths of scripts, or Hub names. The
            code of a metric on the Hub is downloaded and run.
        folder: where this project's own metrics are, beside utils/.
    """
    if not names:
        return {}
    import evaluate  # a large import

    found = {}
    for name in (name.strip() for name in names.split(",")):
        own = Path(__file__).resolve().parents[1] / folder / name / f"{name}.py"
        path = str(own) if own.is_file() else os.path.expanduser(name)
        metric = or_refuse(f"--metrics {name} cannot be loaded", evaluate.load, path)
        # a trial, to fail before the predictions if the metric takes no texts
        for reference in ("a b", ["a b"]):
            try:
                metric.compute(predictions=["a b"], references=[reference])
            except Exception as error:  # a metric may raise anything
                reason = error
                continue
            key = name if Path(name).stem in found else Path(name).stem
            found[key] = (metric, isinstance(reference, list))
            break
        else:
            refuse(f"--metrics {name} does not score texts: {first_line(reason)}")
    return found
