"""The style command: its definitions, counted by hand on two small sources, and its tables."""

import sys

import pytest
from conftest import ROOT

from tools import style

IN_A_FUNCTION = '''"""Trains.

# A docstring, not a comment.
"""
import os.path
from math import (
    inf,
    pi as circle,
)

LIMIT = 3  # a comment behind code


class Config:
    rate = 0.1

    def describe(self):
        """One line."""
        return [name for name in dir(self)]


def batches(count):
    # A comment of its own.
    for index in range(count):
        yield index


def main(config, *extra):
    import json

    model, (first, *others) = config.model, extra
    rows = [row for row in others if (last := row)]
    with open(model) as file, open(first):
        text = file.read()
    try:
        total: int = len(text)
    except OSError as error:
        raise error

    def closure(value):
        inside = value
        return inside

    for epoch in range(total):
        text = epoch
    for loss in batches(total):
        after = loss
        for part in after:
            part.backward()


def later():
    return """
# not a comment
"""


END = LIMIT
'''

# Line 15 is a comment of 101 characters. The module's own code: lines 6 to 22 without 16 and 17.
AT_MODULE_LEVEL = f'''"""Trains."""

import torch as t
import torch.nn

rate = 0.1
size: int = 2
pairs = sorted([], key=lambda pair: pair)
if rate:
    model = t.nn.Linear(size, size)
    start = backward = 0
else:
    model = None

# {"x" * 99}
def score():
    return rate
while rate:
    loss = model(size)
    loss.backward()

print(loss)
'''


def measure(tmp_path, text):
    (tmp_path / "script.py").write_text(text)
    return style.measure(tmp_path / "script.py")


def test_loop_in_a_function(tmp_path):
    module = "os inf circle LIMIT Config batches main".split()
    main = "config extra json model first others rows last file text total error closure epoch"
    assert measure(tmp_path, IN_A_FUNCTION) == {
        "Lines": 58,
        # 42 lines are not blank; the docstrings have 4 of them and the comment 1.
        "Mean code line": pytest.approx(821 / 37),
        "Over 100": 0,
        "Over 100, %": 0,
        "Imported names": 4,
        "Names before the loop": len(module) + len(main.split()),
        "Longest function": 22,
    }


def test_loop_at_module_level(tmp_path):
    names = "t torch rate size pairs model start backward score".split()
    assert measure(tmp_path, AT_MODULE_LEVEL) == {
        "Lines": 22,
        "Mean code line": pytest.approx(274 / 16),
        "Over 100": 1,
        "Over 100, %": pytest.approx(100 / 22),
        "Imported names": 2,
        "Names before the loop": len(names),
        "Longest function": 15,
    }


def test_loop_in_a_nested_function(tmp_path):
    text = "def outer(size):\n    rate = 1\n    def inner(x):\n        y = x\n        while y:\n"
    text += "            loss.backward()\n    late = 2\n"
    numbers = measure(tmp_path, text)
    assert numbers["Names before the loop"] == len("outer size rate inner x y".split())
    assert numbers["Longest function"] == 7


def test_without_a_training_loop(tmp_path):
    # `backward` is neither called as a method nor in the body of a loop
    text = "for index in range(3):\n    backward()\nloss.backward()\n"
    assert measure(tmp_path, text)["Names before the loop"] is None
    assert measure(tmp_path, "")["Lines"] == 0


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["style", *map(str, arguments)])
    style.main()


def test_tables(tmp_path, monkeypatch, capsys):
    peers, page = tmp_path / "peers", tmp_path / "style.md"
    (peers / "one@abc").mkdir(parents=True)
    (peers / "one@abc/function.py").write_text(IN_A_FUNCTION)
    (peers / "module.py").write_text(AT_MODULE_LEVEL)
    ours = tmp_path / "ours.py"
    ours.write_text("import os\n" * 41)
    page.write_text(f"before\n{style.MARKER}\nold\n{style.MARKER}\nafter\n")
    monkeypatch.setattr(style, "PAGE", page)

    run(monkeypatch, ours)
    assert f"| {ours} | 41 | 9.0 | 0 | 0.0 | 1 | - | 0 |" in capsys.readouterr().out
    assert "\nold\n" in page.read_text()
    for _ in range(2):  # what was written is replaced, and nothing else
        run(monkeypatch, ours, "--peers", peers, "--write")
        printed, written = capsys.readouterr().out, page.read_text()
        assert "| one@abc/function.py | 58 | 22.2 | 0 | 0.0 | 4 | 21 | 22 |\n" in printed
        assert "| module.py | 22 | 17.1 | 1 | 4.5 | 2 | 9 | 15 |\n" in printed
        assert (
            "| **median of the peers** | 40.0 | 19.7 | 0.5 | 2.3 | 3.0 | 15.0 | 18.5 |\n" in printed
        )
        assert f"| {ours} | **41** | 9.0 | 0 | 0.0 | 1 | - | 0 |\n" in printed
        assert printed.strip() in written and f"--peers {peers} --write" in written
        assert written.startswith("before\n<!--") and written.endswith("-->\nafter\n")
        assert "\nold\n" not in written and written.count(style.MARKER) == 2


@pytest.mark.parametrize("arguments", [["--write"], ["--peers", "nowhere"]], ids=" ".join)
def test_peers_must_be_there(arguments, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, *arguments)
    assert "error: --peers needs a folder of .py files" in capsys.readouterr().err


def test_the_page_can_be_rewritten():
    assert (ROOT / style.PAGE).read_text().count(style.MARKER) == 2
