"""Compare the logits of merged weights with those of base + adapter."""

import functools

import torch

from tools.merge_adapter.lazy import Lazy
from utils.errors import fail

EXACT = 1e-4  # tolerance of logits computed in 32 bits from weights that were not rounded
LARGEST = 1e-2  # no rounding makes the tolerance of these logits larger
# tolerance of the written model: the largest difference over the largest logit
TOLERANCES = {torch.float32: EXACT, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def probe(model, ids):
    """Return the logits, in 32 bits, of one row of token ids.

    An encoder-decoder model gets the ids on both sides.
    """
    batch = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids[None]
    return model(**batch)[0]


def probe_ids(vocab_size, trained):
    """Return 16 token ids spread over the vocabulary, and up to 8 of those trained separately."""
    spread = torch.linspace(0, vocab_size - 1, 16).long().tolist()
    return torch.tensor(spread + sorted(trained)[-8:])


def exact_tolerance(merged, ids, expected, logits):
    """Return the tolerance for the logits of the merged weights.

    It is EXACT, unless the difference is larger: some models enlarge rounding. Then this function
    moves each weight that the adapter changes by one step of float32, up or down at random. The
    tolerance is ten times the change of the logits, but at least EXACT and at most LARGEST.

    Args:
        merged: the model, with Lazy parameters.
        expected: logits of base + adapter.
        logits: those of `merged`.
    """
    if difference(expected, logits) <= EXACT:
        return EXACT
    makes = {p: p.make for p in merged.parameters() if isinstance(p, Lazy) and p.adapted}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for parameter, make in makes.items():
                parameter.make = functools.partial(moved, make)
            change = difference(logits, probe(merged, ids))
    finally:
        for parameter, make in makes.items():
            parameter.make = make
    return min(max(EXACT, 10 * change), LARGEST)


def moved(make, rows=None):
    """Return the float32 values that `make` returns, each moved by one step."""
    values = make(rows)
    if not values.is_floating_point():
        return values
    return values.nextafter(torch.where(torch.rand_like(values) < 0.5, -torch.inf, torch.inf))


def difference(expected, logits):
    """Return the largest difference of the logits, divided by the largest expected logit."""
    return ((logits - expected).abs().max() / expected.abs().max()).item()


def deviation(expected, logits, tolerance, what, other="base + adapter"):
    """Return the largest difference of the logits, divided by the largest expected logit.

    Stops with an error, which names both models, if it is beyond the tolerance.
    """
    found = difference(expected, logits)
    if not found <= tolerance:
        fail(
            f"nothing was saved: the logits of {what} differ from those of {other} by {found:.1e} "
            f"of the largest logit, more than {tolerance:.0e} (--dtype float32 helps if this model "
            "enlarges rounding, for example because rounding changes which experts are chosen)"
        )
    return found
