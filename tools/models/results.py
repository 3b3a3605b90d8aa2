"""Keep the facts of the cells, and choose which to measure."""

from fnmatch import fnmatch

from tools.compatibility.results import ROOT
from tools.models.rows import CELLS

RESULTS = ROOT / "docs" / "models.json"
GOOD = ("yes", "nothing")  # answers that --failed does not measure again


def has_failed(facts):
    """Return whether a cell says anything but yes, or its files do not reload."""
    return facts["answer"] not in GOOD or bool(facts.get("reload")) or "setting" in facts


def select(rows, columns, failed, cells):
    """Return row -> the columns to measure.

    Args:
        rows, columns: patterns of names. Without any, the cells that are missing are measured.
        failed: also measure the cells again that do not say yes.
        cells: the cells that are measured already.
    """
    names = {"row": rows, "column": columns}
    for number, (kind, patterns) in enumerate(names.items()):
        known = {cell.split("/")[number] for cell in CELLS}
        for pattern in patterns:
            if not any(fnmatch(name, pattern) for name in known):
                raise SystemExit(f"error: --{kind}s {pattern} names no {kind}")
    todo = {}
    for cell in CELLS:
        row, column = cell.split("/")
        wanted = cell not in cells or failed and has_failed(cells[cell])
        if rows or columns:
            wanted = any(fnmatch(row, pattern) for pattern in rows or "*")
            wanted = wanted and any(fnmatch(column, pattern) for pattern in columns or "*")
            wanted = wanted and (not failed or cell not in cells or has_failed(cells[cell]))
        if wanted:
            todo.setdefault(row, []).append(column)
    for row, found in todo.items():
        if found == ["merge"]:  # it merges what another cell has trained
            first = next(cell for cell in CELLS if cell.startswith(f"{row}/"))
            todo[row] = [first.split("/")[1], "merge"]
    return todo
