"""Keep rows of JSON as lines of text, so that no value changes.

Arrow would give every row the keys of all others, turn 1 into 1.0 and dates into timestamps, and
fail where a value has several types. So `datasets` holds the lines, and each is parsed where it is
needed.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path

import datasets

from utils.conversations import BROKEN, COLUMNS, DataError

LINE = "line"  # the column that holds the rows as text


def has_text(row):
    """Return whether a line holds more than blanks."""
    return bool(row[LINE].strip())


def parse_row(row):
    """Return the row in a line of JSON; if it is not JSON, a row with the reason under BROKEN."""
    reason = reason_of(row[LINE])
    return {BROKEN: f"is not a JSON object ({reason})"} if reason else json.loads(row[LINE])


def parse_rows(batch):
    """Return column -> values of lines of JSON. A row without a column has None there."""
    rows = [parse_row({LINE: line}) for line in batch[LINE]]
    columns = {column: None for row in rows for column in row}
    return {column: [row.get(column) for row in rows] for column in columns}


def as_lines(file, unread):
    """Return a file with one JSON object a line: this one, or one in the cache.

    A file may also hold one JSON value: a list of rows, one row, a table, or an object with a list
    of rows in it, as {"version": ..., "data": [...]}.

    Args:
        unread: list that gets the names of the keys beside the rows.

    Raises:
        DataError: the value is broken, or holds no rows.
    """
    with file.open("rb") as lines:
        first = next((line for line in lines if line.strip()), b"")
        is_value = file.suffix.lower() == ".json" and not any(line.strip() for line in lines)
        if not reason_of(first) and not is_value:
            return file
    try:
        value = json.loads(file.read_bytes().decode("utf-8-sig"))
    except ValueError as error:
        if file.suffix.lower() == ".json" and not isinstance(error, UnicodeDecodeError):
            raise DataError(f"{file} cannot be read: {error}") from error
        return file  # the broken line is named later
    rows, names = rows_of(value, file)
    unread += [f"key {name} of {file.name}" for name in names]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    folder = Path(datasets.config.HF_DATASETS_CACHE, "json_lines")
    target = folder / f"{hashlib.sha256(text.encode()).hexdigest()}.jsonl"
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as part:
            part.write(text)
        os.chmod(part.name, 0o644)  # others may share the cache
        os.replace(part.name, target)  # several processes may write it
    return target


def rows_of(value, file):
    """Return the rows in a JSON value, and the names of the keys beside them.

    Raises:
        DataError: there are none, or several lists of rows.
    """
    names = []
    if isinstance(value, dict):
        lists = [key for key, rows in value.items() if rows and (is_rows(rows) or is_chats(rows))]
        is_row = any({"role", "from"} & set(value[key][0]) for key in lists if is_rows(value[key]))
        is_row |= any(isinstance(value.get(column), str) for column in COLUMNS)
        columns = [list(v.values()) if isinstance(v, dict) else v for v in value.values()]
        is_table = all(isinstance(column, list) for column in columns)
        if is_row:
            value = [value]
        elif len(lists) > 1:
            raise DataError(
                f"{file} holds several lists of rows ({', '.join(lists)}): write each to a file of "
                "its own, such as train.json and test.json in one folder"
            )
        elif lists:
            names = [key for key in value if key != lists[0]]
            value = value[lists[0]]
        elif is_table and len(set(map(len, columns))) == 1:
            value = [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
        else:
            value = [value]
    if not isinstance(value, list) or not value:
        raise DataError(f"--dataset_name {file} has no rows: give some")
    return [as_row(row, number, file) for number, row in enumerate(value, start=1)], names


def is_rows(values):
    """Return whether this is a list of JSON objects."""
    return isinstance(values, list) and all(isinstance(value, dict) for value in values)


def is_chats(values):
    """Return whether this is a list of lists of JSON objects."""
    return isinstance(values, list) and all(value and is_rows(value) for value in values)


def as_row(value, number, file):
    """Return an entry of a list as a row: an object, a text, or a list of messages."""
    if isinstance(value, dict):
        return value
    if isinstance(value, str):
        return {"text": value}
    if is_rows(value):
        return {"messages": value}
    raise DataError(f"{file}, row {number} is a {type(value).__name__}, not {{...}}: fix it")


def check_lines(file):
    """Raise DataError for the first line that is not UTF-8 or not a JSON object."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                reason = reason_of(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{file}, line {number} is not UTF-8 text ({error}): convert it"
                ) from error
            if reason:
                raise DataError(f"{file}, line {number} is not a JSON object ({reason}): fix it")


def reason_of(line):
    """Return why a line is not a JSON object; "" for an object and for a blank line."""
    if not line.strip():
        return ""
    try:
        line = line.decode("utf-8-sig") if isinstance(line, bytes) else line
        is_object = isinstance(json.loads(line), dict)
    except json.JSONDecodeError as error:
        return f"{error.msg}, column {error.colno}"
    except (ValueError, RecursionError) as error:  # no UTF-8, or nested too deep
        return str(error)
    return "" if is_object else "it is not {...}"
