"""Read the rows of a file, a folder or a Hub data set, and batch them; stop if they cannot be used.

The script names its columns; this file does not know what they mean. What is not used is printed.
"""

import math
from collections import Counter
from itertools import cycle, islice
from numbers import Integral
from pathlib import Path

import torch
from datasets import ClassLabel, Value, load_dataset
from torch.utils.data import DataLoader, RandomSampler

from utils.errors import or_refuse, refuse, say
from utils.model_files import check_hub
from utils.rows import FORMATS, read_file

SPLITS = ("train", "validation")


def load_data(dataset_name, columns, seed=0, *, keep=()):
    """Return the training rows and the held-out rows, each a `datasets.Dataset`.

    Without a validation split, about a fifth of the rows is held out. Rows with the same text
    (the first of `columns`) stay on one side, so no held-out text is also trained on. Prints one
    line that names every column, file and split that is not used.

    Args:
        dataset_name: a .csv, .json or .jsonl file; a folder with train.* and, if there is one,
            validation.*; or a Hub id. The cells of a .csv file stay text, unchanged.
        columns: flag -> name of a column that the script reads. The flag is named in errors. The
            cells of all columns but the first must not be empty. Class numbers become the names of
            the classes.
        seed: decides which rows are held out.
        keep: names of further columns to return without a check, for example columns of lists.
    """
    names = list(columns.values())
    for flag, name in columns.items():
        if names.count(name) > 1:
            flags = " and ".join(f"--{flag}" for flag in columns if columns[flag] == name)
            refuse(f"{flags} are both {name!r}: name a column for each")
    files, others = find_files(dataset_name)
    unused = Counter()
    if files:
        read = {split: read_file(file, columns, keep) for split, file in files.items()}
        dataset = {split: rows for split, (rows, _, _) in read.items()}
        known = {split: names for split, (_, _, names) in read.items()}
        for _, more, _ in read.values():
            unused.update(more)
    else:
        dataset = or_refuse(f"--dataset_name {dataset_name}", load_dataset, dataset_name)
        known = {split: rows.column_names for split, rows in dataset.items()}
        others = [f"split {s} ({len(r)} rows)" for s, r in dataset.items() if s not in SPLITS]
    if "train" not in dataset:
        refuse(
            f"--dataset_name {dataset_name} has no train split, only {', '.join(dataset)}: save "
            "one as a .csv or .jsonl file and name that"
        )
    dataset = {split: dataset[split] for split in SPLITS if split in dataset}
    for split, rows in dataset.items():
        if absent := [name for name in keep if name not in rows.column_names]:
            told = ", ".join(map(repr, known[split]))
            refuse(f"column {absent[0]!r} is not in {split}: the columns are {told}")
        rows = name_classes(rows, split, columns)
        check_columns(rows, split, columns, known[split])
        rows = as_text(rows, names[0])
        unused.update({name: len(rows) for name in {*rows.column_names} - {*names, *keep}})
        dataset[split] = rows.select_columns(
            [name for name in rows.column_names if name in {*names, *keep}]
        )
    told = [f"column {n!r} ({count} cells)" for n, count in sorted(unused.items()) if n or count]
    if told or others:
        say(f"Unused in {dataset_name}: {', '.join([*told, *others])}.")
    if "validation" in dataset:
        return dataset["train"], dataset["validation"]
    return hold_out(dataset["train"], names[0], seed, f"--dataset_name {dataset_name}")


def hold_out(rows, name, seed, culprit):
    """Return the training rows and about a fifth of all rows, held out. No value is in both.

    Args:
        name: a column; rows with the same value in it stay together.
    """
    counts = Counter(rows[name])
    if len(rows) < 2:
        refuse(
            f"{culprit} has 1 row, and no validation split: give more rows, to train on some and "
            "to hold out the others"
        )
    if len(counts) == 1:
        refuse(
            f"all {len(rows)} rows of {culprit} are equal in {name!r}, so none can be held out "
            "that is not trained on: give rows that differ, or a folder with train and validation"
        )
    train, valid = rows.train_test_split(test_size=0.2, seed=seed).values()
    if len(counts) == len(rows):
        return train, valid
    held = Counter()
    for value in dict.fromkeys([*valid[name], *train[name]]):  # in the order that the seed drew
        if held.total() + counts[value] <= len(valid):
            held[value] = counts[value]
    rarest = min(counts, key=counts.get)
    held = held or Counter({rarest: counts[rarest]})
    say(
        f"{len(rows)} rows have {len(counts)} different {name!r}: {len(held)} of these values are "
        f"held out, {held.total()} rows in all."
    )
    sides = [[], []]
    for index, value in enumerate(rows[name]):
        sides[value in held].append(index)
    return rows.select(sides[False]), rows.select(sides[True])


def find_files(dataset_name):
    """Return split -> file and what of a folder is not read; two empty values for a Hub id."""
    path = Path(dataset_name)
    if or_refuse(f"--dataset_name {path}", path.is_dir):
        return find_splits(path)
    is_format = path.suffix.lower() in FORMATS
    if is_format or path.is_file():
        if not is_format:
            refuse(
                f"--dataset_name {path} is not a {', '.join(FORMATS)} file: convert or rename it"
            )
        if not path.is_file():
            refuse(f"--dataset_name {path} does not exist: check the path")
        return {"train": path}, []
    if not dataset_name or dataset_name.count("/") > 1 or dataset_name[0] in "./~":
        refuse(f"--dataset_name {dataset_name!r} is not a file, folder or Hub id: check the path")
    check_hub(f"--dataset_name {dataset_name}")
    return {}, []


def find_splits(folder):
    """Return split -> file of a folder, and a phrase for each other file in it."""
    files, others = {}, []
    for file in sorted(folder.iterdir()):
        split = file.stem.lower()
        if file.suffix.lower() not in FORMATS or split not in SPLITS or not file.is_file():
            kind = "folder" if file.is_dir() else "file"
            others += [] if file.name.startswith(".") else [f"{kind} {file.name}"]
        elif split in files:
            both = f"{files[split].name} and {file.name}"
            refuse(f"--dataset_name {folder} holds {both}: keep one of them")
        else:
            files[split] = file
    if "train" not in files:
        found = f", only {', '.join(others)}" if others else ""
        refuse(
            f"--dataset_name {folder} holds no train.csv, train.json or train.jsonl{found}: name a "
            "file, or add one"
        )
    return files, others


def check_columns(rows, split, columns, known):
    """Stop if a column is missing, is not text or numbers, or has an empty cell.

    Empty cells of the first column are no error: their number is printed.

    Args:
        known: the names of all columns of the split, for the error.
    """
    for flag, name in columns.items():
        if name not in rows.column_names:
            told = ", ".join(map(repr, known))
            refuse(f"--{flag} {name!r} is not in {split}: the columns are {told}")
        feature = rows.features[name]
        if not isinstance(feature, Value) or feature.dtype.endswith("binary"):
            kind = feature.dtype if isinstance(feature, Value) else type(feature).__name__
            refuse(f"--{flag} {name!r} holds {kind}, not text, in {split}: choose another column")
        cells = enumerate(rows[name], start=1)
        empty = [number for number, cell in cells if cell is None or not str(cell).strip()]
        if empty and name != next(iter(columns.values())):
            refuse(
                f"row {empty[0]} of {split} has no {flag.removesuffix('_column')} in column "
                f"{name!r}: fill it, drop the row, or close a quote that is open"
            )
        if empty:
            say(
                f"{len(empty)} of {len(rows)} rows of {split} have an empty {name!r}, row "
                f"{empty[0]} first; they are used."
            )


def name_classes(rows, split, columns):
    """Return the rows with the names of the classes where the columns hold their numbers.

    A row without a class, -1, gets an empty cell.
    """
    for name in {*columns.values()} & {*rows.column_names}:
        feature = rows.features[name]
        if isinstance(feature, ClassLabel):
            names = dict(enumerate(feature.names))
            rows = replace(rows, name, [names.get(cell) for cell in rows[name]])
            told = ", ".join(feature.names)
            say(f"Column {name!r} of {split} holds class numbers: their names are used, {told}.")
    return rows


def as_text(rows, name):
    """Return the rows with the numbers of a column as text, so that 0 is not an empty cell."""
    if rows.features[name].dtype in ("string", "large_string"):
        return rows
    return replace(rows, name, [None if cell is None else str(cell) for cell in rows[name]])


def replace(rows, name, cells):
    """Return the rows with other cells in a column."""
    return rows.remove_columns(name).add_column(name, cells)


def check_labels(train, targets, tokenizer, max_length, prompt_length, is_shared=True):
    """Return each label's answer and the room for text; stop if a label or text would be lost.

    Labels that become the same text after tokenizing count as the same answer. If they are classes,
    this is an error, unless they differ in blanks only. They are classes if the training rows
    repeat most of them; else they are free text.

    Args:
        train: the labels of the training rows.
        targets: label -> its token ids, without the end-of-sequence token.
        max_length: tokens of prompt and label together; of the prompt alone if not `is_shared`.
        prompt_length: tokens of the prompt without the row's text.

    Returns:
        label -> the text that its token ids decode to, which a correct answer must equal; and how
        many tokens of text fit beside the prompt and the longest label.
    """
    counts = Counter(map(str, train))
    if len(counts) == 1:
        say(
            f"All {counts.total()} training rows have the label {next(iter(counts))!r}: whatever "
            "the text is, the model learns to write it."
        )
    is_free_text = len(counts) > counts.total() / 2
    answers, seen, alike, changed = {}, {}, [], []
    for label, ids in targets.items():
        answers[label] = answer = tokenizer.decode(ids, skip_special_tokens=True).strip()
        if not answer and not is_free_text:
            refuse(f"label {label!r} becomes empty text after tokenizing: rename it")
        first = seen.setdefault(answer, label)
        both = f"{first!r} ({counts[first]} training rows) and {label!r} ({counts[label]})"
        if first != label and first.split() != label.split() and not is_free_text:
            refuse(
                f"two labels, {both}, become the same text after tokenizing ({answer!r}), so they "
                "cannot be told apart: rename one"
            )
        alike += [both] if first != label else []
        changed += [label] if answer != label.strip() else []
    if alike:
        say(f"{len(alike)} labels count as the same answer as another one: {alike[0]}.")
    if changed:
        say(
            f"The tokenizer changes {len(changed)} of {len(targets)} labels, such as "
            f"{changed[0]!r} to {answers[changed[0]]!r}: the latter counts as the correct answer."
        )
    longest = max(map(len, targets.values())) + 1 if is_shared else 0
    room = max_length - prompt_length - longest
    if room < 1:
        refuse(
            f"--max_length {max_length} has no room for text beside {prompt_length} tokens of "
            f"prompt and {longest} of label: give {prompt_length + longest + 1} or more"
        )
    return answers, room


def make_loaders(config, accelerator, train, valid, collate_train, collate_valid, order=None):
    """Return a loader of the training batches of all updates, and one of the held-out rows.

    The training loader holds all epochs, and its length decides the number of updates. The order of
    the training rows does not depend on the number of processes.

    Args:
        config: its seed, batch sizes, gradient_accumulation_steps, num_train_epochs and max_steps
            are read.
        train, valid: the rows, in lists or in anything else with a length and indices.
        collate_train, collate_valid: functions that make a batch from a list of rows.
        order: indices of the training rows, in the order in which every epoch reads them. Without
            it, each epoch has a new random order, which depends on the seed.
    """
    batch_size = config.per_device_train_batch_size
    per_update = batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    max_steps = config.max_steps
    if max_steps < 1:
        max_steps = math.ceil(config.num_train_epochs * len(train) / per_update)
    if order is None:
        generator = torch.Generator().manual_seed(config.seed)
        order = RandomSampler(train, num_samples=max_steps * per_update, generator=generator)
    else:
        order = list(order)
        if not order:
            refuse(f"the given order is empty: give indices of the {len(train)} training rows")
        for index in order:
            if not isinstance(index, Integral) or not 0 <= index < len(train):
                refuse(
                    f"the given order holds {index!r}: give indices of the {len(train)} training "
                    "rows, from 0 on"
                )
        if len({*order}) < len(train):
            say(f"The given order names {len({*order})} of {len(train)} training rows.")
        order = list(islice(cycle(order), max_steps * per_update))
    train_loader = DataLoader(train, batch_size, sampler=order, collate_fn=collate_train)
    valid_loader = DataLoader(
        valid,
        config.per_device_eval_batch_size,
        collate_fn=collate_valid,
        generator=torch.Generator(),  # else evaluating would advance the RNG that dropout uses
    )
    return train_loader, valid_loader
