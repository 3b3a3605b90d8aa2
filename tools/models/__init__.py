"""Measure which architectures of transformers the scripts train, save, reload and merge.

    python -m tools.models                         measure the cells that are still missing
    python -m tools.models --rows gpt_oss,falcon   measure these rows again; or 'qwen*'
    python -m tools.models --columns packing       measure these columns again
    python -m tools.models --failed                also measure every cell again that says no
    python -m tools.models --write                 also write docs/models.md and .json

A cell runs a script of examples/ in two real processes on a small random model of its row, loads
the saved files in a new process, and compares. Every cell is kept in --folder as soon as it is
measured, so an interrupted run continues where it stopped. The cells of docs/models.json count as
measured if they were measured with the installed versions.

    architectures.py  the rows: small configs of all architectures
    rows.py           the columns: which script runs how
    make.py           make the model of a row, its tokenizer, and the data
    process.py        what the processes of a cell do
    compare.py        compare a loaded model with what a run printed
    measure.py        start the processes of a row, collect what they found
    results.py        keep the cells, choose which to measure
    page.py           write docs/models.md
    command.py        the command line
"""
