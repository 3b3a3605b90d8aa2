"""A forked command does the same as one started with python, and leftover processes are found."""

import subprocess
import sys

import pytest
from conftest import read_metrics
from models import make_data, make_model

SHOW = """
import os, sys
print(sys.argv, sys.path[:2], os.getcwd(), os.environ.get("TORCH_EXTENSIONS_DIR"), __name__)
"""
CODES = {"raise ValueError": 1, "import sys; sys.exit(7)": 7}
CODES["import os; os.kill(os.getpid(), 9)"] = -9


@pytest.fixture
def run(forks, tmp_path):
    """Return a function that runs `python ...` in an empty folder: (exit code, output)."""

    def run(*arguments, **options):
        done = forks.run(*arguments, cwd=tmp_path, **options)
        return done.returncode, done.stdout

    return run


@pytest.mark.parametrize("kind", ["-c", "-m", "file"])
def test_arguments_paths_and_variables_are_those_of_python(run, environment, tmp_path, kind):
    (tmp_path / "folder").mkdir()
    (tmp_path / "show.py").write_text(SHOW)
    (tmp_path / "folder" / "show.py").write_text(SHOW)
    command = {"-c": ["-c", SHOW], "-m": ["-m", "show"], "file": ["folder/show.py"]}[kind]
    variables = {"PYTHONPATH": str(tmp_path / "elsewhere"), "TORCH_EXTENSIONS_DIR": "else"}
    code, output = run(*command, "a", "--b", **variables)
    command = [sys.executable, *command, "a", "--b"]
    options = {"cwd": tmp_path, "env": environment | variables, "text": True}
    assert (code, output) == (0, subprocess.check_output(command, **options))


@pytest.mark.parametrize("code", CODES)
def test_exit_codes_are_those_of_python(run, code):
    assert run("-c", code)[0] == CODES[code]


def test_each_command_starts_afresh(run):
    assert run("-c", "import transformers; transformers.changed = 1") == (0, "")
    code = "import sys; m = sys.modules; print(hasattr(m['transformers'], 'changed'), 'utils' in m)"
    assert run("-c", code) == (0, "False False\n")


def test_a_process_that_is_left_behind_is_named_and_killed(run):
    start = "import subprocess; print(subprocess.Popen(['sleep', '4321']).pid)"
    with pytest.raises(RuntimeError, match="left processes behind.*sleep 4321"):
        run("-c", start, patience=0.1)
    assert run("-c", "print(1)") == (0, "1\n")


def test_a_command_that_hangs_is_terminated(run):
    with pytest.raises(subprocess.TimeoutExpired):
        run("-c", "import time; time.sleep(4321)", timeout=0.5)
    assert run("-c", "print(1)") == (0, "1\n")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Flags of a small run of two updates. The path of the output folder must follow them."""
    folder = tmp_path_factory.mktemp("small")
    model = make_model(folder / "llama", "llama")
    data = make_data(folder / "data", train=16, validation=4)
    flags = ("--model_name_or_path", model, "--dataset_name", data, "--max_steps", 2)
    return (*flags, "--warmup_ratio", 0, "--output_dir")


def test_a_forked_launch_trains_as_a_real_one(launch, small, tmp_path):
    """This test also covers a real launch with configs/single.yaml."""
    runs = {}
    for name in ("forked", "real"):
        launch("causal_lm_lora", "single", *small, tmp_path / name, real=name == "real")
        runs[name] = read_metrics(tmp_path / name)
    for key in ("losses", "grad_norms", "scores", "strategy", "engine", "versions"):
        assert runs["forked"][key] == runs["real"][key]
    assert runs["real"]["strategy"] == "single"
