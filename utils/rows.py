"""Read the columns that a script uses from a .csv, .json or .jsonl file, and count all others."""

import csv
import json
import re
import sys
from collections import Counter
from itertools import chain

from datasets import Dataset

from utils.errors import or_refuse, refuse, say

FORMATS = (".csv", ".json", ".jsonl")
SCALARS = {str, int, float, bool}
BLANKS = re.compile(r"\s*")


def read_file(file, columns, keep=()):
    """Return the columns of a file as a Dataset, and what of the file is not read.

    Args:
        columns: flag -> name of a column. Its cells get one type: where they mix text and numbers,
            all become text, and a line says so.
        keep: names of further columns, which stay as they are.

    Returns:
        The rows; name -> number of cells that are not empty, for every other column; and the names
        of all columns, in their order.
    """
    if file.stat().st_size == 0:
        refuse(f"--dataset_name {file} is empty: give a file with rows")
    broken = f"--dataset_name {file} cannot be read, fix or convert it"
    read = read_csv if file.suffix.lower() == ".csv" else read_json
    wanted = {*columns.values(), *keep}
    cells, unused, names, count = or_refuse(broken, lambda: collect(read(file, wanted), wanted))
    if not count:
        refuse(f"--dataset_name {file} has no rows: give a file with rows")
    for flag, name in columns.items():
        if name in cells:
            cells[name] = in_one_type(cells[name], f"Column {name!r} of {file}")
            mixed = f"--{flag} {name!r} has values in {file} that are not of one type, change them"
            or_refuse(mixed, Dataset.from_dict, {name: cells[name]})
    return or_refuse(broken, Dataset.from_dict, cells), unused, names


def collect(rows, wanted):
    """Return column -> cells, other column -> number of its cells, names and number of rows.

    Only the wanted columns are kept in memory.
    """
    cells, unused, names, count = {}, Counter(), {}, 0
    for row in rows:
        names |= dict.fromkeys(row)
        for name, cell in row.items():
            if name in wanted:
                column = cells.setdefault(name, [])
                column += [None] * (count - len(column))  # rows may differ in their columns
                column.append(cell)
            else:
                unused[name] += cell not in (None, "")
        count += 1
    for column in cells.values():
        column += [None] * (count - len(column))
    return cells, unused, [*names], count


def in_one_type(cells, culprit):
    """Return the cells, as text where they mix types or hold an integer of more than 64 bits."""
    kinds = {type(cell) for cell in cells if cell is not None}
    is_large = kinds == {int} and max(abs(cell) for cell in cells if cell is not None) >= 2**63
    if not is_large and (len(kinds) < 2 or kinds - SCALARS):
        return cells
    mix = (
        "integers of more than 64 bits"
        if is_large
        else " and ".join(sorted(kind.__name__ for kind in kinds))
    )
    say(f"{culprit} holds {mix}: all its cells are read as text.")
    return [None if cell is None else str(cell) for cell in cells]


def read_csv(file, wanted):
    """Yield the rows of a .csv as dicts of text; empty cells, NA and 01 stay as they are."""
    csv.field_size_limit(sys.maxsize)
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, strict=True)  # an open quote at the end of the file is an error
        header = next(reader, [])
        if twice := [name for name in header if name and header.count(name) > 1]:
            raise ValueError(f"two columns are called {twice[0]!r}; rename one")
        if len(header) == 1 and not wanted & {*header} and re.search(r"[;\t|]", header[0]):
            raise ValueError(f"its header is {header[0]!r}; separate the cells by commas")
        for number, cells in enumerate(filter(None, reader), start=1):
            if len(cells) > len(header):
                raise ValueError(
                    f"row {number} has {len(cells)} cells for {len(header)} columns; a quote may "
                    "be missing"
                )
            row = dict.fromkeys(header)  # a short row has no cell in the last columns
            for name, cell in zip(header, cells):
                row[name] = cell or row[name] or cell  # several columns may have no name
            yield row


def read_json(file, wanted):
    """Return the rows of a .json or .jsonl: a list of objects, or objects one after the other.

    Also reads one object that holds such a list beside other keys. These are counted as columns.
    """
    values = decode(file.read_text(encoding="utf-8-sig"))
    first, second = next(values, {}), next(values, None)
    if second is not None:
        return check_objects(chain([first, second], values))
    if isinstance(first, dict) and not wanted & set(first):
        lists = [name for name, value in first.items() if is_table(value)]
        if len(lists) > 1:
            raise ValueError(
                f"it is one object with the lists {', '.join(lists)}; write a file for each"
            )
        if lists:
            beside = {name: value for name, value in first.items() if name != lists[0]}
            rows = first[lists[0]]
            return check_objects([beside | rows[0], *rows[1:]])
    return check_objects(first if isinstance(first, list) else [first] if first else [])


def is_table(value):
    """Return whether a value of JSON is a list of objects."""
    return isinstance(value, list) and value and all(isinstance(one, dict) for one in value)


def decode(text):
    """Yield the values of a JSON text, one after the other."""
    decoder = json.JSONDecoder(
        object_pairs_hook=unique,
        parse_constant=lambda name: None if name == "NaN" else float(name),  # NaN: no value
    )
    begin, number = BLANKS.match(text).end(), 0
    while begin < len(text):
        number += 1
        try:
            value, end = decoder.raw_decode(text, begin)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"row {number} is not JSON: {error}") from None
        yield value
        begin = BLANKS.match(text, end).end()


def unique(pairs):
    """Return the object of JSON with these pairs; raise ValueError where a key is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = Counter(name for name, _ in pairs)
        raise ValueError(f"an object has the key {names.most_common(1)[0][0]!r} twice")
    return found


def check_objects(rows):
    """Yield the rows; raise ValueError where one is not an object."""
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is a {type(row).__name__}, not an object with columns")
        yield row
