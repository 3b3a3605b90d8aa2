"""Users' models and data: many architectures, all kinds of tokenizers, files with tricky cells."""

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
from transformers import AutoTokenizer, HfArgumentParser, PreTrainedTokenizerFast

LABELS = ["None", "NA", "01", "once only", 'quoted "so", twice']
LABELS += [f"intent number {number}" for number in range(72)]
TEXTS = ["", "a, b", 'she said "no"', "two\nlines", "😀 👍🏽 é", "nan", "NULL", "1.50"]
TEXTS += [" spaces around ", "long " * 400]
COLUMNS = ("utterance, raw", "intent")
LAUNCHED = [
    ("causal_lm_lora_zero3_offload", "zero3_offload", "qwen2"),
    ("causal_lm_full_zero3", "zero3", "gemma"),
    pytest.param("seq2seq_lora_zero3_offload", "zero3_offload", "t5", marks=pytest.mark.slow),
    pytest.param("seq2seq_lora_zero3_offload", "zero3", "bart", marks=pytest.mark.slow),
]


def hard_rows(labels, count=120):
    """Return rows [text, label] that are hard to read from a file. "once only" labels one row."""
    draw = random.Random(5)
    rows = []
    for number, label in enumerate(labels):
        rows.append([draw.choice(TEXTS) + f" {number}" * (number % 7 > 0), label])
    frequent = [label for label in labels if label != "once only"]
    for number in range(count - len(rows)):
        rows.append([draw.choice(TEXTS) + f" {number}", draw.choice(frequent)])
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Data sets in all supported formats, with the columns COLUMNS: name -> path."""
    folder = tmp_path_factory.mktemp("data")
    write_csv(folder / "77.csv", hard_rows(LABELS), COLUMNS)
    write_csv(folder / "bom.csv", hard_rows(["yes", "no"], 40), COLUMNS)
    (folder / "bom.csv").write_bytes(b"\xef\xbb\xbf" + (folder / "bom.csv").read_bytes())
    (folder / "folder").mkdir()
    for split, seed in (("train", 1), ("validation", 2)):
        lines = (json.dumps(dict(zip(COLUMNS, row))) for row in make_rows(30, seed))
        (folder / "folder" / f"{split}.jsonl").write_text("\n".join(lines))
    text_column, label_column = COLUMNS
    rows = hard_rows(["a", "b"], 40)
    numbers = [{text_column: text, label_column: len(text) % 3} for text, _ in rows]
    (folder / "integers.jsonl").write_text("\n".join(map(json.dumps, numbers)))
    rows = hard_rows(["None", "NA"], 40)
    nulls = [{text_column: text or None, label_column: label} for text, label in rows]
    (folder / "null.json").write_text(json.dumps(nulls))
    names = ("77.csv", "bom.csv", "folder", "integers.jsonl", "null.json")
    return {name: folder / name for name in names}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: make_model(folder / name, name) for name in (*CAUSAL, *SEQ2SEQ)}


def script_of(architecture):
    return "causal_lm_lora" if architecture in CAUSAL else "seq2seq_lora"


def flags(model, dataset, output):
    words = ("--model_name_or_path", model, "--dataset_name", dataset, "--output_dir", output)
    words += ("--text_column", COLUMNS[0], "--label_column", COLUMNS[1])
    return (*words, "--max_steps", 2, "--warmup_ratio", 0)


@pytest.fixture(scope="module")
def single(forks, models, data, tmp_path_factory):
    """Runs in one process of all architectures, each with one of the data sets.

    Architecture -> (output folder, exit code, output).
    """
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
    words = flags(models[architecture], data["77.csv"], tmp_path / "run")
    launch(script, config, *words, processes=2)
    metrics = read_metrics(tmp_path / "run")
    assert metrics["strategy"] == "zero3"
    assert len(metrics["losses"]) == 2 and min(metrics["grad_norms"]) > 0


# Labels that JSON or datasets read as another type than text. datasets turns dates into timestamps.
TYPED = [[0, 1], [True, False], ["2024-01-01 00:00:00", "2025-12-31 00:00:00"]]


@pytest.mark.parametrize("labels", TYPED, ids=str)
@pytest.mark.parametrize("script", ["causal_lm_lora", "seq2seq_lora"])
def test_labels_stay_text_whatever_the_columns_are_called(models, tmp_path, script, labels):
    # the columns have the names of columns that the scripts make
    other = {"target": [0.5], "input_ids": [True]}
    rows = [{"prompt": f"text {n}", "label": labels[n % 2], **other} for n in range(20)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    module = load(script)
    model = str(models["llama" if script == "causal_lm_lora" else "t5"])
    settings = {"model_name_or_path": model, "dataset_name": str(tmp_path / "train.jsonl")}
    settings |= {"text_column": "prompt", "label_column": "label"}
    config = module.Config(**settings, output_dir=str(tmp_path / "run"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    train, valid = module.build_dataloaders(config, tokenizer, SimpleNamespace(num_processes=1))
    assert {type(row["label"]) for row in valid.dataset} == {str}
    decoded = {tokenizer.decode(tokenizer(str(label)).input_ids, True) for label in labels}
    assert {row["label"] for row in train.dataset} == decoded
    assert next(iter(train))["input_ids"].dtype == torch.long


def test_labels_end_with_eos_though_the_tokenizer_adds_none(models, tmp_path):
    file = tmp_path / "tokenizer.json"
    content = json.loads((models["t5"] / "tokenizer.json").read_text())
    file.write_text(json.dumps(content | {"post_processor": None}))
    special = {"eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), **special)
    assert tokenizer.eos_token_id not in tokenizer("text").input_ids
    module = load("seq2seq_lora")
    write_csv(tmp_path / "rows.csv", make_rows(20, seed=3))
    config = module.Config(dataset_name=str(tmp_path / "rows.csv"))
    train, _ = module.build_dataloaders(config, tokenizer, SimpleNamespace(num_processes=1))
    assert all(
        target[-1] == tokenizer.eos_token_id for target in (row["target"] for row in train.dataset)
    )


def load(script):
    """Import a script as a module."""
    spec = importlib.util.spec_from_file_location(script, ROOT / "examples" / f"{script}.py")
    module = sys.modules[script] = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


def loaders(script, folder, dataset, **settings):
    """Return a script's data loaders of both splits, its tokenizer and its Config."""
    module = load(script)
    tokenizer = settings.pop("tokenizer", None) or AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    settings |= {"dataset_name": str(dataset), "model_name_or_path": str(folder)}
    settings |= dict(zip(("text_column", "label_column"), COLUMNS))
    [config] = HfArgumentParser(module.Config).parse_dict(settings)
    both = module.build_dataloaders(
        config, tokenizer, SimpleNamespace(num_processes=1, print=print)
    )
    return (*both, tokenizer, config)


@pytest.mark.parametrize("architecture", CAUSAL)
def test_causal_batches(models, data, architecture):
    folder = models[architecture]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "right"  # prompts for generation are padded on the left nevertheless
    settings = {"tokenizer": tokenizer, "max_length": 64}
    train, valid, tokenizer, config = loaders("causal_lm_lora", folder, data["77.csv"], **settings)
    tail = tokenizer(" Label :", add_special_tokens=False).input_ids
    assert len(tail) > 1
    seen, truncated = set(), 0
    keys = ("input_ids", "attention_mask", "labels")
    for batch in train:
        for ids, mask, labels in zip(*(batch[key].tolist() for key in keys)):
            length, padding = sum(mask), len(mask) - sum(mask)
            assert mask == [1] * length + [0] * padding
            target = [label for label in labels if label != -100]
            start = length - len(target)
            assert ids[start:length] == target
            assert labels == [-100] * start + target + [-100] * padding
            assert ids[:start][-len(tail) :] == tail
            assert target[-1] == tokenizer.eos_token_id and length <= config.max_length
            seen.add(tokenizer.decode(target, skip_special_tokens=True).strip())
            truncated += length > 50
    assert seen <= set(LABELS) and len(seen) > 20 and truncated > 0
    for batch in valid:
        assert set(batch) == {"input_ids", "attention_mask"}
        for ids, mask in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist()):
            assert mask == sorted(mask) and ids[-len(tail) :] == tail


@pytest.mark.parametrize("architecture", SEQ2SEQ)
def test_seq2seq_batches(models, data, architecture):
    folder, settings = models[architecture], {"max_length": 64}
    train, valid, tokenizer, config = loaders("seq2seq_lora", folder, data["77.csv"], **settings)
    complete = {tuple(tokenizer(text_target=label).input_ids) for label in LABELS}
    truncated = 0
    for batch in [*train, *valid]:
        for ids, mask in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist()):
            prompt = [token for token, kept in zip(ids, mask) if kept]
            text = tokenizer.decode(prompt, skip_special_tokens=True)
            assert text.endswith("Label :") and text.startswith("Tweet text :")
            assert prompt[-1] == tokenizer("x").input_ids[-1] and len(prompt) <= config.max_length
            truncated += len(prompt) > 50
        for labels in batch["labels"].tolist() if "labels" in batch else ():
            assert tuple(label for label in labels if label != -100) in complete
    assert truncated > 0


@pytest.mark.parametrize("name", ["77.csv", "bom.csv", "integers.jsonl", "null.json"])
def test_cells_are_not_changed_and_no_text_is_in_both_splits(models, data, name):
    folder = models["qwen2"]
    train, valid, tokenizer, _ = loaders("causal_lm_lora", folder, data[name], max_length=512)

    def texts_of(split):
        decoded = [tokenizer.decode(row["prompt"]) for row in split]
        return [one.removeprefix("Tweet text : ").removesuffix(" Label :") for one in decoded]

    texts = [texts_of(train.dataset), texts_of(valid.dataset)]
    # longer texts may have been truncated
    complete = [{text for text in split if len(text) < 400} for split in texts]
    assert complete[0] and complete[1] and not complete[0] & complete[1]
    if name.endswith(".csv"):
        with data[name].open(newline="", encoding="utf-8-sig") as file:
            cells = {tuple(row[column] for column in COLUMNS) for row in csv.DictReader(file)}
        labels = ([row["label"] for row in split.dataset] for split in (train, valid))
        for texts_of_split, labels_of_split in zip(texts, labels):
            short = [pair for pair in zip(texts_of_split, labels_of_split) if len(pair[0]) < 400]
            assert len(short) > 5 and set(short) <= cells


def test_split_depends_on_the_seed_alone(models, data):
    splits = []
    for seed in (1, 1, 2):
        _, valid, *_ = loaders("causal_lm_lora", models["qwen2"], data["77.csv"], seed=seed)
        splits.append(valid.dataset)
    assert splits[0] == splits[1] != splits[2]


def test_files_of_a_folder_are_its_splits(models, data):
    train, valid, _, _ = loaders("causal_lm_lora", models["qwen2"], data["folder"])
    assert (len(train.dataset), len(valid.dataset)) == (30, 30)


@pytest.mark.parametrize("script", ["causal_lm_full", "causal_lm_lora", "seq2seq_lora"])
def test_settings_of_the_model_take_effect(models, script):
    module, folder = load(script), models["t5" if script.startswith("seq2seq") else "llama"]
    settings = {"model_name_or_path": str(folder), "gradient_checkpointing": True}
    settings |= {"dtype": "bfloat16", "attn_implementation": "eager"}
    if "lora" in script:
        settings |= {"lora_r": 3, "lora_alpha": 6, "lora_dropout": 0.25}
        settings["target_modules"] = ["q" if "seq2seq" in script else "q_proj"]
    [config] = HfArgumentParser(module.Config).parse_dict(settings)
    model = module.build_model(config, AutoTokenizer.from_pretrained(folder))
    assert model.is_activation_checkpointing
    assert model.config._attn_implementation == "eager"
    assert str(model.get_input_embeddings().weight.dtype) == "torch.bfloat16"
    if "lora" in script:
        adapter = model.peft_config["default"]
        assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout) == (3, 6, 0.25)
        trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        layers = {name.split(".lora_")[0] for name in trainable}
        assert layers and all(name.endswith((".q", ".q_proj")) for name in layers)
