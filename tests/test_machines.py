"""Several machines: they train as one, a lost one ends the run, and the launch files are right."""

import re
import time

import pytest
from conftest import ACCELERATE, ROOT, read_metrics
from machines import PORT, Forked, Real, two_machines
from single import run_single

SETTINGS = ("--max_steps", 8, "--learning_rate", 1e-2, "--max_grad_norm", 0.2)
DRIVER = ROOT / "tests" / "machine_driver.py"
SCRIPTS = {
    "ddp": "causal_lm_lora",
    "zero3": "causal_lm_lora_zero3_offload",
    "fsdp2": "causal_lm_lora_fsdp2",
}
END = 60  # seconds in which a run ends after a machine is lost
LOST = r"error: machine {} \(host{}, 10\.77\.0\.\d\) is lost: it has not answered for {} s\."
ENDED = r"error: process {} on machine {} \(host{}, 10\.77\.0\.\d\) ended before the run was done"


@pytest.fixture(scope="module")
def machines():
    """Two machines, or a skipped test that says why there are none."""
    try:
        context = two_machines()
        found = context.__enter__()
    except RuntimeError as reason:
        pytest.skip(str(reason))
    yield found
    context.__exit__(None, None, None)


@pytest.fixture
def start(machines, forks, tmp_path):
    """A function that launches a script on both machines, one process on each."""

    def start(config, script, *arguments, **variables):
        for machine in machines:
            machine.connect("up")
        words = [*ACCELERATE[:-2], "--config_file", config_of(config), "--num_processes", 2]
        words += ["--main_process_ip", machines[0].address, "--machine_rank"]
        commands = [(*words, rank, script, *arguments) for rank in (0, 1)]
        return Forked(forks, tmp_path, machines, commands, **variables)

    return start


def config_of(strategy):
    return ROOT / "configs" / "multi_node" / f"{strategy}_2x8.yaml"


@pytest.fixture(scope="module")
def one_process(forks, tmp_path_factory):
    """The metrics of a run in one process, which sees the same rows per update."""
    folder = tmp_path_factory.mktemp("one")
    rows = ("--per_device_train_batch_size", 8)
    words = ("causal_lm_lora", *SETTINGS, *rows, "--output_dir", folder / "out")
    [(code, output)] = run_single(forks, folder, words)
    assert code == 0, output
    return read_metrics(folder / "out")


# A machine more -----------------------------------------------------------------------------------
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "strategy", ["ddp", pytest.param("zero3", marks=SLOW), pytest.param("fsdp2", marks=SLOW)]
)
def test_two_machines_train_as_one_process(start, one_process, tmp_path, strategy):
    script = ROOT / "examples" / f"{SCRIPTS[strategy]}.py"
    rows = ("--per_device_train_batch_size", 4)
    run = start(strategy, script, *SETTINGS, *rows, "--output_dir", tmp_path / "out")
    assert run.wait(300) == [0, 0], run.told()
    metrics = read_metrics(tmp_path / "out")
    assert metrics["num_processes"] == 2
    for name in ("losses", "grad_norms"):
        assert metrics[name] == pytest.approx(one_process[name], rel=1e-3)
    first, second = run.texts()
    # the host's name does not resolve, so gloo itself would take 127.0.0.1
    assert re.search(r"gloo uses t\d+-0 \(10\.77\.0\.1\), which reaches 10\.77\.0\.1", first)
    assert "saved in" in first and "saved in" not in second
    assert "error" not in first + second
