"""Several machines: they train as one process, and a lost one ends the run with a sentence."""

import re
import shlex
import subprocess
import time

import pytest
from conftest import ACCELERATE, ROOT, read_metrics
from machines import Forked, Real, machines_or_skip
from single import run_single

SETTINGS = ("--max_steps", 8, "--learning_rate", 1e-2, "--max_grad_norm", 0.2)
DRIVER = ROOT / "tests" / "machine_driver.py"
SCRIPTS = {
    "ddp": "causal_lm_lora",
    "zero3": "causal_lm_lora_zero3_offload",
    "fsdp2": "causal_lm_lora_fsdp2",
}
END = 60  # seconds in which a run ends after a machine is lost
LIMIT = 300  # seconds after which a command counts as hanging
LOST = r"error: machine {} \(host{}, 10\.77\.0\.\d\) is lost: it has not answered for {} s\."
ENDED = r"error: process {} on machine {} \(host{}, 10\.77\.0\.\d\) ended before the run was done"


@pytest.fixture(scope="module")
def machines():
    yield from machines_or_skip()


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
@pytest.mark.slow
@pytest.mark.parametrize("strategy", SCRIPTS)
def test_two_machines_train_as_one_process(start, one_process, tmp_path, strategy):
    script = ROOT / "examples" / f"{SCRIPTS[strategy]}.py"
    rows = ("--per_device_train_batch_size", 4)
    run = start(strategy, script, *SETTINGS, *rows, "--output_dir", tmp_path / "out")
    assert run.wait(LIMIT) == [0, 0], run.told()
    metrics = read_metrics(tmp_path / "out")
    assert metrics["num_processes"] == 2
    for name in ("losses", "grad_norms"):
        assert metrics[name] == pytest.approx(one_process[name], rel=1e-3)
    first, second = run.texts()
    assert "saved in" in first and "saved in" not in second
    assert "error" not in first + second


def documented(pattern):
    """Return the words of the only command in docs/multi_node.md that matches."""
    page = (ROOT / "docs" / "multi_node.md").read_text().replace("\\\n", " ")
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if re.match(pattern, line)]
    assert len(lines) == 1, lines
    return shlex.split(lines[0])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [".venv/bin/accelerate", ".venv/bin/torchrun"])
def test_documented_lines(machines, environment, one_process, tmp_path, launcher):
    """The lines of the page, with the address and the numbers of these machines."""
    page = documented(f"{launcher} .*rank[= ]0")
    script = page.index(next(word for word in page if word.startswith("examples/")))
    words = page[:script] if "torchrun" in launcher else [*page[:script], "--num_processes", 2]
    words = [word.replace("10.0.0.1", machines[0].address) for word in map(str, words)]
    words = [re.sub(r"(--nproc_per_node=)\d+", r"\g<1>1", word) for word in words]
    words = [word.replace("zero3_2x8", "ddp_2x8") for word in words]
    rows = ("--per_device_train_batch_size", 4)
    words += ["examples/causal_lm_lora.py", *SETTINGS, *rows, "--output_dir", tmp_path / "out"]
    commands = [words]
    rank = [number for number, word in enumerate(words) if "rank" in str(word)][-1]
    other = list(words)
    if other[rank].endswith("=0"):
        other[rank] = other[rank].replace("=0", "=1")
    else:
        other[rank + 1] = "1"
    for machine in machines:
        machine.connect("up")
    run = Real(environment, tmp_path, machines, [*commands, other], ROOT)
    assert run.wait(LIMIT) == [0, 0], run.told()
    losses = read_metrics(tmp_path / "out")["losses"]
    assert losses == pytest.approx(one_process["losses"], rel=1e-3)


# A machine less -----------------------------------------------------------------------------------
def check_lost(run, seconds, begin):
    """Check that both machines ended in time, each with a sentence about the other."""
    assert run.wait(END) == [1, 1], run.told()
    took = time.monotonic() - begin
    assert took < END
    print(f"both launchers ended {took:.0f} s after the link went down")
    for machine, text in enumerate(run.texts()):
        other = 1 - machine
        assert len(re.findall(LOST.format(other, other, seconds), text)) == 1, run.told()
        assert "saved" not in text


def test_lost_link(start, machines):
    run = start("ddp", DRIVER, "nothing", HEARTBEAT_SECONDS="3")
    run.wait_for("step 5 ")
    begin = time.monotonic()
    machines[1].connect("down")
    check_lost(run, 3, begin)
    # the host's name does not resolve, so gloo itself would take 127.0.0.1
    told = r"gloo uses t\d+-0 \(10\.77\.0\.1\), which reaches 10\.77\.0\.1"
    assert re.search(told, run.texts()[0])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", SCRIPTS)
def test_lost_link_in_the_middle_of_a_training(start, machines, tmp_path, strategy):
    script = ROOT / "examples" / f"{SCRIPTS[strategy]}.py"
    run = start(strategy, script, "--max_steps", 2000, "--output_dir", tmp_path / "out")
    run.wait_for(r" [3-9]/2000")
    begin = time.monotonic()
    machines[1].connect("down")
    check_lost(run, 30, begin)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_is_being_written_is_completed(start, machines):
    run = start("ddp", DRIVER, "saved", HEARTBEAT_SECONDS="3")
    run.wait_for("writing")
    machines[1].connect("down")
    assert run.wait(LIMIT) == [1, 1], run.told()
    first, second = run.texts()
    assert first.index("is lost") < first.index("written")
    assert "is lost" in second


@pytest.mark.slow
@pytest.mark.parametrize("part, machine", [("killed", 1), ("raised", 1), ("failed", 0)])
def test_a_process_that_ends_early_ends_the_others(start, part, machine):
    run = start("ddp", DRIVER, part)
    assert run.wait(LIMIT) == [1, 1], run.told()
    texts = run.texts()
    sentence = ENDED.format(machine, machine, machine)
    assert len(re.findall(sentence, texts[1 - machine])) == 1, run.told()
    assert not re.search(sentence, texts[machine]) and "is lost" not in "".join(texts)


@pytest.mark.slow
def test_a_stopped_process_and_a_short_break_are_no_loss(start, machines):
    run = start("ddp", DRIVER, "nothing", HEARTBEAT_SECONDS="4")
    process = run.wait_for(r"step 5 of process 1, (\d+)", machine=1)[1]
    subprocess.run(["kill", "-STOP", process], check=True)
    time.sleep(10)
    subprocess.run(["kill", "-CONT", process], check=True)
    step = int(re.findall(r"step (\d+)", run.texts()[1])[-1])
    run.wait_for(f"step {step + 20} ", machine=1)
    machines[1].connect("down")
    time.sleep(2)
    machines[1].connect("up")
    run.wait_for(f"step {step + 40} ", machine=1)
    assert "error" not in "".join(run.texts())
    machines[1].connect("down")
    assert run.wait(LIMIT) == [1, 1]


@pytest.mark.slow
def test_the_end_of_some_processes_is_no_loss(start):
    run = start("ddp", DRIVER, "ended")
    assert run.wait(LIMIT) == [0, 0], run.told()
    assert "the last" in run.texts()[0] and "error" not in "".join(run.texts())


@pytest.mark.slow
def test_the_limit_is_checked(start):
    run = start("ddp", DRIVER, "nothing", HEARTBEAT_SECONDS="soon")
    assert run.wait(LIMIT) == [1, 1], run.told()
    assert "".join(run.texts()).count("error: HEARTBEAT_SECONDS is 'soon': give seconds") == 2
