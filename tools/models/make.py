"""Make the small random model of an architecture, its tokenizer, and data to train it on."""

import csv
import json
import warnings
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerFast,
)

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
ROLES = ("<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = "parcel train phone bill order agent letter ticket".split()
COLUMNS = ("Tweet text", "Label")  # the columns that the lessons read by default


def make_tokenizer():
    """Return a byte-level tokenizer: a token for each byte, the special tokens, and a template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL.values(), *ROLES, *alphabet]
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)
    tokenizer.add_tokens(list(ROLES), special_tokens=True)  # they exist, and are marked as special
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_config(architecture, tokenizer):
    """Return the config of a small model, with the tokenizer's vocabulary and special tokens."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    ids |= {"pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)}
    settings = dict(architecture.settings)
    if "vision_config" in settings:  # three tokens that mark images follow the text's tokens
        marks = ("image_token_index", "boi_token_index", "eoi_token_index")
        settings |= {name: len(tokenizer) + number for number, name in enumerate(marks)}
        ids["vocab_size"] += len(marks)
    parts = [name for name in ("text_config", "encoder", "decoder") if name in settings]
    settings |= {name: settings[name] | ids for name in parts}
    if architecture.model_type == "fsmt":
        ids |= {"src_vocab_size": len(tokenizer), "tgt_vocab_size": len(tokenizer)}
        settings["langs"] = ["en", "de"]
    return AutoConfig.for_model(architecture.model_type, **(settings if parts else ids | settings))


def build_model(architecture, tokenizer):
    """Return a random model, the same in every call."""
    config = make_config(architecture, tokenizer)
    auto = AutoModelForSeq2SeqLM if architecture.is_seq2seq else AutoModelForCausalLM
    if "vision_config" in architecture.settings:
        auto = AutoModelForImageTextToText
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return auto.from_config(config)


def save_model(architecture, folder):
    """Save the model with its tokenizer, as save_pretrained writes them."""
    tokenizer = make_tokenizer()
    build_model(architecture, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_data(folder):
    """Write a folder `chat` of conversations and a folder `rows` of texts with labels."""
    folder = Path(folder)
    for split, count in (("train", 16), ("test", 4)):
        questions = [f"{split} {n}: where is my {WORDS[n % len(WORDS)]}?" for n in range(count)]
        answers = [f"the {WORDS[n % len(WORDS)]} is here" for n in range(count)]
        (folder / "chat").mkdir(parents=True, exist_ok=True)
        with (folder / "chat" / f"{split}.jsonl").open("w") as file:
            for question, answer in zip(questions, answers):
                turns = [{"role": "user", "content": question}]
                turns.append({"role": "assistant", "content": answer})
                file.write(json.dumps({"messages": turns}) + "\n")
        (folder / "rows").mkdir(exist_ok=True)
        name = {"train": "train", "test": "validation"}[split]
        with (folder / "rows" / f"{name}.csv").open("w", newline="") as file:
            labels = [("no", "yes")[n % 2] for n in range(count)]
            csv.writer(file).writerows([COLUMNS, *zip(questions, labels)])
