"""Read rows of any of the usual shapes as conversations, pairs or texts; say in one sentence what is wrong with one.

Known columns, the first that fits is taken:

    messages                    list of {"role", "content"}; or conversations, of {"from", "value"}
    prompt, completion          two strings, or two lists of messages
    instruction (input) output  also response in place of output, and question with answer
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
INSTRUCTIONS = (("instruction", "output"), ("instruction", "response"), ("question", "answer"))
ROLES = {"human": "user", "gpt": "assistant", "developer": "system"}
FOLLOWS = {  # role -> which may stand before it
    "system": (None,),
    "user": (None, "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


class DataError(Exception):
    """Data that cannot be trained on: a sentence that names the file or the row, and what to do."""


def read_splits(dataset_name, splits="", streaming=False):
    """Return the rows to train on, and those to evaluate on or None.

    Args:
        dataset_name: a .json, .jsonl, .csv or .parquet file, a folder of such files or one that `save_to_disk` wrote,
            or a Hub id.
        splits: one or two names, comma separated, the held-out one second; slices work, "train[:90%],train[90%:]".
            Empty: train, and test, validation or eval where there is one.
        streaming: read the rows to train on while they are needed, of data larger than memory; held-out ones at once.

    DataError: nothing there, no such split, or a file that cannot be read; of broken JSON with its line. Of a stream
    only the beginning is read here.
    """
    disable_progress_bars()
    set_verbosity(logging.CRITICAL)  # what they would log is said in the one sentence
    if not dataset_name:
        raise DataError("--dataset_name is empty: give a file, a folder or a Hub id")
    path, is_file = (
        Path(dataset_name),
        os.path.isfile(dataset_name),
    )  # a name that is too long is no file
    wanted = [name.strip() for name in splits.split(",") if name.strip()]
    if len(wanted) > 2:
        raise DataError(
            f"--splits {splits} names {len(wanted)} splits: give one to train on, and one to evaluate on"
        )
    if is_file and path.suffix not in FORMATS:
        raise DataError(f"--dataset_name {path} is no {', '.join(FORMATS)} file: convert it")
    if is_file and not path.stat().st_size:
        raise DataError(f"--dataset_name {path} is empty: give a file with rows")
    if not os.path.exists(path) and (
        path.suffix in FORMATS or dataset_name.count("/") > 1 or dataset_name[0] in "./~"
    ):
        raise DataError(f"--dataset_name {path} is not there: check the path")
    if not streaming and os.path.exists(path):
        check_utf8(path)
    try:
        if is_file:
            found = load_dataset(
                FORMATS[path.suffix], data_files=str(path), streaming=streaming, **as_text([path])
            )
        elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            found = load_from_disk(
                path, keep_in_memory=not streaming
            )  # else it would write its caches beside the data
            found = found if isinstance(found, DatasetDict) else DatasetDict(train=found)
            if streaming:
                found = IterableDatasetDict(
                    {name: split.to_iterable_dataset() for name, split in found.items()}
                )
        else:
            files = [file for file in path.glob("*") if file.suffix in FORMATS]
            found = load_dataset(dataset_name, streaming=streaming, **as_text(files))
        if not isinstance(found, DatasetDict | IterableDatasetDict):
            found = {"train": found}
        if not wanted:
            held_out = [name for name in ("test", "validation", "eval") if name in found]
            wanted = [name for name in ("train", *held_out[:1]) if name in found] or list(found)[:1]
        missing = [name for name in wanted if name.partition("[")[0] not in found]
        if missing:
            raise DataError(
                f"--splits: {dataset_name} has no split {missing[0]}, it has {', '.join(found)}"
            )
        rows = [take(found[name.partition("[")[0]], name) for name in wanted]
        if streaming:
            next(iter(rows[0]), None)
            rows[1:] = [Dataset.from_list(list(split)) for split in rows[1:]]
    except DataError:
        raise
    except Exception as error:  # the libraries raise anything for a foreign or corrupt file
        if "corresponds to no data" in str(error):
            raise DataError(f"--dataset_name {dataset_name} has no rows: give some") from error
        if os.path.exists(path):
            find_broken_line(path)
        reason = next(iter(str(error.__cause__ or error).splitlines()), type(error).__name__)
        raise DataError(f"--dataset_name {dataset_name} cannot be read: {reason}") from error
    return rows[0], rows[1] if len(rows) > 1 else None


def as_text(files):
    """Return what makes `load_dataset` keep the cells of .csv files as they stand: pandas would read 01 as 1."""
    if {file.suffix for file in files} != {".csv"}:
        return {}
    columns = {}
    for file in files:
        with file.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
            columns |= dict.fromkeys(next(csv.reader(lines), []), str)
    return {"converters": columns, "keep_default_na": False}


def take(rows, name):
    """Return the rows of a split that the slice after its name, as in train[:100] or train[90%:], leaves."""
    if "[" not in name:
        return rows
    bounds = re.fullmatch(r"[^\[]*\[(-?\d+%?)?:(-?\d+%?)?\]", name)
    if not hasattr(rows, "select") or not bounds:
        raise DataError(
            f"--splits {name}: a slice is [a:b] or [a%:b%], and needs data that is not streamed"
        )
    numbers = [
        b and (len(rows) * int(b[:-1]) // 100 if b.endswith("%") else int(b))
        for b in bounds.groups()
    ]
    start, end, _ = slice(*numbers).indices(len(rows))
    return rows.select(range(start, end) if start < end else [])


def json_files(path):
    files = sorted(path.rglob("*.json*")) if path.is_dir() else [path]
    return [file for file in files if file.suffix in (".json", ".jsonl")]


def check_utf8(path):
    """Raise DataError for the first line of JSON in another encoding: Arrow would find it in the middle of the run."""
    for file in json_files(path):
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    line.decode()
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{file}, line {number} is no UTF-8 text ({error}): convert it"
                    ) from error


def find_broken_line(path):
    """Raise DataError for the first line of JSON lines, in a file or in those of a folder, that is no JSON object."""
    for file in json_files(path):
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    if line.strip() and not isinstance(json.loads(line.decode("utf-8-sig")), dict):
                        raise ValueError("it is no {...}")
                except ValueError as error:
                    if number == 1 and file.suffix == ".json":
                        break  # one value over several lines, of which the libraries say where it breaks
                    reason = (
                        f"{error.msg}, column {error.colno}"
                        if isinstance(error, json.JSONDecodeError)
                        else error
                    )
                    raise DataError(
                        f"{file}, line {number} is no JSON object ({reason}): mend it"
                    ) from error


def shape_of(rows, text_field=""):
    """Return which of the known shapes rows have, as the names of its columns. DataError: none, or no rows."""
    if not (first := next(iter(rows), None)):
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
            f"the columns are {', '.join(columns)}: there must be messages, prompt and completion, instruction and "
            f"output, question and answer, or --dataset_text_field must name one of text (it says {field})"
        )
    return (field,)


def as_document(row, shape, where):
    """Return a row as ("chat", messages, first), ("pair", prompt, completion) or ("text", text).

    Args:
        shape: what `shape_of` returned of the split.
        where: the row, as a sentence names it.

    `first` is the index of the first message that may be trained on: 0, but behind a prompt of messages. DataError: a
    row without what it should hold, roles out of order, a conversation without an assistant's turn, an empty one.
    """
    values = [row.get(column) for column in shape]
    for column, value in zip(shape, values):
        if value is None or value == "" or value == []:
            raise DataError(f"{where} has an empty {column}: fill it")
    if shape[0] in ("messages", "conversations"):
        return "chat", check_messages(values[0], where), 0
    if shape == ("prompt", "completion") and all(isinstance(value, list) for value in values):
        return "chat", check_messages([*values[0], *values[1]], where), len(values[0])
    extra = ["input"] if shape in INSTRUCTIONS and row.get("input") else []
    for column in (*shape, *extra):
        if not isinstance(row[column], str):
            raise DataError(
                f"{where} has no text in {column}, but {type(row[column]).__name__}: convert it"
            )
    if shape in INSTRUCTIONS:
        question = "\n\n".join(part for part in (values[0], row.get("input")) if part)
        return (
            "chat",
            check_messages([message("user", question), message("assistant", values[1])], where),
            0,
        )
    return ("pair", *values) if len(values) == 2 else ("text", *values)


def message(role, content):
    return {"role": role, "content": content}


def check_messages(messages, where):
    """Return the messages with roles as templates know them. DataError: as `as_document` says."""
    if not isinstance(messages, list):
        raise DataError(
            f"{where} holds a {type(messages).__name__}, not a list of messages: convert it"
        )
    checked, before = [], None
    for number, entry in enumerate(messages, start=1):
        if (
            not isinstance(entry, dict)
            or not {"role", "from"} & set(entry)
            or not {"content", "value"} & set(entry)
        ):
            raise DataError(
                f'{where}, message {number} is no {{"role": ..., "content": ...}}: mend it'
            )
        if entry.get("tool_calls"):
            raise DataError(
                f"{where}, message {number} calls tools, which no template here writes: drop the row"
            )
        role, content = (
            entry.get("role") or entry.get("from"),
            entry.get("content") or entry.get("value"),
        )
        role = ROLES.get(role, role) if isinstance(role, str) else role
        if role not in tuple(FOLLOWS):
            raise DataError(
                f"{where}, message {number} has the role {role!r}: it must be one of {', '.join(FOLLOWS)}"
            )
        if not isinstance(content, str) or not content.strip():
            raise DataError(
                f"{where}, message {number} ({role}) has no text: fill it, or drop the row"
            )
        if before not in FOLLOWS[role]:
            raise DataError(
                f"{where}, message {number}: roles are out of order, {role} after {before or 'nothing'}: a system "
                "message comes first, then user and assistant take turns, a tool answers an assistant"
            )
        checked.append(message(role, content))
        before = role
    if all(entry["role"] != "assistant" for entry in checked):
        raise DataError(
            f"{where} has no assistant's turn, so nothing to learn: add one, or drop the row"
        )
    return checked
