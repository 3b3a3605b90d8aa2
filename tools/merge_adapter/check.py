"""Compare the logits of merged weights with those of base + adapter."""

import torch

from utils.errors import fail

EXACT = 1e-4  # tolerance of logits computed in 32 bits from weights that were not rounded
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


def deviation(expected, logits, tolerance, what):
    """Return the largest difference of the logits, divided by the largest expected logit.

    Stops with an error if it is beyond the tolerance.
    """
    found = ((logits - expected).abs().max() / expected.abs().max()).item()
    if not found <= tolerance:
        fail(
            f"nothing was saved: the logits of {what} differ from those of base + adapter by "
            f"{found:.1e} of the largest logit, more than {tolerance:.0e} (--dtype float32 helps "
            "if rounding changes which experts are chosen)"
        )
    return found
