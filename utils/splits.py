"""Read the splits of a data set: files, folders and Hub data sets; name what is not read."""

import csv
import json
import logging
import os
import re
import tempfile
from collections import Counter
from functools import partial
from glob import escape
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import datasets
from datasets import Dataset, DatasetDict, Features, IterableDatasetDict, Value
from datasets import load_dataset, load_dataset_builder, load_from_disk
from datasets.utils.logging import set_verbosity

from utils.conversations import BROKEN, DataError
from utils.errors import first_line, say
from utils.json_lines import LINE, as_lines, check_lines, has_text, parse_row, parse_rows

FORMATS = {  # suffix -> what `datasets` calls the format
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
NO_DATA = ("README.md", "config.json", "dataset_info.json", "dataset_infos.json")
HELD_OUT = ("test", "validation", "eval")  # names of a split to evaluate on
SPLIT_WORDS = {  # split -> words in the name of a file or folder, those of `datasets`
    "train": "train|training",
    "validation": "validation|valid|dev|val",
    "test": "test|testing|eval|evaluation",
}
BEGINNING = 1000  # rows of a stream that are looked at before training


class Splits(NamedTuple):
    """What is read of a data set.

    Fields:
        train: the rows to train on.
        held_out: those to evaluate on, or None.
        unread: names of what is not read.
        shape: the columns that say what a row is (`shape_of` in conversations.py).
        is_chat: whether the rows are conversations.
    """

    train: object
    held_out: object
    unread: list[str]
    shape: tuple = ()
    is_chat: bool = False


def read_splits(dataset_name, config_name="", splits="", streaming=False):
    """Return the `Splits` of a data set.

    Args:
        dataset_name: a file in one of FORMATS; a folder of such files, or one that `save_to_disk`
            wrote; or a Hub id.
        config_name: the configuration of a data set that has several; empty: its only one.
        splits: one or two names, comma separated, the held-out one second. Slices are possible:
            "train[:90%],train[90%:]". Empty: train, and the first of test, validation, eval.
        streaming: read the training rows when they are needed, for data larger than memory. The
            held-out rows are read at once.

    Raises:
        DataError: there is no such data or split, or a file cannot be read; broken JSON is named by
            its line. Only the beginning of a stream is read here.
    """
    datasets.disable_progress_bars()
    set_verbosity(logging.CRITICAL)  # the error's one sentence says what they would log
    wanted = [name.strip() for name in splits.split(",") if name.strip()]
    if len(wanted) > 2:
        raise DataError(
            f"--splits {splits} names {len(wanted)} splits: give one to train on, and one to "
            "evaluate on"
        )
    dataset_name = os.path.expanduser(dataset_name)
    check_name(dataset_name)
    use_writable_cache()
    try:
        found, unread = find_rows(dataset_name, streaming, config_name)
        wanted = wanted or default_splits(found)
        rows = [take(find_split(found, name, dataset_name)(), name) for name in wanted]
        if streaming:
            check_beginning(rows[0])
            rows[1:] = [in_memory(split) for split in rows[1:]]
        read = [name.partition("[")[0] for name in wanted]
        others = [name for name in found if name not in read]
        unread += [f"split {name}{size_of(found[name], streaming)}" for name in others]
    except DataError:
        raise
    except Exception as error:  # the libraries raise anything for a foreign or corrupt file
        explain(dataset_name, error)
    return Splits(rows[0], rows[1] if len(rows) > 1 else None, unread)


def check_name(dataset_name):
    """Raise DataError unless the name is a file that can be read, a folder or a Hub id."""
    if not dataset_name:
        raise DataError("--dataset_name is empty: give a file, a folder or a Hub id")
    if "://" in dataset_name:
        raise DataError(f"--dataset_name {dataset_name} is a URL: download the file and name it")
    path = Path(dataset_name)
    if os.path.isfile(path):  # unlike Path.is_file it does not raise for a name that is too long
        if not format_of(path):
            raise DataError(f"--dataset_name {path} is not a {', '.join(FORMATS)} file: convert it")
        if not path.stat().st_size:
            raise DataError(f"--dataset_name {path} is empty: give a file with rows")
    is_path = format_of(path) or dataset_name.count("/") > 1 or dataset_name[0] in "./~"
    if is_path and not os.path.exists(path):
        raise DataError(f"--dataset_name {path} is not there: check the path")


def use_writable_cache():
    """Let `datasets` cache in the temporary folder where its own folder cannot be written."""
    try:
        os.makedirs(datasets.config.HF_DATASETS_CACHE, exist_ok=True)
        with tempfile.TemporaryFile(dir=datasets.config.HF_DATASETS_CACHE):
            return
    except OSError as error:
        folder = Path(tempfile.gettempdir(), f"datasets-{os.getuid()}")  # one for all processes
        say(
            f"The cache {datasets.config.HF_DATASETS_CACHE} cannot be written ({error.strerror}): "
            f"{folder} is used."
        )
        datasets.config.HF_DATASETS_CACHE = folder


def format_of(path):
    """Return the format of a file by its suffix, in any case; None if the suffix is unknown."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return FORMATS.get(suffixes[-1]) if suffixes else None


def is_json(path):
    """Return whether a file is JSON, and not compressed."""
    return format_of(path) == "json" and path.suffix.lower() not in COMPRESSED


def find_rows(dataset_name, streaming, config_name):
    """Return split name -> function that reads its rows, and the names of what is not read."""
    path = Path(dataset_name)
    if os.path.isfile(path):
        return read_files({"train": [path]}, path.parent, streaming)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        # in memory, else `datasets` would write its caches beside the data
        found = load_from_disk(path, keep_in_memory=not streaming)
        found = found if isinstance(found, DatasetDict) else DatasetDict(train=found)
        if streaming:
            streams = {name: rows.to_iterable_dataset() for name, rows in found.items()}
            found = IterableDatasetDict(streams)
        return {name: partial(found.get, name) for name in found}, []
    files = visible_files(path)
    card = path / "README.md"
    has_configs = card.is_file() and "\nconfigs:" in card.read_text(errors="replace")
    data = [file for file in files if format_of(file) and file.name not in NO_DATA]
    if data and not has_configs:
        if config_name:
            raise DataError(
                f"--dataset_config {config_name}: {path} has no configurations: drop it"
            )
        found, unread = read_files(assign_splits(data, path), path, streaming)
        read = set().union(*(function.args[0] for function in found.values()))
    else:
        found = load_dataset(dataset_name, config_name or None, streaming=streaming)
        found, unread, read = {name: partial(found.get, name) for name in found}, [], set()
        if files:
            builder = load_dataset_builder(dataset_name, config_name or None)
            read = {Path(file) for files in builder.config.data_files.values() for file in files}
    read |= {path / name for name in NO_DATA}
    resolved = {file.resolve() for file in read}
    others = [file for file in files if file.resolve() not in resolved]
    if others:
        used = [file for file in files if file not in others and file.name not in NO_DATA]
        unread.append(f"files {listed(others, path)} (read: {listed(used, path)})")
    return found, unread


def listed(files, folder):
    """Return the names of up to five files in a folder as text, and how many more there are."""
    names = [str(file.relative_to(folder)) for file in files]
    more = [f"and {len(names) - 5} more"] if len(names) > 5 else []
    return ", ".join([*names[:5], *more])


def visible_files(folder):
    """Return the files of a folder and the folders in it that are not hidden, sorted."""
    files = sorted(folder.rglob("*")) if os.path.isdir(folder) else []
    return [
        file
        for file in files
        if file.is_file() and not any(p.startswith(".") for p in file.relative_to(folder).parts)
    ]


def assign_splits(files, folder):
    """Return split name -> files, by the rules of `datasets`.

    Names such as data/train_sft-00000-of-00001.parquet come first, then words in the names of
    folders, then words in the names of files. Without any of them all files are the split train.
    """
    patterns = [r"^data/(?P<any>[^/]+)-\d{5}-of-\d{5}[^/]*$"]
    for end in (r"(?=[-._ 0-9][^/]*/|/)", r"(?=[-._ 0-9][^/]*$)"):
        words = "|".join(f"(?P<{name}>{words})" for name, words in SPLIT_WORDS.items())
        patterns.append(rf"(?:^|[-._ 0-9/])(?:{words}){end}")
    for pattern in patterns:
        found = {}
        for file in files:
            match = re.search(pattern, file.relative_to(folder).as_posix(), re.IGNORECASE)
            if match:
                split = match["any"] if match.lastgroup == "any" else match.lastgroup
                found.setdefault(split, []).append(file)
        if found:
            return {name: found[name] for name in (*SPLIT_WORDS, *found) if name in found}
    return {"train": files}


def read_files(splits, folder, streaming):
    """Return split name -> function that reads its files, and the names of what is not read.

    If a split has files of several formats, only those of the most frequent format are read.
    """
    found, unread = {}, []
    for name, files in splits.items():
        kind, _ = Counter(map(format_of, files)).most_common(1)[0]
        files = [file for file in files if format_of(file) == kind]
        lines = [as_lines(file, unread) if is_json(file) else file for file in files]
        found[name] = partial(load_files, files, lines, kind, streaming)
    return found, unread


def load_files(files, lines, kind, streaming):
    """Return the rows of files of one format.

    Args:
        files: as the user gave them.
        lines: the files to read; for JSON, the files that `as_lines` returned.
    """
    paths = [escape(str(file)) for file in lines]  # `datasets` takes a path as a glob pattern
    options = {"data_files": paths, "split": "train", "streaming": streaming}
    if kind != "json":
        return load_dataset(kind, **options, **(csv_options(files) if kind == "csv" else {}))
    options |= {"encoding": "utf-8-sig", "features": Features({LINE: Value("string")})}
    if streaming:  # bytes that are not UTF-8 become an error of JSON, named with their row
        rows = load_dataset("text", encoding_errors="backslashreplace", **options)
        return rows.filter(has_text).map(parse_row, remove_columns=[LINE])
    for file in lines:
        if is_json(file):
            check_lines(file)
    rows = load_dataset("text", **options)
    kept = [number for number, line in enumerate(rows[LINE]) if line.strip()]
    if not kept:
        raise DataError(f"--dataset_name {files[0]} has no rows: give some")
    rows = rows if len(kept) == len(rows) else rows.select(kept)
    return rows.with_transform(parse_rows)


def csv_options(files):
    """Return the options with which `load_dataset` keeps the cells of .csv files as text.

    Without them pandas would read 01 as 1.
    """
    columns, separator = {}, "\t" if ".tsv" in files[0].name.lower() else ","
    for file in files:
        if file.suffix.lower() not in COMPRESSED:
            with file.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
                columns |= dict.fromkeys(next(csv.reader(lines, delimiter=separator), []), str)
    cells = {"converters": columns} if columns else {"dtype": str}
    return cells | {"keep_default_na": False, "sep": separator}


def default_splits(found):
    """Return the names of the split to train on and, if there is one, of a held-out split."""
    held_out = [name for name in HELD_OUT if name in found]
    others = [name for name in found if name not in HELD_OUT]
    if "train" in found:
        return ["train", *held_out[:1]]
    if not others:
        raise DataError(
            f"the data has only the splits {', '.join(found)}: name one to train on in --splits"
        )
    return others[:1]


def find_split(found, name, dataset_name):
    """Return the split of a name, which may end with a slice. DataError: there is none."""
    split = name.partition("[")[0]
    if split not in found:
        raise DataError(f"--splits: {dataset_name} has no split {name}, it has {', '.join(found)}")
    return found[split]


def size_of(read, streaming):
    """Return the number of rows of a split that is not used, as text; "" where it is unknown."""
    try:
        return "" if streaming else f" ({len(read())} rows)"
    except Exception:  # nothing depends on a split that is not used
        return ""


def take(rows, name):
    """Return the rows that the slice in a split's name selects, as in train[:100] or train[90%:].

    Raises:
        DataError: this is not a slice, or it would need the length of a stream.
    """
    if "[" not in name:
        return rows
    bounds = re.fullmatch(r"[^\[]*\[(-?\d+%?)?:(-?\d+%?)?\]", name)
    if not bounds:
        raise DataError(f"--splits {name}: a slice is [a:b] or [a%:b%]")
    if not hasattr(rows, "select"):
        if "%" in name or "-" in name.partition("[")[2]:
            raise DataError(
                f"--splits {name}: a stream has no known length: give numbers of rows, as in "
                "train[1000:], or drop --streaming"
            )
        start, end = (int(bound) if bound else None for bound in bounds.groups())
        rows = rows if end is None else rows.take(end)
        return rows.skip(start) if start else rows
    numbers = []
    for bound in bounds.groups():
        if bound and bound.endswith("%"):
            numbers.append(len(rows) * int(bound[:-1]) // 100)
        else:
            numbers.append(int(bound) if bound else None)
    start, end, _ = slice(*numbers).indices(len(rows))
    return rows.select(range(start, end) if start < end else [])


# Streams ------------------------------------------------------------------------------------------
def check_beginning(rows):
    """Raise DataError where the first rows of a stream cannot be read."""
    for number, row in enumerate(islice(rows, BEGINNING), start=1):
        if BROKEN in row:
            raise DataError(f"row {number} of the stream {row[BROKEN]}: fix it")


def in_memory(rows):
    """Return the rows of a stream as a `Dataset`, each unchanged."""
    lines = [json.dumps(row, default=str) for row in rows]
    return Dataset.from_dict({LINE: lines}).with_transform(parse_rows)


def explain(dataset_name, error):
    """Raise DataError with what a library's error about the data means."""
    if "corresponds to no data" in str(error):
        raise DataError(f"--dataset_name {dataset_name} has no rows: give some") from error
    if "Config name is missing" in str(error):
        names = re.findall(r"\[(.*?)\]", str(error).replace("\n", " "))
        raise DataError(
            f"--dataset_name {dataset_name} has several configurations ({names[0] if names else ''}"
            "): name one in --dataset_config"
        ) from error
    reason = first_line(error.__cause__ or error)
    raise DataError(f"--dataset_name {dataset_name} cannot be read: {reason}") from error
