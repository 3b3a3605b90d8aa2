"""Measure what works with what: every method of PEFT, base and optimizer (a row) under every strategy (a column).

    python -m tools.compatibility                      measure the cells that are not measured yet with these versions
    python -m tools.compatibility --only lora/zero3    measure these anew; also patterns, as 'lora/*' or '*/fsdp?'
    python -m tools.compatibility --write              and write docs/compatibility.md and docs/compatibility.json

A cell trains a small random Llama for a few updates in two real processes, saves, and opens what was saved in a
process of its own. Cells are kept one by one in --folder, so that a run that was stopped goes on where it was; those
of docs/compatibility.json count as measured where the versions are the same.

The rows and columns are in rows.py, and what a process does in cell.py. This file imports
nothing but Python's own library.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import re
import signal
import socket
import tempfile
import time
from dataclasses import asdict
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path

from tools.compatibility.rows import CELLS, COLUMNS, ROWS, SETTINGS, SHARDED, Row

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "compatibility.json"
PAGE = ROOT / "docs" / "compatibility.md"
LIBRARIES = ("torch", "accelerate", "deepspeed", "transformers", "peft", "bitsandbytes")
TIME_LIMIT = (
    400  # seconds for a step of a cell, with room for compiling DeepSpeed's CPU Adam; then it hangs
)
TOLERANCE = 1e-3  # of losses and gradient norms, relative to those of one process
LOGITS_TOLERANCE = 1e-4  # of the reloaded and of the merged model
LEAST_FALL = 0.01  # of the loss from the first update to the last, relative
# what a cell is asked, in this order, and what the table says where the answer is no
CHECKS = {
    "starts": "does not start",
    "optimizer": "another optimizer",
    "compiles": "not compiled",
    "learns": "does not train",
    "losses": "other losses",
    "shards": "not sharded",
    "reloads": "does not reload",
    "merges": "merges inexactly",
    "state": "state not saved",
}


# Measure ------------------------------------------------------------------------------------------
def run_process(step, job):
    """Run in a fresh process, forked from one that has imported the libraries."""
    os.setsid()  # so that what it starts, as compilers, ends with it
    multiprocessing.set_start_method("fork", force=True)  # as in a process of `accelerate launch`
    from tools.compatibility import cell

    cell.main(step, job)


def start_server():
    """Return the context whose processes are forked from one that has paid for the imports, once."""
    os.environ["OMP_NUM_THREADS"] = (
        "1"  # before torch is imported; as `accelerate launch` sets it for two processes
    )
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    )
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = (
        "1"  # to look for a GPU must not touch it before the fork
    )
    if not count_gpus():
        os.environ["DS_ACCELERATOR"] = (
            "cpu"  # said here, DeepSpeed need not warn that it found none
        )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tools.compatibility.cell"])
    return context


def run_step(context, step, jobs, folder, limit=TIME_LIMIT):
    """Run one process per job to its end, or end all of them where one failed or time is up; return the error, or {}.

    A process says what it failed at in folder/error-RANK.json, {"check": ..., "message": ..., "time": ...}.
    """
    processes = [context.Process(target=run_process, args=(step, job)) for job in jobs]
    for process in processes:
        process.start()
    end = time.monotonic() + limit
    try:
        while any(process.is_alive() for process in processes) and time.monotonic() < end:
            if any(process.exitcode for process in processes):
                end = min(
                    end, time.monotonic() + 2
                )  # the others may have an error of their own to tell
            time.sleep(0.02)
        failed = [process.exitcode for process in processes if process.exitcode]
        hangs = any(process.is_alive() for process in processes) and not failed
    finally:
        for process in processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                process.kill()
            process.join()
    errors = [json.loads(file.read_text()) for file in sorted(folder.glob("error-*.json"))]
    if errors:
        # what failed first is the cause; that the other process went away is an effect, whoever writes it down first
        return min(errors, key=lambda error: ("by peer" in error["message"], error["time"]))
    if hangs or failed:
        at = folder / "check.txt"
        message = (
            f"hangs: no end after {limit} s"
            if hangs
            else f"a process ended with exit code {failed[0]}"
        )
        return {"check": at.read_text() if at.is_file() else "starts", "message": message}
    return {}


def measure(context, cell, model_folder, log):
    """Run a cell and return its facts; with the row's setting, if that helps, where FSDP1 failed without it."""
    facts = run_cell(context, cell, "", model_folder, log)
    setting = ROWS[cell.split("/")[0]].setting
    if cell.endswith("/fsdp1") and setting and "error" in facts:
        again = run_cell(context, cell, setting, model_folder, log)
        if "error" not in again:
            return again | {
                "without": f"{CHECKS[facts['error']['check']]}: {facts['error']['message']}"
            }
    return facts


def run_cell(context, cell, setting, model_folder, log):
    """Run the processes of a cell and return what they found: numbers, and what the check failed at, if one did."""
    row, column = cell.split("/")
    started = time.monotonic()
    config, flags = COLUMNS[column]
    flags = (*flags, *ROWS[row].flags, *SETTINGS.get(setting, ()))
    world = 1 if column == "single" else 2
    with tempfile.TemporaryDirectory(prefix="compatibility-") as name:
        folder = Path(name)
        job = {
            "row": asdict(ROWS[row]),
            "launch": ["--config_file", str(ROOT / "configs" / f"{config}.yaml"), *flags],
            "folder": name,
            "model": str(model_folder),
            "log": str(log),
        }

        def run(step, world=1):
            port = free_port()
            jobs = [job | {"rank": rank, "world": world, "port": port} for rank in range(world)]
            return run_step(context, step, jobs, folder)

        error = run("train", world)
        if (folder / "saved").is_file():
            error = run("reload") or error
        if not error and ROWS[row].checkpoint:
            error = run("state", world)
        found = [json.loads(file.read_text()) for file in sorted(folder.glob("found-*.json"))]
    facts = {key: value for one in found for key, value in one.items()}
    facts["seconds"] = round(time.monotonic() - started, 1)
    return facts | (
        {"error": {"check": error["check"], "message": plain(error["message"])}} if error else {}
    )


def plain(message):
    """Return the first line of an error without what differs from run to run: folders, addresses, ports."""
    line = next(iter(message.strip().splitlines()), "")
    line = re.sub(r"(?<![\w.:/])/(?:[^\s/'\"]+/)+", "", line)
    line = re.sub(r"0x[0-9a-f]{6,}", "0x...", line)
    line = re.sub(r"\d+\.\d+\.\d+\.\d+(\]?:\d+)?", "ADDRESS", line).replace("|", "/")
    return line if len(line) <= 240 else f"{line[:240]}..."


def count_gpus():
    """Return how many NVIDIA GPUs the system knows, without a library that would start them."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def free_port():
    """Return a port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


# Judge --------------------------------------------------------------------------------------------
def judge(cell, facts, reference):
    """Return check -> "" where it holds, or why not; without those that were not reached or do not apply.

    Args:
        facts: of the cell, as `measure` returns them.
        reference: facts of the same row in one process; None where they are missing.
    """
    row, column = ROWS[cell.split("/")[0]], cell.split("/")[1]
    answers = {}
    if "bytes" in facts:
        answers["starts"] = ""
        asked = row.optimizer.rpartition(".")[2]
        if row.optimizer != Row.optimizer:
            answers["optimizer"] = (
                "" if facts["optimizer"] == asked else f"{asked} became {facts['optimizer']}"
            )
        if "--dynamo_backend" in row.flags and "graphs" in facts:
            answers["compiles"] = (
                "" if facts["graphs"] else "torch.compile was asked for, and compiled no graph"
            )
        if column in SHARDED:
            share = max(facts["bytes"]) / facts["whole"]
            answers["shards"] = (
                ""
                if share <= 1.1 / len(facts["bytes"])
                else f"a process holds {share:.0%} of the bytes"
            )
    if "losses" in facts:
        first, last = facts["losses"][0], facts["losses"][-1]
        falls = last < (1 - LEAST_FALL) * first
        answers["learns"] = "" if falls else f"the loss goes from {first:.4f} to {last:.4f}"
        if column != "single" and reference is not None and "losses" in reference:
            answers["losses"] = compare_curves(facts, reference)
    if "reload" in facts:
        answers["reloads"] = compare_reload(facts["reload"])
    if "merge" in facts:
        within = facts["merge"] <= LOGITS_TOLERANCE
        answers["merges"] = "" if within else f"merged logits differ by up to {facts['merge']:.2g}"
    if "state" in facts:
        answers["state"] = ""
    if "error" in facts:
        answers[facts["error"]["check"]] = facts["error"]["message"]
    return {check: answers[check] for check in CHECKS if check in answers}


def compare_curves(facts, reference):
    """Return "" where losses and gradient norms are those of one process, else the largest relative difference."""
    for name, word in (("losses", "loss"), ("grad_norms", "gradient norm")):
        difference = max(
            abs(a - b) / max(abs(b), 1e-9) if a == a else float("inf")
            for a, b in zip(facts[name], reference[name])
        )
        if difference > TOLERANCE:
            return f"{word} differs by up to {difference:.2g} of the single process's"
    return ""


def compare_reload(found):
    """Return "" where the reloaded adapter is the trained one."""
    if found["missing"]:
        return f"the saved adapter lacks {len(found['missing'])} trained tensors, as {found['missing'][0]}"
    if found["unequal"]:
        return f"{len(found['unequal'])} of {found['tensors']} reloaded tensors differ, as {found['unequal'][0]}"
    if not found["logits"] <= LOGITS_TOLERANCE:
        return f"reloaded logits differ by up to {found['logits']:.2g}"
    return ""


def status(answers, facts):
    """Return the words of the table for a cell: "yes", or what does not work, or that a setting was needed."""
    if not answers:
        return "not measured"
    words = ", ".join(CHECKS[check] for check, reason in answers.items() if reason) or "yes"
    return f"{words}, with a setting" if "without" in facts else words


# Keep ---------------------------------------------------------------------------------------------
def versions():
    """Return library -> installed version, without the suffix that names the build, as +cpu."""
    return {library: version(library).split("+")[0] for library in LIBRARIES}


def cell_file(folder, cell):
    """Return where the facts of a cell are kept."""
    return Path(folder) / f"{cell}.json"


def read_cells(folder, results=RESULTS):
    """Return cell -> facts of what was measured with these versions: in the folder, else in the committed file."""
    cells, now = {}, versions()
    if Path(results).is_file():
        committed = json.loads(Path(results).read_text())
        if committed["versions"] == now:
            cells |= committed["cells"]
    for cell in CELLS:
        if (file := cell_file(folder, cell)).is_file():
            kept = json.loads(file.read_text())
            if kept.pop("versions") == now:
                cells[cell] = kept
    return {cell: cells[cell] for cell in CELLS if cell in cells}


def dump(results):
    """Return the results as JSON with a line per cell, so that a difference names the cells."""
    cells = ",\n".join(
        f"{json.dumps(cell)}: {json.dumps(facts)}" for cell, facts in results["cells"].items()
    )
    head = json.dumps(results | {"cells": {}}, indent=1)
    return head.removesuffix("{}\n}") + "{\n" + cells + "\n}\n}\n"


def select(patterns, cells):
    """Return the cells to measure, rows in order and of each the single process first: its losses are the reference.

    Args:
        patterns: those of --only, to be measured anew; without any, all that are missing are measured.
        cells: those measured already.
    """
    if not patterns:
        return [cell for cell in CELLS if cell not in cells]
    for pattern in patterns:
        if not any(fnmatch(cell, pattern) for cell in CELLS):
            raise SystemExit(
                f"error: --only {pattern} names no cell: it is ROW/COLUMN, as lora/zero3 or 'lora/*'"
            )
    wanted = {cell for cell in CELLS if any(fnmatch(cell, pattern) for pattern in patterns)}
    references = {f"{cell.split('/')[0]}/single" for cell in wanted} - set(cells)
    return [cell for cell in CELLS if cell in wanted | references]


def measure_all(todo, folder, cells):
    """Measure the cells and keep each as soon as it is there; `cells` is updated."""
    context = start_server()
    with tempfile.TemporaryDirectory(prefix="compatibility-") as name:
        log = Path(folder) / "model.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        job = {"rank": 0, "folder": name, "model": f"{name}/model", "log": str(log)}
        if error := run_step(context, "make_model", [job], Path(name)):
            raise SystemExit(f"error: the model could not be made: {error['message']}; see {log}")
        for number, cell in enumerate(todo, 1):
            file = cell_file(folder, cell)
            file.parent.mkdir(parents=True, exist_ok=True)
            facts = measure(context, cell, f"{name}/model", file.with_suffix(".log"))
            file.write_text(json.dumps(facts | {"versions": versions()}, indent=1) + "\n")
            cells[cell] = facts
            answers = judge(cell, facts, cells.get(f"{cell.split('/')[0]}/single"))
            reason = next((reason for reason in answers.values() if reason), "")
            print(
                f"{number}/{len(todo)} {cell}: {status(answers, facts)} ({facts['seconds']} s) {reason}",
                flush=True,
            )


# Render -------------------------------------------------------------------------------------------
def hardware():
    """Return one phrase that says where the cells ran."""
    models = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    names = ", ".join(sorted({re.sub(r"\s+(\d+-Core )?Processor$", "", model) for model in models}))
    gpus = f"{count_gpus()} GPU(s)" if count_gpus() else "no GPU"
    return f"{len(os.sched_getaffinity(0))} cores of an {names}, {gpus}"


def table(corner, entry):
    """Return a markdown table of all rows and columns, of which `entry(cell)` is the text."""
    lines = [f"| {corner} | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for row in ROWS:
        lines.append(f"| {row} | {' | '.join(entry(f'{row}/{column}') for column in COLUMNS)} |")
    return "\n".join(lines)


def render(results):
    """Return the page of the results, which are the content of docs/compatibility.json."""
    cells, notes = results["cells"], []
    judged = {
        cell: judge(cell, cells[cell], cells.get(f"{cell.split('/')[0]}/single")) for cell in cells
    }

    def note(text):
        if text not in notes:
            notes.append(text)
        return f"[{notes.index(text) + 1}](#n{notes.index(text) + 1})"

    def entry(cell):
        facts, row = cells.get(cell, {}), cell.split("/")[0]
        answers = judged.get(cell, {})
        marks = [
            note(f"{CHECKS[check]}: `{why.replace('`', chr(39))}`")
            for check, why in answers.items()
            if why
        ]
        if "without" in facts:
            words = " ".join(SETTINGS[ROWS[row].setting])
            marks.append(
                note(f"with `{words}`; without it `{facts['without'].replace('`', chr(39))}`")
            )
        words = status(answers, facts)
        return " ".join(
            [words if words.startswith(("yes", "not measured")) else f"**{words}**", *marks]
        )

    def bytes_entry(cell):
        facts = cells.get(cell, {})
        return f"{max(facts['bytes']):,}" if "bytes" in facts else ""

    main = table("", entry)
    good = sum(not any(answers.values()) for answers in judged.values())
    return PAGE_TEMPLATE.format(
        table=main,
        notes="\n".join(
            f'{number}. <a id="n{number}"></a>{text}' for number, text in enumerate(notes, 1)
        ),
        rows="\n".join(f"- `{name}`: {row.title}" for name, row in ROWS.items()),
        bytes=table("", bytes_entry),
        checkpoints=", ".join(f"`{name}`" for name, row in ROWS.items() if row.checkpoint),
        summary=f"{good} cells say yes, {len(judged) - good} do not, {len(CELLS) - len(judged)} are not measured",
        versions=", ".join(
            f"{library} {number}" for library, number in results["versions"].items()
        ),
        hardware=results["hardware"],
        date=results["date"],
        tolerance=TOLERANCE,
        logits=LOGITS_TOLERANCE,
    )


PAGE_TEMPLATE = """# What works with what

Measured: each cell of the table trained a small random Llama (2 layers, float32) with the method of its row under the
strategy of its column, in two processes over gloo (`single`: in one), with ragged batches and two micro-batches per
update, saved it and loaded it again. {summary}.

{table}

**yes** means all of these, in this order:

1. it starts: the model loads, the adapter is made, `accelerator.prepare` takes them under this repository's launch
   config; the optimizer is the one that was asked for, and where compilation was asked for something was compiled;
2. it trains: the loss falls;
3. losses and gradient norms of every update are those of the single process, within {tolerance:g} relative;
4. under zero3 and fsdp each process holds its share of the parameters' bytes, within 10 %;
5. the saved adapter, loaded by plain `peft` in a process of its own, holds the trained tensors bit for bit (of a
   prompt: what its encoder made) and gives the logits of the model that was trained, within {logits:g}; LoRA under
   fsdp1 is written as the scripts here write it, for PEFT's own saving finds nothing there;
6. merged into the base it gives the same logits; not asked of prompt, prefix and p-tuning, which cannot be merged;
7. in the rows {checkpoints}: `accelerator.save_state` writes a checkpoint with the optimizer's state, and under
   fsdp1 all of it.

Else the cell names what does not work, and the number leads to the reason. What comes after an error that ended the
run was not asked. Two errors are of machines without a GPU alone: one that speaks of CUDA says that the library asks
for a GPU there; and FSDP1 frees the full state dict (`setStorage`) that it has moved to the CPU, where it was already.

Under DeepSpeed `accelerate launch` drops `--dynamo_backend` in silence, so that nothing is compiled. Set in the
environment, `ACCELERATE_DYNAMO_BACKEND` arrives: tried with `aot_eager`, zero2 and zero3 then compiled, with the same
losses. What an 8-bit base does on GPUs under ZeRO-3, where wrong losses have been reported, these cells do not say.

{notes}

## Rows

{rows}

Columns are launch configs in `configs/`; `zero1_offload` is `zero1` with `--offload_optimizer_device cpu`. Where
`adamw_8bit` has "other losses" under a strategy that shards the optimizer's states, it is no fault: the states are
rounded in blocks, and the blocks are others. A merged 4-bit or 8-bit base is rounded anew.

## Bytes of parameters per process

The most that a process holds after `prepare`; nothing where it did not start. 4-bit and 8-bit weights are counted as
stored, and with them the whole 8-bit weights that bitsandbytes keeps beside the shares. ZeRO-3 also keeps small
parameters whole while it trains (`stage3_param_persistence_threshold`); counted are the shares.

{bytes}

## Measure it again

```bash
.venv/bin/python -m tools.compatibility --write
```

measures what is missing for the installed versions, in a few seconds per cell (a minute or more where `torch.compile`
has to call the C++ compiler), and writes this page and `docs/compatibility.json`. `--only 'lora/*'` measures a row
anew, `--only '*/fsdp2'` a column. A test measures a sample anew and compares it with that file.

Versions: {versions}. Hardware: {hardware}. Date: {date}.
"""


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="ROW/COLUMN", help="measure these anew"
    )
    parser.add_argument(
        "--folder", default=ROOT / "outputs" / "compatibility", help="where single cells are kept"
    )
    parser.add_argument(
        "--write", action="store_true", help="write docs/compatibility.md and .json at the end"
    )
    options = parser.parse_args(arguments)
    cells = read_cells(options.folder)
    if todo := select(options.only, cells):
        measure_all(todo, options.folder, cells)
    if options.write:
        cells = {cell: cells[cell] for cell in CELLS if cell in cells}
        date = datetime.date.today().isoformat()
        results = {"versions": versions(), "hardware": hardware(), "date": date, "cells": cells}
        RESULTS.write_text(dump(results))
        PAGE.write_text(render(results))
        print(f"wrote {PAGE.relative_to(ROOT)} and {RESULTS.relative_to(ROOT)}")
