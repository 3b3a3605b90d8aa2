"""Models and data of one's own: every architecture, every kind of tokenizer, files with hard cells."""

import csv
import importlib.util
import json
import random
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, read_metrics, write_csv
from models import CAUSAL, SEQ2SEQ, make_model, make_rows
from single import run_single
from transformers import AutoTokenizer, PreTrainedTokenizerFast

LABELS = [
    "None",
    "NA",
    "01",
    "once only",
    'quoted "so", twice',
    *(f"intent number {number}" for number in range(72)),
]
TEXTS = [
    "",
    "a, b",
    'she said "no"',
    "two\nlines",
    "😀 👍🏽 é",
    "nan",
    "NULL",
    "1.50",
    " spaces around ",
    "long " * 400,
]
LAUNCHED = [
    ("causal_lm_lora_zero3_offload", "zero3_offload", "qwen2"),
    ("causal_lm_full_zero3", "zero3", "gemma"),
    pytest.param("seq2seq_lora_zero3_offload", "zero3_offload", "t5", marks=pytest.mark.slow),
    pytest.param("seq2seq_lora_zero3_offload", "zero3", "bart", marks=pytest.mark.slow),
]


def hard_rows(labels, count=120):
    """Return rows of texts and labels that are hard to read from a file; the label "once only" comes once."""
    draw = random.Random(5)
    rows = [
        [draw.choice(TEXTS) + f" {number}" * (number % 7 > 0), label]
        for number, label in enumerate(labels)
    ]
    often = [label for label in labels if label != "once only"]
    return rows + [
        [draw.choice(TEXTS) + f" {number}", draw.choice(often)]
        for number in range(count - len(rows))
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Data sets in every form, all with columns of other names: name -> what --dataset_name is given."""
    folder = tmp_path_factory.mktemp("data")
    columns = ("utterance, raw", "intent")
    write_csv(folder / "77.csv", hard_rows(LABELS), columns)
    write_csv(folder / "bom.csv", hard_rows(["yes", "no"], 40), columns)
    (folder / "bom.csv").write_bytes(b"\xef\xbb\xbf" + (folder / "bom.csv").read_bytes())
    (folder / "folder").mkdir()
    for split, seed in (("train", 1), ("validation", 2)):
        lines = (json.dumps(dict(zip(columns, row))) for row in make_rows(30, seed))
        (folder / "folder" / f"{split}.jsonl").write_text("\n".join(lines))
    numbers = (
        {columns[0]: text, columns[1]: len(text) % 3} for text, _ in hard_rows(["a", "b"], 40)
    )
    (folder / "integers.jsonl").write_text("\n".join(map(json.dumps, numbers)))
    rows = [
        {columns[0]: text or None, columns[1]: label}
        for text, label in hard_rows(["None", "NA"], 40)
    ]
    (folder / "null.json").write_text(json.dumps(rows))
    return {
        name: folder / name
        for name in ("77.csv", "bom.csv", "folder", "integers.jsonl", "null.json")
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        architecture: make_model(folder / architecture, architecture)
        for architecture in (*CAUSAL, *SEQ2SEQ)
    }


def script_of(architecture):
    return "causal_lm_lora" if architecture in CAUSAL else "seq2seq_lora"


def flags(model, dataset, output):
    columns = (
        "--text_column",
        "utterance, raw",
        "--label_column",
        "intent",
        "--output_dir",
        output,
    )
    return (
        "--model_name_or_path",
        model,
        "--dataset_name",
        dataset,
        "--max_steps",
        2,
        *columns,
        "--warmup_ratio",
        0,
    )


@pytest.fixture(scope="module")
def single(forks, models, data, tmp_path_factory):
    """A run in one process of every architecture, each on one of the data sets: architecture -> code and output."""
    folder = tmp_path_factory.mktemp("single")
    sets = [*data.values()] * len(models)
    commands = [
        (script_of(architecture), *flags(model, dataset, folder / architecture))
        for (architecture, model), dataset in zip(models.items(), sets)
    ]
    done = run_single(forks, folder, *commands, side_by_side=2)
    return {name: (folder / name, *result) for name, result in zip(models, done)}


@pytest.mark.parametrize("architecture", [*CAUSAL, *SEQ2SEQ])
def test_architecture_trains(single, architecture):
    folder, code, output = single[architecture]
    assert code == 0, output
    metrics = read_metrics(folder)
    assert len(metrics["losses"]) == 2 and min(metrics["grad_norms"]) > 0
    assert "adapter_model.safetensors" in metrics["saved"]


@pytest.mark.parametrize(("script", "config", "architecture"), LAUNCHED)
def test_architecture_trains_sharded(launch, models, data, tmp_path, script, config, architecture):
    launch(
        script, config, *flags(models[architecture], data["77.csv"], tmp_path / "run"), processes=2
    )
    metrics = read_metrics(tmp_path / "run")
    assert (
        metrics["strategy"] == "zero3"
        and len(metrics["losses"]) == 2
        and min(metrics["grad_norms"]) > 0
    )


TYPED = [  # labels that JSON or datasets give a type of their own, in columns named like the script's own
    [0, 1],
    [True, False],
    [
        "2024-01-01 00:00:00",
        "2025-12-31 00:00:00",
    ],  # datasets makes a time of it, and of a date alone
]


@pytest.mark.parametrize("labels", TYPED, ids=str)
@pytest.mark.parametrize("script", ["causal_lm_lora", "seq2seq_lora"])
def test_labels_stay_text_whatever_the_columns_are_called(models, tmp_path, script, labels):
    rows = [
        {
            "prompt": f"text {number}",
            "label": labels[number % 2],
            "target": [0.5],
            "input_ids": [True],
        }
        for number in range(20)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    module = load(script)
    model = str(models["llama" if script == "causal_lm_lora" else "t5"])
    columns = {
        "text_column": "prompt",
        "label_column": "label",
        "output_dir": str(tmp_path / "run"),
    }
    config = module.Config(
        model_name_or_path=model, dataset_name=str(tmp_path / "train.jsonl"), **columns
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    train, valid = module.build_dataloaders(config, tokenizer, SimpleNamespace(num_processes=1))
    assert {type(label) for label in valid.dataset["label"]} == {str}
    assert set(train.dataset["label"]) == {
        tokenizer.decode(tokenizer(str(label)).input_ids, True) for label in labels
    }
    assert next(iter(train))["input_ids"].dtype == torch.long


def test_a_target_ends_though_the_tokenizer_adds_no_end(models, tmp_path):
    file = tmp_path / "tokenizer.json"
    whole = json.loads((models["t5"] / "tokenizer.json").read_text())
    file.write_text(json.dumps(whole | {"post_processor": None}))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(file), eos_token="</s>", pad_token="<pad>"
    )
    assert tokenizer.eos_token_id not in tokenizer("text").input_ids
    module = load("seq2seq_lora")
    write_csv(tmp_path / "rows.csv", make_rows(20, seed=3))
    config = module.Config(dataset_name=str(tmp_path / "rows.csv"))
    train, _ = module.build_dataloaders(config, tokenizer, SimpleNamespace(num_processes=1))
    assert all(target[-1] == tokenizer.eos_token_id for target in train.dataset["target"])


def load(script):
    """Import a script as a module."""
    spec = importlib.util.spec_from_file_location(script, ROOT / "examples" / f"{script}.py")
    module = sys.modules[script] = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


def loaders(script, folder, dataset, **settings):
    """The loaders that a script would train and score with, its tokenizer and its Config."""
    module = load(script)
    tokenizer = settings.pop("tokenizer", None) or AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    columns = {"text_column": "utterance, raw", "label_column": "intent"}
    [config] = module.HfArgumentParser(module.Config).parse_dict(
        {"dataset_name": str(dataset), "model_name_or_path": str(folder), **columns, **settings}
    )
    return (
        *module.build_dataloaders(config, tokenizer, SimpleNamespace(num_processes=1)),
        tokenizer,
        config,
    )


@pytest.mark.parametrize("architecture", CAUSAL)
def test_causal_batches(models, data, architecture):
    tokenizer = AutoTokenizer.from_pretrained(models[architecture])
    tokenizer.padding_side = (
        "right"  # whatever it says, what is generated from is padded on the left
    )
    train, valid, tokenizer, config = loaders(
        "causal_lm_lora", models[architecture], data["77.csv"], tokenizer=tokenizer, max_length=64
    )
    tail = tokenizer(" Label :", add_special_tokens=False).input_ids
    assert len(tail) > 1
    seen, cut = set(), 0
    for batch in train:
        for ids, mask, labels in zip(
            *(batch[key].tolist() for key in ("input_ids", "attention_mask", "labels"))
        ):
            length = sum(mask)
            assert mask == [1] * length + [0] * (len(mask) - length)
            target = [label for label in labels if label != -100]
            assert ids[length - len(target) : length] == target
            assert labels == [-100] * (length - len(target)) + target + [-100] * (
                len(mask) - length
            )
            assert ids[: length - len(target)][-len(tail) :] == tail
            assert target[-1] == tokenizer.eos_token_id and length <= config.max_length
            seen.add(tokenizer.decode(target, skip_special_tokens=True).strip())
            cut += length > 50
    assert seen <= set(LABELS) and len(seen) > 20 and cut > 0
    for batch in valid:
        assert set(batch) == {"input_ids", "attention_mask"}
        for ids, mask in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist()):
            assert mask == sorted(mask) and ids[-len(tail) :] == tail


@pytest.mark.parametrize("architecture", SEQ2SEQ)
def test_seq2seq_batches(models, data, architecture):
    train, valid, tokenizer, config = loaders(
        "seq2seq_lora", models[architecture], data["77.csv"], max_length=64
    )
    whole = {tuple(tokenizer(text_target=label).input_ids) for label in LABELS}
    cut = 0
    for batch in [*train, *valid]:
        for ids, mask in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist()):
            prompt = [token for token, kept in zip(ids, mask) if kept]
            text = tokenizer.decode(prompt, skip_special_tokens=True)
            assert text.endswith("Label :") and text.startswith("Tweet text :")
            assert prompt[-1] == tokenizer("x").input_ids[-1] and len(prompt) <= config.max_length
            cut += len(prompt) > 50
        for labels in batch["labels"].tolist() if "labels" in batch else ():
            assert tuple(label for label in labels if label != -100) in whole
    assert cut > 0


@pytest.mark.parametrize("name", ["77.csv", "bom.csv", "integers.jsonl", "null.json"])
def test_cells_stay_as_they_stand_and_no_text_is_on_both_sides(models, data, name):
    train, valid, tokenizer, config = loaders(
        "causal_lm_lora", models["qwen2"], data[name], max_length=512
    )
    texts = [
        [
            tokenizer.decode(row["prompt"]).removeprefix("Tweet text : ").removesuffix(" Label :")
            for row in split
        ]
        for split in (train.dataset, valid.dataset)
    ]
    whole = [
        {text for text in texts_of_split if len(text) < 400} for texts_of_split in texts
    ]  # the others were cut
    assert whole[0] and whole[1] and not whole[0] & whole[1]
    if name.endswith(".csv"):
        with data[name].open(newline="", encoding="utf-8-sig") as file:
            cells = {
                (row[config.text_column], row[config.label_column]) for row in csv.DictReader(file)
            }
        labels = train.dataset["label"][:], valid.dataset["label"][:]
        for texts_of_split, labels_of_split in zip(texts, labels):
            short = [pair for pair in zip(texts_of_split, labels_of_split) if len(pair[0]) < 400]
            assert len(short) > 5 and set(short) <= cells


def test_split_depends_on_the_seed_alone(models, data):
    splits = [
        loaders("causal_lm_lora", models["qwen2"], data["77.csv"], seed=seed)[1].dataset["prompt"][
            :
        ]
        for seed in (1, 1, 2)
    ]
    assert splits[0] == splits[1] != splits[2]


def test_files_of_a_folder_are_its_splits(models, data):
    train, valid, _, _ = loaders("causal_lm_lora", models["qwen2"], data["folder"])
    assert (len(train.dataset), len(valid.dataset)) == (30, 30)


@pytest.mark.parametrize("script", ["causal_lm_full", "causal_lm_lora", "seq2seq_lora"])
def test_knobs_of_the_model_act(models, script):
    module, folder = load(script), models["t5" if script.startswith("seq2seq") else "llama"]
    settings = {
        "model_name_or_path": str(folder),
        "gradient_checkpointing": True,
        "dtype": "bfloat16",
    }
    settings |= {"attn_implementation": "eager"}
    lora = {
        "lora_r": 3,
        "lora_alpha": 6,
        "lora_dropout": 0.25,
        "target_modules": ["q" if "seq2seq" in script else "q_proj"],
    }
    if "lora" in script:
        settings |= lora
    [config] = module.HfArgumentParser(module.Config).parse_dict(settings)
    model = module.build_model(config, AutoTokenizer.from_pretrained(folder))
    assert model.is_activation_checkpointing
    assert model.config._attn_implementation == "eager"
    assert str(model.get_input_embeddings().weight.dtype) == "torch.bfloat16"
    if "lora" in script:
        adapter = model.peft_config["default"]
        assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout) == (3, 6, 0.25)
        trained = {
            name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad
        }
        assert trained and all(name.endswith((".q", ".q_proj")) for name in trained)
