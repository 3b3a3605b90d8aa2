"""Write docs/compatibility.md from the results, which are the content of compatibility.json."""

import datetime
import os
import re
from pathlib import Path

from tools.compatibility.judge import CHECKS, LOGITS_TOLERANCE, TOLERANCE, judge, status
from tools.compatibility.measure import ROOT, count_gpus
from tools.compatibility.results import dump, versions
from tools.compatibility.rows import CELLS, COLUMNS, ROWS, SETTINGS, SLICE

PAGE = ROOT / "docs" / "compatibility.md"
TEMPLATE = """# What works with what

Every cell of this table is a measurement. For each cell a small random Llama (2 layers, float32)
was trained with the method of the row under the strategy of the column. The result was saved and
loaded again. Each cell ran in two processes over gloo (`single`: in one; `zero3_hpz`: in four, as
two nodes with two processes), with sequences of different lengths and two micro-batches per update.
`zero3_nvme` needs DeepSpeed's extension async_io ([how to build it](deepspeed.md#nvme)). DeepSpeed
keeps slices below 1 MiB in memory. This model has no larger slices, so the cells of `zero3_nvme`
lower that limit to {slice} bytes, and set `stage3_param_persistence_threshold` to 0.
{summary}.

{table}

**yes** means that all these checks passed, in this order:

1. The run starts. The model loads, the adapter is created, and `accelerator.prepare` accepts both
   under this repository's launch config. The optimizer is the one that was requested. If
   compilation was requested, something was compiled.
2. The run trains: the loss falls.
3. The loss and the gradient norm of every update are those of the single process, within a relative
   difference of {tolerance:g}.
4. Under zero3 and fsdp each process holds its share of the parameters' bytes, within 10 %.
5. The saved adapter loads with plain `peft` in a new process. It holds the trained tensors bit for
   bit (for a prompt: the output of its encoder) and gives the logits of the trained model, within
   {logits:g}. Under fsdp1 LoRA is written as this repository's scripts write it, because PEFT's own
   saving finds no parameters there.
6. The adapter, merged into the base model, gives the same logits. Prompt tuning, prefix tuning and
   p-tuning skip this check, because they cannot be merged.
7. `accelerator.save_state` writes a checkpoint with the optimizer's state, and under fsdp1 with all
   of it. This was tested in the rows {checkpoints}.

Otherwise the cell says what does not work, and the number links to the reason. After an error that
ends the run, the remaining checks were not made. Two errors occur only on machines without a GPU.
If an error mentions CUDA, the library needs a GPU at this point. `setStorage` fails because FSDP1
moves the full state dict to the CPU and then frees the original. Without a GPU both are the same
memory.

Under DeepSpeed `accelerate launch` ignores `--dynamo_backend` without a warning, so nothing is
compiled. The environment variable `ACCELERATE_DYNAMO_BACKEND` does have an effect: with `aot_eager`
zero2 and zero3 compiled and gave the same losses. The cells of `base_8bit` do not show what an
8-bit base model does under ZeRO-3 on GPUs. Others have reported wrong losses there.

{notes}

## Rows

{rows}

Columns are launch configs in `configs/`; `zero1_offload` is `zero1` with
`--offload_optimizer_device cpu`.

Two results are no faults. `adamw_8bit` has "different losses" under strategies that shard the
optimizer states, because the states are quantized in blocks, and sharding changes the blocks. A
4-bit or 8-bit base model "merges inexactly", because merging quantizes the weights again.

## Bytes of parameters per process

The table shows the most that any process holds after `prepare`. A cell is empty if the run did not
start. 4-bit and 8-bit weights are counted as they are stored, including the full 8-bit weights that
bitsandbytes keeps beside the shards. During training, ZeRO-3 also keeps full copies of small
parameters (`stage3_param_persistence_threshold`). The table counts only the shards, and under
zero3_nvme only the shards that stay in memory.

{bytes}

## Measure it again

```bash
.venv/bin/python -m tools.compatibility --write
```

This command measures the cells that were not measured with the installed versions. This takes a few
seconds per cell, or a minute and more if `torch.compile` calls the C++ compiler. Then the command
writes this page and `docs/compatibility.json`. `--only 'lora/*'` measures a row again, `--only
'*/fsdp2'` a column. A test measures a sample of the cells again and compares it with that file.

Versions: {versions}. Hardware: {hardware}. Date of the last measurement: {date}.
"""


def hardware():
    """Return one phrase that names the machine, for the page."""
    models = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    names = ", ".join(sorted({re.sub(r"\s+(\d+-Core )?Processor$", "", model) for model in models}))
    gpus = f"{count_gpus()} GPU(s)" if count_gpus() else "no GPU"
    return f"{len(os.sched_getaffinity(0))} cores of an {names}, {gpus}"


def write_results(cells, file, page, render):
    """Write the facts of the cells as JSON, with versions, hardware and date, and the page of them.

    Args:
        file, page: the paths.
        render: function of the results that returns the page.
    """
    date = datetime.date.today().isoformat()
    results = {"versions": versions(), "hardware": hardware(), "date": date, "cells": cells}
    file.write_text(dump(results))
    page.write_text(render(results))
    print(f"wrote {page.relative_to(ROOT)} and {file.relative_to(ROOT)}")


def table(entry):
    """Return a markdown table of all rows and columns, with the text `entry(cell)` in each cell."""
    lines = [f"|  | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for row in ROWS:
        lines.append(f"| {row} | {' | '.join(entry(f'{row}/{column}') for column in COLUMNS)} |")
    return "\n".join(lines)


def code(text):
    """Return the text as markdown code."""
    return f"`{text.replace('`', chr(39))}`"


class Notes(list):
    """The reasons below the table, each listed once."""

    def link(self, text):
        """Return the link to a reason, which is added if it is new."""
        if text not in self:
            self.append(text)
        number = self.index(text) + 1
        return f"[{number}](#n{number})"

    def __str__(self):
        return "\n".join(f'{i}. <a id="n{i}"></a>{text}' for i, text in enumerate(self, 1))


def render(results):
    """Return the text of the page."""
    cells, notes = results["cells"], Notes()
    judged = {
        cell: judge(cell, facts, cells.get(f"{cell.split('/')[0]}/single"))
        for cell, facts in cells.items()
    }

    def entry(cell):
        facts, answers = cells.get(cell, {}), judged.get(cell, {})
        failed = {check: reason for check, reason in answers.items() if reason}
        links = [notes.link(f"{CHECKS[check]}: {code(failed[check])}") for check in failed]
        if "without" in facts:
            flags = " ".join(SETTINGS[ROWS[cell.split("/")[0]].setting])
            links.append(notes.link(f"with `{flags}`; without it {code(facts['without'])}"))
        words = status(answers, facts)
        if not words.startswith(("yes", "not measured")):
            words = f"**{words}**"
        return " ".join([words, *links])

    def bytes_entry(cell):
        facts = cells.get(cell, {})
        return f"{max(facts['bytes']):,}" if "bytes" in facts else ""

    main = table(entry)  # fills the notes
    good = sum(not any(answers.values()) for answers in judged.values())
    missing = len(CELLS) - len(judged)
    counts = f"{good} cells say yes, {len(judged) - good} do not, {missing} are not measured"
    return TEMPLATE.format(
        table=main,
        notes=notes,
        rows="\n".join(f"- `{name}`: {row.title}" for name, row in ROWS.items()),
        bytes=table(bytes_entry),
        checkpoints=", ".join(f"`{name}`" for name, row in ROWS.items() if row.checkpoint),
        summary=counts,
        versions=", ".join(f"{name} {number}" for name, number in results["versions"].items()),
        hardware=results["hardware"],
        date=results["date"],
        slice=SLICE,
        tolerance=TOLERANCE,
        logits=LOGITS_TOLERANCE,
    )
