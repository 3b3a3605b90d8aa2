"""The form of the scripts: sizes, sections, and flags that all act and all explain themselves."""

import ast
import dataclasses
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from test_models import load

from tools import lineage

SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
ROOTS = {
    "chat_sft"
}  # production scripts, roots of their own: other functions, flags and sizes than the lessons'
NAMES = [script.stem for script in SCRIPTS if script.stem not in ROOTS]
FLAGS = """model_name_or_path
dtype attn_implementation dataset_name text_column label_column prompt_template max_length
per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps learning_rate lr_scheduler_type
warmup_ratio weight_decay max_grad_norm num_train_epochs max_steps gradient_checkpointing tf32
seed output_dir overwrite_output_dir hub_model_id""".split()
LORA_FLAGS = ["lora_r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save"]
RESUME_FLAGS = ["deterministic", "save_steps", "checkpoint_dir", "resume_from_checkpoint"]


def text(name):
    return (ROOT / "examples" / f"{name}.py").read_text()


def fields(name):
    return {field.name: field for field in dataclasses.fields(load(name).Config)}


def read_from_config(source):
    """The fields that a file reads as `config.NAME`, or `config["NAME"]`."""
    read = set()
    for node in ast.walk(ast.parse(source)):
        value = node.value if isinstance(node, ast.Attribute | ast.Subscript) else None
        if isinstance(value, ast.Name) and value.id == "config":
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
    assert len(SCRIPTS) == len(NAMES) + len(ROOTS)


@pytest.mark.parametrize("name", NAMES)
def test_size(name):
    assert 160 <= len(text(name).splitlines()) <= 260
    assert max(map(len, text(name).splitlines())) <= 119


@pytest.mark.parametrize("name", NAMES)
def test_functions_and_imports(name):
    tree = ast.parse(text(name))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert [node.name for node in functions] == [
        "build_dataloaders",
        "build_model",
        "evaluate",
        "main",
    ]
    assert all(len(node.args.args) <= 4 and not node.args.kwonlyargs for node in functions)
    assert [node.name for node in tree.body if isinstance(node, ast.ClassDef)] == ["Config"]
    names = {
        name.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom | ast.Import)
        for name in node.names
    }
    assert not any("Trainer" in name for name in names)
    assert "Trainer" not in text(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_knob_is_read_where_it_acts(name):
    sources = [
        text(name),
        *((ROOT / "utils" / f"{part}.py").read_text() for part in ("report", "launch", "memory")),
    ]
    acting = set().union(*map(read_from_config, sources))
    if "data_files(config.dataset_name)" not in text(name):
        acting.discard("dataset_name")
    assert set(fields(name)) - acting == set()


@pytest.mark.parametrize("name", NAMES)
def test_flags_and_help(name):
    sharded = ["layerwise_generation"] if any(part in name for part in ("zero3", "fsdp")) else []
    sharded += ["bnb_4bit_quant_storage", "optim"] if "qlora" in name else []
    sharded += RESUME_FLAGS if name.endswith("_resume") else []
    assert set(fields(name)) == {*FLAGS, *(LORA_FLAGS if "lora" in name else []), *sharded}
    assert "--no_" not in assert_help_explains_every_flag(name)


def assert_help_explains_every_flag(name):
    """Return the page of --help, which holds the text and the default of each field of Config."""
    module = load(name)
    page = module.HfArgumentParser(module.Config).format_help()
    entries = dict(re.findall(r"^  (--\w+)(.*?)(?=^  -|\Z)", page, re.MULTILINE | re.DOTALL))
    for flag, field in fields(name).items():
        entry = " ".join(entries[f"--{flag}"].split())
        assert " ".join(field.metadata["help"].split()) in entry
        assert "(default:" in entry
    return page


def test_flags_of_one_name_are_alike():
    first = {}
    for name in NAMES:
        for flag, field in fields(name).items():
            kept = first.setdefault(flag, (field.type, field.metadata["help"]))
            own = {
                "seq2seq": ("prompt_template", "max_length"),
                "causal": ("dtype",) if "qlora" in name else (),
            }
            if flag not in own[name.split("_")[0]]:
                assert (field.type, field.metadata["help"]) == kept, f"{name} {flag}"


@pytest.mark.parametrize("name", NAMES)
def test_run_line(name):
    [command] = re.findall(r"^Run: +(.*)$", ast.get_docstring(ast.parse(text(name))), re.MULTILINE)
    form = re.fullmatch(
        r"accelerate launch --config_file (configs/(\w+)\.yaml) (examples/\w+\.py)", command
    )
    assert form and form[3] == f"examples/{name}.py"
    assert (ROOT / form[1]).is_file()
    [strategies] = re.findall(r"check_settings\(config, (\([^)]*\)),", text(name))
    assert form[2].split("_")[0] in ast.literal_eval(strategies)
    for config in ("zero3_offload", "zero3"):
        if name.endswith(f"_{config}") and "qlora" not in name:
            assert form[2] == config


# The production scripts, of which each is like no other ------------------------------------------------
@pytest.mark.parametrize("name", ROOTS)
def test_form_of_a_production_script(name):
    script = lineage.parse(ROOT / "examples" / f"{name}.py")
    assert script.problems == [] and script.is_root
    assert list(script.sections) == [lineage.HEAD, *lineage.SECTIONS]
    assert max(map(len, text(name).splitlines())) <= 119
    [command] = re.findall(r"^Run: +(.*)$", ast.get_docstring(ast.parse(text(name))), re.MULTILINE)
    form = re.match(
        r"accelerate launch --config_file (configs/\w+\.yaml) (examples/\w+\.py)( --|$)", command
    )
    assert form and form[2] == f"examples/{name}.py" and (ROOT / form[1]).is_file()


@pytest.mark.parametrize("name", ROOTS)
def test_no_trainer_in_a_production_script(name):
    nodes = list(ast.walk(ast.parse(text(name))))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    names |= {node.name for node in nodes if isinstance(node, ast.alias | ast.ClassDef)}
    assert names and not any("Trainer" in one for one in names)


@pytest.mark.parametrize("name", ROOTS)
def test_every_knob_of_a_production_script_is_read_where_it_acts(name):
    parts = ("checks", "launch", "memory", "report", "packing", "checkpoint")
    sources = [text(name), *((ROOT / "utils" / f"{part}.py").read_text() for part in parts)]
    assert set(fields(name)) - set().union(*map(read_from_config, sources)) == set()


@pytest.mark.parametrize("name", ROOTS)
def test_help_of_a_production_script_explains_every_flag(name):
    assert_help_explains_every_flag(name)
