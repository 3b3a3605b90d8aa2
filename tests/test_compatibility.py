"""The compatibility table: selecting, judging, keeping and rendering its cells, and a sample."""

import json
import multiprocessing
import re
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from tools.compatibility import command, measure
from tools.compatibility.judge import judge, status
from tools.compatibility.measure import plain, run_step
from tools.compatibility.page import PAGE, render
from tools.compatibility.results import RESULTS, cell_file, dump, read_cells, select, versions
from tools.compatibility.rows import CELLS, COLUMNS, ROWS, SETTINGS

SAMPLE = """lora/single lora/zero1 rslora/zero2 dora/fsdp2 pissa/zero3 modules_to_save/fsdp1
new_tokens/zero3 ia3/fsdp1 prompt_tuning/ddp p_tuning/fsdp2 loha/zero3 base_4bit/zero3
base_4bit/fsdp2 adamw_paged/fsdp2""".split()
GOOD = {
    "whole": 1000,
    "bytes": [505, 505],
    "optimizer": "AdamW",
    "graphs": 0,
    "losses": [2.0, 1.5, 1.0],
    "grad_norms": [1.0, 1.0, 1.0],
    "reload": {"tensors": 2, "missing": [], "unequal": [], "logits": 0.0},
    "merge": 1e-6,
    "state": True,
    "seconds": 1.0,
}


def words(cell, facts, reference=GOOD):
    return status(judge(cell, facts, reference), facts)


def error(check, message):
    return {"error": {"check": check, "message": message}}


def results(cells):
    head = {"versions": versions(), "hardware": "a test", "date": "2026-01-02"}
    return head | {"cells": cells}


def keep(folder, cell, facts, **changed):
    file = cell_file(folder, cell)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(facts | {"versions": versions() | changed}))


def test_table_is_large_enough():
    assert len(ROWS) >= 18 and len(COLUMNS) == 12 and len(set(CELLS)) == len(ROWS) * 12
    assert {f"{config}.yaml" for config, _ in COLUMNS.values()} <= {
        path.name for path in ROOT.glob("configs/*.yaml")
    }
    assert {row.setting for row in ROWS.values()} - {""} == set(SETTINGS)


@pytest.mark.parametrize(
    "change, expected",
    [
        ({}, "yes"),
        ({"losses": [2.0, 1.5, 1.999]}, "does not train, different losses"),
        ({"losses": [2.0, 1.504, 1.0]}, "different losses"),
        ({"losses": [2.0, 1.5, float("nan")]}, "does not train, different losses"),
        ({"grad_norms": [1.0, 1.0, 1.01]}, "different losses"),
        ({"bytes": [560, 440]}, "not sharded"),
        ({"reload": GOOD["reload"] | {"missing": ["lm_head.weight"]}}, "does not reload"),
        ({"reload": GOOD["reload"] | {"unequal": ["lora_B"]}}, "does not reload"),
        ({"reload": GOOD["reload"] | {"logits": 2e-4}}, "does not reload"),
        ({"reload": GOOD["reload"] | {"logits": float("nan")}}, "does not reload"),
        ({"merge": 2e-4}, "merges inexactly"),
        (error("state", "RuntimeError: full"), "state not saved"),
        ({"without": "does not start: because"}, "yes, with a setting"),
    ],
)
def test_every_check_can_fail(change, expected):
    assert words("lora/zero3", GOOD | change) == expected


def test_checks_of_some_cells_alone():
    # under ddp every process holds all parameters
    assert words("lora/ddp", GOOD | {"bytes": [1000, 1000]}) == "yes"
    assert words("lora/single", GOOD, None) == "yes"
    # there is nothing to compare the losses with
    assert words("lora/zero3", GOOD, error("starts", "no")) == "yes"
    assert words("adamw_8bit/ddp", GOOD) == "different optimizer"
    assert words("adamw_8bit/ddp", GOOD | {"optimizer": "AdamW8bit"}) == "yes"
    assert words("torch_compile/zero3", GOOD) == "not compiled"
    assert words("torch_compile/zero3", GOOD | {"graphs": 1}) == "yes"
    failed = {"seconds": 1.0} | error("starts", "ValueError: no")
    assert words("ia3/zero3", failed) == "does not start"
    assert status({}, {}) == "not measured"


def test_errors_lose_what_differs_from_run_to_run():
    message = "KeyError: '/tmp/compatibility-ab12/adapter/x.json' at 0x7f12345678"
    message += " [127.0.0.1]:4242 a|b\nsecond line"
    assert plain(message) == "KeyError: 'x.json' at 0x... [ADDRESS a/b"
    assert plain("see https://example.org/a/b") == "see https://example.org/a/b"
    assert len(plain("long " * 100)) < 250


def test_select():
    assert select([], {}) == CELLS
    assert select([], dict.fromkeys(CELLS[:-1])) == CELLS[-1:]
    # the losses of the other strategies are compared with those of the single process
    assert select(["lora/zero3"], {}) == ["lora/single", "lora/zero3"]
    assert select(["lora/zero3"], dict.fromkeys(CELLS)) == ["lora/zero3"]
    assert select(["lora/*"], {}) == [f"lora/{column}" for column in COLUMNS]
    assert select(["*/fsdp?"], dict.fromkeys(CELLS)) == [
        f"{row}/fsdp{number}" for row in ROWS for number in (1, 2)
    ]
    with pytest.raises(SystemExit, match="lora/zero4 names no cell"):
        select(["lora/zero3", "lora/zero4"], {})


def test_cells_of_nvme_wait_for_async_io(monkeypatch, capsys):
    todo = ["lora/zero3", "lora/zero3_nvme"]
    monkeypatch.setattr(command, "can_swap", lambda: True)
    assert command.leave_out_nvme(todo, asked=True) == todo
    monkeypatch.setattr(command, "can_swap", lambda: False)
    assert command.leave_out_nvme(todo[:1], asked=True) == todo[:1]
    assert command.leave_out_nvme(todo, asked=False) == todo[:1]
    assert "1 cell(s) of zero3_nvme not measured" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="async_io is not built"):
        command.leave_out_nvme(todo, asked=True)


def test_resume(tmp_path):
    committed = tmp_path / "compatibility.json"
    assert read_cells(tmp_path, committed) == {}
    cells = {"lora/ddp": GOOD, "lora/zero1": GOOD, "gone/ddp": GOOD}
    committed.write_text(dump(results(cells)))
    keep(tmp_path, "lora/zero1", GOOD | {"seconds": 2.0})
    keep(tmp_path, "lora/single", GOOD)
    keep(tmp_path, "lora/zero2", GOOD, torch="0.1")
    cells = read_cells(tmp_path, committed)
    # without other versions, and without rows that no longer exist
    assert list(cells) == ["lora/single", "lora/ddp", "lora/zero1"]
    assert cells["lora/zero1"]["seconds"] == 2.0  # the folder is newer than the committed file
    assert "versions" not in cells["lora/zero1"]
    other = json.loads(committed.read_text())
    other["versions"]["torch"] = "0.1"
    committed.write_text(json.dumps(other))
    assert list(read_cells(tmp_path, committed)) == ["lora/single", "lora/zero1"]


def test_render():
    cells = {
        "lora/single": GOOD,
        "lora/ddp": GOOD | {"losses": [2.0, 1.5, 1.1]},
        "lora/zero3": GOOD | {"without": "state not saved: `b`"},
        "ia3/zero1": error("starts", "ValueError: no `a`"),
        "ia3/zero2": error("starts", "ValueError: no `a`"),
    }
    page = render(results(cells))
    rows = {
        row[0]: row[1:]
        for row in (line.strip("| ").split(" | ") for line in page.splitlines() if line[:1] == "|")
    }
    first = re.search(r"^\| lora \| (.*) \|$", page, re.MULTILINE)[1].split(" | ")
    assert first[:2] == ["yes", "**different losses** [1](#n1)"]
    assert first[6] == "yes, with a setting [2](#n2)"
    assert page.count("**does not start** [3](#n3)") == 2  # one reason, listed once
    assert "3. <a id=\"n3\"></a>does not start: `ValueError: no 'a'`" in page
    assert "2 cells say yes, 3 do not, 223 are not measured" in page
    assert rows["lora"][:3] == ["505", "505", ""]  # the second table of that name: bytes
    assert all(f"`{name}`" in page for name in ROWS)
    assert "Hardware: a test. Date of the last measurement: 2026-01-02." in page


def test_processes_end_with_the_step(tmp_path, monkeypatch):
    def process(step, job):
        if step == "hang" or job["rank"] == 1:
            time.sleep(60)
        message = json.dumps({"check": "learns", "message": "planted", "time": 1})
        (tmp_path / "error-0.json").write_text(message)
        raise SystemExit(1)

    monkeypatch.setattr(measure, "run_process", process)
    context = multiprocessing.get_context("fork")
    begin = time.monotonic()
    (tmp_path / "check.txt").write_text("reloads")
    jobs = [{"rank": 0}, {"rank": 1}]
    hang = {"check": "reloads", "message": "hangs: did not end in 1 s"}
    assert run_step(context, "hang", jobs, tmp_path, limit=1) == hang
    assert run_step(context, "fail", jobs, tmp_path)["message"] == "planted"
    assert time.monotonic() - begin < 20
    assert not multiprocessing.active_children()


def test_committed_results_are_complete_and_rendered():
    committed = json.loads(RESULTS.read_text())
    assert list(committed["cells"]) == CELLS
    assert PAGE.read_text() == render(committed)
    for word in ("/tmp", "/root", "site-packages"):
        assert word not in RESULTS.read_text()


@pytest.mark.slow
def test_a_sample_gives_the_committed_answers(environment, tmp_path):
    command = [sys.executable, "-m", "tools.compatibility", "--folder", tmp_path, "--only", *SAMPLE]
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    committed = json.loads(RESULTS.read_text())["cells"]
    measured = {cell: json.loads(cell_file(tmp_path, cell).read_text()) for cell in SAMPLE}

    def answers(cells):
        references = committed | cells
        return {
            cell: words(cell, cells[cell], references[f"{cell.split('/')[0]}/single"])
            for cell in SAMPLE
        }

    assert answers(measured) == answers({cell: committed[cell] for cell in SAMPLE}), done.stdout
    assert sum(word.startswith("yes") for word in answers(measured).values()) >= 10
    assert any(word == "does not start" for word in answers(measured).values())
