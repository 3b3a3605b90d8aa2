"""Read the rows of a file, a folder or a Hub data set; stop if they cannot be used.

The script names its columns; this file does not know what they mean.
"""

import csv
import json
import sys
from pathlib import Path

from datasets import Dataset, load_dataset

from utils.errors import first_line, or_refuse, refuse, say
from utils.model_files import check_hub

FORMATS = (".csv", ".json", ".jsonl")


def load_data(dataset_name, columns, seed=0, num_processes=1):
    """Return the training rows and the held-out rows, each a `datasets.Dataset`.

    Without a validation split a fifth of the rows is held out. Rows that are equal in the first
    column stay on the same side of the split, so no held-out text is also trained on.

    Args:
        dataset_name: a .csv, .json or .jsonl file; a folder with train.* and, if there is one,
            validation.*; or a Hub id. The cells of a .csv file stay text, unchanged.
        columns: flag -> name of a column that the script reads. The flag is named in errors. The
            cells of all columns but the first must not be empty.
        seed: decides which rows are held out.
        num_processes: each needs a training row.
    """
    names = list(columns.values())
    for flag, name in columns.items():
        if names.count(name) > 1:
            flags = " and ".join(f"--{flag}" for flag in columns if columns[flag] == name)
            refuse(f"{flags} are both {name!r}: name a column for each")
    files = find_files(dataset_name)
    if files:
        dataset = {split: read_file(file, columns) for split, file in files.items()}
    else:
        dataset = or_refuse(f"--dataset_name {dataset_name}", load_dataset, dataset_name)
    if "train" not in dataset:
        refuse(f"--dataset_name {dataset_name} has no train split, only {', '.join(dataset)}")
    for split in ("train", "validation"):
        if split in dataset:
            check_columns(dataset[split], split, columns)
    train, valid, repeated = dataset["train"], dataset.get("validation"), 0
    if valid is None and len(train) > 1:
        train, valid = train.train_test_split(test_size=0.2, seed=seed).values()
        held_out = set(valid[names[0]])
        split = len(train)
        train = train.filter(lambda row: row[names[0]] not in held_out)
        repeated = split - len(train)
    told = f"{repeated} training rows are left out: their {names[0]!r} is held out, too"
    sizes = {"train": (len(train), num_processes), "validation": (len(valid or ()), 1)}
    for split, (count, least) in sizes.items():
        if count < least:
            reason = f" ({told})" if repeated else ""
            refuse(
                f"--dataset_name {dataset_name} leaves {count} row(s) for {split}{reason}, and "
                f"{num_processes} process(es) need {least}: give more rows, or "
                "launch with fewer --num_processes"
            )
    if repeated:
        say(f"{told}.")
    return train, valid


def find_files(dataset_name):
    """Return split -> file; an empty dict for a Hub id."""
    path = Path(dataset_name)
    if or_refuse(f"--dataset_name {path}", path.is_dir):
        return find_splits(path)
    if path.suffix in FORMATS or path.is_file():
        if path.suffix not in FORMATS:
            refuse(
                f"--dataset_name {path} is not a {', '.join(FORMATS)} file: convert or rename it"
            )
        if not path.is_file():
            refuse(f"--dataset_name {path} does not exist: check the path")
        return {"train": path}
    if dataset_name.count("/") > 1 or dataset_name.startswith((".", "/", "~")):
        refuse(f"--dataset_name {dataset_name!r} is not a file, folder or Hub id: check the path")
    check_hub(f"--dataset_name {dataset_name}")
    return {}


def find_splits(folder):
    """Return split -> file of a folder."""
    files = {}
    for file in sorted(folder.iterdir()):
        if file.suffix in FORMATS and file.stem in ("train", "validation"):
            if file.stem in files:
                both = f"{files[file.stem].name} and {file.name}"
                refuse(f"--dataset_name {folder} holds {both}: keep one of them")
            files[file.stem] = file
    if "train" not in files:
        refuse(
            f"--dataset_name {folder} holds no train.csv, train.json or train.jsonl: name a file, "
            "or add one"
        )
    return files


def read_file(file, columns):
    """Return the rows of a .csv, .json or .jsonl file as a Dataset.

    A column that the script reads must have values of one type. Any other column with mixed types
    is left out, and its name is printed.
    """
    if file.stat().st_size == 0:
        refuse(f"--dataset_name {file} is empty: give a file with rows")
    broken = f"--dataset_name {file} cannot be read, fix or convert it"
    rows = or_refuse(broken, read_csv if file.suffix == ".csv" else read_json, file)
    if not rows:
        refuse(f"--dataset_name {file} has no rows: give a file with rows")
    names = dict.fromkeys(name for row in rows for name in row)  # rows may differ in their keys
    cells = {name: [row.get(name) for row in rows] for name in names}
    for flag, name in columns.items():
        if name in cells:
            mixed = f"--{flag} {name!r} has values in {file} that are not of one type, change them"
            or_refuse(mixed, Dataset.from_dict, {name: cells[name]})
    for name in [name for name in cells if name not in columns.values()]:
        try:
            Dataset.from_dict({name: cells[name]})
        except Exception as error:  # pyarrow's, of several classes
            del cells[name]
            say(f"Column {name!r} of {file} is left out: {first_line(error)}")
    return Dataset.from_dict(cells)


def read_csv(file):
    """Return the rows of a .csv as dicts of text; empty cells, NA and 01 stay as they are."""
    csv.field_size_limit(sys.maxsize)
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, strict=True)  # an open quote at the end of the file is an error
        header, rows = next(reader), []
        named = [name for name in header if name]
        if twice := [name for name in named if header.count(name) > 1]:
            raise ValueError(f"two columns are called {twice[0]!r}; rename one")
        for number, cells in enumerate(filter(None, reader), start=1):
            if len(cells) > len(header):
                raise ValueError(
                    f"row {number} has {len(cells)} cells for {len(header)} columns; a quote may "
                    "be missing"
                )
            cells += [None] * (len(header) - len(cells))
            if any(cell for name, cell in zip(header, cells) if not name):
                raise ValueError(f"row {number} has a cell in a column without a name")
            rows.append({name: cell for name, cell in zip(header, cells) if name})
    return rows


def read_json(file):
    """Return the rows of a .json or .jsonl: a list of objects, or one object per line."""
    with file.open(encoding="utf-8-sig") as lines:
        is_list = next(filter(str.strip, lines), "").lstrip().startswith("[")
        lines.seek(0)
        if is_list:
            rows = json.load(lines)
        else:
            where = f"--dataset_name {file}: row {{}} is not JSON, fix it"
            numbered = enumerate(filter(str.strip, lines), start=1)
            rows = [or_refuse(where.format(number), json.loads, line) for number, line in numbered]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is a {type(row).__name__}, not an object with columns")
    return rows


def check_columns(rows, split, columns):
    """Stop if a column is missing, holds lists, or has an empty cell that must be filled."""
    for flag, name in columns.items():
        if name not in rows.column_names:
            known = ", ".join(map(repr, rows.column_names))
            refuse(f"--{flag} {name!r} is not in {split}: the columns are {known}")
        if not hasattr(rows.features[name], "dtype"):
            kind = type(rows.features[name]).__name__
            refuse(f"--{flag} {name!r} holds {kind}, not text, in {split}: choose another column")
        if name != next(iter(columns.values())):
            for number, cell in enumerate(rows[name], start=1):
                if cell is None or not str(cell).strip():
                    refuse(
                        f"row {number} of {split} has no {flag.removesuffix('_column')} in column "
                        f"{name!r}: fill it, drop the row, or close a quote that is open"
                    )


def check_labels(train, targets, tokenizer, max_length, prompt_length, is_shared=True):
    """Stop if labels cannot be told apart, or leave no room for text.

    For classification; free text as a target needs no such check.

    Args:
        train: the labels of the training rows.
        targets: label -> its token ids, without the end-of-sequence token.
        max_length: tokens of prompt and label together; of the prompt alone if not `is_shared`.
        prompt_length: tokens of the prompt without the row's text.

    Returns:
        label -> the text that its token ids decode to, which a correct answer must equal; and how
        many tokens of text fit beside the prompt and the longest label.
    """
    if len(set(map(str, train))) < 2:
        refuse(f"all training rows have the label {train[0]!r}: there is nothing to learn")
    answers, seen = {}, {}
    for label, ids in targets.items():
        answers[label] = answer = tokenizer.decode(ids, skip_special_tokens=True).strip()
        if not answer:
            refuse(f"label {label!r} becomes empty text after tokenizing: rename it")
        if seen.setdefault(answer, label) != label:
            refuse(
                f"two labels, {seen[answer]!r} and {label!r}, become the same text after "
                f"tokenizing ({answer!r}), so they cannot be told apart: rename one"
            )
    longest = max(map(len, targets.values())) + 1 if is_shared else 0
    room = max_length - prompt_length - longest
    if room < 1:
        refuse(
            f"--max_length {max_length} has no room for text beside {prompt_length} tokens of "
            f"prompt and {longest} of label: give {prompt_length + longest + 1} or more"
        )
    return answers, room
