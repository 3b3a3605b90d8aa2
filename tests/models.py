"""Small random models of many architectures, each with its own kind of tokenizer, and data that they can learn."""

import json
import random
from pathlib import Path

import torch
import transformers
from conftest import write_csv
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

# What decides the label of a row, and the label: of one word and of several, so that targets have unlike lengths.
KEYS = {
    "complaint": ["broken", "late", "rude", "refund"],
    "no complaint at all from me": ["thanks", "great", "open", "tomorrow"],
}
FILL = (
    "the my a parcel train phone bill order of in is was and today please @shop agent on it".split()
)
CORPUS = [*KEYS, *sum(KEYS.values(), []), " ".join(FILL), "Tweet text : Label : Text Answer"] * 20

# architecture -> its tokenizer, and settings of its own
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
}
SIZE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
CAUSAL = {
    "llama": ("LlamaTokenizer", SIZE | {"tie_word_embeddings": False}),
    "mistral": ("LlamaTokenizer", SIZE | {"tie_word_embeddings": False, "sliding_window": 64}),
    "gemma": ("GemmaTokenizer", SIZE | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Tokenizer", SIZE | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen2Tokenizer", SIZE | {"tie_word_embeddings": False}),
    "gpt2": ("GPT2Tokenizer", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "opt": ("GPT2Tokenizer", SIZE | {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}),
}
SEQ2SEQ = {
    "t5": (
        "T5Tokenizer",
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "dropout_rate": 0.0,
        },
    ),
    "bart": ("BartTokenizer", BART),
    "mbart": ("MBartTokenizer", BART),
    "pegasus": ("PegasusTokenizer", BART),
}


def byte_bpe(specials):
    """Vocabulary and merges of a byte-level BPE, as GPT-2, OPT, BART and Qwen have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    return train(tokenizer, trainer)


def piece_bpe(specials):
    """Vocabulary and merges of a BPE over pieces that fall back to bytes, as Llama, Mistral and Gemma have it."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = [*specials, *(f"<0x{byte:02X}>" for byte in range(256))]
    return train(
        tokenizer, trainers.BpeTrainer(vocab_size=600, special_tokens=specials, show_progress=False)
    )


def unigram(specials, extra=()):
    """Vocabulary of a unigram model over pieces, as T5, mBART and Pegasus have it: what it has not seen is <unk>."""
    words = [(f"▁{word}", -3.0) for word in sorted(set(" ".join(CORPUS).split()))]
    letters = [
        (letter, -9.0) for letter in ["▁", *map(chr, range(33, 127))]
    ]  # trained, it is another every time
    return {
        "vocab": [
            *((token, 0.0) for token in specials),
            *words,
            *letters,
            *((token, 0.0) for token in extra),
        ]
    }


def train(tokenizer, trainer):
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return {"vocab": model["vocab"]} | (
        {"merges": [tuple(pair) for pair in model["merges"]]} if "merges" in model else {}
    )


def make_tokenizer(kind, architecture):
    """Return a tokenizer of the class that the architecture's checkpoints come with, and with its special tokens."""
    if kind == "Qwen2Tokenizer":
        return transformers.Qwen2Tokenizer(**byte_bpe(["<|endoftext|>"]))
    if architecture == "gpt2":
        return transformers.GPT2Tokenizer(**byte_bpe(["<|endoftext|>"]))  # no pad token
    if architecture == "opt":
        end = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "</s>")
        return transformers.GPT2Tokenizer(
            **byte_bpe(["<pad>", "</s>"]), **end, pad_token="<pad>", add_bos_token=True
        )
    if kind == "BartTokenizer":
        return transformers.BartTokenizer(**byte_bpe(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]))
    if kind == "LlamaTokenizer":
        return transformers.LlamaTokenizer(
            **piece_bpe(["<unk>", "<s>", "</s>"]), add_bos_token=True
        )  # no pad token
    if kind == "GemmaTokenizer":
        return transformers.GemmaTokenizer(
            **piece_bpe(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]), add_bos_token=True
        )
    if kind == "T5Tokenizer":
        return transformers.T5Tokenizer(**unigram(["<pad>", "</s>", "<unk>"]), extra_ids=10)
    if kind == "PegasusTokenizer":
        return transformers.PegasusTokenizer(
            **unigram(["<pad>", "</s>", "<unk>", "<mask_1>", "<mask_2>"])
        )
    if kind == "MBartTokenizer":
        languages = transformers.models.mbart.tokenization_mbart.FAIRSEQ_LANGUAGE_CODES
        vocabulary = unigram(["<s>", "<pad>", "</s>", "<unk>"], [*languages, "<mask>"])
        return transformers.MBartTokenizer(**vocabulary, src_lang="en_XX", tgt_lang="en_XX")
    raise ValueError(kind)


def make_model(folder, architecture, seed=0, **settings):
    """Write a random model of the architecture, with its tokenizer, and return its folder."""
    kind, own = (CAUSAL | SEQ2SEQ)[architecture]
    tokenizer = make_tokenizer(kind, architecture)
    special = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    special["decoder_start_token_id"] = (
        special["eos_token_id"] if architecture == "bart" else special["pad_token_id"]
    )
    config = AutoConfig.for_model(
        architecture, vocab_size=len(tokenizer), **(special | own | settings)
    )
    for name in vars(config):
        if name.endswith(("pdrop", "dropout")) and not isinstance(getattr(config, name), str):
            setattr(config, name, 0.0)
    torch.manual_seed(seed)
    auto = AutoModelForCausalLM if architecture in CAUSAL else AutoModelForSeq2SeqLM
    auto.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def make_rows(count, seed, noise=0.0):
    """Return rows of text and label: a word of the text decides the label, but in a share of `noise` of the rows."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        label = list(KEYS)[number % len(KEYS)]
        words = draw.choices(FILL, k=draw.randint(1, 14))
        words.insert(draw.randint(0, len(words)), draw.choice(KEYS[label]))
        rows.append((" ".join(words), draw.choice(list(KEYS)) if draw.random() < noise else label))
    return rows


def make_data(folder, train=160, validation=17, noise=0.0):
    """Write train.csv and validation.csv with the scripts' default columns and return the folder."""
    Path(folder).mkdir()
    write_csv(Path(folder) / "train.csv", make_rows(train, seed=1, noise=noise))
    write_csv(Path(folder) / "validation.csv", make_rows(validation, seed=2, noise=noise))
    return Path(folder)


def teach(folder, steps, seed=3):
    """Train every weight of the model in the folder on rows of its own, so that it answers and now and then errs."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    seq2seq = AutoConfig.from_pretrained(folder).is_encoder_decoder
    model = (
        (AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM).from_pretrained(folder).train()
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = make_rows(16 * steps, seed, noise=0.1)
    for start in range(0, len(rows), 16):
        inputs, targets = [], []
        for text, label in rows[start : start + 16]:
            prompt = tokenizer(f"Tweet text : {text} Label :").input_ids
            answer = [
                *tokenizer(f" {label}", add_special_tokens=False).input_ids,
                tokenizer.eos_token_id,
            ]
            inputs.append(prompt if seq2seq else prompt + answer)
            targets.append(
                tokenizer(text_target=label).input_ids if seq2seq else [-100] * len(prompt) + answer
            )
        batch = {"input_ids": pad(inputs, 0), "labels": pad(targets, -100)}
        batch["attention_mask"] = pad([[1] * len(ids) for ids in inputs], 0)
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return Path(folder)


def pad(rows, value):
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, value)
