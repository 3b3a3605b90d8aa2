"""Read rows of the usual shapes as conversations, pairs or texts; name what is wrong with a row.

These columns are known, and the first that fits is used:

    messages                    list of {"role", "content"}; or conversations, of {"from", "value"}
    prompt, completion          two strings, or two lists of messages
    instruction (input) output  also response instead of output, and question with answer
    text                        or any other column, by its name

This file imports no other file of the project and can be copied along with a script.
"""

import csv
import json
import logging
import os
import re
from pathlib import Path

from datasets import (
    Dataset,
    DatasetDict,
    IterableDatasetDict,
    disable_progress_bars,
    load_dataset,
    load_from_disk,
)
from datasets.utils.logging import set_verbosity

FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
HELD_OUT = ("test", "validation", "eval")  # names of a split to evaluate on
INSTRUCTIONS = (("instruction", "output"), ("instruction", "response"), ("question", "answer"))
ROLES = {"human": "user", "gpt": "assistant", "developer": "system"}
FOLLOWS = {  # role -> the roles that may come before it; None: it comes first
    "system": (None,),
    "user": (None, "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


class DataError(Exception):
    """Data that cannot be trained on: one sentence names the file or the row, and what to do."""


# Files and splits ---------------------------------------------------------------------------------
def read_splits(dataset_name, splits="", streaming=False):
    """Return the rows to train on, and those to evaluate on or None.

    Args:
        dataset_name: a .json, .jsonl, .csv or .parquet file; a folder of such files, or one that
            `save_to_disk` wrote; or a Hub id.
        splits: one or two names, comma separated, the held-out one second. Slices are possible:
            "train[:90%],train[90%:]". Empty: train, and test, validation or eval if there is one.
        streaming: read the training rows when they are needed, for data larger than memory. The
            held-out rows are read at once.

    Raises:
        DataError: there is no such data or split, or a file cannot be read; broken JSON is named by
            its line. Of a stream only the beginning is read here.
    """
    disable_progress_bars()
    set_verbosity(logging.CRITICAL)  # what they would log is in the one sentence
    wanted = [name.strip() for name in splits.split(",") if name.strip()]
    if len(wanted) > 2:
        raise DataError(
            f"--splits {splits} names {len(wanted)} splits: give one to train on, and one to "
            "evaluate on"
        )
    check_name(dataset_name)
    if not streaming and os.path.exists(dataset_name):
        check_utf8(Path(dataset_name))
    try:
        found = load(dataset_name, streaming)
        if not wanted:
            wanted = default_splits(found)
        rows = [take(find_split(found, name, dataset_name), name) for name in wanted]
        if streaming:
            next(iter(rows[0]), None)  # a file that cannot be read raises here
            rows[1:] = [Dataset.from_list(list(split)) for split in rows[1:]]
    except DataError:
        raise
    except Exception as error:  # the libraries raise anything for a foreign or corrupt file
        explain(dataset_name, error)
    return rows[0], rows[1] if len(rows) > 1 else None


def check_name(dataset_name):
    """Raise DataError where the name is no file that can be read, no folder and no Hub id."""
    if not dataset_name:
        raise DataError("--dataset_name is empty: give a file, a folder or a Hub id")
    path = Path(dataset_name)
    if os.path.isfile(path):  # unlike Path.is_file it does not raise for a name that is too long
        if path.suffix not in FORMATS:
            raise DataError(f"--dataset_name {path} is not a {', '.join(FORMATS)} file: convert it")
        if not path.stat().st_size:
            raise DataError(f"--dataset_name {path} is empty: give a file with rows")
    is_path = path.suffix in FORMATS or dataset_name.count("/") > 1 or dataset_name[0] in "./~"
    if is_path and not os.path.exists(path):
        raise DataError(f"--dataset_name {path} is not there: check the path")


def load(dataset_name, streaming):
    """Return split name -> rows."""
    path = Path(dataset_name)
    if os.path.isfile(path):
        options = {"data_files": str(path), "streaming": streaming, **csv_options([path])}
        found = load_dataset(FORMATS[path.suffix], **options)
    elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        # in memory, else it would write its caches beside the data
        found = load_from_disk(path, keep_in_memory=not streaming)
        found = found if isinstance(found, DatasetDict) else DatasetDict(train=found)
        if streaming:
            streams = {name: rows.to_iterable_dataset() for name, rows in found.items()}
            found = IterableDatasetDict(streams)
    else:
        files = [file for file in path.glob("*") if file.suffix in FORMATS]
        found = load_dataset(dataset_name, streaming=streaming, **csv_options(files))
    is_split = isinstance(found, DatasetDict | IterableDatasetDict)
    return found if is_split else {"train": found}


def csv_options(files):
    """Return the options with which `load_dataset` keeps the cells of .csv files as text.

    Without them pandas would read 01 as 1.
    """
    if {file.suffix for file in files} != {".csv"}:
        return {}
    columns = {}
    for file in files:
        with file.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
            columns |= dict.fromkeys(next(csv.reader(lines), []), str)
    return {"converters": columns, "keep_default_na": False}


def default_splits(found):
    """Return the names of the split to train on and, if there is one, of a held-out split."""
    held_out = [name for name in HELD_OUT if name in found]
    names = [name for name in ("train", *held_out[:1]) if name in found]
    return names or list(found)[:1]


def find_split(found, name, dataset_name):
    """Return the rows of a split, whose name may end with a slice. DataError: there is none."""
    split = name.partition("[")[0]
    if split not in found:
        raise DataError(f"--splits: {dataset_name} has no split {name}, it has {', '.join(found)}")
    return found[split]


def take(rows, name):
    """Return the rows that the slice in a split's name selects, as in train[:100] or train[90%:].

    Raises:
        DataError: the slice is none, or the data is streamed.
    """
    if "[" not in name:
        return rows
    bounds = re.fullmatch(r"[^\[]*\[(-?\d+%?)?:(-?\d+%?)?\]", name)
    if not hasattr(rows, "select") or not bounds:
        raise DataError(
            f"--splits {name}: a slice is [a:b] or [a%:b%], and needs data that is not streamed"
        )
    numbers = []
    for bound in bounds.groups():
        if bound and bound.endswith("%"):
            numbers.append(len(rows) * int(bound[:-1]) // 100)
        else:
            numbers.append(int(bound) if bound else None)
    start, end, _ = slice(*numbers).indices(len(rows))
    return rows.select(range(start, end) if start < end else [])


# Broken files -------------------------------------------------------------------------------------
def explain(dataset_name, error):
    """Raise DataError with what a library's error about the data means."""
    if "corresponds to no data" in str(error):
        raise DataError(f"--dataset_name {dataset_name} has no rows: give some") from error
    if os.path.exists(dataset_name):
        find_broken_line(Path(dataset_name))
    reason = next(iter(str(error.__cause__ or error).splitlines()), type(error).__name__)
    raise DataError(f"--dataset_name {dataset_name} cannot be read: {reason}") from error


def json_files(path):
    """Return the .json and .jsonl files of a folder and the folders in it, or the file itself."""
    files = sorted(path.rglob("*.json*")) if path.is_dir() else [path]
    return [file for file in files if file.suffix in (".json", ".jsonl")]


def check_utf8(path):
    """Raise DataError for the first line of JSON that is not UTF-8.

    Arrow would find it only in the middle of the run.
    """
    for file in json_files(path):
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    line.decode()
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{file}, line {number} is not UTF-8 text ({error}): convert it"
                    ) from error


def find_broken_line(path):
    """Raise DataError for the first line that is not a JSON object."""
    for file in json_files(path):
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                reason = reason_of(line)
                if reason and number == 1 and file.suffix == ".json":
                    break  # one value on several lines; the libraries say where it is broken
                if reason:
                    raise DataError(
                        f"{file}, line {number} is not a JSON object ({reason}): fix it"
                    )


def reason_of(line):
    """Return why a line is not a JSON object; "" for an object and for a blank line."""
    if not line.strip():
        return ""
    try:
        is_object = isinstance(json.loads(line.decode("utf-8-sig")), dict)
    except json.JSONDecodeError as error:
        return f"{error.msg}, column {error.colno}"
    except ValueError as error:  # no UTF-8
        return str(error)
    return "" if is_object else "it is not {...}"


# Rows ---------------------------------------------------------------------------------------------
def shape_of(rows, text_field=""):
    """Return which of the known shapes the rows have, as the names of its columns.

    Raises:
        DataError: there are no rows, or none of the known columns.
    """
    first = next(iter(rows), None)
    if not first:
        raise DataError("the data has no rows: give some")
    columns = list(first)
    for column in ("messages", "conversations"):
        if column in columns:
            return (column,)
    for pair in (("prompt", "completion"), *INSTRUCTIONS):
        if set(pair) <= set(columns):
            return pair
    field = text_field or "text"
    if field not in columns:
        raise DataError(
            f"the columns are {', '.join(columns)}: there must be messages, prompt and completion, "
            "instruction and output, or question and answer; or --dataset_text_field must name a "
            f"column of text (it says {field})"
        )
    return (field,)


def as_document(row, shape, where):
    """Return a row as ("chat", messages, first), ("pair", prompt, completion) or ("text", text).

    `first` is the index of the first message that may be trained on. It is 0, unless the row has a
    prompt of messages.

    Args:
        shape: what `shape_of` returned for the split.
        where: the name of the row in an error.

    Raises:
        DataError: a cell is empty or of another type, the roles are out of order, or there is no
            turn of the assistant.
    """
    values = [row.get(column) for column in shape]
    for column, value in zip(shape, values, strict=True):
        if value is None or value == "" or value == []:
            raise DataError(f"{where} has an empty {column}: fill it")
    if shape[0] in ("messages", "conversations"):
        return "chat", check_messages(values[0], where), 0
    if shape == ("prompt", "completion") and all(isinstance(value, list) for value in values):
        return "chat", check_messages([*values[0], *values[1]], where), len(values[0])
    extra = ["input"] if shape in INSTRUCTIONS and row.get("input") else []
    for column in (*shape, *extra):
        if not isinstance(row[column], str):
            kind = type(row[column]).__name__
            raise DataError(f"{where} has no text in {column}, but {kind}: convert it")
    if shape in INSTRUCTIONS:
        question = "\n\n".join(part for part in (values[0], row.get("input")) if part)
        messages = [message("user", question), message("assistant", values[1])]
        return "chat", check_messages(messages, where), 0
    return ("pair", *values) if len(values) == 2 else ("text", *values)


def message(role, content):
    """Return a message as chat templates know it."""
    return {"role": role, "content": content}


def check_messages(messages, where):
    """Return the messages with the roles that chat templates know.

    Raises:
        DataError: as `as_document`.
    """
    if not isinstance(messages, list):
        kind = type(messages).__name__
        raise DataError(f"{where} holds a {kind}, not a list of messages: convert it")
    checked, before = [], None
    for number, entry in enumerate(messages, start=1):
        checked.append(check_message(entry, before, f"{where}, message {number}"))
        before = checked[-1]["role"]
    if all(entry["role"] != "assistant" for entry in checked):
        raise DataError(
            f"{where} has no assistant's turn, so there is nothing to learn: add one, or drop the "
            "row"
        )
    return checked


def check_message(entry, before, where):
    """Return a message; raise DataError where it is none, has no text, or is out of order.

    Args:
        before: role of the message before; None for the first.
    """
    keys = set(entry) if isinstance(entry, dict) else set()
    if not keys & {"role", "from"} or not keys & {"content", "value"}:
        raise DataError(f'{where} is not {{"role": ..., "content": ...}}: fix it')
    if entry.get("tool_calls"):
        raise DataError(f"{where} calls tools, which no template here writes: drop the row")
    role = entry.get("role") or entry.get("from")
    content = entry.get("content") or entry.get("value")
    role = ROLES.get(role, role) if isinstance(role, str) else role
    if role not in tuple(FOLLOWS):  # a tuple, because the role may be unhashable
        raise DataError(f"{where} has the role {role!r}: it must be one of {', '.join(FOLLOWS)}")
    if not isinstance(content, str) or not content.strip():
        raise DataError(f"{where} ({role}) has no text: fill it, or drop the row")
    if before not in FOLLOWS[role]:
        raise DataError(
            f"{where}: roles are out of order, {role} after {before or 'nothing'}: a system "
            "message comes first, then user and assistant take turns, a tool answers an assistant"
        )
    return message(role, content)
