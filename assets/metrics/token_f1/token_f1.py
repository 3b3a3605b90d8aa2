"""Mean F1 of the words that a prediction shares with its reference, as for SQuAD.

From 0 to 1. Words are compared in lower case, without punctuation and English articles
(Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250). A reference may be a list: then the best
F1 counts.
"""

import re
import string
from collections import Counter

import datasets
import evaluate


class TokenF1(evaluate.Metric):
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
        return {"token_f1": total / len(predictions)}


def words(text):
    """Return the words of a text, without case, punctuation and articles."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1(found, wanted):
    """Return the harmonic mean of precision and recall; 1 where both texts have no words."""
    shared = sum((Counter(found) & Counter(wanted)).values())
    if not found or not wanted:
        return float(found == wanted)
    return 2 * shared / (len(found) + len(wanted))
