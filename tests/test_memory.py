"""Tests of the memory tracker: planted peaks, printed reports, two processes, the figure."""

import gc
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import PartialState

from utils.memory import MemoryTracker, report
from utils.plots import draw_memory

ROOT = Path(__file__).parents[1]
MB = 2**20
MOMENTS = ("begin", "end", "peak")
KEYS = [f"{kind}_{moment}" for kind in ("gpu", "gpu_reserved", "cpu") for moment in MOMENTS]
REPORT = """\
GPU Memory before entering the train : 1916
GPU Memory consumed at the end of the train (end-begin): 66
GPU Peak Memory consumed during the train (max-begin): 7488
GPU Total Peak Memory consumed during the train (max): 9404
CPU Memory before entering the train : 19411
CPU Memory consumed at the end of the train (end-begin): 0
CPU Peak Memory consumed during the train (max-begin): 0
CPU Total Peak Memory consumed during the train (max): 19411"""
TWO_PROCESSES = """
import json
import sys
import time

import torch
from accelerate import PartialState

from utils.memory import MemoryTracker

state = PartialState(cpu=True, backend="gloo")
tracker = MemoryTracker()
with tracker.phase("load"):
    pass
with tracker.phase("train"):
    planted = torch.ones(100 * (1 + state.process_index) * 2**20, dtype=torch.uint8)
    time.sleep(0.3)
    del planted
with open(f"{sys.argv[1]}/{state.process_index}.json", "w") as file:
    json.dump({"own": tracker.entries, "memory": tracker.gather()}, file)
state.destroy_process_group()
"""


@pytest.fixture(autouse=True)
def cpu_state():
    PartialState._reset_state()
    yield PartialState(cpu=True)
    PartialState._reset_state()


def plant(megabytes):
    """Allocate memory and write to all its pages; those of zeros() would not become resident."""
    return torch.ones(megabytes * MB, dtype=torch.uint8)


def near(megabytes):
    return pytest.approx(megabytes * MB, rel=0.05)


def example(processes, gpu):
    """Return a made-up result of gather(): two phases, numbers that differ between processes."""

    def entry(rank, start):
        values = ((key, rank + number) for number, key in enumerate(KEYS, start))
        return {key: value * MB * (gpu or key.startswith("cpu")) for key, value in values}

    starts = {"load": 100, "train": 200}
    return {name: [entry(rank, starts[name]) for rank in range(processes)] for name in starts}


def test_entries_are_bytes_in_int_and_the_gpu_is_zero_on_a_cpu():
    tracker = MemoryTracker()
    before = psutil.Process().memory_info().rss
    with tracker.phase("load"):
        pass
    after = psutil.Process().memory_info().rss
    assert list(tracker.entries) == ["load"]
    entry = tracker.entries["load"]
    assert list(entry) == KEYS
    assert all(type(value) is int for value in entry.values())
    assert not any(value for key, value in entry.items() if key.startswith("gpu"))
    assert before * 0.98 <= entry["cpu_begin"] <= entry["cpu_peak"] <= after * 1.02
    assert before * 0.98 <= entry["cpu_end"] <= after * 1.02


def test_planted_peak_is_found_and_counts_for_its_own_phase_only():
    tracker = MemoryTracker()
    with tracker.phase("train"):
        planted = plant(200)
        time.sleep(0.3)
        del planted
    with tracker.phase("evaluate"):
        pass
    train, evaluate = tracker.entries["train"], tracker.entries["evaluate"]
    assert train["cpu_peak"] - train["cpu_begin"] == near(200)
    assert abs(train["cpu_end"] - train["cpu_begin"]) < 10 * MB
    assert evaluate["cpu_peak"] - evaluate["cpu_begin"] < 10 * MB


def test_peak_is_found_while_python_keeps_the_interpreter_busy():
    tracker = MemoryTracker()
    with tracker.phase("train"):
        planted = plant(200)
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            pass
        del planted
    entry = tracker.entries["train"]
    assert entry["cpu_peak"] - entry["cpu_begin"] == near(200)


def test_memory_held_at_the_end_counts_without_a_sample():
    # a thread that waited for its next sample would block this test for an hour
    tracker = MemoryTracker(interval=3600)
    with tracker.phase("load"):
        planted = plant(200)
    entry = tracker.entries["load"]
    assert entry["cpu_end"] - entry["cpu_begin"] == near(200)
    assert entry["cpu_peak"] - entry["cpu_begin"] == near(200)
    with tracker.phase("free"):
        del planted
    entry = tracker.entries["free"]
    assert entry["cpu_end"] - entry["cpu_begin"] == near(-200)
    assert entry["cpu_peak"] >= entry["cpu_begin"]


def test_garbage_at_the_end_counts_as_peak_and_is_collected_before_the_end():
    tracker = MemoryTracker(interval=3600)
    gc.disable()
    try:
        with tracker.phase("train"):
            cycle = [plant(200)]
            cycle.append(cycle)
            del cycle
    finally:
        gc.enable()
    entry = tracker.entries["train"]
    assert entry["cpu_peak"] - entry["cpu_begin"] == near(200)
    assert abs(entry["cpu_end"] - entry["cpu_begin"]) < 10 * MB


def test_report_has_the_words_and_the_unit_of_the_guide():
    figures = {"gpu": (1916, 1982, 9404), "cpu": (19411, 19411, 19411)}
    entry = {}
    for kind, values in figures.items():
        entry |= {f"{kind}_{moment}": value * MB for moment, value in zip(MOMENTS, values)}
    assert report("train", entry, on_gpu=True) == REPORT
    assert report("train", entry, on_gpu=False) == REPORT[REPORT.index("CPU") :]


def test_phase_prints_its_report_on_the_main_process(capsys):
    tracker = MemoryTracker()
    with tracker.phase("train"):
        assert capsys.readouterr().out == ""
    expected = report("train", tracker.entries["train"], torch.cuda.is_available())
    assert capsys.readouterr().out == expected + "\n"


def test_exception_passes_through_ends_the_thread_and_keeps_the_entry(capsys):
    tracker = MemoryTracker()
    threads = threading.enumerate()
    with pytest.raises(MemoryError, match="planted"):
        with tracker.phase("train"):
            (sampler,) = set(threading.enumerate()) - set(threads)
            assert sampler.daemon
            raise MemoryError("planted")
    assert threading.enumerate() == threads
    assert list(tracker.entries["train"]) == KEYS
    assert "before entering the train" in capsys.readouterr().out
    with tracker.phase("save"):
        pass
    assert list(tracker.entries) == ["train", "save"]


def test_repeated_and_nested_phases_are_refused():
    tracker = MemoryTracker()
    threads = threading.enumerate()
    with tracker.phase("train"):
        with pytest.raises(ValueError, match="'save' cannot begin inside phase 'train'"):
            with tracker.phase("save"):
                pass
    with pytest.raises(ValueError, match="'train' was measured before"):
        with tracker.phase("train"):
            pass
    assert list(tracker.entries) == ["train"]
    assert threading.enumerate() == threads


def test_gather_on_one_process():
    tracker = MemoryTracker()
    for name in ("load", "train"):
        with tracker.phase(name):
            pass
    assert tracker.gather() == {name: [tracker.entries[name]] for name in ("load", "train")}


def test_gather_on_two_processes(tmp_path):
    script = tmp_path / "two_processes.py"
    script.write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", script, tmp_path]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options = {"cwd": ROOT, "env": variables, "capture_output": True, "text": True}
    run = subprocess.run(command, **options, timeout=600)
    assert run.returncode == 0, run.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["memory"] == second["memory"]
    assert list(first["memory"]) == ["load", "train"]
    assert first["memory"]["train"] == [first["own"]["train"], second["own"]["train"]]
    for rank, entry in enumerate(first["memory"]["train"]):
        assert entry["cpu_peak"] - entry["cpu_begin"] == near(100 * (1 + rank))
    reports = [report(name, first["own"][name], False) for name in ("load", "train")]
    assert run.stdout.rstrip("\n") == "\n".join(reports)


@pytest.mark.parametrize("processes", [1, 2, 64])
@pytest.mark.parametrize("gpu", [False, True])
def test_figure_shows_every_phase_of_every_process(processes, gpu):
    memory = example(processes, gpu)
    phases = [memory[name] for name in ("load", "train")]
    figure = draw_memory(memory, limit=3000 * MB if gpu else 0)
    panels = dict(zip(("gpu", "cpu") if gpu else ("cpu",), figure.axes, strict=True))
    for kind, panel in panels.items():
        bars = [bar for container in panel.containers for bar in container]
        peaks = [entry[f"{kind}_peak"] for phase in phases for entry in phase]
        assert [bar.get_height() * MB for bar in bars] == peaks
        centers = [bar.get_x() + bar.get_width() / 2 for bar in bars]
        assert [round(center) for center in centers] == 2 * list(range(processes))
        assert len(set(centers)) == 2 * processes
        lines = [
            [segment[0][1] * MB for segment in lines.get_segments()] for lines in panel.collections
        ]
        assert lines == [
            [entry[f"{kind}_{moment}"] for entry in phase]
            for phase in phases
            for moment in ("begin", "end")
        ]
        assert panel.get_ylim()[0] == 0
    if gpu:
        (line,) = panels["gpu"].lines
        assert set(line.get_ydata()) == {3000}
        assert panels["gpu"].get_ylim()[1] > 3000
    assert not panels["cpu"].lines


def test_plot_writes_a_png_and_leaves_pyplot_alone(tmp_path):
    pyplot = "matplotlib.pyplot" in sys.modules
    figure = draw_memory(json.loads(json.dumps(example(2, gpu=False))))
    figure.savefig(tmp_path / "memory.png", format="png")
    picture = (tmp_path / "memory.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert picture.endswith(b"IEND\xaeB`\x82")
    assert ("matplotlib.pyplot" in sys.modules) == pyplot
