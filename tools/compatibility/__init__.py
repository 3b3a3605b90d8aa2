"""Measure which methods, base models and optimizers (rows) work under which strategies (columns).

    python -m tools.compatibility                    measure the cells that are still missing
    python -m tools.compatibility --only lora/zero3  measure these again; or 'lora/*', '*/fsdp?'
    python -m tools.compatibility --write            also write docs/compatibility.md and .json

A cell trains a small random Llama for a few updates in two real processes, saves it, and loads the
saved files in a new process. Every cell is kept in --folder as soon as it is measured, so an
interrupted run continues where it stopped. The cells of docs/compatibility.json count as measured
if they were measured with the installed versions.

    rows.py      the rows and columns
    cell.py      what the processes of a cell do
    measure.py   start the processes of a cell, collect what they found
    judge.py     turn that into yes, or into what does not work
    results.py   keep the cells, choose which to measure
    page.py      write docs/compatibility.md
    command.py   the command line
"""
