"""The command line of tools/models."""

import argparse
import json
import tempfile
from pathlib import Path

from tools import models
from tools.compatibility.page import write_results
from tools.compatibility.results import ROOT, cell_file, read_cells, versions
from tools.models.measure import measure_row, start_server
from tools.models.page import PAGE, render
from tools.models.results import RESULTS, select
from tools.models.rows import CELLS


def measure_all(todo, folder, cells):
    """Measure the cells, keep each as soon as it is measured, and add it to `cells`.

    Args:
        todo: row -> columns.
        folder: keeps the facts of each cell and the output of its processes.
    """
    total, number = sum(map(len, todo.values())), 0
    with tempfile.TemporaryDirectory(prefix="models-") as home:
        context = start_server(home)
        for row, columns in todo.items():
            for column, facts in measure_row(context, row, columns, folder / row / "logs"):
                number += column in columns
                cell, file = f"{row}/{column}", cell_file(folder, f"{row}/{column}")
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(facts | {"versions": versions()}, indent=1) + "\n")
                cells[cell] = facts
                said = facts["answer"], facts.get("reason", ""), facts.get("reload", "")
                words = " ".join(filter(None, said))
                print(f"{number}/{total} {cell}: {words} ({facts['seconds']} s)", flush=True)


def names(text):
    """Return the names in a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def main(arguments=None):
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.models",
        description=models.__doc__.partition("\n\n    architectures.py")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--rows", type=names, default=[], help="rows to measure again, such as gpt_oss,falcon"
    )
    parser.add_argument(
        "--columns", type=names, default=[], help="columns to measure again, such as zero3,merge"
    )
    parser.add_argument(
        "--failed", action="store_true", help="measure cells again that do not say yes"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=ROOT / "outputs" / "models",
        help="folder that keeps the measured cells and their output (default: outputs/models)",
    )
    parser.add_argument(
        "--write", action="store_true", help="write docs/models.md and .json at the end"
    )
    options = parser.parse_args(arguments)
    cells = read_cells(options.folder, RESULTS, CELLS)
    todo = select(options.rows, options.columns, options.failed, cells)
    if todo:
        measure_all(todo, options.folder, cells)
    if options.write:
        cells = {cell: cells[cell] for cell in CELLS if cell in cells}
        write_results(cells, RESULTS, PAGE, render)
