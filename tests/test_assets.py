"""Tests of assets/: the data sets, the tiny base models and the text they were pretrained on."""

import csv
import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from assets.corpus import generate
from assets.pretrain import check_corpus

ROOT = Path(__file__).parent.parent
ASSETS = ROOT / "assets"
SPLITS = {"train": 400, "validation": 100, "test": 100}
MODELS = {"tiny-causal-lm": AutoModelForCausalLM, "tiny-seq2seq": AutoModelForSeq2SeqLM}
# Limit of (words in both messages) / (words in either one), without handles. The most similar two
# messages of the data set have 0.47.
NEAR_DUPLICATE = 0.5
MODEL_FILES = ["config.json", "generation_config.json", "model.safetensors"]
MODEL_FILES += ["tokenizer.json", "tokenizer_config.json"]


def read_split(split):
    with open(ASSETS / "complaints" / f"{split}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def words(message):
    return set(re.findall(r"[\w']+", re.sub(r"@\w+", "", message.lower())))


def near_duplicates(messages):
    bags = [(message, words(message)) for message in messages]
    return [
        (one, other)
        for (one, bag), (other, other_bag) in itertools.combinations(bags, 2)
        if len(bag & other_bag) >= NEAR_DUPLICATE * len(bag | other_bag)
    ]


@pytest.fixture(scope="module")
def messages():
    return [row["Tweet text"] for split in SPLITS for row in read_split(split)]


@pytest.mark.parametrize(("split", "size"), SPLITS.items())
def test_split(split, size):
    rows = read_split(split)
    assert list(rows[0]) == ["Tweet text", "Label", "ID"]
    counts = Counter(row["Label"] for row in rows)
    assert counts == {"complaint": size // 2, "no complaint": size // 2}
    for row in rows:
        assert 6 <= len(row["Tweet text"].split()) <= 30
        assert "complain" not in row["Tweet text"].lower()


def test_ids_are_unique():
    ids = [int(row["ID"]) for split in SPLITS for row in read_split(split)]
    assert ids == list(range(sum(SPLITS.values())))


def test_no_near_duplicates(messages):
    assert near_duplicates(messages) == []


def test_near_duplicate_detector_finds_a_planted_one(messages):
    planted = messages[7].upper().replace(" the ", " a ") + " @SomebodyElse"
    assert near_duplicates([*messages, planted]) == [(messages[7], planted)]


def test_pretraining_text_has_no_label_and_no_message():
    check_corpus(generate(5000, seed=1))


@pytest.mark.parametrize("leak", ["a label", "a message"])
def test_corpus_check_finds_a_planted_leak(leak, messages):
    planted = "No Complaint." if leak == "a label" else messages[3].upper()
    with pytest.raises(AssertionError, match=leak):
        check_corpus([*generate(10, seed=1), (f"Customer : {planted} Agent :", "thanks")])


def test_pretraining_text_is_deterministic():
    assert generate(200, seed=3) == generate(200, seed=3)
    assert generate(200, seed=3) != generate(200, seed=4)


@pytest.mark.parametrize("name", MODELS)
def test_folder(name):
    files = {path.name: path.stat().st_size for path in (ASSETS / name).iterdir()}
    assert sorted(files) == MODEL_FILES
    assert sum(files.values()) <= 8_000_000


@pytest.mark.parametrize("name", MODELS)
def test_model(name):
    model = MODELS[name].from_pretrained(ASSETS / name, local_files_only=True)
    dropouts = {key: value for key, value in model.config.to_dict().items() if "dropout" in key}
    assert dropouts and not any(dropouts.values())
    assert all(module.p == 0 for module in model.modules() if isinstance(module, torch.nn.Dropout))
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_tokenizer(name, messages):
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / name, local_files_only=True)
    config = MODELS[name].from_pretrained(ASSETS / name, local_files_only=True).config
    assert tokenizer.pad_token_id == config.pad_token_id
    assert tokenizer.eos_token_id == config.eos_token_id
    assert len(tokenizer) == config.vocab_size
    for text in [*messages, " two  spaces \n\t", "🤬👩‍🚀 日本語 naïve £5 €8", "no complaint"]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        if name == "tiny-causal-lm":
            assert ids[0] == tokenizer.bos_token_id and ids[-1] != tokenizer.eos_token_id
        else:
            assert ids[-1] == tokenizer.eos_token_id


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_pretrain(forks, name, tmp_path):
    def pretrain(*more):
        return forks.run("-m", "assets.pretrain", *words, *more, cwd=ROOT)

    words = (name.removeprefix("tiny-"), "--output_dir", tmp_path / "model")
    words += ("--num_exchanges", 640)
    run = pretrain()
    assert run.returncode == 0, run.stdout
    MODELS[name].from_pretrained(tmp_path / "model")
    weights = (tmp_path / "model" / "model.safetensors").read_bytes()

    run = pretrain()
    assert run.returncode != 0 and "--overwrite_output_dir" in run.stdout
    # a process of its own, with another hash seed
    command = [sys.executable, "-m", "assets.pretrain", *words, "--overwrite_output_dir"]
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == weights


def read_chats(split):
    lines = (ASSETS / "chat" / f"{split}.jsonl").read_text().splitlines()
    return [json.loads(line)["messages"] for line in lines]


@pytest.mark.parametrize("split, count", [("train", 100), ("test", 20)])
def test_chats_are_conversations(split, count):
    chats = read_chats(split)
    assert len(chats) == count
    for messages in chats:
        roles = [message["role"] for message in messages]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2) and 1 <= len(turns) // 2 <= 3
        assert all(4 <= len(message["content"].split()) <= 30 for message in messages)


def test_chats_have_no_near_duplicates_and_no_label():
    chats = [*read_chats("train"), *read_chats("test")]
    texts = [" ".join(message["content"] for message in chat) for chat in chats]
    assert near_duplicates(texts) == []
    assert not any("complain" in text.lower() for text in texts)
