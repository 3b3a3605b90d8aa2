"""Keep the facts of the cells, and choose which cells to measure."""

import json
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path

from tools.compatibility.rows import CELLS

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "compatibility.json"
LIBRARIES = ("torch", "accelerate", "deepspeed", "transformers", "peft", "bitsandbytes")


def versions():
    """Return library -> installed version, without a suffix such as +cpu."""
    return {library: version(library).split("+")[0] for library in LIBRARIES}


def cell_file(folder, cell):
    """Return the path of the file that keeps the facts of a cell."""
    return Path(folder) / f"{cell}.json"


def read_cells(folder, results=RESULTS, known=CELLS):
    """Return cell -> facts of the cells that were measured with the installed versions.

    The cells in the folder are newer than those of the committed file.

    Args:
        known: the cells of the table, in its order.
    """
    cells, now = {}, versions()
    if Path(results).is_file():
        committed = json.loads(Path(results).read_text())
        if committed["versions"] == now:
            cells |= committed["cells"]
    for cell in known:
        file = cell_file(folder, cell)
        if file.is_file():
            kept = json.loads(file.read_text())
            if kept.pop("versions") == now:
                cells[cell] = kept
    return {cell: cells[cell] for cell in known if cell in cells}


def dump(results):
    """Return the results as JSON with one line per cell, so that a diff names the cells."""
    cells = ",\n".join(
        f"{json.dumps(cell)}: {json.dumps(facts)}" for cell, facts in results["cells"].items()
    )
    head = json.dumps(results | {"cells": {}}, indent=1)
    return head.removesuffix("{}\n}") + "{\n" + cells + "\n}\n}\n"


def select(patterns, cells):
    """Return the cells to measure, row by row, each after the single process of its row.

    Args:
        patterns: those of --only, measured again; without any, the missing cells are measured.
        cells: the cells that are measured already.
    """
    if not patterns:
        return [cell for cell in CELLS if cell not in cells]
    for pattern in patterns:
        if not any(fnmatch(cell, pattern) for cell in CELLS):
            forms = "give ROW/COLUMN, such as lora/zero3 or 'lora/*'"
            raise SystemExit(f"error: --only {pattern} names no cell: {forms}")
    wanted = {cell for cell in CELLS if any(fnmatch(cell, pattern) for pattern in patterns)}
    references = {f"{cell.split('/')[0]}/single" for cell in wanted} - set(cells)
    return [cell for cell in CELLS if cell in wanted | references]
