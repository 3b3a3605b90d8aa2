"""What a run saved loads in a fresh process that knows only peft and transformers, and answers as in the run."""

import json
import re

import pytest
from conftest import LIMIT, ROOT, read_metrics, run_real
from models import make_data, make_model, teach
from safetensors import safe_open

RUNS = [
    ("causal_lm_lora", "ddp", "llama"),
    ("causal_lm_lora_zero3_offload", "zero3_offload", "llama"),
    ("seq2seq_lora_zero3_offload", "zero3_offload", "t5"),
    ("causal_lm_full_zero3", "zero3", "llama"),
    ("causal_lm_lora_fsdp1", "fsdp1", "llama"),
    ("causal_lm_lora_fsdp2", "fsdp2_hybrid", "llama"),
    ("seq2seq_lora_fsdp1", "fsdp1", "t5"),
    ("causal_lm_qlora_zero3", "zero3_qlora", "llama"),
    ("causal_lm_qlora_fsdp2", "fsdp2_qlora", "llama"),
]
TOLD_TWICE = ("causal_lm_lora", "seq2seq_lora_fsdp1")  # by the runs that only add to these
ROWS = 21
# bitsandbytes repacks 4-bit weights to answer on CPUs with AVX512-BF16: in bfloat16, and never those of so few columns
BEFORE = """import bitsandbytes
bitsandbytes.nn.modules.has_avx512bf16 = lambda: False"""
# The lines that a run prints, a tokenizer, and one row after the other: no padding, none of the project's code.
RELOAD = """
import csv
import json
import sys

import torch
{before}
{lines}
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
answers = []
for row in csv.DictReader(open(sys.argv[2], newline="")):
    inputs = tokenizer(f"Tweet text : {{row['Tweet text']}} Label :", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        tokens = model.eval().generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=0)[0]
    start = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    answers.append([tokenizer.decode(tokens[start:], skip_special_tokens=True).strip(), row["Label"]])
print(json.dumps({{"answers": answers, "ours": [name for name in sys.modules if name.split(".")[0] == "utils"]}}))
"""


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {
        "llama": teach(make_model(folder / "llama", "llama"), steps=60),
        "t5": teach(make_model(folder / "t5", "t5"), steps=120),
        "data": make_data(folder / "data", train=64, validation=ROWS, noise=0.2),
    }


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(run, marks=[pytest.mark.slow] if run[0] in TOLD_TWICE else []) for run in RUNS
    ],
    ids=[script for script, _, _ in RUNS],
)
def run(request, launch, bases, tmp_path_factory):
    """A run of each script: its base model, its folder and its output."""
    script, config, base = request.param
    folder = tmp_path_factory.mktemp(script) / "run"
    flags = (
        "--model_name_or_path",
        bases[base],
        "--dataset_name",
        bases["data"],
        "--output_dir",
        folder,
    )
    rate = {"full": 1e-3, "causal": 2e-2, "seq2seq": 1e-2}[
        "full" if "full" in script else script.split("_")[0]
    ]
    done = launch(
        script,
        config,
        *flags,
        "--max_steps",
        6,
        "--learning_rate",
        rate,
        processes=4 if "hybrid" in config else 2,
    )
    return bases[base], folder, done.stdout


def read(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}
    return tensors


def test_fresh_process_gives_the_same_answers(run, bases, forks, environment, tmp_path):
    base, folder, output = run
    lines = re.search(r"^from (.|\n)*?^model = .*$", output, re.MULTILINE)[0]
    assert str(folder) in lines
    before = BEFORE if "4bit" in lines else ""
    script = tmp_path / "reload.py"
    script.write_text(RELOAD.format(before=before, lines=lines))
    command = (script, folder, bases["data"] / "validation.csv")
    if base == bases["t5"]:  # a fresh process, without the imports of the fork server
        done = run_real(command, environment, tmp_path, LIMIT)
    else:
        done = forks.run(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    result = json.loads(done.stdout.splitlines()[-1])
    answers = [answer for answer, _ in result["answers"]]
    printed = re.findall(r"^  prediction '(.*)' *  label '(.*)'$", output, re.MULTILINE)
    assert [tuple(pair) for pair in result["answers"][:10]] == printed and len(printed) == 10
    score = sum(answer == label for answer, label in result["answers"]) / ROWS
    assert score == pytest.approx(read_metrics(folder)["score"]["after"])
    assert result["ours"] == []
    assert len(set(answers)) > 1, "one answer to all rows proves little"


def test_files_hold_full_shapes_and_what_was_learned(run):
    base, folder, _ = run
    saved, original = read(folder), read(base)
    if "adapter_config.json" not in {file.name for file in folder.iterdir()}:
        assert {name: tensor.shape for name, tensor in saved.items()} == {
            name: tensor.shape for name, tensor in original.items()
        }
        assert any((saved[name] != original[name]).any() for name in saved)
        return
    rank = json.loads((folder / "adapter_config.json").read_text())["r"]
    weights = {name.removesuffix(".weight"): tensor.shape for name, tensor in original.items()}
    for name, tensor in saved.items():
        layer, _, half = (
            name.removeprefix("base_model.model.").removesuffix(".weight").partition(".lora_")
        )
        rows, columns = weights[layer]
        assert tuple(tensor.shape) == ((rank, columns) if half == "A" else (rows, rank))
        assert tensor.any()
    assert read_metrics(folder)["trainable_parameters"] == sum(
        tensor.numel() for tensor in saved.values()
    )


def test_folder_stands_alone(run):
    base, folder, _ = run
    assert (folder / "tokenizer.json").read_text() == (base / "tokenizer.json").read_text()
    assert str(ROOT) not in (folder / "README.md").read_text().replace(str(base), "").replace(
        str(folder), ""
    )
