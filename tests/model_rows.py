"""Measure rows of docs/models.md again, and compare them with docs/models.json."""

import json
import subprocess
import sys

from conftest import ROOT

from tools.compatibility.results import cell_file
from tools.models.architectures import ARCHITECTURES
from tools.models.results import RESULTS
from tools.models.rows import CELLS

ROWS_OF_A_TEST = 6  # a test imports the libraries once


def groups(half):
    """Return the rows of one half of the table, as lists, one for each test.

    Each half is a test file, because pytest-xdist gives a file to one worker.
    """
    rows = list(ARCHITECTURES)[half::2]
    return [rows[at : at + ROWS_OF_A_TEST] for at in range(0, len(rows), ROWS_OF_A_TEST)]


def measured(environment, folder, *flags):
    """Measure cells and return cell -> facts."""
    command = [sys.executable, "-m", "tools.models", "--folder", folder, *flags]
    command = list(map(str, command))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    files = {cell: cell_file(folder, cell) for cell in CELLS}
    return {cell: json.loads(file.read_text()) for cell, file in files.items() if file.is_file()}


def answer(facts):
    """Return all that the page tells of a cell."""
    return {name: value for name, value in facts.items() if name not in ("seconds", "versions")}


def assert_as_committed(cells):
    committed = json.loads(RESULTS.read_text())["cells"]
    assert {cell: answer(facts) for cell, facts in cells.items()} == {
        cell: answer(committed[cell]) for cell in cells
    }


def assert_rows_as_committed(environment, folder, rows):
    """Measure all cells of these rows; fail where one differs from docs/models.json."""
    cells = measured(environment, folder, "--rows", ",".join(rows))
    assert list(cells) == [cell for cell in CELLS if cell.split("/")[0] in rows]
    assert_as_committed(cells)
