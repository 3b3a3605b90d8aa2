"""Saved files load in a fresh process without the project's code and give the run's answers."""

import json
import re

import pytest
from conftest import LIMIT, ROOT, read_metrics, run_real
from models import make_data, make_model, teach
from safetensors import safe_open

RUNS = [  # (script, config, architecture of the base model)
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
COVERED = ("causal_lm_lora", "seq2seq_lora_fsdp1")  # other runs cover these scripts: they are slow
ROWS = 21
# On CPUs with AVX512-BF16, bitsandbytes repacks 4-bit weights for inference: it computes in
# bfloat16, and it cannot repack weights with as few columns as here.
BEFORE = """import bitsandbytes
bitsandbytes.nn.modules.has_avx512bf16 = lambda: False"""
# A script with the lines that a run prints. It generates row by row, without padding and without
# the project's code.
RELOAD = """
import csv
import json
import sys

import torch
{before}
{lines}
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
options = {{"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}}
answers = []
for row in csv.DictReader(open(sys.argv[2], newline="")):
    prompt = f"Tweet text : {{row['Tweet text']}} Label :"
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        tokens = model.eval().generate(**inputs, **options)[0]
    start = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    answer = tokenizer.decode(tokens[start:], skip_special_tokens=True).strip()
    answers.append([answer, row["Label"]])
ours = [name for name in sys.modules if name.split(".")[0] == "utils"]
print(json.dumps({{"answers": answers, "ours": ours}}))
"""


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Small trained models and data: name -> path."""
    folder = tmp_path_factory.mktemp("bases")
    return {
        "llama": teach(make_model(folder / "llama", "llama"), steps=60),
        "t5": teach(make_model(folder / "t5", "t5"), steps=120),
        "data": make_data(folder / "data", train=64, validation=ROWS, noise=0.2),
    }


MARKS = [[pytest.mark.slow] if script in COVERED else [] for script, _, _ in RUNS]
PARAMS = [pytest.param(run, id=run[0], marks=marks) for run, marks in zip(RUNS, MARKS)]
RATES = {"full": 1e-3, "causal": 2e-2, "seq2seq": 1e-2}


@pytest.fixture(scope="module", params=PARAMS)
def run(request, launch, bases, tmp_path_factory):
    """A run of each script: (base model, output folder, output)."""
    script, config, base = request.param
    folder = tmp_path_factory.mktemp(script) / "run"
    rate = RATES["full" if "full" in script else script.split("_")[0]]
    flags = ("--model_name_or_path", bases[base], "--dataset_name", bases["data"])
    flags += ("--max_steps", 6, "--learning_rate", rate, "--output_dir", folder)
    done = launch(script, config, *flags, processes=4 if "hybrid" in config else 2)
    return bases[base], folder, done.stdout


def read(folder):
    """Return all tensors of the safetensors files in a folder."""
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
    assert score == pytest.approx(read_metrics(folder)["scores"]["accuracy"]["after"])
    assert result["ours"] == []
    assert len(set(answers)) > 1, "the same answer to all rows proves little"


def test_files_hold_trained_weights_in_full_shapes(run):
    base, folder, _ = run
    saved, original = read(folder), read(base)
    if "adapter_config.json" not in {file.name for file in folder.iterdir()}:
        shapes, expected = (
            {name: tensor.shape for name, tensor in one.items()} for one in (saved, original)
        )
        assert shapes == expected
        assert any((saved[name] != original[name]).any() for name in saved)
        return
    rank = json.loads((folder / "adapter_config.json").read_text())["r"]
    weights = {name.removesuffix(".weight"): tensor.shape for name, tensor in original.items()}
    for name, tensor in saved.items():
        name = name.removeprefix("base_model.model.").removesuffix(".weight")
        layer, _, matrix = name.partition(".lora_")
        rows, columns = weights[layer]
        assert tuple(tensor.shape) == ((rank, columns) if matrix == "A" else (rows, rank))
        assert tensor.any()
    count = sum(tensor.numel() for tensor in saved.values())
    assert read_metrics(folder)["trainable_parameters"] == count


def test_folder_is_self_contained(run):
    base, folder, _ = run
    assert (folder / "tokenizer.json").read_text() == (base / "tokenizer.json").read_text()
    card = (folder / "README.md").read_text().replace(str(base), "").replace(str(folder), "")
    assert str(ROOT) not in card
