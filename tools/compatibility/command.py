"""The command line of tools/compatibility."""

import argparse
import json
import tempfile
from pathlib import Path

from tools import compatibility
from tools.compatibility.judge import judge, status
from tools.compatibility.measure import ROOT, measure, run_step, start_server
from tools.compatibility.page import PAGE, render, write_results
from tools.compatibility.results import RESULTS, cell_file, read_cells, select, versions
from tools.compatibility.rows import CELLS, NVME


def can_swap():
    """Return whether DeepSpeed's extension async_io is built, without which nothing is on NVMe."""
    from utils.nvme import is_built  # imports torch, which takes seconds

    return is_built()


def leave_out_nvme(todo, asked):
    """Return the cells to measure without those of NVMe, if async_io is not built.

    Args:
        asked: whether the cells were named on the command line; then it stops instead.
    """
    cells = [cell for cell in todo if cell.endswith(f"/{NVME}")]
    if not cells or can_swap():
        return todo
    reason = "DeepSpeed's extension async_io is not built: run `python -m tools.nvme build`"
    if asked:
        raise SystemExit(f"error: {len(cells)} cell(s) of {NVME} cannot be measured, {reason}")
    print(f"{len(cells)} cell(s) of {NVME} not measured, {reason}")
    return [cell for cell in todo if cell not in cells]


def measure_all(todo, folder, cells):
    """Measure the cells, keep each as soon as it is measured, and add it to `cells`."""
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
            answer = f"{status(answers, facts)} ({facts['seconds']} s) {reason}"
            print(f"{number}/{len(todo)} {cell}: {answer}", flush=True)


def main(arguments=None):
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.compatibility",
        description=compatibility.__doc__.partition("\n\n    rows.py")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="ROW/COLUMN",
        help="cells to measure again (default: measure the missing ones)",
    )
    parser.add_argument(
        "--folder",
        default=ROOT / "outputs" / "compatibility",
        help="folder that keeps the measured cells (default: outputs/compatibility)",
    )
    parser.add_argument(
        "--write", action="store_true", help="write docs/compatibility.md and .json at the end"
    )
    options = parser.parse_args(arguments)
    cells = read_cells(options.folder)
    todo = leave_out_nvme(select(options.only, cells), asked=bool(options.only))
    if todo:
        measure_all(todo, options.folder, cells)
    if options.write:
        cells = {cell: cells[cell] for cell in CELLS if cell in cells}
        write_results(cells, RESULTS, PAGE, render)
