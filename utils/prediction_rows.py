"""Turn a row to predict into tokens: a chat, a prompt, or a text to score.

    messages    the model answers; if the last message is the assistant's, it is the reference.
                Also conversations or conversation, and a prompt that is a list of messages.
    prompt      the model continues it; completion or label is the reference
    text        is not continued, but scored

A row is encoded as chat_sft encodes it for training: the chat template writes the special tokens of
chats, and other texts get those that the tokenizer adds, and an end token.
"""

from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

from utils.conversations import CHATS, Conversation, DataError, EmptyRow, as_document
from utils.conversations import message, note
from utils.documents import encode_text
from utils.errors import refusing
from utils.json_lines import is_rows
from utils.prediction import GENERATE, SCORE, parse, read_line
from utils.rendering import Text, apply_template, find_turn, find_unwritten

KINDS = (*CHATS, "prompt", "text")
REFERENCES = ("completion", "label")  # unless --reference_key names another key
ADDED = ("prediction", "finish_reason", "loss", "tokens", "error")  # keys of the output lines
# as chat_sft encodes a document by default, and without truncation
ENCODING = SimpleNamespace(
    max_length=2**62, train_on="assistant", add_special_tokens=None, append_concat_token=None
)


class Example(NamedTuple):
    """A row as tokens.

    Fields:
        job: GENERATE or SCORE.
        input_ids: the prompt; for a causal model that scores, with the answer.
        labels: tokens that are scored. For a causal model one for each of input_ids, -100 where the
            token has no loss. None for GENERATE.
        reference: text or list of texts that a prediction is compared with; None: there is none.
        notes: a `note` for what of the row is changed or not used.
    """

    job: int
    input_ids: list[int]
    labels: list[int] | None
    reference: str | list[str] | None
    notes: list[str]


def read_example(config, index, encode_row, row):
    """Return the line number of a row of the input file, and its `Example`.

    Stop with an error if the line is bad: then the input has changed since it was indexed.
    """
    line = index.lines[row]
    where = f"{config.input_file}, line {line}"
    with refusing(DataError):
        return int(line), encode_row(parse(read_line(config, index, row), where), where)


def encode(config, source, tokenizer, row, where):
    """Return the `Example` of a row.

    Args:
        config: the Config of predict.py.
        source: the `Source` of the model.
        where: the name of the row in errors.

    Raises:
        DataError: the row is bad.
    """
    kind = next((key for key in KINDS if row.get(key) is not None), None)
    if kind is None:
        raise DataError(f"{where} has none of the keys messages, prompt and text")
    if taken := [key for key in ADDED if key in row]:
        raise DataError(f"{where} has the key {taken[0]!r}, which the output adds: rename it")
    job = SCORE if config.perplexity or kind == "text" else GENERATE
    prompt, answer, notes = read(row, kind, where)
    notes += [note(f"key {key}", "rows") for key in KINDS if key != kind and row.get(key)]
    reference = answer.get("content") if isinstance(answer, dict) else answer
    if kind != "text" and (config.reference_key or answer is None):
        keys = (config.reference_key,) if config.reference_key else REFERENCES
        reference = answer = next((row[key] for key in keys if row.get(key) is not None), None)
    if isinstance(reference, int) and not isinstance(reference, bool):
        reference = answer = str(reference)
    needed = "metrics" if config.metrics and job == GENERATE else "perplexity"
    is_call = job == SCORE and isinstance(answer, dict) and "tool_calls" in answer
    is_known = kind == "text" or is_call or is_texts(reference, needed)
    if (config.metrics or job == SCORE) and not is_known:
        known = config.reference_key or "completion or label, or a last message of the assistant"
        raise DataError(f"{where} has no text to compare with, which --{needed} needs: {known}")
    if job == GENERATE:
        ids, labels = encode_prompt(source, tokenizer, prompt, where, notes), None
    elif source.is_seq2seq:
        ids, labels = encode_pair(source, tokenizer, prompt, answer, where, notes)
    else:
        ids, labels = encode_answer(tokenizer, prompt, answer, where, notes)
    check_tokens(config, source, tokenizer, where, Example(job, ids, labels, None, []))
    return Example(job, ids, labels, reference, notes)


def is_texts(reference, needed):
    """Return whether a reference is a text; for metrics also whether it is a list of texts."""
    if isinstance(reference, list) and needed == "metrics":
        return bool(reference) and all(isinstance(one, str) for one in reference)
    return isinstance(reference, str) and bool(reference.strip())


def read(row, kind, where):
    """Return what stands before the answer, the answer itself, and notes of what is changed.

    Returns:
        prompt: a `Conversation`; or a text.
        answer: the assistant's last message as a dict; or a text; None: there is none.
    """
    completion = row.get("completion")
    is_pair = kind == "prompt" and isinstance(row[kind], list) and completion
    if is_pair and isinstance(completion, str):
        row = row | {"completion": [message("assistant", completion)]}
    is_pair = is_pair and is_rows(row["completion"])
    try:
        parts = as_document(row, (kind, "completion") if is_pair else (kind,), where)
    except EmptyRow:
        raise DataError(f"{where} has an empty {kind}") from None
    if not isinstance(parts, Conversation):
        return (None, parts[0], []) if kind == "text" else (parts[0], None, [])
    answer, messages = None, parts.messages
    if messages[-1]["role"] == "assistant":
        *messages, answer = messages
    if not messages:
        raise DataError(f"{where} has no message before the answer")
    unlabelled = "have no label"  # says nothing about a prediction
    notes = [one for one in parts.notes if unlabelled not in one]
    return parts._replace(messages=messages), answer, notes


# Tokens -------------------------------------------------------------------------------------------
def encode_prompt(source, tokenizer, prompt, where, notes):
    """Return the token ids of a prompt or a conversation, up to where the answer begins."""
    is_chat = isinstance(prompt, Conversation)
    text = write_prompt(tokenizer, prompt, where, notes) if is_chat else prompt
    ids = tokenizer(text, add_special_tokens=not is_chat or source.is_seq2seq)["input_ids"]
    ends = ids[-1:] == [tokenizer.eos_token_id] and not text.endswith(tokenizer.eos_token)
    if ends and not source.is_seq2seq:  # some tokenizers add it, and nothing would follow
        ids = ids[:-1]
    if not ids:
        raise DataError(f"{where} has a prompt without tokens")
    return ids


def write_prompt(tokenizer, chat, where, notes):
    """Return a conversation as the chat template writes it, with the beginning of the answer."""
    if not tokenizer.chat_template:
        raise DataError(
            f"{where} holds messages, and the tokenizer has no chat template: give rows with a "
            "prompt, or --chat_template_format with a .jinja file"
        )
    write = partial(apply_template, tokenizer, chat.tools, where)
    notes += find_unwritten(
        tokenizer, chat, where, [Text(write(chat.messages)[0], [], len(chat.messages))]
    )
    return write(chat.messages, add_generation_prompt=True)[0]


def encode_answer(tokenizer, prompt, answer, where, notes):
    """Return the token ids of a prompt with its answer, or of a text, and the labels.

    Args:
        prompt: a `Conversation`, a text, or None for a text that is scored as a whole.
        answer: the assistant's message as a dict, or a text.
    """
    if isinstance(prompt, Conversation):
        write_prompt(tokenizer, prompt, where, notes)
        answer = answer if isinstance(answer, dict) else message("assistant", answer)
        messages = [*prompt.messages, answer]
        write = partial(apply_template, tokenizer, prompt.tools, where)
        turn = write(messages)
        text, spans = turn[0], find_turn(write, messages, len(messages) - 1, turn, where, notes)
    else:
        text = (prompt or "") + answer
        spans = [(len(prompt or ""), len(text))]
    document = encode_text(text, spans, ENCODING, tokenizer, isinstance(prompt, Conversation))
    return document["input_ids"], document["labels"]


def encode_pair(source, tokenizer, prompt, answer, where, notes):
    """Return the token ids of a prompt and of its answer, for an encoder and a decoder."""
    if prompt is None:
        raise DataError(
            f"{where} is a text, and the model has an encoder: give a prompt and its completion"
        )
    ids = encode_prompt(source, tokenizer, prompt, where, notes)
    answer = answer["content"] if isinstance(answer, dict) else answer
    labels = tokenizer(text_target=answer)["input_ids"]
    if tokenizer.eos_token_id not in labels:
        labels = [*labels, tokenizer.eos_token_id]
    return ids, labels


def check_tokens(config, source, tokenizer, where, example):
    """Raise DataError where a row has too many tokens, unknown ones, or none to score."""
    limit, ids, labels = config.max_length or source.positions, example.input_ids, example.labels
    is_causal = not source.is_seq2seq
    added = config.max_new_tokens if example.job == GENERATE and is_causal else 0
    longest = len(ids) + added
    if labels is not None and not is_causal:
        longest = max(longest, len(labels))
    if limit and longest > limit:
        told = f"{len(ids)} tokens" + (f" and --max_new_tokens {added}" if added else "")
        where_from = "--max_length" if config.max_length else "the model's positions"
        raise DataError(f"{where} has {told}, which exceeds {where_from}, {limit}")
    largest = max(*ids, *(labels or ()), 0)
    if largest >= source.num_rows:  # some tokenizers have more tokens
        raise DataError(
            f"{where} has the token {tokenizer.convert_ids_to_tokens(largest)!r} ({largest}), and "
            f"the model's embedding has {source.num_rows} rows"
        )
    if labels is not None and all(one == -100 for one in labels[is_causal:]):
        raise DataError(f"{where} has no token to score")
