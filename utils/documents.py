"""Turn rows into documents: token ids, and labels where the model is to learn.

A document is a dict with the lists `input_ids` and `labels`, of one length, and `length`, the
number of tokens before truncation. A label stands where its token stands; -100 means no loss.
"""

import hashlib
import math
import os
import zlib
from functools import cache, partial
from itertools import groupby, islice
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import transformers
from torch.utils.data import DataLoader

from utils.chat_templates import render
from utils.conversations import DataError, as_document
from utils.errors import say
from utils.packing import join, pack, split_evenly

ROWS_PER_WORKER = 1000  # a tokenizing process gets at least so many rows
# the settings that `encode` reads
ENCODING = ("max_length", "train_on", "add_special_tokens", "append_concat_token")
PROMPT_OF_TEXT = 8  # tokens of the prompt made from a text, which has no prompt of its own
SHUFFLE_BUFFER = 10_000  # rows of a stream among which the next one is drawn


class Data(NamedTuple):
    """What a run needs of its data.

    Fields:
        train_loader: the micro-batches of this process, without end.
        num_sequences: sequences of an epoch, packed or not; infinity for a stream.
        max_steps: number of updates of the run.
        examples: the first one or two documents.
        facts: the line that counts the documents; "" for a stream.
        valid_batches: the held-out batches of this process; empty where nothing is evaluated.
        prompts: held-out prompts to answer, each a list of token ids.
    """

    train_loader: DataLoader
    num_sequences: float
    max_steps: int
    examples: list[dict]
    facts: str
    valid_batches: list[dict]
    prompts: list[list[int]]


# From a row to a document -------------------------------------------------------------------------
def encode(row, index, config, tokenizer, shape, split, code="", num_rows=math.inf):
    """Return the document of a row.

    Args:
        index: number of the row, from 0.
        config: with the settings that ENCODING names.
        shape: what `shape_of` in conversations.py returned.
        split: the name of the split in errors.
        code: digest of the code (`code_digest`); `datasets` keys its cache by the arguments.
        num_rows: of the model's embedding; some tokenizers have more tokens.

    Raises:
        DataError: the row cannot be trained on.
    """
    where = f"row {index + 1} of {split}"
    kind, *parts = as_document(row, shape, where)
    if kind == "chat":
        text, spans = render(tokenizer, *parts, where)
    else:
        text = "".join(parts)
        spans = [(len(text) - len(parts[-1]), len(text))]  # the completion, or all of a text
    is_text = kind != "chat"  # a chat template writes the special tokens itself
    adds_special = is_text if config.add_special_tokens is None else config.add_special_tokens
    adds_end = is_text if config.append_concat_token is None else config.append_concat_token
    tokens = tokenizer(text, add_special_tokens=adds_special, return_offsets_mapping=True)
    ids = labels = tokens["input_ids"]
    if config.train_on == "assistant":
        if None in spans:
            raise DataError(
                f"{where}: the chat template does not show where the assistant's turns begin and "
                "end: give --chat_template_format chatml, or a template that does, or --train_on "
                "all"
            )
        labels = label_spans(ids, tokens["offset_mapping"], spans)
    if adds_end:
        end = tokenizer.eos_token_id
        if ids[-1:] == [end]:  # some tokenizers have added it, without a place in the text
            ids, labels = ids[:-1], labels[:-1]
        ids, labels = [*ids, end], [*labels, end]
    if (largest := max(ids, default=0)) >= num_rows:
        raise DataError(
            f"{where} has the token {tokenizer.convert_ids_to_tokens(largest)!r} ({largest}), and "
            f"the model's embedding has {num_rows} rows: take it out of the data, or save the "
            "model after resize_token_embeddings"
        )
    limit = config.max_length
    return {"input_ids": ids[:limit], "labels": labels[:limit], "length": len(ids)}


def label_spans(ids, offsets, spans):
    """Return the labels: the token's id where it overlaps a span of the text, else -100.

    Args:
        offsets: (begin, end) of each token in the text, in characters; (0, 0) for a token that is
            not in the text.
        spans: (begin, end) of the parts to learn.
    """
    labels = []
    for token, (begin, end) in zip(ids, offsets, strict=True):
        if begin == end and end > 0:
            end += 1  # some tokenizers give a blank no width; it counts like other tokens
        overlaps = any(begin < stop and end > start for start, stop in spans)
        labels.append(token if overlaps else -100)
    return labels


def is_kept(document, config):
    """Return whether a document has a label to learn, and is short enough to keep."""
    is_fitting = document["length"] <= config.max_length or config.long_documents == "truncate"
    return is_fitting and has_labels(document)


def has_labels(document):
    """Return whether a document has a label. Nothing predicts its first token."""
    return any(label != -100 for label in document["labels"][1:])


@cache
def code_digest():
    """Return a digest of the code that makes documents out of rows.

    `datasets` caches what `map` returned. It knows a function of an imported module by its name
    alone, so it would read the documents of an earlier version of that function.
    """
    digest = hashlib.sha256(transformers.__version__.encode())
    for name in ("documents", "chat_templates", "conversations"):
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return digest.hexdigest()


# Splits -------------------------------------------------------------------------------------------
def build_documents(config, accelerator, rows, split, **encoding):
    """Return the documents of a split that can be trained on, and a line that counts them.

    Prints the line, and how many rows were truncated and left out.

    Args:
        encoding: tokenizer and shape, for `encode`.

    Raises:
        DataError: a row cannot be trained on, or none has a label within max_length.
    """
    # The cache is keyed by the arguments. So only the settings that matter are handed over, and a
    # later run with other settings still finds what this one has encoded.
    settings = SimpleNamespace(**{name: getattr(config, name) for name in ENCODING})
    encoding |= {"config": settings, "split": split, "code": code_digest()}
    options = {"with_indices": True, "remove_columns": rows.column_names, "fn_kwargs": encoding}
    workers = min(len(os.sched_getaffinity(0)), len(rows) // ROWS_PER_WORKER)
    if workers > 1:
        options["num_proc"] = workers
    with accelerator.local_main_process_first():  # the others of the machine read its cache
        encoded = rows.map(encode, **options)
    kept, num_tokens, num_labels, num_long, checksum = [], 0, 0, 0, 0
    for number, document in enumerate(encoded):
        num_long += document["length"] > config.max_length
        if is_kept(document, config):
            kept.append(number)
            num_tokens += len(document["input_ids"])
            num_labels += sum(label != -100 for label in document["labels"][1:])
            content = repr((document["input_ids"], document["labels"])).encode()
            checksum = zlib.crc32(content, checksum)
    if not kept:
        raise DataError(
            f"no row of {split} has a token to train on within --max_length {config.max_length}: "
            "raise it"
        )
    # a part of what identifies a run: checkpoints hold this text
    facts = (
        f"{len(kept)} documents, {num_tokens:,} tokens, {num_labels:,} of them trained on, "
        f"checksum {checksum:08x}"
    )
    done = "truncated" if config.long_documents == "truncate" else "dropped"
    say(
        f"{split}: {facts}; {num_long} longer than --max_length {done}, "
        f"{len(encoded) - len(kept)} of {len(encoded)} left out."
    )
    return encoded.select(kept), facts


def read_stream(config, rows, epoch, **encoding):
    """Yield the documents of a stream that can be trained on, shuffled anew in each epoch.

    Args:
        encoding: tokenizer and shape, for `encode`.

    Raises:
        DataError: as `build_documents`.
    """
    if config.shuffle:
        rows = rows.shuffle(seed=config.seed + epoch, buffer_size=SHUFFLE_BUFFER)
    encoding |= {"config": config, "split": "the stream"}
    documents = (encode(row, number, **encoding) for number, row in enumerate(rows))
    kept = filter(partial(is_kept, config=config), documents)
    first = next(kept, None)
    if first is None:
        raise DataError(
            "no row of the stream has a token to train on within --max_length "
            f"{config.max_length}: raise it"
        )
    yield first
    yield from kept


def build_held_out(config, accelerator, rows, **encoding):
    """Return this process's batches of the held-out rows, and prompts of token ids to answer.

    Both are empty without held-out rows, or where nothing is evaluated.
    """
    if config.eval_strategy == "no":
        return [], []
    if rows is None:
        say("There are no held-out rows, so nothing is evaluated: name a second split in --splits.")
        return [], []
    documents, _ = build_documents(config, accelerator, rows, "the held-out split", **encoding)
    lengths = [len(ids) for ids in documents["input_ids"]]
    sequences = pack(lengths, config.max_length, config.packing)
    size = config.per_device_eval_batch_size
    rank, processes = accelerator.process_index, accelerator.num_processes
    batches = split_evenly(sequences, documents, size, rank, processes)
    return batches, [prompt_of(document) for document in islice(documents, config.num_samples)]


def prompt_of(document):
    """Return the token ids before the first label; a text has no prompt, so its beginning."""
    labels = document["labels"]
    first = next(number for number, label in enumerate(labels) if label != -100)
    return document["input_ids"][: first or PROMPT_OF_TEXT]


# Looks at documents -------------------------------------------------------------------------------
def preview(tokenizer, document):
    """Return a document as text, with the label tokens between guillemets."""
    text, pairs = "", zip(document["input_ids"], document["labels"], strict=True)
    for has_label, part in groupby(pairs, key=lambda pair: pair[1] != -100):
        words = tokenizer.decode([token for token, _ in part])
        text += f"\u00ab{words}\u00bb" if has_label else words
    return text


def probe(documents, num_tokens=16):
    """Return the beginnings of documents as one batch, and as a batch for each document.

    For `check_token_loss`. Every token has a label.
    """
    beginnings = [document["input_ids"][:num_tokens] for document in documents]
    short = [{"input_ids": ids, "labels": ids} for ids in beginnings]
    return join(short), [join([document]) for document in short]
