"""From the rows of a data set to the micro-batches of a run of chat_sft."""

import math
from functools import partial
from itertools import islice
from typing import NamedTuple

from torch.utils.data import DataLoader

from utils.chat_templates import build_tokenizer as build_tokenizer  # chat_sft takes it from here
from utils.chat_templates import pin_date
from utils.conversations import DataError, holds_chats, shape_of
from utils.documents import build_documents, build_held_out, preview, probe, read_stream
from utils.errors import refusing, say
from utils.packing import build_loader, pack, shuffled_sequences, stream_sequences
from utils.splits import Splits as Splits  # for rows of your own
from utils.splits import read_splits
from utils.vocabulary import check_end, embedding_rows


class Data(NamedTuple):
    """What a run needs of its data.

    Fields:
        train_loader: the micro-batches of this process, without end.
        num_sequences: sequences of an epoch, packed or not; infinity for a stream.
        max_steps: number of updates of the run.
        examples: the first one or two documents.
        facts: the line that counts the documents; "" for a stream.
        template_date: the date that the chat template writes, in ISO format; None: it writes none.
        valid_batches: the held-out batches of this process; empty where nothing is evaluated.
        prompts: held-out prompts to answer, each a list of token ids.
    """

    train_loader: DataLoader
    num_sequences: float
    max_steps: int
    examples: list[dict]
    facts: str
    template_date: str | None
    valid_batches: list[dict]
    prompts: list[list[int]]


class Sequences(NamedTuple):
    """The sequences to train on, each of one document or of several packed ones.

    Fields:
        endless: returns an iterator over the sequences of one epoch after the other (`build_loader`
            in packing.py).
        documents: what the sequences index; None if they hold the documents, as in a stream.
        count: sequences of an epoch; infinity for a stream.
        examples: the first one or two documents.
        facts: the line that counts the documents; "" for a stream.
    """

    endless: object
    documents: object
    count: float
    examples: list[dict]
    facts: str


def load_splits(config):
    """Return the `Splits` of the data set that the settings name, or stop with an error."""
    with refusing(DataError):
        return read_splits(
            config.dataset_name,
            config.dataset_config,
            config.splits,
            config.streaming,
        )


def find_shape(config, splits):
    """Return the `Splits` with what kind of rows they hold. Stop if no kind fits them.

    Args:
        splits: its rows are lists, datasets or streams of dicts.
    """
    with refusing(DataError):
        shape = shape_of(splits.train, config.dataset_text_field)
    if config.dataset_text_field and shape != (config.dataset_text_field,):
        say(
            f"--dataset_text_field {config.dataset_text_field} is unused: the data has "
            f"{' and '.join(shape)}."
        )
    return splits._replace(shape=shape, is_chat=holds_chats(splits.train, shape))


def prepare_encoding(config, tokenizer, rows, num_added, date):
    """Return the arguments with which all rows are encoded, and the date in the chat template.

    Stops if the tokenizer has no token that ends a document.

    Args:
        rows: `Splits` with their shape.
        num_added: number of tokens that were added to the tokenizer.
        date: the date of the interrupted run; None: today's.

    Returns:
        encoding: tokenizer, shape and num_rows, for `build_documents` in documents.py.
        date: in ISO format; None if the template writes none.
    """
    pinned, date = pin_date(tokenizer, date) if rows.is_chat else (tokenizer, None)
    ends_turns = rows.is_chat and not config.append_concat_token
    check_end(config.model_name_or_path, tokenizer, ends_turns)
    num_rows = embedding_rows(config, tokenizer, num_added)
    return {"tokenizer": pinned, "shape": rows.shape, "num_rows": num_rows}, date


def encode_documents(config, accelerator, rows, encoding):
    """Return the `Sequences` of all training rows, packed if --packing asks for it."""
    with refusing(DataError):
        documents, facts = build_documents(
            config,
            accelerator,
            rows.train,
            "the training split",
            rows.unread,
            **encoding,
        )
    lengths = [len(ids) for ids in documents["input_ids"]]
    packed = pack(lengths, config.max_length, config.packing)
    if config.packing:
        used = sum(lengths) / len(packed) / config.max_length
        say(
            f"{len(lengths)} documents are packed into {len(packed)} sequences of "
            f"{config.max_length} tokens, {used:.1%} used."
        )
    endless = partial(shuffled_sequences, packed, config.seed, config.shuffle)
    return Sequences(endless, documents, len(packed), list(islice(documents, 2)), facts)


def encode_stream(config, rows, encoding):
    """Return the `Sequences` of a stream, which is read while the run trains."""
    read = partial(read_stream, config, rows.train, rows.unread, **encoding)
    endless = partial(stream_sequences, read, config.max_length, config.packing)
    with refusing(DataError):
        examples = list(islice(read(0, is_strict=True), 2))
    if config.dataloader_num_workers > 1:  # `datasets` would split the files among the workers
        workers = config.dataloader_num_workers
        say(f"--dataloader_num_workers {workers}: a stream is read by one worker.")
    return Sequences(endless, None, math.inf, examples, "")


def encode_held_out(config, accelerator, rows, encoding):
    """Return this process's held-out batches, and prompts of token ids to answer."""
    with refusing(DataError):
        return build_held_out(config, accelerator, rows.held_out, **encoding)


def show_example(tokenizer, document):
    """Print a document as text, with marks around the tokens that count in the loss."""
    say("The first document, label tokens between \u00ab \u00bb:")
    say(preview(tokenizer, document))


def probe_loss(config, examples):
    """Return what `check_token_loss` needs: see `probe` in documents.py.

    Returns:
        packed: the beginnings of the examples as one batch.
        alone: a batch for each example.
        is_joined: whether a row of a batch may hold several documents. If not, `packed` holds the
            first example alone.
    """
    sizes = [config.per_device_train_batch_size]
    if config.eval_strategy != "no":
        sizes.append(config.per_device_eval_batch_size)
    is_joined = config.packing or max(sizes) > 1
    return *probe(examples if is_joined else examples[:1]), is_joined


def load_batches(config, accelerator, sequences, start):
    """Return the endless loader of this process's micro-batches.

    Args:
        start: number of sequences that the interrupted run has used.
    """
    workers = config.dataloader_num_workers
    return build_loader(
        sequences.endless,
        sequences.documents,
        config.per_device_train_batch_size,
        start,
        accelerator.process_index,
        accelerator.num_processes,
        num_workers=workers if sequences.documents is not None else min(workers, 1),
    )
