"""Write docs/models.md from the facts of the cells."""

from collections import Counter

from tools.compatibility.page import Notes, code
from tools.compatibility.results import ROOT
from tools.models.architectures import ARCHITECTURES, CAUSAL, SEQ2SEQ
from tools.models.rows import CELLS, COLUMNS, RUNS, TOLERANCE

PAGE = ROOT / "docs" / "models.md"
TEMPLATE = """# Which models the scripts train

Every cell of these tables is a measurement. It ran a script of this repository, as it is, on a
small model of the architecture: random weights, 2 layers, a tokenizer with one token per byte.
{count} architectures; {summary}.

The columns:

- **chat_sft**: `examples/chat_sft.py --use_peft_lora` trains on two processes under
  `configs/ddp.yaml`, evaluates, answers prompts and saves.
- **lesson**: the same for `examples/causal_lm_lora.py`, or `examples/seq2seq_lora.py`.
- **packing**: chat_sft with `--packing`.
- **ZeRO-3**: chat_sft, or `seq2seq_lora_zero3_offload.py`, under `configs/zero3.yaml`.
- **FSDP2**: chat_sft under `configs/fsdp2.yaml`. The lesson for sequence-to-sequence models is
  `seq2seq_lora_fsdp1.py`, which runs under `configs/fsdp1.yaml`.
- **reload**: what each of these runs saved is loaded in a new process by the lines of Python that
  the run printed. It gives the same answers and, for chat_sft, the same held-out loss (within
  {tolerance:g}, relative), document by document and without code of this repository.
- **merge**: `python -m tools.merge_adapter` merges the adapter of the first run that was saved. The
  merged model is loaded by the lines that the command printed and gives the same as the run.

The answers:

- **yes**: all of this worked, with two updates.
- **with a setting**: the script refused its defaults and named flags. The first note has both, and
  the answer is that of a run with these flags.
- **no**: the script refused before training, with the sentence in the note.
- **fault**: the run ended with a traceback, or after training had started. That is a fault of this
  repository, and the note has the error.
- **differs**: the files were saved and loaded, but the model that they gave is not the trained one.
- **-**: there is no such script, or no run of the row saved an adapter.

## Causal language models

{causal}

## Sequence-to-sequence models

{seq2seq}

{notes}

## Measure it again

```bash
.venv/bin/python -m tools.models --write
```

measures the cells that are missing for the installed versions and writes this page and
`docs/models.json`. `--rows gpt_oss,falcon` measures these rows again, `--columns packing` a column,
`--failed` every cell that says anything but yes. `pytest --all` measures every cell again, and
compares it with that file, in `tests/test_models_rows_1.py` and `tests/test_models_rows_2.py`.

The architectures and the settings of their small models are in `tools/models/architectures.py`. The
dropout and all else that is not about size have the architecture's defaults. Weights, data and
seeds are the same in every run.

Versions: {versions}. Hardware: {hardware}. Date: {date}.
"""
TITLES = {"zero3": "ZeRO-3", "fsdp2": "FSDP2"}
WORDS = {
    "yes": "yes",
    "refused": "no",
    "stopped": "**fault**",
    "traceback": "**fault**",
    "differs": "**differs**",
    "nothing": "-",
}


def reason_of(facts):
    """Return the note of a cell that does not say yes."""
    text = code(facts["reason"])
    if facts["answer"] == "refused":
        return text
    where = "after training had started" if facts.get("started") else "before training"
    if facts["answer"] == "stopped":
        return f"stopped {where}: {text}"
    return f"traceback {where}: {text}" if facts["answer"] == "traceback" else text


def cell_words(facts, notes):
    """Return the words of a cell that was measured."""
    words = [WORDS[facts["answer"]]]
    if "setting" in facts:
        sentences = ", then ".join(map(code, facts["without"]))
        note = f"with `{facts['setting']}`; without it {sentences}"
        words = [f"{words[0]}, with a setting", notes.link(note)]
    return " ".join(words + ([notes.link(reason_of(facts))] if "reason" in facts else []))


def reload_words(row, cells, notes):
    """Return the words of the column `reload`, which all runs of a row share."""
    runs = {column: cells.get(f"{row}/{column}", {}) for column in RUNS}
    reasons = {column: facts["reload"] for column, facts in runs.items() if "reload" in facts}
    bad = [f"{column}: {code(reason)}" for column, reason in reasons.items() if reason]
    if bad:
        return " ".join(["**differs**", *map(notes.link, bad)])
    return "yes" if reasons else "-"


def table(rows, cells, notes):
    """Return a markdown table of these rows."""
    titles = [TITLES.get(column, column) for column in COLUMNS]
    lines = [f"|  | {' | '.join(titles)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for row in rows:
        words = [f"{ARCHITECTURES[row].title} (`{row}`)"]
        for column in COLUMNS:
            cell = f"{row}/{column}"
            if column == "reload":
                words.append(reload_words(row, cells, notes))
            elif cell in cells:
                words.append(cell_words(cells[cell], notes))
            else:
                words.append("not measured" if cell in CELLS else "-")
        lines.append(f"| {' | '.join(words)} |")
    return "\n".join(lines)


def summary(cells):
    """Return how many cells give which answer."""
    answers = Counter(WORDS[facts["answer"]].strip("*") for facts in cells.values())
    answers["do not reload"] = sum(bool(facts.get("reload")) for facts in cells.values())
    missing = len(CELLS) - len(cells)
    counts = [f"{answers['yes']} cells say yes", f"{answers['no']} no"]
    counts += [f"{answers['fault'] + answers['differs']} have a fault"]
    counts += [f"{answers['do not reload']} runs do not reload"]
    return ", ".join(counts + ([f"{missing} are not measured"] if missing else []))


def render(results):
    """Return the text of the page, made of the content of docs/models.json."""
    cells, notes = results["cells"], Notes()
    tables = [table(rows, cells, notes) for rows in (CAUSAL, SEQ2SEQ)]  # they fill the notes
    return TEMPLATE.format(
        count=len(ARCHITECTURES),
        summary=summary(cells),
        causal=tables[0],
        seq2seq=tables[1],
        notes=notes,
        tolerance=TOLERANCE,
        versions=", ".join(f"{name} {number}" for name, number in results["versions"].items()),
        hardware=results["hardware"],
        date=results["date"],
    )
