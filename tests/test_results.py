"""Tests of utils/results.py: output folders lose no run, and written models are checked."""

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

from utils import loading, results, run_files, saving


def settings(folder, overwrite=False):
    return SimpleNamespace(output_dir=str(folder), overwrite_output_dir=overwrite)


def test_a_folder_that_appears_during_the_run_is_not_overwritten_and_the_run_is_kept(
    tmp_path, capsys
):
    with pytest.raises(SystemExit), results.new_folder(settings(tmp_path / "run")) as folder:
        (folder / "mine").write_text("of this run")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "mine").write_text("of another")
    [spare] = [path for path in tmp_path.iterdir() if path.name != "run"]
    assert (tmp_path / "run" / "mine").read_text() == "of another"
    assert (spare / "mine").read_text() == "of this run"
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and str(spare) in error


def test_a_run_that_cannot_be_moved_into_place_is_kept(tmp_path, capsys):
    (tmp_path / "run" / "weights").mkdir(parents=True)  # where a file of the run must go
    with (
        pytest.raises(SystemExit),
        results.new_folder(settings(tmp_path / "run", overwrite=True)) as folder,
    ):
        (folder / "weights").write_text("of this run")
    assert (folder / "weights").read_text() == "of this run"
    assert str(folder) in capsys.readouterr().err


def test_a_run_that_raises_leaves_no_folder(tmp_path):
    with pytest.raises(ZeroDivisionError), results.new_folder(settings(tmp_path / "run")) as folder:
        (folder / "half").write_text("")
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []


WRITTEN = [  # tensors of the file, and words of the expected error
    ({"weight": torch.ones(3), "buffer": torch.ones(2)}, None),  # buffers are not counted
    ({"weight": torch.ones(0)}, "holds 0 of 3 elements"),
    ({"weight": torch.tensor([1.0, 2.0, float("nan")])}, "NaN or infinity"),
]


@pytest.mark.parametrize("tensors, words", WRITTEN)
def test_a_written_model_is_read_back(tmp_path, capsys, tensors, words):
    save_file(tensors, tmp_path / "model.safetensors")
    if words is None:
        saving.check_model(tmp_path, 3)
    else:
        with pytest.raises(SystemExit):
            saving.check_model(tmp_path, 3)
        assert words in capsys.readouterr().err


def layout_of(tensors):
    """A stand-in for an `AdapterLayout`: what it knows of an adapter with these tensors."""
    before = {key: saving.fingerprint(tensor) for key, tensor in tensors.items()}
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    return SimpleNamespace(shapes=shapes, before=before)


@pytest.mark.parametrize("rates, is_told", [([1e-3, 1e-3], True), ([0.0, 1e-3], False)])
def test_tensors_that_did_not_change_are_a_warning(tmp_path, capsys, rates, is_told):
    written = {"a.lora_B.weight": torch.ones(2, 3), "b.lora_B.weight": torch.zeros(2, 3)}
    save_file(written, tmp_path / "adapter_model.safetensors")
    saving.check_adapter(tmp_path, layout_of({k: v * 0 for k, v in written.items()}), rates)
    told = "Warning: 1 of 2 trained tensors did not change: b.lora_B.weight"
    assert (told in capsys.readouterr().out) == is_told


@pytest.mark.parametrize(
    "written, words",
    [
        ({}, "lacks a.lora_A.weight"),
        ({"a.lora_A.weight": torch.ones(0)}, "has shape (0,), not (2, 3)"),
        ({"a.lora_A.weight": torch.ones(2, 3) / 0}, "NaN or infinity in a.lora_A.weight"),
    ],
)
def test_a_written_adapter_is_read_back(tmp_path, capsys, written, words):
    save_file(written, tmp_path / "adapter_model.safetensors")
    with pytest.raises(SystemExit):
        saving.check_adapter(tmp_path, layout_of({"a.lora_A.weight": torch.ones(2, 3)}))
    assert words in capsys.readouterr().err


def save_model(folder, tensor):
    save_file({"weight": tensor}, folder / "model.safetensors")


METRICS = {"memory": {}}
FILES = SimpleNamespace(check=lambda folder, rates: saving.check_model(folder, 3))


@pytest.mark.parametrize("error", [OSError("No space left"), ValueError("a font is missing")])
def test_weights_are_kept_if_a_plot_or_a_log_fails(tmp_path, capsys, monkeypatch, error):
    def draw(*args):
        raise error

    monkeypatch.setattr(run_files, "draw_memory", draw)
    run = settings(tmp_path / "run")
    with pytest.raises(SystemExit), results.new_folder(run, METRICS, FILES) as folder:
        save_model(folder, torch.ones(3))
    assert (folder / "model.safetensors").is_file() and not (tmp_path / "run").exists()
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert str(folder) in message and str(error) in message


@pytest.mark.parametrize("fault", ["check", "body"])
def test_weights_are_kept_if_the_check_or_the_body_fails(tmp_path, capsys, fault):
    run = settings(tmp_path / "run")
    error = SystemExit if fault == "check" else ZeroDivisionError
    with pytest.raises(error), results.new_folder(run, METRICS, FILES) as folder:
        save_model(folder, torch.ones(3) / 0 if fault == "check" else torch.ones(3))
        if fault == "body":
            1 / 0  # noqa: B018
    kept = tmp_path / "run.unchecked"
    assert list(tmp_path.iterdir()) == [kept] and (kept / "model.safetensors").is_file()
    assert str(kept) in capsys.readouterr().err


def test_a_score_that_is_not_a_number_does_not_stop_a_finished_run(capsys):
    assert [results.as_number(score) for score in (torch.tensor(0.5), np.float32(0.5))] == [0.5] * 2
    assert math.isnan(results.as_number([0.5, 1.0]))
    assert "a score is [0.5, 1.0], not one number" in capsys.readouterr().out


def test_a_model_that_is_not_of_transformers_does_not_stop_a_finished_run():
    assert loading.base_model(torch.nn.Linear(2, 2)) == {"own_class": "", "num_labels": 2}


def test_metrics_of_a_score_that_is_no_number_are_json(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"task_type": "CAUSAL_LM"}')
    run = {"config": {"model_name_or_path": ".", "output_dir": "o"}, "losses": [1.0]}
    run |= {"scores": {"f1": {"before": 0.5, "after": math.nan}}, "strategy": "ddp"}
    run_files.write_metrics(tmp_path, run | {"num_processes": 2})
    text = (tmp_path / "metrics.json").read_text()
    assert json.loads(text)["scores"] == {"f1": {"before": 0.5, "after": None}}


def test_an_update_is_logged_in_single_numbers():
    accelerator = SimpleNamespace(device=torch.device("cpu"), is_main_process=False)
    progress = object.__new__(results.Progress)
    progress.accelerator, progress.updates, progress.epochs_per_update = accelerator, [], 1.0
    progress.max_steps = 9
    progress.log(loss=torch.tensor(1.5), margin=2, grad_norm=torch.tensor([3.0]))
    last = progress.updates[-1]
    assert (last["loss"], last["margin"], last["grad_norm"]) == (1.5, 2, 3.0)
    for value in (torch.ones(2), "warmup", None):
        with pytest.raises(ValueError, match="margin is .* single numbers"):
            progress.log(loss=torch.tensor(1.5), margin=value)


@pytest.mark.parametrize("name, in_card", [("someone/model", True), (".", False)])
def test_the_card_names_a_base_of_the_hub_and_no_path(tmp_path, name, in_card):
    (tmp_path / "adapter_config.json").write_text('{"task_type": "CAUSAL_LM"}')
    config = {"model_name_or_path": name, "dataset_name": "d", "output_dir": "o"}
    config |= {"label_column": "l", "text_column": "t"}
    run = {"config": config, "scores": {"accuracy": {"before": 0.0, "after": 1.0}}}
    run |= {"strategy": "ddp", "num_processes": 2, "losses": [None, 1.0]}
    run_files.write_metrics(tmp_path, run)
    assert ("base_model: " in (tmp_path / "README.md").read_text()) == in_card
    assert json.loads((tmp_path / "metrics.json").read_text())["losses"] == [None, 1.0]


def test_the_page_of_results_has_a_row_of_every_lesson():
    page = (ROOT / "docs" / "results.md").read_text()
    lessons = [*ROOT.glob("examples/causal_lm*.py"), *ROOT.glob("examples/seq2seq*.py")]
    assert len(lessons) >= 16
    assert [script.stem for script in lessons if f"| {script.stem} |" not in page] == []


GROUPS = """
import sys
import time
import torch
from torch import distributed
from utils.results import end_run

class Accelerator:
    distributed_type = "MULTI_CPU"
    wait_for_everyone = staticmethod(distributed.barrier)
    end_training = staticmethod(distributed.destroy_process_group)

def main(store, number):
    store = distributed.PrefixStore(str(number), store)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
    model(torch.ones(1, 4)).sum().backward()
    end_run(Accelerator)

rank, port = int(sys.argv[1]), int(sys.argv[2])
store = distributed.TCPStore("127.0.0.1", port, 2, rank == 0, wait_for_workers=False)
print(store.port, flush=True)
for number in range(100):
    main(store, number)
store.set(f"ended {rank}", "")
store.wait(["ended 0", "ended 1"])  # process 0 hosts the store and must end last
store.add("left", 1)
while rank == 0 and store.add("left", 0) < 2:
    time.sleep(0.01)
"""


@pytest.mark.slow
def test_the_end_of_a_run_never_hangs():
    """Two processes end 100 process groups. They would hang if end_run kept no references."""

    def start(rank, port):
        command = [sys.executable, "-c", GROUPS, str(rank), str(port)]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    processes = [start(0, 0)]
    try:
        processes.append(start(1, int(processes[0].stdout.readline())))
        assert [process.wait(timeout=600) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
