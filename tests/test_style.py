"""The form of the scripts: sizes, sections, and flags that all act and all explain themselves."""

import ast
import dataclasses
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from test_models import load

from tools import lineage, style
from utils.settings import make_parser

SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
ROOTS = {
    "chat_sft"
}  # production scripts, roots of their own: other functions, flags and sizes than the lessons'
PAGES = {"predict"}  # scripts that do not train, and have no sections
NAMES = [script.stem for script in SCRIPTS if script.stem not in ROOTS | PAGES]
FLAGS = """model_name_or_path
dtype attn_implementation dataset_name text_column label_column prompt_template max_length
per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps
learning_rate lr_scheduler_type
warmup_ratio weight_decay max_grad_norm num_train_epochs max_steps eval_strategy
gradient_checkpointing tf32
seed output_dir overwrite_output_dir hub_model_id""".split()
LORA_FLAGS = ["lora_r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save"]
CHECKPOINTING_FLAGS = ["gradient_checkpointing_every_n_layers", "gradient_checkpointing_offload"]
RESUME_FLAGS = ["deterministic", "save_steps", "checkpoint_dir", "resume_from_checkpoint"]


def text(name):
    return (ROOT / "examples" / f"{name}.py").read_text()


def fields(name):
    return {field.name: field for field in dataclasses.fields(load(name).Config)}


def flags(name):
    """The flags of a script -> type and help text."""
    parser = make_parser(load(name).Config)
    actions = {one.dest: one for one in parser._actions if f"--{one.dest}" in one.option_strings}
    return {flag: (field.type, actions[flag].help) for flag, field in fields(name).items()}


def read_from_config(source):
    """The fields that a file reads as `config.NAME`, `self.config.NAME` or `config["NAME"]`."""
    read = set()
    for node in ast.walk(ast.parse(source)):
        value = node.value if isinstance(node, ast.Attribute | ast.Subscript) else None
        if value is not None and ast.unparse(value) in ("config", "self.config"):
            read.add(
                node.attr if isinstance(node, ast.Attribute) else getattr(node.slice, "value", None)
            )
    return read


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_scripts():
    assert len(NAMES) >= 6
    assert len(SCRIPTS) == len(NAMES) + len(ROOTS) + len(PAGES)


# What a reader can rely on: each file of the repository is held to this table, without exceptions.
LIMITS = {
    "columns of a line of Python": 100,
    "lines of a file in utils/ or tools/": 450,
    "lines of a lesson": 385,
    "names of ours that a lesson imports": 12,
    "files of ours that a lesson imports": 5,
    "lines of code in those files": 1000,
    "functions before main of a lesson": 6,
    "lines of chat_sft without its Settings": 480,
    "lines of main in chat_sft": 120,
    "lines of another function in chat_sft": 60,
    "lines of predict": 350,
    "lines of a function in predict": 60,
    "lines of README.md": 150,
    # of every script: columns of docs/style.md, with the medians of the peers there
    "Mean code line": 43.5,
    "Over 100": 18,
    "Imported names": 16,
    "Names before the loop": 56,
    "Longest function": 159,
}
PYTHON = sorted(
    file
    for folder in ("examples", "utils", "tools", "tests", "benchmarks", "assets")
    for file in (ROOT / folder).rglob("*.py")
)


def measure(what, path, value):
    """Fail where a file is beyond its limit."""
    assert value <= LIMITS[what], f"{path.relative_to(ROOT)}: {value} {what}, limit {LIMITS[what]}"


def module(path):
    """The name by which a file of utils/ is imported from there, such as chat.data."""
    return ".".join(path.relative_to(ROOT / "utils").with_suffix("").parts)


def imported(path):
    """The files of utils/ that a file imports -> the names it takes from each."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text()))]
    found = {}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("utils."):
            names, file = [name.name for name in node.names], node.module.removeprefix("utils.")
            if (ROOT / "utils" / file).is_dir():
                found |= {f"{file}.{name}": [] for name in names}
            else:
                found.setdefault(file, []).extend(names)
        if isinstance(node, ast.ImportFrom) and node.module == "utils":
            for file in (name.name for name in node.names):
                used = [one for one in nodes if isinstance(one, ast.Attribute)]
                names = [one.attr for one in used if getattr(one.value, "id", None) == file]
                found.setdefault(file, []).extend(names)
    return found


def code_lines(path):
    """The number of lines that are not blank, no comment and no docstring."""
    source = path.read_text()
    skipped = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str):
            skipped |= set(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(source.splitlines(), start=1)
    return sum(
        bool(line.strip()) and not line.lstrip().startswith("#") and number not in skipped
        for number, line in lines
    )


def span(node):
    return node.end_lineno - node.lineno + 1


def test_layout():
    assert len(PYTHON) > 60
    for path in PYTHON:
        measure("columns of a line of Python", path, max(map(len, path.read_text().split("\n"))))
    for path in [path for path in PYTHON if path.parts[-2] != "tests"]:
        if {"utils", "tools"} & set(path.relative_to(ROOT).parts):
            lines = len(path.read_text().splitlines())
            measure("lines of a file in utils/ or tools/", path, lines)
    readme = ROOT / "README.md"
    measure("lines of README.md", readme, len(readme.read_text().splitlines()))


def test_utils_import_each_other_in_one_direction():
    paths = [path for path in (ROOT / "utils").rglob("*.py") if path.stem != "__init__"]
    files = {module(path): set(imported(path)) for path in paths}
    while files:
        free = [name for name, needs in files.items() if not needs & set(files)]
        assert free, f"files of utils/ import each other in a circle: {sorted(files)}"
        files = {name: needs for name, needs in files.items() if name not in free}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_as_readable_as_the_peers(path):
    measured = {column: value for column, value in style.measure(path).items() if column in LIMITS}
    assert len(measured) == 5
    for column, value in measured.items():
        measure(column, path, value or 0)  # None: a script without a training loop


@pytest.mark.parametrize("name", NAMES)
def test_size_of_a_lesson(name):
    path = ROOT / "examples" / f"{name}.py"
    measure("lines of a lesson", path, len(text(name).splitlines()))
    files = imported(path)
    measure("files of ours that a lesson imports", path, len(files))
    names = set().union(*files.values())
    measure("names of ours that a lesson imports", path, len(names))
    behind = sum(code_lines(ROOT / "utils" / f"{file}.py") for file in files)
    measure("lines of code in those files", path, behind)


@pytest.mark.parametrize("name", [*NAMES, *ROOTS])
def test_marks_under_the_banners(name):
    lines = text(name).splitlines()
    for banner in lineage.BANNERS:
        at = lines.index(banner)
        mine = banner.lstrip("# ")[0] in "1234"
        mark = "# yours to change" if mine else "# leave, unless you know why"
        assert lines[at + 1].strip() == mark, banner


@pytest.mark.parametrize("name", NAMES)
def test_functions_and_imports(name):
    tree = ast.parse(text(name))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    wanted = ["build_dataloaders", "build_model", "compute_loss", "count_targets", "evaluate"]
    assert [node.name for node in functions] == [*wanted, "main", "gather_weights"]
    path = ROOT / "examples" / f"{name}.py"
    measure("functions before main of a lesson", path, len(functions) - 2)
    assert all(len(node.args.args) <= 5 and not node.args.kwonlyargs for node in functions)
    assert [node.name for node in tree.body if isinstance(node, ast.ClassDef)] == ["Config"]
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom | ast.Import)]
    names = {name.name for node in nodes for name in node.names}
    assert not any("Trainer" in name for name in names)
    assert "Trainer" not in text(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_knob_is_read_where_it_acts(name):
    parts = ("data", "results", "run_files", "launch", "memory", "traffic")
    sources = [text(name), *((ROOT / "utils" / f"{part}.py").read_text() for part in parts)]
    acting = set().union(*map(read_from_config, sources))
    if "data.load_data(config.dataset_name, " not in text(name):
        acting.discard("dataset_name")
    assert set(fields(name)) - acting == set()


SEAM = ("errors", "launch", "settings", "model_files", "data", "memory", "engine", "results")
SEAM += ("plots", "generation", "loading", "run_files", "saving", "rows", "environment", "folders")
SEAM += ("launch_checks", "deepspeed_checks", "activations", "traffic")
TASKS = ("text_column", "label_column", "prompt", "accuracy", "perplexity_of", "rouge")


@pytest.mark.parametrize("name", SEAM)
def test_the_seam(name):
    """Files that lessons import know no data column, prompt or metric, and ask for no field."""
    source = (ROOT / "utils" / f"{name}.py").read_text()
    assert "hasattr(config" not in source and "getattr(config" not in source
    strings = [
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    names = [node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
    assert [task for task in TASKS if task in names or task in strings] == []


@pytest.mark.parametrize("name", NAMES)
def test_flags_and_help(name):
    sharded = ["layerwise_generation"] if any(part in name for part in ("zero3", "fsdp")) else []
    sharded += ["bnb_4bit_quant_storage", "optim"] if "qlora" in name else []
    sharded += CHECKPOINTING_FLAGS if name == "causal_lm_full_zero3" else []
    sharded += ["comm_hook", "power_sgd_rank"] if name.endswith("_compressed") else []
    sharded += RESUME_FLAGS if name.endswith("_resume") else []
    own = {*FLAGS, *(LORA_FLAGS if "lora" in name else []), *sharded}
    own -= {"lr_scheduler_type"} if name.endswith("_config") else set()  # DeepSpeed's config has it
    assert set(fields(name)) == own
    assert "--no_" not in assert_help_explains_every_flag(name)


def assert_help_explains_every_flag(name):
    """Return the page of --help, which holds the text and the default of each field of Config."""
    page = make_parser(load(name).Config).format_help()
    entries = dict(re.findall(r"^  (--\w+)(.*?)(?=^  -|\Z)", page, re.MULTILINE | re.DOTALL))
    for flag, (_, told) in flags(name).items():
        assert told != flag.replace("_", " "), f"{flag} has no help text"
        entry = " ".join(entries[f"--{flag}"].split())
        assert " ".join(told.split()) in entry
        assert "(default:" in entry
    return page


def test_flags_of_one_name_are_alike():
    first = {}
    for name in NAMES:
        for flag, both in flags(name).items():
            kept = first.setdefault(flag, both)
            own = {
                "seq2seq": ("prompt_template", "max_length"),
                "causal": ("dtype",) if "qlora" in name else (),
            }
            if flag not in own[name.split("_")[0]]:
                assert both == kept, f"{name} {flag}"


@pytest.mark.parametrize("name", NAMES)
def test_run_line(name):
    [command] = re.findall(r"^Run: +(.*)$", ast.get_docstring(ast.parse(text(name))), re.MULTILINE)
    form = re.fullmatch(
        r"accelerate launch --config_file (configs/(\w+)\.yaml) (examples/\w+\.py)", command
    )
    assert form and form[3] == f"examples/{name}.py"
    assert (ROOT / form[1]).is_file()
    [strategies] = re.findall(r"\((\"(?:single|zero\d|fsdp)[^)]*)\)", text(name))
    assert form[2].split("_")[0] in ast.literal_eval(f"({strategies})")
    for config in ("zero3_offload", "zero3"):
        if name.endswith(f"_{config}") and "qlora" not in name:
            assert form[2] == config


# The production script ----------------------------------------------------------------------------
@pytest.mark.parametrize("name", ROOTS)
def test_form_of_a_production_script(name):
    script = lineage.parse(ROOT / "examples" / f"{name}.py")
    assert script.problems == [] and script.is_root
    assert list(script.sections) == [lineage.HEAD, *lineage.SECTIONS]
    [command] = re.findall(r"^Run: +(.*)$", ast.get_docstring(ast.parse(text(name))), re.MULTILINE)
    form = re.match(
        r"accelerate launch --config_file (configs/\w+\.yaml) (examples/\w+\.py)( --|$)", command
    )
    assert form and form[2] == f"examples/{name}.py" and (ROOT / form[1]).is_file()


def test_size_of_chat_sft():
    path = ROOT / "examples/chat_sft.py"
    settings = lineage.parse(path).sections["1. Settings"]
    lines = len(text("chat_sft").splitlines()) - len(settings.splitlines())
    measure("lines of chat_sft without its Settings", path, lines)
    for node in ast.walk(ast.parse(text("chat_sft"))):
        if isinstance(node, ast.FunctionDef):
            kind = "main" if node.name == "main" else "another function"
            measure(f"lines of {kind} in chat_sft", path, span(node))


@pytest.mark.parametrize("name", PAGES)
def test_form_of_a_script_without_sections(name):
    script = lineage.parse(ROOT / "examples" / f"{name}.py")
    assert script.problems == [] and script.is_root and not script.sections
    measure(f"lines of {name}", ROOT / "examples" / script.name, len(text(name).splitlines()))
    for node in ast.walk(ast.parse(text(name))):
        if isinstance(node, ast.FunctionDef):
            path = ROOT / "examples" / script.name
            measure(f"lines of a function in {name}", path, span(node))


@pytest.mark.parametrize("name", [*ROOTS, *PAGES])
def test_no_trainer_in_a_production_script(name):
    nodes = list(ast.walk(ast.parse(text(name))))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    names |= {node.name for node in nodes if isinstance(node, ast.alias | ast.ClassDef)}
    assert names and not any("Trainer" in one for one in names)


@pytest.mark.parametrize("name", [*ROOTS, *PAGES])
def test_every_knob_of_a_production_script_is_read_where_it_acts(name):
    # only checking a value does not count as reading it
    checks = ("settings", "model_files")
    files = [file for file in (ROOT / "utils").rglob("*.py") if module(file) not in checks]
    sources = [text(name), *(file.read_text() for file in files)]
    assert set(fields(name)) - set().union(*map(read_from_config, sources)) == set()


@pytest.mark.parametrize("name", [*ROOTS, *PAGES])
def test_help_of_a_production_script_explains_every_flag(name):
    assert_help_explains_every_flag(name)
