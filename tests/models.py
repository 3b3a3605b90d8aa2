"""Small random models of many architectures with their usual tokenizers, and data to train them."""

import json
import random
from pathlib import Path

import torch
import transformers
from conftest import write_csv
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

# label -> words that decide it; labels of one and of several words give targets of unequal length
KEYS = {
    "complaint": ["broken", "late", "rude", "refund"],
    "no complaint at all from me": ["thanks", "great", "open", "tomorrow"],
}
FILLERS = "the my a parcel train phone bill order of in is was and today please @shop agent on it"
CORPUS = [*KEYS, *sum(KEYS.values(), []), FILLERS, "Tweet text : Label : Text Answer"] * 20

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
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
CAUSAL = {  # architecture -> (class of its tokenizer, settings of the model)
    "llama": ("LlamaTokenizer", SIZE | {"tie_word_embeddings": False}),
    "mistral": ("LlamaTokenizer", SIZE | {"tie_word_embeddings": False, "sliding_window": 64}),
    "gemma": ("GemmaTokenizer", SIZE | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Tokenizer", SIZE | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen2Tokenizer", SIZE | {"tie_word_embeddings": False}),
    "gpt2": ("GPT2Tokenizer", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "opt": ("GPT2Tokenizer", SIZE | {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}),
}
SEQ2SEQ = {
    "t5": ("T5Tokenizer", T5),
    "bart": ("BartTokenizer", BART),
    "mbart": ("MBartTokenizer", BART),
    "pegasus": ("PegasusTokenizer", BART),
}


def byte_bpe(specials):
    """Return vocabulary and merges of a byte-level BPE, which GPT-2, OPT, BART and Qwen use."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    return train(tokenizer, trainer)


def piece_bpe(specials):
    """Return vocabulary and merges of a BPE with byte fallback, as of Llama, Mistral and Gemma."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = [*specials, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=specials, show_progress=False)
    return train(tokenizer, trainer)


def unigram(specials, extra=()):
    """Return the vocabulary of a unigram model, which T5, mBART and Pegasus use.

    It consists of the words of CORPUS and of the ASCII letters; all else becomes <unk>. It is not
    trained, because the result of training differs from run to run.
    """
    words = [(f"▁{word}", -3.0) for word in sorted(set(" ".join(CORPUS).split()))]
    letters = [(letter, -9.0) for letter in ["▁", *map(chr, range(33, 127))]]
    first, last = ([(token, 0.0) for token in tokens] for tokens in (specials, extra))
    return {"vocab": [*first, *words, *letters, *last]}


def train(tokenizer, trainer):
    """Train a BPE tokenizer on CORPUS and return its vocabulary and merges."""
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(pair) for pair in model["merges"]]}


def make_tokenizer(kind, architecture):
    """Return a tokenizer of the class and with the special tokens of the architecture's models."""
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
        vocabulary = piece_bpe(["<unk>", "<s>", "</s>"])
        return transformers.LlamaTokenizer(**vocabulary, add_bos_token=True)  # no pad token
    if kind == "GemmaTokenizer":
        vocabulary = piece_bpe(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])
        return transformers.GemmaTokenizer(**vocabulary, add_bos_token=True)
    if kind == "T5Tokenizer":
        return transformers.T5Tokenizer(**unigram(["<pad>", "</s>", "<unk>"]), extra_ids=10)
    if kind == "PegasusTokenizer":
        vocabulary = unigram(["<pad>", "</s>", "<unk>", "<mask_1>", "<mask_2>"])
        return transformers.PegasusTokenizer(**vocabulary)
    if kind == "MBartTokenizer":
        languages = transformers.models.mbart.tokenization_mbart.FAIRSEQ_LANGUAGE_CODES
        vocabulary = unigram(["<s>", "<pad>", "</s>", "<unk>"], [*languages, "<mask>"])
        return transformers.MBartTokenizer(**vocabulary, src_lang="en_XX", tgt_lang="en_XX")
    raise ValueError(kind)


def make_model(folder, architecture, seed=0, **settings):
    """Save a random model of the architecture with its tokenizer to a folder and return the folder.

    Args:
        settings: settings of the model's config, which override those of CAUSAL or SEQ2SEQ.
    """
    kind, own = (CAUSAL | SEQ2SEQ)[architecture]
    tokenizer = make_tokenizer(kind, architecture)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    special = {name: getattr(tokenizer, name) for name in names}
    first = "eos_token_id" if architecture == "bart" else "pad_token_id"
    special["decoder_start_token_id"] = special[first]
    settings = {"vocab_size": len(tokenizer)} | special | own | settings
    config = AutoConfig.for_model(architecture, **settings)
    for name in vars(config):
        if name.endswith(("pdrop", "dropout")) and not isinstance(getattr(config, name), str):
            setattr(config, name, 0.0)
    torch.manual_seed(seed)
    auto = AutoModelForCausalLM if architecture in CAUSAL else AutoModelForSeq2SeqLM
    auto.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def make_rows(count, seed, noise=0.0):
    """Return rows (text, label). One word of the text decides the label.

    Args:
        noise: the share of rows with a random label, 0 to 1.
    """
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        label = list(KEYS)[number % len(KEYS)]
        words = draw.choices(FILLERS.split(), k=draw.randint(1, 14))
        words.insert(draw.randint(0, len(words)), draw.choice(KEYS[label]))
        rows.append((" ".join(words), draw.choice(list(KEYS)) if draw.random() < noise else label))
    return rows


def make_data(folder, train=160, validation=17, noise=0.0):
    """Write train.csv and validation.csv, with the scripts' default columns; return the folder."""
    Path(folder).mkdir()
    write_csv(Path(folder) / "train.csv", make_rows(train, seed=1, noise=noise))
    write_csv(Path(folder) / "validation.csv", make_rows(validation, seed=2, noise=noise))
    return Path(folder)


def teach(folder, steps, seed=3):
    """Train the full model in the folder until it answers with labels, some of them wrong.

    The rows differ from those of `make_data`. The trained model replaces the one in the folder.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    seq2seq = AutoConfig.from_pretrained(folder).is_encoder_decoder
    auto = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    model = auto.from_pretrained(folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = make_rows(16 * steps, seed, noise=0.1)
    for start in range(0, len(rows), 16):
        inputs, targets = [], []
        for text, label in rows[start : start + 16]:
            prompt = tokenizer(f"Tweet text : {text} Label :").input_ids
            if seq2seq:
                inputs.append(prompt)
                targets.append(tokenizer(text_target=label).input_ids)
            else:
                answer = tokenizer(f" {label}", add_special_tokens=False).input_ids
                answer.append(tokenizer.eos_token_id)
                inputs.append(prompt + answer)
                targets.append([-100] * len(prompt) + answer)
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
