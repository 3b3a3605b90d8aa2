"""What chat_sft logs while it trains: when something is due, the lines of log.jsonl, the means."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from utils import results
from utils.chat import run_log
from utils.results import Progress
from utils.chat.run_log import RunLog, is_due


@pytest.fixture
def accelerator():
    """What Progress and RunLog use of an Accelerator, on the main process of two."""
    logged = []
    return SimpleNamespace(
        is_main_process=True,
        num_processes=2,
        device=torch.device("cpu"),
        log=lambda values, step: logged.append((step, values)),
        logged=logged,
    )


@pytest.fixture
def make_progress(accelerator, monkeypatch):
    """make_progress(max_steps, num_rows) -> a Progress of updates of 8 rows."""
    monkeypatch.setattr(results, "check_sharding", lambda *_: None)
    config = SimpleNamespace(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    return lambda max_steps, num_rows: Progress(accelerator, None, config, max_steps, num_rows)


def log_update(progress, loss=1.0, labels=10):
    counts = {"target_tokens": labels, "input_tokens": 2 * labels}
    progress.log(loss=torch.tensor(loss).double(), learning_rate=0.1, grad_norm=2.0, **counts)


@pytest.mark.parametrize("rows", [8, 20, 100, 104, math.inf])
def test_what_is_due(make_progress, rows):
    """After the update in which an epoch ends, after every so many updates, and after the last."""
    progress, found = make_progress(38, rows), {"epoch": [], "steps": [], "no": []}
    for step in range(1, 39):
        log_update(progress)
        for strategy, steps in found.items():
            if is_due(strategy, 5, progress):
                steps.append(step)
    per_epoch = rows / 8
    ends = [n for n in range(1, 39) if math.floor(n / per_epoch) > math.floor((n - 1) / per_epoch)]
    assert found["epoch"] == sorted({*ends, 38})
    assert found["steps"] == [5, 10, 15, 20, 25, 30, 35, 38] and found["no"] == []


def epoch_lines(capsys):
    lines = capsys.readouterr().out.splitlines()
    return [line for line in lines if "mean loss" in line]


def test_an_epoch_has_the_mean_of_the_updates_that_begin_in_it(make_progress, capsys):
    progress = make_progress(7, 20)  # 2.5 updates an epoch
    for loss, labels in ((4, 10), (2, 30), (3, 10), (1, 10), (2, 10), (5, 10), (6, 10)):
        log_update(progress, loss, labels)
    assert epoch_lines(capsys) == [
        f"epoch 1: mean loss {130 / 50:.4f}, perplexity exp(loss) {math.exp(130 / 50):.4g}",
        f"epoch 2: mean loss 1.5000, perplexity exp(loss) {math.exp(1.5):.4g}",
        f"epoch 3: mean loss 5.5000, perplexity exp(loss) {math.exp(5.5):.4g}",
    ]


def test_of_a_stream_all_updates_have_a_mean(make_progress, capsys):
    progress = make_progress(2, math.inf)
    log_update(progress, 1.0)
    log_update(progress, 3.0)
    assert epoch_lines(capsys) == [
        f"all updates: mean loss 2.0000, perplexity exp(loss) {math.exp(2):.4g}"
    ]


@pytest.fixture
def make_log(accelerator, tmp_path):
    config = SimpleNamespace(output_dir=str(tmp_path / "run"), report_to="none")
    return lambda progress: RunLog(accelerator, config, progress, (3, 5))


def lines_of(log):
    return [json.loads(line) for line in log.path.read_text().splitlines()]


def test_a_line_has_the_means_since_the_line_before(make_progress, make_log, accelerator):
    log = make_log(make_progress(6, 100))
    log.write_scores({"perplexity": 9.0})
    for loss, labels in ((4.0, 10), (2.0, 30)):
        log_update(log.progress, loss, labels)
        log.add_seconds(0.5)
    log.write_updates()
    log_update(log.progress, 7.0)
    log.add_seconds(2.0)
    log.write_updates()
    log.write_scores({"perplexity": 3.0})
    before, first, second, after = lines_of(log)
    assert before == {"step": 0, "perplexity": 9.0} and after == {"step": 3, "perplexity": 3.0}
    assert first["step"] == 2 and first["loss"] == 2.5 and first["epoch"] == pytest.approx(0.16)
    assert first["tokens_per_second"] == 80 and first["seconds_left"] == 2.0
    assert second["step"] == 3 and second["loss"] == 7.0 and second["seconds_left"] == 6.0
    assert log.seconds == 3.0 and log.scores() == [{"perplexity": 9.0}, {"perplexity": 3.0}]
    assert [step for step, _ in accelerator.logged] == [0, 2, 3, 3]


def test_lines_of_updates_that_are_made_again_are_removed(make_progress, make_log, tmp_path):
    (tmp_path / "run").mkdir()
    lines = [json.dumps({"step": step}) + "\n" for step in (0, 1, 2, 3)]
    (tmp_path / "run/log.jsonl").write_text("".join(lines) + '{"step": 2')  # killed while writing
    progress = make_progress(6, 100)
    log_update(progress)
    log_update(progress)
    log = make_log(progress)
    assert [line["step"] for line in lines_of(log)] == [0, 1, 2]
    assert lines_of(make_log(make_progress(6, 100))) == []  # a new run


def test_no_update_is_missing_in_the_lines_of_a_resumed_run(make_progress, make_log):
    """The interrupted run wrote a line after update 2, and stopped after update 3."""
    progress = make_progress(6, 100)
    log = make_log(progress)
    for loss in (1.0, 3.0):
        log_update(progress, loss)
        log.add_seconds(0.5)
    log.write_updates()
    log_update(progress, 4.0, labels=10)
    log.write_scores({"perplexity": 3.0})
    resumed = make_log(progress)
    log_update(progress, 8.0, labels=30)
    resumed.add_seconds(2.0)
    resumed.write_updates()
    first, _, last = lines_of(resumed)
    assert (first["step"], first["loss"]) == (2, 2.0)
    assert (last["step"], last["loss"]) == (4, (4 * 10 + 8 * 30) / 40)
    # only of the updates whose time is known
    assert last["tokens_per_second"] == 60 / 2 and last["seconds_left"] == 4.0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("loss", [1.0, 0.0, math.nan, math.inf])
@pytest.mark.parametrize("grad_norm", [1.0, math.nan])
def test_a_bad_update_ends_the_run(
    make_progress, make_log, monkeypatch, capsys, precision, loss, grad_norm
):
    monkeypatch.setattr(run_log, "launched_precision", lambda: precision)
    log = make_log(make_progress(6, 100))
    counts = {"target_tokens": 10, "input_tokens": 20}
    log.progress.log(
        loss=torch.tensor(loss).double(), learning_rate=0.1, grad_norm=grad_norm, **counts
    )
    if loss in (0.0, 1.0) and (grad_norm == 1.0 or precision == "fp16"):
        log.check_last_update("run/checkpoint-1")
        assert ("is exactly 0" in capsys.readouterr().out) == (loss == 0.0)
        return
    with pytest.raises(SystemExit):
        log.check_last_update("run/checkpoint-1")
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: the loss of update 1 is {loss}, and its gradient norm is ")
    assert error.endswith("the last good checkpoint is run/checkpoint-1")
