"""Share of the predictions that equal a reference, blanks at both ends aside.

From 0 to 1. A reference may be a list: then one of its texts has to be equal.
"""

import datasets
import evaluate


class ExactMatch(evaluate.Metric):
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
        hits = 0
        for prediction, texts in zip(predictions, references, strict=True):
            texts = [texts] if isinstance(texts, str) else texts
            hits += prediction.strip() in [text.strip() for text in texts]
        return {"exact_match": hits / len(predictions)}
