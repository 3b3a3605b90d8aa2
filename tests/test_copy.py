"""A script, copied out with the files of utils/ that it imports, runs where nothing else of the repository is."""

import ast
import shutil

import pytest
from conftest import ROOT, read_metrics
from models import make_data, make_model
from test_style import ROOTS

LESSONS = sorted(script for script in (ROOT / "examples").glob("*.py") if script.stem not in ROOTS)
LAUNCHED = {"causal_lm_lora": "ddp", "causal_lm_full_zero3": "zero3"}
STARTED = [
    "causal_lm_full",
    "causal_lm_lora_fsdp2",
    "causal_lm_qlora_fsdp1",
    "seq2seq_lora_zero3_offload",
]
DECOY = "raise RuntimeError('the wrong utils')\n"


def imported(path):
    """The names of utils that a file imports by name; the package's own `__init__` comes with any of them."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    froms = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0]
    plain = [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
    return sorted({name.split(".")[1] for name in (*froms, *plain) if name.startswith("utils.")})


@pytest.fixture
def copy_out(tmp_path):
    """Return a function that copies a script out and gives its new path, its folder and the environment of its run."""

    def copy(script):
        place, decoy = tmp_path / "place", tmp_path / "decoy"
        (place / "utils").mkdir(parents=True)
        shutil.copy(script, place)
        for name in ("__init__", *imported(script)):
            shutil.copy(ROOT / "utils" / f"{name}.py", place / "utils")
        (decoy / "utils").mkdir(parents=True)
        for name in ("__init__", *imported(script)):
            (decoy / "utils" / f"{name}.py").write_text(DECOY)
        return place / script.name, place, {"PYTHONPATH": str(decoy)}

    return copy


def test_there_are_scripts_and_utils_files_import_none_of_ours():
    assert len(LESSONS) >= 6
    names = {name for script in LESSONS for name in imported(script)}
    assert all(set(imported(script)) == names for script in LESSONS), (
        "then some of them start as all of them do"
    )
    assert names and names <= {"memory", "launch", "checks", "report"}
    assert not any(imported(ROOT / "utils" / f"{name}.py") for name in names)


@pytest.mark.parametrize("name", LAUNCHED)
def test_copied_script_runs(copy_out, launch, tmp_path, name):
    script, place, environment = copy_out(ROOT / "examples" / f"{name}.py")
    config = shutil.copy(ROOT / "configs" / f"{LAUNCHED[name]}.yaml", place)
    make_model(place / "model", "llama")
    make_data(place / "data", train=24, validation=8)
    flags = (
        "--model_name_or_path",
        "model",
        "--dataset_name",
        "data",
        "--output_dir",
        "run",
        "--max_steps",
        2,
    )
    options = {"processes": 2, "cwd": place, "real": LAUNCHED[name] == "zero3", **environment}
    launch(script, config, *flags, "--warmup_ratio", 0, **options)
    assert read_metrics(place / "run")["strategy"] == LAUNCHED[name]


@pytest.mark.parametrize("name", STARTED)
def test_copied_script_starts(copy_out, forks, name):
    copied, place, extra = copy_out(ROOT / "examples" / f"{name}.py")
    done = forks.run(copied, "--help", cwd=place, **extra)
    assert done.returncode == 0, done.stdout
    assert "--model_name_or_path" in done.stdout
