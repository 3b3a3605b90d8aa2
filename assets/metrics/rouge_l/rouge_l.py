"""Mean ROUGE-L: F1 of the longest common subsequence of the words of prediction and reference.

From 0 to 1. Words are runs of letters and digits in lower case, without stemming. A reference may
be a list: then the best F1 counts (Lin 2004, https://aclanthology.org/W04-1013).
"""

import re

import datasets
import evaluate


class RougeL(evaluate.Metric):
    """Metric of the library `evaluate`; predictions and references are texts."""

    def _info(self):
        text = datasets.Value("string")
        several = {"predictions": text, "references": datasets.Sequence(text)}
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            features=[
                datasets.Features({"predictions": text, "references": text}),
                datasets.Features(several),
            ],
        )

    def _compute(self, predictions, references):
        total = 0.0
        for prediction, texts in zip(predictions, references, strict=True):
            texts = [texts] if isinstance(texts, str) else texts
            total += max(f1(words(prediction), words(text)) for text in texts)
        return {"rouge_l": total / len(predictions)}


def words(text):
    """Return the words of a text in lower case."""
    return re.findall(r"[^\W_]+", text.lower())


def f1(found, wanted):
    """Return the F1 of the longest common subsequence; 1 where both texts have no words."""
    if not found or not wanted:
        return float(found == wanted)
    return 2 * longest_common(found, wanted) / (len(found) + len(wanted))


def longest_common(found, wanted):
    """Return the length of the longest common subsequence of two lists."""
    row = [0] * (len(wanted) + 1)
    for one in found:
        above = row
        row = [0]
        for position, other in enumerate(wanted):
            row.append(above[position] + 1 if one == other else max(above[position + 1], row[-1]))
    return row[-1]
