"""Turn rows into documents: token ids, and labels where the model is to learn.

A document is a dict with the lists `input_ids` and `labels`, of one length, and `length`, the
number of tokens before truncation. A label stands where its token stands; -100 means no loss. Its
`notes` say what of its row is not used, or is changed when it is read.
"""

import hashlib
import math
import os
import zlib
from collections import Counter
from functools import cache
from itertools import groupby, islice
from pathlib import Path
from types import SimpleNamespace

import transformers

from utils.conversations import Conversation, DataError, EmptyRow, as_document, census, note
from utils.conversations import used_columns
from utils.errors import first_line, say
from utils.json_lines import LINE
from utils.packing import join, pack, split_evenly
from utils.rendering import render

ROWS_PER_WORKER = 1000  # a tokenizing process gets at least so many rows
# the settings that `encode` reads
ENCODING = ("max_length", "train_on", "add_special_tokens", "append_concat_token")
DOCUMENT = ("input_ids", "labels", "length", "notes")
PROMPT_OF_TEXT = 8  # tokens of the prompt made from a text, which has no prompt of its own
# the files whose code decides what `datasets` caches
CACHED = ("documents", "rendering", "chat_templates", "conversations", "json_lines", "splits")
NAMED = 5  # rows of a stream that are left out and named; later ones are counted
SHUFFLE_BUFFER = 10_000  # rows of a stream among which the next one is drawn


# From a row to a document -------------------------------------------------------------------------
def encode_batch(columns, numbers, **encoding):
    """Return the documents of rows, for `map`: name -> values, one for each document.

    Args:
        columns: name -> values, one for each row.
        numbers: the rows' numbers, from 0.
        encoding: the other arguments of `encode`.
    """
    names, documents = list(columns.keys()), []
    for position, number in enumerate(numbers):
        row = {name: columns[name][position] for name in names}
        documents += encode(row, number, **encoding)
    return {name: [one[name] for one in documents] for name in DOCUMENT}


def encode(row, index, config, tokenizer, shape, split, code="", num_rows=math.inf):
    """Return the documents of a row: one, or several where the template rewrites earlier turns.

    A row with nothing to learn is a document without tokens, for its notes.

    Args:
        index: number of the row, from 0.
        config: with the settings that ENCODING names.
        shape: what `shape_of` in conversations.py returned.
        split: the name of the split in errors.
        code: digest of the code (`code_digest`); `datasets` keys its cache by the arguments.
        num_rows: rows in the model's embedding; some tokenizers have more tokens.

    Raises:
        DataError: the row cannot be trained on.
    """
    where, learns_all = f"row {index + 1} of {split}", config.train_on == "all"
    unused = [name for name in row if row[name] is not None and name not in used_columns(shape)]
    notes = [note(f"column {name}", "rows") for name in unused]
    try:
        parts = as_document(row, shape, where)
    except EmptyRow as reason:
        return [{"input_ids": [], "labels": [], "length": 0, "notes": [*notes, str(reason)]}]
    is_chat = isinstance(parts, Conversation)
    if is_chat:
        texts, unwritten = render(tokenizer, parts, where, learns_all)
        notes += parts.notes + unwritten
        if learns_all:
            notes = [one.replace("which have no label", "all trained on") for one in notes]
        if not parts.learned and not learns_all:
            notes.append(note("rows without a turn to learn, which are left out", "rows"))
    else:
        text = "".join(parts)
        texts = [(text, [(0 if learns_all else len(text) - len(parts[-1]), len(text))], 0)]
        others = [name for name in used_columns(shape)[len(shape) :] if row.get(name)]
        notes += [note(f"column {name} beside prompts of text", "rows") for name in others]
    documents = [
        {**encode_text(text, spans, config, tokenizer, is_chat), "notes": []}
        for text, spans, _ in texts
    ]
    documents[0]["notes"] = notes
    largest = max((max(one["input_ids"], default=0) for one in documents), default=0)
    if largest >= num_rows:
        raise DataError(
            f"{where} has the token {tokenizer.convert_ids_to_tokens(largest)!r} ({largest}), and "
            f"the model's embedding has {num_rows} rows: take it out of the data, or save the "
            "model after resize_token_embeddings"
        )
    return documents


def encode_text(text, spans, config, tokenizer, is_chat):
    """Return the token ids, labels and length of a text.

    Args:
        spans: (begin, end) of the parts to learn, in characters.
    """
    # a chat template writes the special tokens itself
    adds_special = config.add_special_tokens
    adds_special = not is_chat if adds_special is None else adds_special
    adds_end = not is_chat if config.append_concat_token is None else config.append_concat_token
    tokens = tokenizer(text, add_special_tokens=adds_special, return_offsets_mapping=True)
    ids = labels = tokens["input_ids"]
    if config.train_on == "assistant":
        labels = label_spans(ids, tokens["offset_mapping"], spans)
    if adds_end:
        end = tokenizer.eos_token_id
        if ids[-1:] == [end]:  # some tokenizers have added it, without a place in the text
            ids, labels = ids[:-1], labels[:-1]
        ids, labels = [*ids, end], [*labels, end]
    limit = config.max_length  # a truncated document ends without the end token
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
    for name in CACHED:
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return digest.hexdigest()


# Splits -------------------------------------------------------------------------------------------
def build_documents(config, accelerator, rows, split, unread=(), **encoding):
    """Return the documents of a split that can be trained on, and a line that counts them.

    Prints the line, how many documents were truncated and left out, and what is not used.

    Args:
        unread: names of what was not read, for that line.
        encoding: tokenizer and shape, for `encode`.

    Raises:
        DataError: a row cannot be trained on, or none has a label within max_length.
    """
    # The cache is keyed by the arguments. So only the settings that matter are handed over, and a
    # later run with other settings still finds what this one has encoded.
    settings = SimpleNamespace(**{name: getattr(config, name) for name in ENCODING})
    encoding |= {"config": settings, "split": split, "code": code_digest()}
    unused = []
    if LINE not in rows.column_names:  # else every row has its own columns
        used = used_columns(encoding["shape"])
        unused = [name for name in rows.column_names if name not in used]
        unused = unused if len(unused) < len(rows.column_names) else []  # without any, no rows
        rows = rows.remove_columns(unused)
    options = {"with_indices": True, "remove_columns": rows.column_names, "fn_kwargs": encoding}
    workers = min(len(os.sched_getaffinity(0)), len(rows) // ROWS_PER_WORKER)
    if workers > 1:
        options["num_proc"] = workers
    with accelerator.local_main_process_first():  # the others of the machine read its cache
        encoded = rows.map(encode_batch, batched=True, **options).with_format(None)
    kept, num_tokens, num_labels, num_long, checksum = [], 0, 0, 0, 0
    notes = Counter({note(f"column {name}", "rows"): len(rows) for name in unused})
    for number, document in enumerate(encoded):
        num_long += document["length"] > config.max_length
        notes.update(document["notes"])
        if is_kept(document, config):
            kept.append(number)
            num_tokens += len(document["input_ids"])
            num_labels += sum(label != -100 for label in document["labels"][1:])
            content = repr((document["input_ids"], document["labels"])).encode()
            checksum = zlib.crc32(content, checksum)
    if not kept:
        raise DataError(nothing_left(split, config, num_long, notes))
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
    say_census(split, unread, notes)
    return encoded.select(kept), facts


def say_census(split, unread, notes):
    """Print one line with all that is not used, or is changed when it is read."""
    parts = "; ".join(filter(None, [*unread, census(notes)]))
    if parts:
        say(f"{split}, not used or changed: {parts}.")


def nothing_left(split, config, num_long, notes):
    """Return why no document has a label, and what to do."""
    if num_long:
        return (
            f"no row of {split} has a token to train on within --max_length {config.max_length}: "
            "raise it"
        )
    found = f"; found: {census(notes)}" if notes else ""
    return (
        f"no row of {split} has a token to train on: give rows with a turn, a completion or a text "
        f"to learn{found}"
    )


def read_stream(config, rows, unread, epoch, is_strict=False, **encoding):
    """Yield the documents of a stream that can be trained on, shuffled anew in each epoch.

    The rows cannot be counted before training. So whatever is not used is printed when it first
    occurs, and counted at the end of each epoch. A row that cannot be trained on is left out.

    Args:
        unread: names of what was not read.
        is_strict: for a look at the beginning: raise the DataError of a row that cannot be trained
            on, and print that rows are counted later.
        encoding: tokenizer and shape, for `encode`.

    Raises:
        DataError: no row can be trained on, or the data cannot be read any further.
    """
    if is_strict:
        say(
            "The stream: whenever rows are truncated, left out or not fully used for a new reason, "
            "the reason is printed. These rows are counted at the end of each epoch."
        )
        say_census("The stream", unread, {})
    name = "the stream"
    if config.shuffle:
        rows = rows.shuffle(seed=config.seed + epoch, buffer_size=SHUFFLE_BUFFER)
        name = f"the stream, as shuffled for epoch {epoch + 1}"
    notes, num_kept, num_rows, num_long, broken = Counter(), 0, 0, 0, 0
    for number, row in enumerate(readable(rows)):
        num_rows += 1
        try:
            documents = encode(row, number, config, split=name, **encoding)
        except DataError as error:
            if is_strict:
                raise
            broken += 1
            if broken <= NAMED and not epoch:
                say(f"Left out: {error}.")
            notes[note("rows that cannot be trained on, which are left out", "rows")] += 1
            continue
        for document in documents:
            found = Counter(document["notes"])
            if document["length"] > config.max_length:
                done = "truncated" if config.long_documents == "truncate" else "dropped"
                found[note(f"longer than --max_length, {done}", "documents")] += 1
                num_long += 1
            if document["length"] and not has_labels(document):
                found[note("without a label within --max_length, left out", "documents")] += 1
            new = Counter(dict.fromkeys(found.keys() - notes.keys(), 1))
            if new and not is_strict and not epoch:
                say_census("New in the stream", [], new)
            notes += found
            if is_kept(document, config):
                num_kept += 1
                yield document
    if not num_kept:
        raise DataError(nothing_left("the stream", config, num_long, notes))
    if not is_strict:
        counted = f"The stream, epoch {epoch + 1}: {num_kept:,} documents of {num_rows:,} rows"
        say_census(counted, [], notes)


def readable(rows):
    """Yield rows; raise a DataError where the source fails."""
    try:
        yield from rows
    except Exception as error:  # the libraries raise anything
        raise DataError(f"the stream cannot be read any further ({first_line(error)})") from error


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
