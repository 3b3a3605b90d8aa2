"""Measure the cells of a row: start the processes, and collect what they found.

This file imports no library that could start a GPU.
"""

import json
import multiprocessing
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

from tools.compatibility import measure as processes
from tools.compatibility.measure import ROOT, free_port, plain
from tools.models.rows import RUNS, run_of

TIME_LIMIT = 180  # seconds for a step of a cell
LONGEST = 600  # characters of a sentence or error on the page
REMEDY = re.compile(r": give ((?:--\w+ \w+ ?)+)")  # flags that a sentence names
ABORT = re.compile(r"terminate called .*\n +what\(\): +(.*)")


def run_process(step, job):
    """Run a step in a new process, forked from one that has imported the libraries."""
    os.setsid()  # so that its own processes end with it
    multiprocessing.set_start_method("fork", force=True)  # as in a process of `accelerate launch`
    from tools.models import process

    process.main(step, job)


def start_server(home):
    """Return a context whose processes are forked from one that has imported the libraries.

    Args:
        home: folder for the caches of the libraries, which read its name when they are imported.
    """
    os.environ |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    return processes.start_server("tools.models.process")


class RowFolder:
    """The working directory of a row, with its model and data, in which its cells run."""

    def __init__(self, context, row, folder):
        self.context, self.row, self.folder = context, row, Path(folder)
        (self.folder / "make").mkdir()
        if error := self.step("make", "make"):
            raise SystemExit(f"error: the model of {row} could not be made: {error['message']}")

    def step(self, step, run, world=1, **job):
        """Run a step of the cell in the folder `run`; return its error, {} if there was none."""
        job |= {"row": self.row, "folder": str(self.folder), "run": run, "world": world}
        job["port"] = free_port()
        jobs = [job | {"rank": rank} for rank in range(world)]
        folder = self.folder / run
        error = processes.run_step(self.context, step, jobs, folder, TIME_LIMIT, run_process)
        if error.get("kind") != "refused":
            # a process that a library aborts writes no error, and the others lose their connection
            aborted = [ABORT.search(file.read_text()) for file in folder.glob(f"{step}-*.stderr")]
            error |= next(({"message": f"aborts: {one[1]}"} for one in aborted if one), {})
        return error

    def measure_run(self, column, extra=()):
        """Run a script, reload what it saved, and return the facts of the cell."""
        run, name = run_of(self.row, column), f"{column}{len(extra)}"
        folder = self.folder / name
        folder.mkdir()
        error = self.step(
            "train",
            name,
            world=2,
            script=str(ROOT / "examples" / f"{run.script}.py"),
            arguments=[*run.arguments(f"{name}/out"), *extra],
            launch=["--config_file", str(ROOT / "configs" / f"{run.config}.yaml")],
        )
        facts = judge(error, (folder / "started").exists())
        if facts["answer"] == "yes":
            facts["folder"] = name  # removed when the row is done
            facts["reload"] = self.compare("reload", name, run)
        return facts

    def compare(self, step, name, run):
        """Return "" if a loaded model gives what the run printed, else how it differs."""
        if error := self.step(step, name, is_chat=run.is_chat):
            return plain(error["message"], LONGEST)
        return json.loads((self.folder / name / f"{step}.json").read_text())

    def measure_cell(self, column):
        """Return the facts of a cell.

        If the script refuses with a sentence that names flags, the cell is measured again with
        them. The second sentence may name others.
        """
        begin = time.monotonic()
        facts, flags, refused = self.measure_run(column), (), []
        while facts["answer"] == "refused":
            named = named_flags(facts["reason"], column)
            if not named or " ".join(named) in " ".join(flags):  # a circle
                break
            refused.append(facts["reason"])
            flags += named
            facts = self.measure_run(column, flags)
        if refused:
            facts |= {"setting": " ".join(flags), "without": refused}
        return facts | {"seconds": round(time.monotonic() - begin, 1)}

    def measure_merge(self, cells):
        """Merge the adapter of the first run that has one, load the result and return the facts.

        Args:
            cells: column -> facts of the runs of this row.
        """
        begin = time.monotonic()
        for column, facts in cells.items():
            if "folder" not in facts:
                continue
            name, run = facts["folder"], run_of(self.row, column)
            merged = judge(self.step("merge", name), False)
            if merged["answer"] == "yes" and (reason := self.compare("reload_merged", name, run)):
                merged = {"answer": "differs", "reason": reason}
            return merged | {"seconds": round(time.monotonic() - begin, 1)}
        return {"answer": "nothing", "seconds": 0.0}


def named_flags(reason, column):
    """Return the flags that a sentence tells the user to give, as words; () without any."""
    named = REMEDY.search(reason)
    words = tuple(named[1].split()) if named else ()
    # documents one by one are not packed
    return () if column == "packing" and "--per_device_train_batch_size" in words else words


def judge(error, has_started):
    """Return the answer of a step, and the reason where it is not yes.

    "yes"; "refused": a sentence before training; "stopped": a sentence after training has started;
    "traceback": an exception.
    """
    if not error:
        return {"answer": "yes"}
    answer = error.get("kind", "traceback")
    if answer == "refused" and has_started:
        answer = "stopped"
    facts = {"answer": answer, "reason": plain(error["message"], LONGEST)}
    return facts | ({"started": True} if has_started else {})


def measure_row(context, row, columns, logs=None):
    """Measure cells of a row and yield (column, facts).

    Args:
        columns: those to measure. `merge` needs one of the others.
        logs: folder that keeps the output of the processes.
    """
    with tempfile.TemporaryDirectory(prefix="models-") as name:
        folder = RowFolder(context, row, name)
        cells = {}
        for column in RUNS:
            if column in columns and run_of(row, column):
                cells[column] = folder.measure_cell(column)
                yield column, {k: v for k, v in cells[column].items() if k != "folder"}
        if "merge" in columns:
            yield "merge", folder.measure_merge(cells)
        if logs:
            shutil.rmtree(logs, ignore_errors=True)
            kinds = shutil.ignore_patterns("model", "out", "merged", "*.safetensors")
            shutil.copytree(name, logs, ignore=kinds)
