"""Which tokens have a row in the embedding, which are new, and which end a text."""

import copy
from pathlib import Path

from transformers import AutoConfig, GenerationConfig

from utils.errors import refuse, say
from utils.lora import adapter_rows


def tokenizer_folder(config):
    """Return where the tokenizer is: with the adapter that is trained further, or the model."""
    adapter = config.adapter_name_or_path
    has_own = adapter and (Path(adapter) / "tokenizer_config.json").is_file()
    return adapter if has_own else config.model_name_or_path


def check_tokens_used(culprit, skeleton, tokenizer):
    """Stop if the embedding has no row for the token that ends or pads every text.

    Other tokens of the tokenizer may lack a row: some checkpoints have tokens for images or for
    filling in, which no text holds. The number of such tokens is printed.
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
    if len(tokenizer) > rows:
        token = tokenizer.convert_ids_to_tokens(rows)
        say(
            f"{culprit} has {rows} rows in its embedding: a text with one of the tokenizer's "
            f"{len(tokenizer) - rows} further tokens, such as {token!r}, cannot be trained on."
        )


def resize(model, tokenizer, num_added, adapter):
    """Give new tokens rows in the embedding; return the layers that must be trained in full.

    Args:
        adapter: folder or Hub id of the adapter that is trained further; else "".
    """
    if rows := adapter_rows(adapter, model):
        model.resize_token_embeddings(rows, mean_resizing=False)
    if not num_added:
        return []
    if adapter:
        refuse(
            f"--adapter_name_or_path {adapter} does not train the {num_added} tokens that the chat "
            "template adds: give a --chat_template_format of known tokens, or merge the adapter "
            "with tools.merge_adapter and train a new one"
        )
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:  # it may have spare rows
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if module in ends]
    modules_to_save = [name.rpartition(".")[2] for name in names]
    say(f"{num_added} new tokens: {', '.join(modules_to_save)} are trained and saved in full.")
    return modules_to_save


def check_end(name, tokenizer, ends_turns=False):
    """Stop if no token ends a text.

    Args:
        ends_turns: whether the token that ends an answer in the chat template is enough. Otherwise
            the tokenizer needs an eos token.
    """
    ends = turn_ends(tokenizer) if ends_turns else {tokenizer.eos_token_id}
    if ends == {None}:
        own = " and a chat template without an end token of its own" if ends_turns else ""
        refuse(
            f"--model_name_or_path {name} has a tokenizer without eos_token{own}, so generated "
            "text would never end: set one and save it"
        )


def embedding_rows(config, tokenizer, num_added):
    """Return how many tokens have a row in the model's embedding once `resize` has run.

    Args:
        config: read are model_name_or_path and adapter_name_or_path.
        num_added: number of tokens that the tokenizer was given.
    """
    rows = AutoConfig.from_pretrained(config.model_name_or_path).get_text_config().vocab_size
    is_resized = num_added or config.adapter_name_or_path
    return max(rows, len(tokenizer)) if is_resized else rows


def turn_ends(tokenizer):
    """Return the ids of the tokens that end an answer: eos, and what the chat template writes.

    The model learns to end its answers with them, so generation must stop there.
    """
    return {tokenizer.eos_token_id} | {last_token(tokenizer)} & {*tokenizer.added_tokens_decoder}


def last_token(tokenizer):
    """Return the id of the token that ends an answer in the chat template; None: it is unknown."""
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False).rstrip()
    except Exception:  # there is no template, or one that needs more than this
        return None
    return tokenizer(text, add_special_tokens=False)["input_ids"][-1]


def set_ends(model, tokenizer):
    """Let generation stop at every end token, and drop its settings that cannot be saved."""
    model.generation_config = valid_generation(model.generation_config)
    known = model.generation_config.eos_token_id or []  # one or several
    ends = {*turn_ends(tokenizer), *(known if isinstance(known, list) else [known])}
    model.generation_config.eos_token_id = sorted(ends - {None})


def valid_generation(settings):
    """Return a checkpoint's generation settings without those that transformers would not save.

    Some contradict the others, such as a temperature without sampling. Prints which are dropped.
    """
    given = {name: value for name, value in settings.to_diff_dict().items() if value is not None}
    kept, dropped = GenerationConfig(), []
    # the settings that decide which others have a meaning come first
    for name in sorted(given, key=lambda name: name not in ("do_sample", "num_beams")):
        tried = copy.deepcopy(kept)
        setattr(tried, name, given[name])
        try:
            tried.validate(strict=True)
            kept = tried
        except ValueError:
            dropped.append(f"{name} {given[name]}")
    if dropped:
        say(
            f"The checkpoint's generation settings contradict each other, and are saved without "
            f"{', '.join(dropped)}."
        )
    return kept
