"""docs/adapt.md: every diff fits its script, and the adapted script does what the text says."""

import ast
import json
import math
import re
import subprocess
import sys

import pytest
from conftest import ROOT, read_metrics, write_csv
from models import make_data, make_model, make_rows
from processes import plant
from safetensors.torch import load_file

DOCUMENT = (ROOT / "docs/adapt.md").read_text()
# heading -> (script, diff)
ADAPTATIONS = {
    section.partition("\n")[0]: re.search(
        r"^```diff\n--- a/examples/(\w+)\.py\n(.+?)^```$", section, re.MULTILINE | re.DOTALL
    ).groups()
    for section in re.split(r"^## (?=\d)", DOCUMENT, flags=re.MULTILINE)[1:]
}
FLAGS = ("--max_steps", 3, "--learning_rate", 1e-2, "--warmup_ratio", 0)
FLAGS += ("--per_device_train_batch_size", 2, "--per_device_eval_batch_size", 2)
HELD_OUT = 5  # odd: two processes repeat a row to fill their batches
# The lines that a run prints, a tokenizer, and one row after the other: no padding.
RELOAD = """
import csv, json, sys
import torch
{lines}
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
rows = list(csv.DictReader(open(sys.argv[2], newline="")))
model.eval()

def encode(text, **options):
    return torch.tensor([tokenizer(text, **options).input_ids])

def generate(prompt, column, **options):
    targets = [tokenizer(f" {{row[column]}}", add_special_tokens=False).input_ids for row in rows]
    longest = max(map(len, targets)) + 1  # with the end
    ids = encode(prompt)
    tokens = model.generate(input_ids=ids, max_new_tokens=longest, **options)[0]
    start = 0 if model.config.is_encoder_decoder else ids.shape[1]
    return tokenizer.decode(tokens[start:], skip_special_tokens=True).strip()

def compute(row):
    {body}

with torch.no_grad():
    print(json.dumps([compute(row) for row in rows]))
"""
LOSS = """
    ids = torch.tensor([tokenizer(row["Tweet text"]).input_ids + [tokenizer.eos_token_id]])
    return model(ids, labels=ids).loss.item(), ids.shape[1] - 1
"""
CLASS = """
    return model(encode(row["Tweet text"])).logits.argmax().item()
"""
SUMMARY = """
    return generate(f"summarize: {row['document']}", "summary", num_beams=4)
"""
ANSWER = """
    return generate(f"Tweet text : {row['Tweet text']} Label :", "Label")
"""


def split(diff):
    """Return the hunks of a diff, each as its lines."""
    hunks = []
    for line in diff.splitlines():
        if line.startswith("@@"):
            counts = [int(count) for count in re.findall(r",(\d+)", line)]
            hunks.append((counts, []))
        elif hunks:
            hunks[-1][1].append(line or " ")  # editors drop the space of an empty line
    return hunks


def apply(diff, text):
    """Return the text with the diff applied. Every hunk must fit exactly, and in one place."""
    for counts, lines in split(diff):
        old = "".join(f"{line[1:]}\n" for line in lines if line[0] in " -")
        new = "".join(f"{line[1:]}\n" for line in lines if line[0] in " +")
        assert counts == [old.count("\n"), new.count("\n")], f"wrong counts in the hunk of\n{old}"
        assert text.count(old) == 1, f"fits {text.count(old)} times:\n{old}"
        text = text.replace(old, new)
    return text


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Folders of small models and of the data of each task."""
    folder = tmp_path_factory.mktemp("small")
    places = {kind: make_model(folder / kind, kind) for kind in ("llama", "t5")}
    places["labels"] = make_data(folder / "labels", train=24, validation=HELD_OUT)
    tables = {
        "classes": (("Tweet text", "Label"), classify),
        "summaries": (("document", "summary"), lambda text, _: (text, " ".join(text.split()[:3]))),
        "pairs": (("prompt", "chosen", "rejected"), lambda text, label: (text, label, "Label")),
    }
    for name, (columns, make) in tables.items():
        places[name] = folder / name
        places[name].mkdir()
        for file, count, seed in (("train", 24, 1), ("validation", HELD_OUT, 2)):
            rows = [make(text, label) for text, label in make_rows(count, seed)]
            write_csv(places[name] / f"{file}.csv", rows, columns)
    return places


def classify(text, label):
    classes = {"c": "complaint", "n": "praise"}
    return (text, "question" if "in" in text.split() else classes[label[0]])


@pytest.fixture
def run(launch, small, tmp_path):
    """Apply the diff of a heading to the script, launch it; return its folder, output, metrics."""

    def run(title, config, model, data, *flags, name="run", **options):
        script = adapted(title, tmp_path)
        target = tmp_path / name
        flags = ("--model_name_or_path", small[model], *FLAGS, *flags, "--output_dir", target)
        flags += ("--dataset_name", small[data]) if data else ()
        done = launch(script, config, *flags, processes=2, cwd=tmp_path, **options)
        metrics = read_metrics(target)
        assert all(math.isfinite(loss) for loss in metrics["losses"]), metrics["losses"]
        assert metrics["grad_norms"][0] > 0
        card = (target / "README.md").read_text()
        for score, value in metrics["scores"].items():
            before, after = f"{value['before']:.4f}", f"{value['after']:.4f}"
            assert f"held-out {score}: {after} (before training {before})" in done.stdout
            assert f"Held-out {score}: {before} before training, {after} after." in card
        if "accuracy" not in metrics["scores"]:
            assert not re.search(r"\baccuracy", card + done.stdout)
        return target, done.stdout, metrics

    return run


def adapted(title, folder):
    """Write the adapted script and a copy of utils/ into the folder, once; return its path."""
    script, diff = ADAPTATIONS[title]
    copy = folder / f"{script}.py"
    if not copy.exists():
        plant(folder, script)
        copy.write_text(apply(diff, copy.read_text()))
    return copy


def reload(forks, folder, output, data, body):
    """Return what a fresh process computes of each held-out row, with the printed lines."""
    lines = re.search(r"^from (.|\n)*?^model = .*$", output, re.MULTILINE)[0]
    script = folder.parent / "reload.py"
    script.write_text(RELOAD.format(lines=lines, body=body.strip()))
    done = forks.run(script, folder, data / "validation.csv", cwd=folder.parent)
    assert done.returncode == 0, done.stdout
    return json.loads(done.stdout.splitlines()[-1])


def printed(output):
    """Return the predictions that a run printed."""
    reprs = re.findall(r"^  prediction (['\"].*['\"]) +label ['\"].*$", output, re.MULTILINE)
    return [ast.literal_eval(one) for one in reprs]


@pytest.mark.parametrize("title", ADAPTATIONS)
def test_size(title):
    """At most 40 lines of code are added, and the text gives the right numbers."""
    lines = [line for _, hunk in split(ADAPTATIONS[title][1]) for line in hunk]
    added, removed = (
        sum(line[0] == sign and line[1:].strip() != "" for line in lines) for sign in "+-"
    )
    assert added <= 40
    assert f"`{ADAPTATIONS[title][0]}` ({added} lines added, {removed} removed)." in DOCUMENT


@pytest.mark.parametrize("title", ADAPTATIONS)
def test_style(title, tmp_path):
    script, diff = ADAPTATIONS[title]
    text = apply(diff, (ROOT / f"examples/{script}.py").read_text())
    for command in (["check"], ["format", "--check"]):
        command = [
            sys.executable,
            "-m",
            "ruff",
            *command,
            "--stdin-filename",
            f"examples/{script}.py",
        ]
        done = subprocess.run([*command, "-"], input=text, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_hunk_that_does_not_fit_fails():
    script, diff = next(iter(ADAPTATIONS.values()))
    text = (ROOT / f"examples/{script}.py").read_text()
    line = next(line for line in diff.splitlines() if line.startswith("-"))
    with pytest.raises(AssertionError, match="fits 0 times"):
        apply(diff, text.replace(line[1:], f"{line[1:]} "))


# The adaptations ----------------------------------------------------------------------------------
def titled(number):
    return next(title for title in ADAPTATIONS if title.startswith(f"{number}. "))


def test_every_adaptation_is_here():
    assert [title.split(".")[0] for title in ADAPTATIONS] == list("12345678")


def test_plain_text(run, forks, small):
    folder, output, metrics = run(titled(1), "zero3", "llama", "labels")
    assert list(metrics["scores"]) == ["perplexity"]
    score = metrics["scores"]["perplexity"]
    assert score["after"] < score["before"] and "held-out rows:" not in output
    results = reload(forks, folder, output, small["labels"], LOSS)
    tokens = sum(count for _, count in results)
    assert len(results) == HELD_OUT  # none of them twice
    loss = sum(mean * count for mean, count in results) / tokens
    assert math.exp(loss) == pytest.approx(score["after"], rel=1e-4)


def test_summarisation(run, forks, small):
    folder, output, metrics = run(titled(2), "zero3", "t5", "summaries")
    assert list(metrics["scores"]) == ["rouge_l"]
    assert metrics["losses"][-1] < metrics["losses"][0]
    assert "from peft import AutoPeftModelForSeq2SeqLM" in output
    predictions = reload(forks, folder, output, small["summaries"], SUMMARY)
    assert predictions == printed(output) and len(predictions) == HELD_OUT


def test_rouge_l(tmp_path):
    text = adapted(titled(2), tmp_path).read_text()
    scope = {}
    exec(re.search(r"^def rouge_l\(.+?(?=^def )", text, re.MULTILINE | re.DOTALL)[0], scope)
    rouge_l = scope["rouge_l"]
    assert rouge_l("", "a b") == rouge_l("", "") == rouge_l("c", "a b") == 0
    assert rouge_l("A b", "a B") == 1
    assert rouge_l("the cat sat", "the dog sat down") == pytest.approx(2 * 2 / 7)


def test_classification(run, forks, small):
    names = ["complaint", "praise", "question"]
    folder, output, metrics = run(titled(3), "ddp", "llama", "classes", "--classes", *names)
    assert list(metrics["scores"]) == ["accuracy"]
    assert metrics["losses"][-1] != metrics["losses"][0]
    assert metrics["target_tokens"] == 3 * 4  # rows
    assert "from peft import AutoPeftModelForSequenceClassification" in output
    assert "score.weight" in " ".join(load_file(folder / "adapter_model.safetensors"))
    classes = reload(forks, folder, output, small["classes"], CLASS)
    assert [names[one] for one in classes] == printed(output) and len(classes) == HELD_OUT


def test_ia3_and_a_class_of_ones_own(run, forks, small):
    folder, output, metrics = run(titled(4), "fsdp2", "llama", "labels")
    assert metrics["strategy"] == "fsdp2" and list(metrics["scores"]) == ["accuracy"]
    vectors = load_file(folder / "adapter_model.safetensors")
    assert {name.rpartition(".")[2] for name in vectors} == {"ia3_l"}
    assert all((vector != 1).any() for vector in vectors.values())  # as all are at the start
    assert "from causal_lm_lora_fsdp2 import CappedLlama" in output
    predictions = reload(forks, folder, output, small["labels"], ANSWER)
    assert predictions == printed(output) and len(predictions) == HELD_OUT


def test_dpo(run):
    _, output, metrics = run(titled(5), "ddp", "llama", "pairs")
    accuracy, margin = metrics["scores"]["reward_accuracy"], metrics["scores"]["reward_margin"]
    assert len(metrics["scores"]) == 2 and "held-out rows:" not in output
    # before training the model is the reference
    assert metrics["losses"][0] == pytest.approx(math.log(2))
    assert (accuracy["before"], margin["before"]) == (0, 0)
    assert metrics["losses"][-1] < metrics["losses"][0] and margin["after"] > 0
    assert accuracy["after"] > 0.5
    assert metrics["target_tokens"] == 3 * 4  # pairs


def test_checkpoints(run, tmp_path):
    flags = ("--save_steps", 2, "--lora_dropout", 0.1, "--checkpoint_dir", tmp_path / "checkpoints")
    full, _, expected = run(titled(6), "zero3_qlora", "llama", "labels", *flags)
    resuming = (*flags, "--resume_from_checkpoint", True)
    resumed, _, metrics = run(titled(6), "zero3_qlora", "llama", "labels", *resuming, name="again")
    same = ("losses", "learning_rates", "grad_norms", "scores", "target_tokens", "input_tokens")
    assert [metrics[key] for key in same] == [expected[key] for key in same]
    weights, others = (load_file(one / "adapter_model.safetensors") for one in (full, resumed))
    assert weights.keys() == others.keys()
    assert all((weights[name] == others[name]).all() for name in weights)
    state = json.loads((tmp_path / "checkpoints/checkpoint-2/state.json").read_text())
    assert metrics["train_seconds"] > state["seconds"] > 0  # those before the checkpoint count


def test_other_data_optimizer_and_score(run):
    rate = 1e-4
    flags = ("--use_peft_lora", "--num_sums", 12, "--num_samples", 0, "--save_strategy", "no")
    flags += ("--learning_rate", rate, "--lr_scheduler_type", "constant", "--logging_steps", 1)
    folder, output, metrics = run(titled(7), "ddp", "llama", None, *flags)
    scores = metrics["scores"]
    assert {"perplexity", "token_accuracy", "top5_accuracy"} < set(scores)
    assert scores["perplexity"]["after"] < scores["perplexity"]["before"]
    for moment in ("before", "after"):
        assert scores["top5_accuracy"][moment] > scores["token_accuracy"][moment]
    assert "(--dataset_name `made-up sums`)" in (folder / "README.md").read_text()
    assert "assets/chat" not in output
    # AdamW's first update moves every element by the learning rate; lora_B starts at 0
    adapter = load_file(folder / "adapter_model.safetensors")
    moved = [adapter[name].abs().max() for name in adapter if "lora_B" in name]
    assert len(moved) > 0 and min(moved) > 8 * rate


@pytest.mark.slow
def test_less_traffic_with_lora(run):
    _, output, metrics = run(titled(8), "ddp", "llama", "labels")
    full, sent = re.search(
        r"of an update: ([\d,]+) bytes, sent as ([\d,]+) bytes in", output
    ).groups()
    assert int(full.replace(",", "")) == 4 * metrics["trainable_parameters"]
    assert int(sent.replace(",", "")) == 2 * metrics["trainable_parameters"]
    assert metrics["losses"][-1] < metrics["losses"][0]
