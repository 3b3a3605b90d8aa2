"""docs/from_trainer.md names every flag of chat_sft with its default, and quotes real lines."""

import ast
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

DOCUMENT = (ROOT / "docs/from_trainer.md").read_text()
SCRIPT = (ROOT / "examples/chat_sft.py").read_text()
CONFIG = next(node for node in ast.parse(SCRIPT).body if getattr(node, "name", "") == "Config")
# used by the fields
NAMES = {"Path": Path, "__file__": "chat_sft.py", "launch": SimpleNamespace(OPTIMIZERS={})}


def evaluated(node):
    return eval(ast.unparse(node), dict(NAMES))


# flag -> default and aliases; parsed, because importing the script takes seconds
FIELDS = {
    node.target.id: {word.arg: evaluated(word.value) for word in node.value.keywords}
    if isinstance(node.value, ast.Call)
    else {"default": evaluated(node.value)}
    for node in CONFIG.body
    if isinstance(node, ast.AnnAssign)
}
# A row: flag or step, what train.py does, what chat_sft does, and the line as `code` (place). A
# place is a file in utils/, or a section of the script and, where it has functions, one of them.
ROWS = [
    re.split(r" ?(?<!\\)\| ?", line)[1:-1]
    for line in DOCUMENT.splitlines()
    if line.startswith("| ")
]
ROWS = [row for row in ROWS if row[3] != "line of `chat_sft.py`"]
FLAG_ROWS = [row for row in ROWS if row[0].startswith("`--")]


def text_of(place):
    """Return the lines of a file in utils/, or of a section of the script or a function in it."""
    if place.startswith("utils/"):
        return (ROOT / place).read_text().splitlines()
    section, _, function = place.partition(", ")
    parts = re.split(r"^ *# (\d\. [\w ]+) -+$", SCRIPT, flags=re.MULTILINE)
    lines = parts[parts.index(section) + 1].splitlines()
    if not function:
        return lines
    first = next(number for number, line in enumerate(lines) if line.startswith(f"def {function}("))
    ends = [
        number
        for number, line in enumerate(lines)
        if number > first and line.startswith(("def ", "# "))
    ]
    return lines[first : next(iter(ends), None)]


def test_rows_have_four_cells():
    assert len(FLAG_ROWS) > 60 and len(ROWS) > len(FLAG_ROWS) + 30
    assert all(len(row) == 4 and all(row) for row in ROWS)


def test_every_flag_of_the_script_and_no_other():
    flags = [flag for row in FLAG_ROWS for flag in re.findall(r"`--(\w+)`", row[0])]
    aliases = [
        alias.removeprefix("--") for field in FIELDS.values() for alias in field.get("aliases", [])
    ]
    assert sorted(flags) == sorted(["config_file", *FIELDS, *aliases])


@pytest.mark.parametrize(
    "command", sorted((ROOT / "docs/commands").glob("*.sh")), ids=lambda path: path.stem
)
def test_every_flag_of_a_command(command):
    flags = set(re.findall(r"--(\w+)", command.read_text()))
    assert len(flags) > 35
    assert not [flag for flag in flags if not any(f"`--{flag}`" in row[0] for row in FLAG_ROWS)]


@pytest.mark.parametrize("row", FLAG_ROWS[1:], ids=lambda row: row[0].split("`")[1])
def test_default(row):
    default = FIELDS[re.match(r"`--(\w+)`", row[0])[1]]["default"]
    told = {"": "empty", None: "unset"}.get(default, f"`{default}`")
    assert re.findall(r"Default: (empty|unset|`[^`]*`)[.,]", row[2]) == [told]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].replace("`", ""))
def test_quoted_line(row):
    code, place = re.fullmatch(r"`([^`]+)` \(([^()]+)\)", row[3]).groups()
    assert any(code in line for line in text_of(place)), f"{place} has no line {code}"
