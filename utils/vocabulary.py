"""Check that the tokenizer ends its texts, and that the model's embedding has a row for a token."""

from pathlib import Path

from transformers import AutoConfig

from utils.errors import refuse


def tokenizer_folder(config):
    """Return where the tokenizer is: with the adapter that is trained on, or with the model."""
    adapter = config.adapter_name_or_path
    has_own = adapter and (Path(adapter) / "tokenizer_config.json").is_file()
    return adapter if has_own else config.model_name_or_path


def check_tokens_used(culprit, skeleton, tokenizer):
    """Stop if a token that every text ends with, or is padded with, does not exist.

    Other tokens of the tokenizer may lack a row in the embedding: some checkpoints have tokens for
    images or for filling in, which no text holds. `check_token_rows` looks for those in the data.
    """
    rows = skeleton.get_input_embeddings().num_embeddings
    for name in ("eos_token", "pad_token"):
        token = getattr(tokenizer, f"{name}_id")
        if token is not None and token >= rows:
            refuse(
                f"{culprit} has {rows} rows in its embedding, none of them for the tokenizer's "
                f"{name} {getattr(tokenizer, name)!r}, token {token}: save the model after "
                "resize_token_embeddings, or give the tokenizer another one"
            )


def check_end(name, tokenizer):
    """Stop if the tokenizer has no token that ends a text."""
    if tokenizer.eos_token_id is None:
        refuse(
            f"--model_name_or_path {name} has a tokenizer without eos_token, so generated text "
            "would never end: set one and save it"
        )


def embedding_rows(name, tokenizer=()):
    """Return how many tokens have a row in a model's embedding.

    Args:
        tokenizer: one for whose tokens the embedding will be resized.
    """
    return max(AutoConfig.from_pretrained(name).get_text_config().vocab_size, len(tokenizer))


def check_token_rows(documents, tokenizer, name):
    """Stop at the first token that has no row in the model's embedding.

    Args:
        documents: lists of token ids, those of the rows in their order.
        name: the model's folder or Hub id.
    """
    num_rows = embedding_rows(name)
    for number, ids in enumerate(documents, start=1):
        if (largest := max(ids)) >= num_rows:
            refuse(
                f"row {number} has the token {tokenizer.convert_ids_to_tokens(largest)!r} "
                f"({largest}), and the model's embedding has {num_rows} rows: take it out of the "
                "data, or save the model after resize_token_embeddings"
            )
