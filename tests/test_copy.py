"""tools/copy_out.py: a copy of a script runs where nothing else of the repository is."""

import ast
import difflib
import functools
import importlib.metadata
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ACCELERATE, ROOT, read_metrics, run_real
from packaging.requirements import Requirement

from tools import copy_out

SCRIPTS = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
LAUNCHED = {"causal_lm_lora": "ddp", "causal_lm_full_zero3": "zero3"}
DECOY = "raise RuntimeError('the wrong utils')\n"


def imports(path):
    """Return the imports of a file as text, `module` or `module.name`, those in functions too."""
    return imports_in(path.read_text())


@functools.cache
def imports_in(text):
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "utils/ has no relative imports"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def installed_with(requirements):
    """Return the packages that are installed with a list of requirements, in lower case."""
    found, queue = set(), [Requirement(line) for line in requirements]
    while queue:
        requirement = queue.pop()
        name = requirement.name.lower().replace("_", "-")
        marker = requirement.marker
        if name in found or (marker and not marker.evaluate({"extra": ""})):
            continue
        try:
            queue += map(Requirement, importlib.metadata.requires(name) or [])
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        found.add(name)
    return found


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """A folder with a copy of every script, each in a folder of its name."""
    folder = tmp_path_factory.mktemp("copies")
    for name in SCRIPTS:
        copy_out.copy(name, folder / name)
    return folder


@pytest.fixture
def decoy(tmp_path):
    """A folder for PYTHONPATH whose package utils holds files of the same names that raise."""
    for path in (ROOT / "utils").rglob("*.py"):
        file = tmp_path / "decoy" / path.relative_to(ROOT)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(DECOY)
    return str(tmp_path / "decoy")


def test_there_are_scripts():
    assert len(SCRIPTS) >= 15
    assert set(LAUNCHED) < set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_copy_holds_what_it_imports_and_no_more(copies, name):
    folder = copies / name
    used, queue = set(), [folder / f"{name}.py"]
    while queue:
        words = [word.split(".") for word in imports(queue.pop())]
        paths = {Path(*word[:n]) for word in words for n in (1, 2, 3) if word[0] == "utils"}
        files = {path.with_suffix(".py") for path in paths} | {
            path / "__init__.py" for path in paths
        }
        new = {file for file in files if (ROOT / file).is_file()} - used
        used |= new
        queue += [folder / file for file in new]
    copied = {path.relative_to(folder) for path in folder.glob("utils/**/*.py")}
    assert copied == used
    for path in copied:
        assert (folder / path).read_bytes() == (ROOT / path).read_bytes()
    others = {f"{name}.py", "README.md", "requirements.txt", "utils", "configs", "assets"}
    assert {path.name for path in folder.iterdir()} <= others
    readme = (folder / "README.md").read_text()
    for path in folder.rglob("*.*"):
        parts = path.relative_to(folder).parts
        listed = "/".join(parts[:2] if parts[0] == "assets" else parts)
        assert path.name == "README.md" or f"`{listed}`: " in readme


@pytest.mark.parametrize("name", SCRIPTS)
def test_packages_of_the_imports_are_required(copies, name):
    folder = copies / name
    required = (folder / "requirements.txt").read_text().splitlines()
    assert set(required) <= set((ROOT / "requirements.txt").read_text().splitlines())
    packages = installed_with(required)
    distributions = importlib.metadata.packages_distributions()
    # an import inside a function of utils/ may be of use under other launch configs only
    needed = [*imports(folder / f"{name}.py")]
    for path in folder.glob("utils/**/*.py"):
        body = ast.parse(path.read_text()).body
        needed += [node.module for node in body if isinstance(node, ast.ImportFrom)]
        needed += [a.name for node in body if isinstance(node, ast.Import) for a in node.names]
    for module in {word.split(".")[0] for word in needed} - {"utils"} - sys.stdlib_module_names:
        assert {one.lower().replace("_", "-") for one in distributions[module]} & packages, module
    config = next(folder.glob("configs/*.yaml"), None)
    kind = yaml.safe_load(config.read_text())["distributed_type"] if config else ""
    text = (folder / f"{name}.py").read_text()
    uses_deepspeed = any(word.split(".")[0] == "deepspeed" for word in needed)
    assert ("deepspeed" in packages) == (kind == "DEEPSPEED" or uses_deepspeed)
    assert ("bitsandbytes" in packages) == ("BitsAndBytesConfig" in text)
    assert "results" not in text or "matplotlib" in packages


@pytest.mark.parametrize("name", SCRIPTS)
def test_copied_text(copies, name):
    folder = copies / name
    text = (folder / f"{name}.py").read_text()
    original = (ROOT / "examples" / f"{name}.py").read_text()
    assert "sys.path" not in text and "parents[1]" not in text
    docstring = ast.get_docstring(ast.parse(text))
    assert "examples/" not in docstring
    assert not re.search("^(Base|Changes):", docstring, re.MULTILINE)
    [run] = re.findall("^Run: +(.*)$", docstring, re.MULTILINE)
    assert f"examples/{name}.py".join(run.split(f"{name}.py")) in original.replace("\\\n", "")
    assert run in (folder / "README.md").read_text()
    diff = list(difflib.unified_diff(original.splitlines(), text.splitlines(), n=0, lineterm=""))
    assert [line for line in diff[2:] if line[0] == "+"] == [
        f"+{re.search('^Run:.*$', text, re.M)[0]}"
    ]
    # Run on one or two lines, Base, Changes, sys.path
    assert len([line for line in diff[2:] if line[0] == "-"]) <= 9
    tree = ast.parse(text)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    aliases = [a for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names]
    assert {(alias.asname or alias.name).split(".")[0] for alias in aliases} <= names


@pytest.mark.parametrize("name", SCRIPTS)
def test_copy_starts(copies, forks, decoy, tmp_path, name):
    script, empty = copies / name / f"{name}.py", tmp_path / "empty"
    empty.mkdir()
    command = [script, "--help"]
    if "class Config" not in script.read_text():  # it takes no flags and would train
        command = ["-c", f"import sys; sys.path[0] = {str(script.parent)!r}; import {name}"]
    done = forks.run(*command, cwd=empty, PYTHONPATH=decoy)
    assert done.returncode == 0, done.stdout
    assert command[0] == "-c" or "--model_name_or_path" in done.stdout
    assert not list(empty.iterdir())


@pytest.mark.parametrize(
    "name", ["causal_lm_lora", pytest.param("causal_lm_full_zero3", marks=pytest.mark.slow)]
)
def test_copy_runs_with_its_own_run_line(forks, environment, tmp_path, name):
    folder = tmp_path / "new" / "place"
    run, _ = copy_out.copy(name, folder)
    accelerate, launch, *words = shlex.split(run)
    assert (accelerate, launch) == ("accelerate", "launch")
    command = [str(word) for word in (*ACCELERATE, *words, "--max_steps", 2)]
    if LAUNCHED[name] == "zero3":  # a fork does not show an import that the copy lacks
        done = run_real(command, environment, cwd=folder, timeout=900)
    else:
        done = forks.run(*command, cwd=folder)
    assert done.returncode == 0, done.stdout
    metrics = read_metrics(folder / "outputs" / name)
    assert metrics["strategy"] == LAUNCHED[name] and len(metrics["losses"]) == 2


def test_another_config(tmp_path):
    files = copy_out.copy("causal_lm_lora", tmp_path / "copy", "zero2_offload")[1]
    assert "configs/zero2_offload.yaml" in files and "configs/ddp.yaml" not in files
    docstring = ast.get_docstring(ast.parse((tmp_path / "copy" / "causal_lm_lora.py").read_text()))
    run = "accelerate launch --config_file configs/zero2_offload.yaml causal_lm_lora.py"
    assert (
        f"Run:     {run}\nNote:    Needs and Expect were measured with configs/ddp.yaml"
        in docstring
    )
    assert "deepspeed==" in (tmp_path / "copy" / "requirements.txt").read_text()
    for config in ("single", "fsdp2_hybrid", "zero3"):  # it names no strategies, so takes them all
        copy_out.copy("chat_sft", tmp_path / config, config)


def test_json_that_the_config_names_comes_along(tmp_path, monkeypatch):
    root = tmp_path / "root"
    for name in ("examples", "utils", "configs"):
        shutil.copytree(ROOT / name, root / name)
    shutil.copy(ROOT / "requirements.txt", root)
    monkeypatch.setattr(copy_out, "ROOT", root)
    path = root / "configs" / "deepspeed" / "zero2.json"
    path.write_text("{}")
    line = "deepspeed_config:\n  deepspeed_config_file: configs/deepspeed/zero2.json\n"
    config = root / "configs" / "zero2.yaml"
    config.write_text(config.read_text().replace("deepspeed_config:\n", line))
    copy_out.copy("causal_lm_lora", tmp_path / "copy", "zero2")
    assert (tmp_path / "copy" / "configs" / "deepspeed" / "zero2.json").read_text() == "{}"
    path.unlink()
    with pytest.raises(SystemExit, match="error: nothing was copied: "):
        copy_out.main(["causal_lm_lora", str(tmp_path / "other"), "--config", "zero2"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "root"]


def test_files_of_utils_bring_those_that_they_import(tmp_path, monkeypatch):
    for name in ("examples", "utils"):
        (tmp_path / name).mkdir()
    (tmp_path / "utils" / "__init__.py").touch()
    (tmp_path / "utils" / "a.py").write_text('"""A."""\n\n\ndef f():\n    from . import b\n')
    (tmp_path / "utils" / "b.py").write_text('"""B."""\n\nfrom .c import d\n')
    (tmp_path / "utils" / "c.py").write_text(
        '"""C."""\n\nimport utils.a as d\n\nfrom . import more\n'
    )
    (tmp_path / "utils" / "more").mkdir()
    (tmp_path / "utils" / "more" / "__init__.py").write_text('"""More."""\n\nfrom .f import g\n')
    (tmp_path / "utils" / "more" / "f.py").write_text(
        '"""F."""\n\nfrom .. import b\nfrom . import g\n'
    )
    for name in ("g", "h"):
        (tmp_path / "utils" / "more" / f"{name}.py").write_text('"""G."""\n')
    (tmp_path / "utils" / "e.py").write_text('"""E."""\n')
    (tmp_path / "requirements.txt").write_text("# pins\ntorch==1\n")
    script = tmp_path / "examples" / "x.py"
    script.write_text('"""X.\n\nRun:  python examples/x.py\n"""\n\nfrom utils import a\n')
    monkeypatch.setattr(copy_out, "ROOT", tmp_path)
    run, _ = copy_out.copy("x", tmp_path / "copy")
    assert run == "python x.py"
    names = sorted(path.name for path in tmp_path.glob("copy/utils/*"))
    assert names == ["__init__.py", "a.py", "b.py", "c.py", "more"]
    names = sorted(path.name for path in tmp_path.glob("copy/utils/more/*"))
    assert names == ["__init__.py", "f.py", "g.py"]
    assert not (tmp_path / "copy" / "configs").exists()
    with pytest.raises(SystemExit, match="error: x.py takes no launch config"):
        copy_out.copy("x", tmp_path / "other", "ddp")


@pytest.mark.parametrize("form", ["{}", "{}.py", "examples/{}.py", f"{ROOT}/examples/{{}}.py"])
def test_forms_of_a_name(tmp_path, form, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy_out.copy(form.format("seq2seq_lora"), "here")
    assert (tmp_path / "here" / "seq2seq_lora.py").is_file()


REFUSALS = {
    "there is no script causal_lm in examples/: give one of": ["causal_lm", "new"],
    "there is no script tests/conftest.py in": ["tests/conftest.py", "new"],
    "full exists and is not an empty folder": ["causal_lm_lora", "full"],
    "file exists and is not an empty folder": ["causal_lm_lora", "full/file"],
    "there is no configs/zero4.yaml": ["causal_lm_lora", "new", "--config", "zero4"],
    "causal_lm_lora.py runs under single, ddp, zero1, zero2, not with configs/zero3_offload.yaml": [
        "causal_lm_lora",
        "new",
        "--config",
        "zero3_offload",
    ],
    "causal_lm_full_zero3.py runs under zero3, not with": [
        "causal_lm_full_zero3",
        "new",
        "--config",
        "ddp",
    ],
    "nothing was copied: ": ["causal_lm_lora", "full/file/below"],
}


@pytest.mark.parametrize("words", REFUSALS)
def test_refusals(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(SystemExit) as ended:
        copy_out.main(REFUSALS[words])
    assert ended.value.code.startswith("error: ") and words in ended.value.code
    assert "\n" not in ended.value.code
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full"]


def test_failure_halfway_leaves_nothing(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError("No space left on device")

    monkeypatch.setattr(copy_out.shutil, "copytree", full)
    with pytest.raises(SystemExit, match="error: nothing was copied: No space left on device"):
        copy_out.main(["causal_lm_lora", str(tmp_path / "new" / "place")])
    assert list(tmp_path.iterdir()) == []


def test_empty_folder_is_filled(tmp_path, capsys):
    (tmp_path / "new").mkdir()
    copy_out.main(["causal_lm_lora", str(tmp_path / "new")])
    printed = capsys.readouterr().out
    assert f"cd {tmp_path / 'new'}\n  accelerate launch --config_file configs/ddp.yaml" in printed
    for path in tmp_path.glob("new/utils/**/*.py"):
        assert f"  {path.relative_to(tmp_path / 'new')}: " in printed
