"""Pretrain the tiny base models from scratch on a CPU, on the text that assets/corpus.py generates.

Run:  python -m assets.pretrain causal-lm
      python -m assets.pretrain seq2seq
"""

import argparse
import csv
import math
import random
import re
import shutil
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from assets.corpus import generate

ASSETS = Path(__file__).parent
VOCAB_SIZE = 1600
MAX_LENGTH = 128
SENTINELS = [f"<extra_id_{i}>" for i in range(8)]


def read_messages():
    messages = []
    for path in sorted(ASSETS.glob("complaints/*.csv")):
        with open(path, encoding="utf-8", newline="") as file:
            messages += [row["Tweet text"] for row in csv.DictReader(file)]
    return messages


def word_runs(text, length):
    """Return all runs of `length` words. Handles, capitals and punctuation cannot hide a copy."""
    words = re.findall(r"[\w']+", re.sub(r"[@#]\w+", "", text.lower()))
    length = min(length, len(words))
    return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}


def check_corpus(exchanges):
    """Raise if the pretraining text contains a label or seven consecutive words of the data set."""
    text = "\n".join(f"{prompt} {reply}".lower() for prompt, reply in exchanges)
    # "complain" is a part of both labels
    assert "complain" not in text, "a label occurs in the pretraining text"
    runs = set().union(*(word_runs(message, 7) for message in read_messages()))
    for length in {len(run) for run in runs}:  # a message of fewer than seven words is one run
        for prompt, _ in exchanges:
            copied = runs & word_runs(prompt, length)
            assert not copied, f"a message occurs in the pretraining text: {copied}"


def build_tokenizer(kind, exchanges):
    """Train a byte-level BPE tokenizer. It encodes any UTF-8 text without unknown tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    is_causal = kind == "causal-lm"
    special_tokens = ["<pad>", "<s>", "</s>"] if is_causal else ["<pad>", "</s>", *SENTINELS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"{prompt} {reply}" for prompt, reply in exchanges), trainer)
    template, special = ("<s> $A", "<s>") if is_causal else ("$A </s>", "</s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(special, tokenizer.token_to_id(special))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>" if is_causal else None,
        eos_token="</s>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_model(kind, tokenizer):
    if kind == "causal-lm":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=160,
                intermediate_size=416,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=512,
                tie_word_embeddings=True,
                attention_dropout=0.0,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=160,
            d_kv=40,
            d_ff=432,
            num_layers=4,
            num_decoder_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            classifier_dropout=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
    )


def take_embeddings(model, tokenizer, folder):
    """Copy the causal model's embeddings of shared tokens, scaled to T5's unit variance."""
    causal = LlamaForCausalLM.from_pretrained(folder)
    known = AutoTokenizer.from_pretrained(folder).get_vocab()
    weights = causal.get_input_embeddings().weight.detach()
    with torch.no_grad():
        for token, index in tokenizer.get_vocab().items():
            if token in known:
                model.shared.weight[index] = weights[known[token]] / weights.std()


def corrupt_spans(ids, tokenizer, rng):
    """Apply T5's objective: replace spans of 1 to 3 tokens, about a fifth of all, by sentinels.

    Returns the corrupted ids and the label ids, which are the sentinels with the removed spans.
    """
    source, target = [], []
    position = 0
    sentinels = iter(tokenizer.convert_tokens_to_ids(SENTINELS))
    for sentinel in sentinels:
        keep = rng.randint(3, 12)
        source += ids[position : position + keep]
        position += keep
        if position >= len(ids):
            break
        cut = rng.randint(1, 3)
        source.append(sentinel)
        target += [sentinel, *ids[position : position + cut]]
        position += cut
    return source + ids[position:], target


def encode(kind, exchanges, tokenizer, rng):
    """Return pairs (input_ids, labels). For the causal model both are the same list."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    prompts = tokenizer([prompt for prompt, _ in exchanges], add_special_tokens=False)["input_ids"]
    spaced = [f" {reply}" if kind == "causal-lm" else reply for _, reply in exchanges]
    replies = tokenizer(spaced, add_special_tokens=False)["input_ids"]
    examples = []
    for prompt, reply in zip(prompts, replies, strict=True):
        if kind == "causal-lm":
            ids = [bos, *prompt, *reply, eos][:MAX_LENGTH]
            examples.append((ids, ids))
        elif rng.random() < 0.5:  # the labels are the reply and the spans removed from the message
            source, target = corrupt_spans(prompt[: MAX_LENGTH - 1], tokenizer, rng)
            examples.append(([*source, eos], [*reply, *target, eos]))
        else:
            examples.append(([*prompt[: MAX_LENGTH - 1], eos], [*reply, eos]))
    return examples


def pad(rows, value):
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def build_batches(examples, batch_size, rng):
    """Yield batches in random order. Examples of similar length share one, to halve the padding."""
    rng.shuffle(examples)
    pool = batch_size * 50
    for start in range(0, len(examples), pool):
        chunk = sorted(examples[start : start + pool], key=lambda example: len(example[0]))
        batches = [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
        yield from rng.sample(batches, len(batches))


def pretrain(args):
    output_dir = Path(args.output_dir or ASSETS / f"tiny-{args.kind}")
    if output_dir.exists():
        if not args.overwrite_output_dir:
            message = f"error: {output_dir} exists; pass --overwrite_output_dir to replace it"
            raise SystemExit(message)
        shutil.rmtree(output_dir)

    # the order of float additions, and so the weights, depends on the number of threads
    torch.set_num_threads(args.num_threads)
    set_seed(args.seed)
    rng = random.Random(args.seed)
    exchanges = generate(args.num_exchanges, args.seed)
    check_corpus(exchanges)
    tokenizer = build_tokenizer(args.kind, exchanges[:50_000])
    model = build_model(args.kind, tokenizer).train()
    if args.kind == "seq2seq":
        take_embeddings(model, tokenizer, args.embeddings_from)
    examples = encode(args.kind, exchanges, tokenizer, rng)

    steps = args.num_exchanges // args.batch_size
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    scheduler = get_cosine_schedule_with_warmup(
        optimizer, num_warmup_steps=math.ceil(0.03 * steps), num_training_steps=steps
    )
    start = time.time()
    for step, batch in enumerate(build_batches(examples, args.batch_size, rng), start=1):
        input_ids = pad([source for source, _ in batch], tokenizer.pad_token_id)
        labels = pad([target for _, target in batch], -100)
        loss = model(
            input_ids=input_ids, attention_mask=input_ids.ne(tokenizer.pad_token_id), labels=labels
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == 1:
            seconds = time.time() - start
            print(f"step={step}/{steps} loss={loss.item():.4f} seconds={seconds:.0f}", flush=True)

    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    size = sum(path.stat().st_size for path in output_dir.iterdir())
    print(f"saved {model.num_parameters():,} parameters to {output_dir}, {size / 1e6:.1f} MB")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=["causal-lm", "seq2seq"])
    parser.add_argument("--output_dir", help="default: assets/tiny-<kind>")
    parser.add_argument("--overwrite_output_dir", action="store_true")
    parser.add_argument(
        "--embeddings_from", default=ASSETS / "tiny-causal-lm", help="causal model, for seq2seq"
    )
    parser.add_argument("--num_exchanges", type=int, default=100_000, help="each is seen once")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--num_threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    pretrain(parser.parse_args())


if __name__ == "__main__":
    main()
