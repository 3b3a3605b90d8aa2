"""Read the rows of a JSONL file by their offsets, and write a line for each of them exactly once.

The rows stay on the disk. In memory there are a few numbers per row (`Index`), so a file of any
length can be read.

Each process appends its lines to a file of its own, in a folder beside the output file. A line
counts once it ends with a line break. After SIGKILL or a loss of power, the incomplete line at the
end of a file is dropped, and only the rows without a line are predicted. The output file appears by
a rename when all lines are there.
"""

import hashlib
import json
import os
import shutil
import zlib
from array import array
from functools import partial
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy

from utils.conversations import DataError, census
from utils.errors import first_line, or_refuse, refuse, say
from utils.rows import unique

NAMED = 5  # bad lines that are named; the others are counted
RUN = "run.json"  # in the folder of an unfinished run: what identifies it


# Rows ---------------------------------------------------------------------------------------------
class Index(NamedTuple):
    """Where the rows of the input file are, and how long. A row is a line that is not blank.

    Fields:
        lines: number of each row's line in the file, from 1.
        offsets, sizes: first byte and number of bytes of each row's line.
        lengths: tokens of each row; 0 for a bad line.
        jobs: GENERATE or SCORE, for each row.
        bad: row -> what is wrong with its line.
        digest: SHA-256 of the file.
        tokens: checksum of the token ids of all rows.
        written: size of the file and when it was written last.
    """

    lines: numpy.ndarray
    offsets: numpy.ndarray
    sizes: numpy.ndarray
    lengths: numpy.ndarray
    jobs: numpy.ndarray
    bad: dict[int, str]
    digest: str
    tokens: int
    written: tuple[int, int]


GENERATE, SCORE = 0, 1


def parse(line, where):
    """Return the row in a line of JSON.

    Raises:
        DataError: it is not one JSON object, an object in it has a key twice, or a text in it
            cannot be written as UTF-8.
    """
    try:
        row = json.loads(line.decode("utf-8-sig").strip(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({first_line(error)})") from None
    if not isinstance(row, dict):
        raise DataError(f"{where} is a {type(row).__name__}, not a JSON object")
    try:
        if b"\\ud" in line.lower():
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError(f"{where} has half of a surrogate pair, which is not text") from None
    return row


def build_index(config, encode):
    """Return the `Index` of the input file; stop at bad lines, unless they are to be skipped.

    Args:
        config: read are input_file and skip_bad_lines.
        encode: called with a row and its name in errors; returns an `Example` (prediction_rows.py),
            or raises DataError for a bad line.
    """
    columns = lines, offsets, sizes, lengths, jobs = [array(kind) for kind in "qqqqb"]
    bad, notes, digest, tokens, blank, offset = {}, Counter(), hashlib.sha256(), 0, 0, 0
    with open(config.input_file, "rb") as file:
        written = last_write(config)
        for number, line in enumerate(file, start=1):
            digest.update(line)
            where, job, ids = f"{config.input_file}, line {number}", GENERATE, []
            if line.strip():
                try:
                    example = encode(parse(line, where), where)
                    job, ids = example.job, example.input_ids + (example.labels or [])
                    notes.update(example.notes)
                except DataError as error:
                    bad[len(lines)] = str(error)
                values = number, offset, len(line), len(ids), job
                for column, value in zip(columns, values, strict=True):
                    column.append(value)
                tokens = zlib.crc32(array("q", ids).tobytes(), tokens)
            else:
                blank += 1
            offset += len(line)
    if not lines:
        refuse(f"--input_file {config.input_file} has no rows: give some")
    if bad and not config.skip_bad_lines:
        first, *others = bad
        named = ", ".join(str(lines[row]) for row in others[:NAMED])
        named = f"; bad lines besides: {named}" if others else ""
        more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
        refuse(f"{bad[first]}{named}{more} [fix them, or give --skip_bad_lines]")
    if len(bad) == len(lines):
        refuse(f"{next(iter(bad.values()))}; no line of the input is better: fix them")
    for reason in list(bad.values())[:NAMED]:
        say(f"Skipped: {reason}.")
    if bad:
        say(f"{len(bad)} of {len(lines)} lines are skipped; the output has the key error there.")
    if blank:
        say(f"{blank} blank lines of {config.input_file} are left out.")
    if notes:
        say(f"Unused in {config.input_file}, or changed: {census(notes)}.")
    return Index(*map(numpy.array, columns), bad, digest.hexdigest(), tokens, written)


def last_write(config):
    """Return the size of the input file, and when it was written last."""
    state = Path(config.input_file).stat()
    return state.st_size, state.st_mtime_ns


def read_line(config, index, row):
    """Return the bytes of a row's line in the input file."""
    with open(config.input_file, "rb") as file:
        file.seek(index.offsets[row])
        return file.read(index.sizes[row])


def deal(index, done, size, process, num_processes, in_step):
    """Return the batches of a process, as pairs: a job, and the numbers of the rows.

    The batches are the same on any number of processes and in a resumed run: rows of one job, the
    longest first. They are dealt in turn to the processes. A batch of which all rows are done is
    left out.

    Args:
        done: whether each row is done, as a boolean array.
        size: rows of a batch.
        in_step: whether all processes need the same number of batches of each job, because they
            gather the model's layers together. A process without a batch then gets the last one
            again. It writes the same lines, of which the output takes one.
    """
    batches = []
    for job in (GENERATE, SCORE):
        rows = numpy.flatnonzero((index.jobs == job) & (index.lengths > 0))
        rows = rows[numpy.argsort(-index.lengths[rows], kind="stable")]
        starts = range(0, len(rows), size)
        starts = [start for start in starts if not done[rows[start : start + size]].all()]
        for first in range(0, len(starts), num_processes):
            dealt = starts[first + process : first + process + 1]
            for start in dealt or starts[-1:] * in_step:
                batches.append((job, rows[start : start + size]))
    return batches


# The output ---------------------------------------------------------------------------------------
class Output:
    """The output file of a run, and the folder that holds its lines until all are there.

    Args:
        config: read are output_file and overwrite_output_file.
        process: number of this process.

    Attributes:
        done: whether each row has its line, as a boolean array.
    """

    def __init__(self, config, process):
        self.target, self.overwrites = Path(config.output_file), config.overwrite_output_file
        self.folder, self.metrics = unfinished_folder(config), metrics_file(config)
        self.own, self.files = self.folder / f"lines-{process:05}.jsonl", []
        file, self.state = self.folder / RUN, {"identity": None, "written": []}
        if file.is_file():
            culprit = f"{file} cannot be read, delete {self.folder}"
            self.state |= or_refuse(culprit, lambda: dict(json.loads(file.read_text())))

    def begin(self, identity, num_rows, date):
        """Resume the unfinished run in the folder, or begin a new one. For the main process.

        Args:
            num_rows: rows of the input.
            date: what the chat template writes (`pin_date`), or None.
            identity: what a run must have in common with the one that it resumes, name -> value, as
                JSON can hold it.
        """
        identity, then = json.loads(json.dumps(identity)), self.state["identity"]
        changed = [] if then is None else differing(then, identity)
        if then is None and any(self.folder.glob("[!.]*")):
            refuse(f"{self.folder} holds no unfinished run: move it away, or rename the output")
        if changed and not self.overwrites:
            told = ", ".join(f"{n} {then.get(n)!r} (now {identity.get(n)!r})" for n in changed)
            refuse(
                f"{self.folder} holds the lines of an unfinished run with {told}: give the same "
                "to resume it, or --overwrite_output_file to drop these lines"
            )
        if changed:
            shutil.rmtree(self.folder)
            self.state["written"] = []
        check_free(self, self.state["written"])
        or_refuse(f"--output_file {self.target}", self.folder.mkdir, exist_ok=True)
        self.write_state(identity=identity, date=date)
        for file in self.folder.glob("lines-*.jsonl"):
            drop_incomplete_lines(file, num_rows)
        self.find_lines(num_rows)

    def write_state(self, **changed):
        """Write the file that identifies the run, at once."""
        self.state |= changed
        part = self.folder / f".{RUN}"
        write_through(part, (json.dumps(self.state, indent=1) + "\n").encode())
        part.replace(self.folder / RUN)

    def find_lines(self, num_rows):
        """Note where the line of each row is, while no process writes."""
        self.done = numpy.zeros(num_rows, dtype=bool)
        self.positions = numpy.zeros((num_rows, 2), dtype=numpy.int64)
        self.files = sorted(self.folder.glob("lines-*.jsonl"))
        for number, file in enumerate(self.files):
            offset = 0
            with file.open("rb") as lines:
                for line in lines:
                    row = json.loads(line)["row"]
                    self.done[row], self.positions[row] = True, (number, offset)
                    offset += len(line)

    def join(self, done):
        """Take over `done` from the main process, so that all processes deal the same batches."""
        self.done = done
        if not (self.folder / RUN).is_file():
            refuse(f"a process does not see {self.folder}: give all machines the same folder")
        if count := done.sum():
            say(f"Resumed: {count} of {len(done)} rows were done.")

    def write(self, entries):
        """Append lines to this process's file; they are on the disk when this returns.

        Args:
            entries: number of a row -> what its line of the output gets. Rows that are done
                are left out.
        """
        text = "".join(
            json.dumps({"row": int(row)} | entry, ensure_ascii=False) + "\n"
            for row, entry in entries.items()
            if not self.done[row]
        )
        content = text.encode("utf-8", "backslashreplace")
        or_refuse(f"{self.own} cannot be written", write_through, self.own, content, os.O_APPEND)
        self.done[list(entries)] = True

    def entries(self):
        """Yield what was written of each row, in the order of the input; None for a bad line."""
        self.find_lines(len(self.done))
        files = [file.open("rb") for file in self.files]
        for row, (number, offset) in enumerate(self.positions):
            entry = None
            if self.done[row]:
                files[number].seek(offset)
                entry = json.loads(files[number].readline())
                del entry["row"]
            yield row, entry
        for file in files:
            file.close()

    def publish(self, lines, finish):
        """Write the output file and its metrics, and rename both to their places.

        Args:
            lines: bytes of each line of the output, in order.
            finish: called after the last line; returns the content of the metrics file.
        """
        merged = self.folder / "output.jsonl"
        or_refuse(f"{merged} cannot be written", write_lines, merged, lines)
        # a run that is killed around the rename finds its own file there
        self.write_state(written=[file_id(self.target), file_id(merged)])
        merged.replace(self.target)
        flush_folder(self.target.parent)
        metrics = self.folder / "metrics.json"
        write_through(metrics, (json.dumps(finish(), indent=1, default=plain) + "\n").encode())
        metrics.replace(self.metrics)
        shutil.rmtree(self.folder)
        flush_folder(self.target.parent)


def plain(value):
    """Return a number or array of numpy as JSON can hold it, and anything else as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def check_free(output, written=()):
    """Stop if a file is in the place of the output or of its metrics, and may not be replaced.

    Args:
        written: `file_id` of the files that an earlier start of the same run put there.
    """
    found = file_id(output.target)
    if output.overwrites or found in written:
        return
    for path in [output.target] * bool(found) or [output.metrics]:
        if path.exists():
            refuse(f"{path} exists: choose another --output_file, or add --overwrite_output_file")


def unfinished_folder(config):
    """Return the folder that holds the lines of the output file until all are there."""
    return Path(f"{config.output_file}.unfinished")


def metrics_file(config):
    """Return the file beside the output file that gets the scores: OUT.metrics.json."""
    return Path(config.output_file).with_suffix(".metrics.json")


def file_id(path):
    """Return what a file keeps when it is renamed; None if there is none."""
    return [path.stat().st_dev, path.stat().st_ino] if path.exists() else None


def drop_incomplete_lines(file, num_rows):
    """Cut a file of lines before the first line that a kill or a loss of power left incomplete."""
    end = 0
    with file.open("rb") as lines:
        for line in lines:
            try:
                is_whole = line.endswith(b"\n") and 0 <= json.loads(line)["row"] < num_rows
            except (ValueError, KeyError, TypeError):
                is_whole = False
            if not is_whole:
                break
            end += len(line)
    if end < file.stat().st_size:
        os.truncate(file, end)


def differing(then, now):
    """Return the names whose values differ in two dicts."""
    return [name for name in {**then, **now} if then.get(name) != now.get(name)]


def write_lines(path, lines):
    """Write lines of bytes to the disk itself."""
    with path.open("wb") as file:
        for line in lines:
            file.write(line)
        file.flush()
        os.fsync(file.fileno())


def write_through(path, content, flag=os.O_TRUNC):
    """Write bytes to the disk itself: a new file, or with O_APPEND at the end of a file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | flag, 0o666)
    try:
        while content:
            content = content[os.write(descriptor, content) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(folder):
    """Write the names in a folder to the disk, so that a rename survives a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def merge(config, index, output, read, scores):
    """Yield the lines of the output file, as bytes, in the order of the input.

    Args:
        read: called with the number of a row; returns its line number and `Example`.
        scores: its `add` is called for each line.
    """
    if last_write(config) != index.written:
        refuse(
            f"--input_file {config.input_file} was changed during the run. The lines are kept in "
            f"{output.folder}: restore the file and start again"
        )
    for row, entry in output.entries():
        if entry is None and row not in index.bad:
            refuse(f"line {index.lines[row]} has no prediction in {output.folder}: start again")
        if entry is None:
            entry = {"line": int(index.lines[row]), "error": index.bad[row]}
            yield (json.dumps(entry, ensure_ascii=False) + "\n").encode()
        else:
            yield extend(read_line(config, index, row).decode("utf-8-sig").strip(), entry)
        scores.add(entry, partial(read, row))


def extend(line, entry):
    """Return a line of JSON, an object with keys, with further keys at its end, as bytes."""
    text = f"{line[:-1].rstrip()}, {json.dumps(entry, ensure_ascii=False)[1:]}\n"
    return text.encode("utf-8", "backslashreplace")
