"""A failing run ends soon, with an exit code other than 0, and leaves no process and no output."""

import os
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import read_metrics
from fork_server import WHOLE_EXIT
from models import make_data, make_model
from processes import plant, running

LIMIT = 300  # seconds within which a launch must end after one of its processes has failed
# a line of the training loop; faults are planted before it
SECOND_UPDATE = "            progress.log("
OFFLOAD = "causal_lm_lora_zero3_offload"


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Flags of a small run of two updates. The path of the output folder must follow them."""
    folder = tmp_path_factory.mktemp("failures")
    model = make_model(folder / "model", "llama")
    data = make_data(folder / "data", train=32, validation=4)
    return ["--model_name_or_path", model, "--dataset_name", data, "--max_steps", 2, "--output_dir"]


@pytest.fixture
def output_dir(tmp_path):
    """An output folder in an otherwise empty folder.

    After the test, the fixture checks that no process of a real launch is left. The fork server
    does so for forked launches.
    """
    (tmp_path / "outputs").mkdir()
    yield tmp_path / "outputs" / "new"
    assert running(tmp_path) == {}


def left_in(folder):
    """Return the files of a folder, but for the lock of a process that was killed."""
    return [file for file in folder.iterdir() if file.name != ".new.lock"]


def in_update(number, process, statement):
    """Return a replacement for `plant`: some processes run a statement in an update.

    Args:
        number: the update, counted from 1.
        process: tuple of the ranks of the processes.
        statement: a line of Python.
    """
    condition = f"accelerator.process_index in {process} and len(progress.updates) == {number - 1}"
    planted = f"            if {condition}:\n                {statement}\n"
    return SECOND_UPDATE, planted + SECOND_UPDATE


RAISE = "raise RuntimeError('planted')"
KILL = "__import__('os').kill(__import__('os').getpid(), 9)"


def launched_until(pool, launch, copy, config, flags, started):
    """Start a launch in the background and return its future when the planted line has run.

    Args:
        started: the file that the planted line creates.
    """
    options = {"processes": 2, "code": None, "real": config != "ddp"}
    launched = pool.submit(launch, copy, config, *flags, **options)
    while not started.exists() and not launched.done():
        time.sleep(0.1)
    return launched


@pytest.mark.parametrize(
    "script, config, fault",
    [
        ("causal_lm_lora", "ddp", RAISE),
        ("causal_lm_lora", "ddp", KILL),
        pytest.param(OFFLOAD, "zero3", KILL, marks=pytest.mark.slow),
        pytest.param(OFFLOAD, "zero3", RAISE, marks=pytest.mark.slow),
    ],
)
def test_one_process_that_fails_ends_the_launch(
    launch, arguments, tmp_path, output_dir, script, config, fault
):
    started = tmp_path / "started"
    copy = plant(tmp_path, script, in_update(2, (1,), f"Path({str(started)!r}).touch(); {fault}"))
    with ThreadPoolExecutor() as pool:
        launched = launched_until(pool, launch, copy, config, (*arguments, output_dir), started)
        done = launched.result(timeout=LIMIT)
    assert done.returncode != 0
    assert "planted" in done.stdout or "Signal 9 (SIGKILL)" in done.stdout
    assert left_in(output_dir.parent) == []


def test_ctrl_c_ends_the_launch(launch, arguments, tmp_path, output_dir):
    started = tmp_path / "started"
    copy = plant(tmp_path, OFFLOAD, in_update(2, (0, 1), f"Path({str(started)!r}).touch()"))
    with ThreadPoolExecutor() as pool:
        flags = (*arguments, output_dir, "--max_steps", 10**6)
        launched = launched_until(pool, launch, copy, "zero3", flags, started)
        for process, command in running(copy).items():
            # Ctrl+C reaches only the launcher: its processes are in other sessions
            if "accelerate_cli" in command:
                os.kill(process, signal.SIGINT)
        done = launched.result(timeout=LIMIT)
    assert done.returncode != 0
    assert left_in(output_dir.parent) == []


GATHER = "    with GatheredParameters(list(trainable.values())):"
WEIGHTS = "    weights = gather_weights(accelerator, model)\n"


def test_a_save_without_gathering_ends_before_the_training(launch, arguments, tmp_path, output_dir):
    copy = plant(tmp_path, OFFLOAD, (GATHER, "    if True:"))
    done = launch(copy, "zero3", *arguments, output_dir, processes=2, code=None)
    assert done.returncode != 0
    (line,) = re.findall("^error: .*", done.stdout, re.MULTILINE)
    assert "lora_A" in line and "(0,)" in line and "gather" in line
    assert "epoch 1" not in done.stdout
    assert left_in(output_dir.parent) == []


def test_a_save_that_fails_only_at_the_end_keeps_the_files(launch, arguments, tmp_path, output_dir):
    # gathers for the trial, and not at the end
    once = "    gathered = [] if hasattr(gather_weights, 'tried') else list(trainable.values())\n"
    once += "    gather_weights.tried = True\n    with GatheredParameters(gathered):"
    copy = plant(tmp_path, OFFLOAD, (GATHER, once))
    done = launch(copy, "zero3", *arguments, output_dir, processes=2, code=None)
    assert done.returncode != 0
    (line,) = re.findall("^error: .*", done.stdout, re.MULTILINE)
    assert "lora_A" in line and "(0,)" in line and "gather" in line
    kept = output_dir.with_name(f"{output_dir.name}.unchecked")  # no work is thrown away
    assert left_in(output_dir.parent) == [kept] and str(kept) in done.stdout
    assert {"adapter_model.safetensors", "log.jsonl"} < {file.name for file in kept.iterdir()}


@pytest.mark.parametrize(
    "place, words",
    [
        ("    files.try_writing(", "a trial before the training could not save"),
        (WEIGHTS, "nothing was saved in"),
    ],
    ids=["from the start", "at the end"],
)
def test_a_save_that_the_system_refuses_leaves_nothing(
    launch, arguments, tmp_path, output_dir, place, words
):
    # no file may grow beyond 10 kB: for the weights, this is like a full disk
    limit = "    import resource\n    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
    copy = plant(tmp_path, "causal_lm_lora", (place, limit + place))
    done = launch(copy, "ddp", *arguments, output_dir, processes=2, code=None)
    assert done.returncode != 0
    (line,) = re.findall("^error: .*", done.stdout, re.MULTILINE)
    assert words in line and "File too large" in line
    assert left_in(output_dir.parent) == []


ABORTS = ("terminate called", "Aborted", "SIGABRT", "Segmentation fault")


@pytest.fixture(scope="module")
def offloaded(launch, arguments, tmp_path_factory):
    """Three successive runs of two updates under ZeRO-3 with offload: (output, metrics) of each.

    They are forked, and skip most of the interpreter's end, where aborts happen:
    test_twenty_runs_do_not_abort does not, and test_runs.py looks for aborts in a real launch.
    """
    folder = tmp_path_factory.mktemp("offloaded")
    runs = []
    for number in range(3):
        flags = (*arguments, folder / str(number))
        runs.append(launch(OFFLOAD, "zero3_offload", *flags, processes=2))
    return [(run.stdout, read_metrics(folder / str(number))) for number, run in enumerate(runs)]


def test_repeated_runs_do_not_abort_and_have_equal_losses(offloaded):
    for output, metrics in offloaded:
        assert [word for word in ABORTS if word in output] == []
        assert metrics["engine"]["optimizer"] == "DeepSpeedCPUAdam"
        assert metrics["losses"] == offloaded[0][1]["losses"]


def aborts(launch, script, *flags, real=False):
    """Run the script, with the end of its interpreters, and return the signs of an abort."""
    more = {"processes": 2, "code": None, "real": real, WHOLE_EXIT: "1"}
    done = launch(script, "zero3_offload", *flags, **more)
    found = [word for word in ABORTS if word in done.stdout]
    assert bool(done.returncode) == bool(found), done.stdout
    return found


@pytest.mark.slow
def test_twenty_runs_do_not_abort(launch, arguments, tmp_path):
    for number in range(20):
        # a forked process has the same end, but its libraries were imported by another one
        is_real = number < 5
        assert aborts(launch, OFFLOAD, *arguments, tmp_path / str(number), real=is_real) == []


@pytest.mark.slow
def test_an_abort_at_the_end_of_the_interpreter_is_seen(launch, arguments, tmp_path):
    last = "class Last:\n    def __del__(self, end=__import__('os').abort):\n        end()\n"
    last += "sys.modules['last'] = Last()"  # Python clears it last
    copy = plant(tmp_path, OFFLOAD, ("\nimport sys\n", f"\nimport sys\n{last}\n"))
    assert aborts(launch, copy, *arguments, tmp_path / "run")


def test_without_a_compiler_torch_adamw_gives_the_same_losses(
    launch, environment, offloaded, arguments, tmp_path, output_dir
):
    # a PATH with all programs except compilers
    programs = tmp_path / "bin"
    programs.mkdir()
    for folder in reversed(environment["PATH"].split(os.pathsep)):
        for program in os.scandir(folder) if os.path.isdir(folder) else ():
            if not re.search(r"(\+\+|gcc|clang|\bcc)(-[\d.]+)?$", program.name):
                (programs / program.name).unlink(missing_ok=True)
                (programs / program.name).symlink_to(program.path)
    for name in ("c++", "g++", "cc", "gcc", "clang"):
        assert not shutil.which(name, path=str(programs))
    bare = {"PATH": str(programs), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    bare["CXX"] = "c++"  # torch's default
    done = launch(OFFLOAD, "zero3_offload", *arguments, output_dir, processes=2, **bare)
    (line,) = [line for line in done.stdout.splitlines() if "DeepSpeedCPUAdam" in line]
    assert "cannot be built" in line and "install" in line and "g++" in line and "AdamW" in line
    metrics = read_metrics(output_dir)
    assert metrics["engine"]["optimizer"] == "AdamW"
    assert metrics["losses"] == pytest.approx(offloaded[0][1]["losses"], rel=1e-5)
