"""examples/predict.py: a line for each line of the input, the same ones however it runs."""

import json
import math
import sys

import numpy
import pytest
import torch
from conftest import ROOT, read_metrics
from models import make_model, make_rows, teach
from peft import LoraConfig, PeftModel, get_peft_model
from single import run_single
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from utils import prediction, prediction_model

TEMPLATE = (
    "{% for m in messages %}{{ 'Tweet text : ' if m['role'] == 'user' else ' ' }}{{ m['content'] }}"
    "{% if m['role'] == 'user' %} Label :{% else %}{{ eos_token }}{% endif %}{% endfor %}"
)
NEW = 8  # new tokens
FLAGS = ("--max_new_tokens", NEW, "--per_device_eval_batch_size", 3)
SAMPLED = ("--temperature", 0.9, "--top_p", 0.9, "--seed", 7)


def write(path, rows):
    """Write rows of JSON, and texts as they are, one per line; return the path."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def make_input(count, seed=5):
    """Return rows of all kinds, of many lengths."""
    rows = []
    for number, (text, label) in enumerate(make_rows(count, seed)):
        chat = [{"role": "user", "content": text}, {"role": "assistant", "content": label}]
        rows.append(
            [
                {"id": number, "messages": chat},
                {"prompt": f"Tweet text : {text} Label :", "label": label, "id": number},
                {"text": text, "more": [number, 1.0]},
                {"conversations": chat[:1], "completion": label},
            ][number % 4]
        )
    return rows


def flags(model, source, target, *more):
    """Return the command line of a run."""
    names = ("--model_name_or_path", model, "--input_file", source, "--output_file", target)
    return ("predict", *names, *FLAGS, *more)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the models llama, adapter (of llama) and t5, and the inputs in and pairs."""
    folder = tmp_path_factory.mktemp("predict")
    for name, steps in (("llama", 16), ("t5", 24)):
        teach(make_model(folder / name, name), steps=steps)
    tokenizer = AutoTokenizer.from_pretrained(folder / "llama")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "llama")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder / "llama")
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(folder / "adapter")
    write(folder / "in.jsonl", make_input(22))
    pairs = [{"prompt": f"Tweet text : {a} Label :", "completion": b} for a, b in make_rows(11, 6)]
    write(folder / "pairs.jsonl", pairs)
    return folder


@pytest.fixture(scope="module")
def alone(forks, place):
    """Outputs of one process: name -> rows. `forks` runs all of them in one interpreter."""
    runs = {
        "llama": ("llama", "in"),
        "adapter": ("adapter", "in"),
        "sampled": ("adapter", "in", *SAMPLED),
        "scored": ("adapter", "in_answered", "--perplexity"),
        "t5": ("t5", "pairs", "--metrics", "exact_match,token_f1,rouge_l"),
        "t5_scored": ("t5", "pairs", "--perplexity"),
    }
    answered = [row for row in read(place / "in.jsonl")]
    write(place / "in_answered.jsonl", answered)
    commands = [
        flags(place / model, place / f"{data}.jsonl", place / f"{name}.out.jsonl", *more)
        for name, (model, data, *more) in runs.items()
    ]
    for code, output in run_single(forks, place, *commands):
        assert code == 0, output
    return {name: read(place / f"{name}.out.jsonl") for name in runs}


# What it writes -----------------------------------------------------------------------------------
def prompt_of(row, tokenizer):
    """Return the token ids of a prompt, by the libraries alone."""
    if "prompt" in row:
        return tokenizer(row["prompt"])["input_ids"]
    messages = row.get("messages") or row["conversations"]
    text = tokenizer.apply_chat_template(messages[:1], tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", ["llama", "adapter"])
def test_output_is_that_of_the_libraries(alone, place, name):
    tokenizer = AutoTokenizer.from_pretrained(place / "llama")
    model = AutoModelForCausalLM.from_pretrained(place / "llama")
    if name == "adapter":
        model = PeftModel.from_pretrained(model, place / "adapter")
    reasons = set()
    for row, found in zip(read(place / "in.jsonl"), alone[name], strict=True):
        added = {key: found.pop(key) for key in list(found) if key not in row}
        assert found == row and list(found) == list(row)
        if "text" in row:
            ids = [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]
            with torch.no_grad():
                loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
            assert added["tokens"] == len(ids) - 1
            assert added["loss"] == pytest.approx(loss, rel=1e-4)
            continue
        ids = torch.tensor([prompt_of(row, tokenizer)])
        options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        mask = torch.ones_like(ids)
        tokens = model.generate(input_ids=ids, attention_mask=mask, **options)[0, ids.shape[1] :]
        text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
        reason = "stop" if tokens[-1] == tokenizer.eos_token_id else "length"
        assert added == {"prediction": text, "finish_reason": reason}
        reasons.add(reason)
    assert reasons >= {"stop"} if name == "llama" else reasons


def test_seq2seq_output_and_metrics(alone, place):
    tokenizer = AutoTokenizer.from_pretrained(place / "t5")
    model = AutoModelForSeq2SeqLM.from_pretrained(place / "t5")
    hits = 0
    for row, scored in zip(alone["t5"], alone["t5_scored"], strict=True):
        inputs = tokenizer(row["prompt"], return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        text = tokenizer.decode(tokens[0], skip_special_tokens=True).strip()
        assert row["prediction"] == text
        hits += text == row["completion"]
        labels = tokenizer(text_target=row["completion"], return_tensors="pt").input_ids
        with torch.no_grad():
            loss = model(**inputs, labels=labels).loss.item()
        assert scored["loss"] == pytest.approx(loss, rel=1e-4) and "prediction" not in scored
    content = json.loads((place / "t5.out.metrics.json").read_text())
    assert content["scores"]["exact_match"] == hits / len(alone["t5"])
    assert set(content["scores"]) == {"exact_match", "token_f1", "rouge_l"}


def test_given_answers_are_scored(alone, place):
    rows, content = alone["scored"], json.loads((place / "scored.out.metrics.json").read_text())
    tokens = sum(row["tokens"] for row in rows)
    loss = sum(row["loss"] * row["tokens"] for row in rows) / tokens
    assert content["scores"]["perplexity"] == pytest.approx(math.exp(loss))
    assert not any("prediction" in row for row in rows)
    tokenizer = AutoTokenizer.from_pretrained(place / "llama")
    for row in rows:  # label tokens of an answer: its own and the end
        answer = row.get("label") or row.get("completion") or row.get("text")
        answer = answer or row["messages"][1]["content"]
        ids = tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
        assert abs(row["tokens"] - len(ids) - 1) <= ("text" in row)


STRATEGIES = ("zero2", "zero3", "fsdp1", "fsdp2")
CASES = [("adapter", "ddp", 2, ()), ("sampled", "ddp", 3, ())]
CASES += [("sampled", strategy, 2, ()) for strategy in STRATEGIES]
CASES += [(name, "fsdp2", 3, ()) for name in ("llama", "scored", "t5", "t5_scored")]
CASES += [(name, "zero3", 2, ()) for name in ("scored", "t5")]
CASES += [("sampled", name, 2, ("--layerwise_generation",)) for name in STRATEGIES[1:]]
DATA = {"scored": "in_answered", "t5": "pairs", "t5_scored": "pairs"}
MORE = {"sampled": SAMPLED, "scored": ("--perplexity",), "t5_scored": ("--perplexity",)}
QUICK = (("adapter", "ddp"), ("sampled", "fsdp2"))


@pytest.mark.parametrize(
    ("name", "config", "processes", "more"),
    [
        pytest.param(*case, marks=[] if case[:2] in QUICK and not case[3] else pytest.mark.slow)
        for case in CASES
    ],
)
def test_output_is_the_same_on_any_processes(
    alone, launch, place, tmp_path, name, config, processes, more
):
    model = place / {"sampled": "adapter", "scored": "adapter"}.get(name, name.split("_")[0])
    data = place / f"{DATA.get(name, 'in')}.jsonl"
    command = flags(model, data, tmp_path / "out.jsonl", *MORE.get(name, ()), *more)
    done = launch(command[0], config, *command[1:], processes=processes)
    for found, wanted in zip(read(tmp_path / "out.jsonl"), alone[name], strict=True):
        if "loss" in wanted:
            assert found.pop("loss") == pytest.approx(wanted["loss"], rel=1e-5)
        assert found == wanted | ({"loss": 0} if False else {}) or "loss" in wanted
    assert f"on {processes} processes" in done.stdout
    assert [path.name for path in tmp_path.iterdir()]
