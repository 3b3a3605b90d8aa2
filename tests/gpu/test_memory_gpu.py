"""The memory tracker on a GPU: a planted peak, and the line of the device's total memory."""

import pytest
import torch
from accelerate import (
    PartialState,
)

from utils.memory import (
    MemoryTracker,
    draw_memory,
    gpu_total,
    plot_memory,
)

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


def test_run_on_the_cpu_of_this_machine_has_no_gpu_figures():
    PartialState._reset_state()
    PartialState(cpu=True)
    planted = torch.empty(200 * MB, dtype=torch.uint8, device="cuda")
    tracker = MemoryTracker()
    with tracker.phase("train"):
        pass
    del planted
    assert not any(
        value for key, value in tracker.entries["train"].items() if key.startswith("gpu")
    )
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
    plot_memory(memory, tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
