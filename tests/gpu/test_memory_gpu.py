"""The memory tracker on a GPU: a planted peak, and the device's total memory in the figure."""

import pytest
import torch
from accelerate import PartialState

from utils.memory import MemoryTracker
from utils.plots import draw_memory, gpu_total

MB = 2**20

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(autouse=True)
def gpu_state():
    PartialState._reset_state()
    yield PartialState()
    PartialState._reset_state()


def test_planted_peak_is_found_in_its_own_phase():
    tracker = MemoryTracker()
    with tracker.phase("train"):
        planted = torch.empty(200 * MB, dtype=torch.uint8, device="cuda")
        del planted
    with tracker.phase("load"):
        planted = torch.empty(200 * MB, dtype=torch.uint8, device="cuda")
    train, load = tracker.entries["train"], tracker.entries["load"]
    for kind in ("gpu", "gpu_reserved"):
        assert train[f"{kind}_peak"] - train[f"{kind}_begin"] == pytest.approx(200 * MB, rel=0.05)
        assert train[f"{kind}_end"] == train[f"{kind}_begin"]
        assert load[f"{kind}_end"] - load[f"{kind}_begin"] == pytest.approx(200 * MB, rel=0.05)
    del planted


def test_a_run_on_the_cpu_of_a_gpu_machine_reports_no_gpu_memory():
    PartialState._reset_state()
    PartialState(cpu=True)
    planted = torch.empty(200 * MB, dtype=torch.uint8, device="cuda")
    tracker = MemoryTracker()
    with tracker.phase("train"):
        pass
    del planted
    entry = tracker.entries["train"]
    assert not any(value for key, value in entry.items() if key.startswith("gpu"))
    assert gpu_total() == 0


def test_total_of_the_device_is_drawn(tmp_path):
    tracker = MemoryTracker()
    with tracker.phase("train"):
        planted = torch.empty(200 * MB, dtype=torch.uint8, device="cuda")
        del planted
    memory = tracker.gather()
    panel, _ = draw_memory(memory, gpu_total()).axes
    (line,) = panel.lines
    _, total = torch.cuda.mem_get_info()
    assert list(line.get_ydata()) == 2 * [pytest.approx(total / MB, rel=0.05)]
    assert panel.get_ylim()[1] > gpu_total() / MB
    draw_memory(memory, gpu_total()).savefig(tmp_path / "memory.png", format="png")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
