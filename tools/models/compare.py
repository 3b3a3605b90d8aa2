"""Compare a model that was loaded with what the script printed about the model it had trained."""

import ast
import csv
import json
import re

import torch
from torch.nn import functional

from tools.models.rows import NEW_TOKENS, NUM_SAMPLES, TOLERANCE

# the lines of Python that scripts and tools/merge_adapter print
LINES = re.compile(
    r"^from (?:peft|transformers) import (?:.|\n)*?^model = .*$(?:\nmodel\..*)?", re.MULTILINE
)
CHAT_ANSWER = re.compile(r"^  ['\"].* -> (['\"].*)$", re.MULTILINE)
ROW_ANSWER = re.compile(r"^  prediction (['\"].*?['\"]) +label '(?:no|yes)'$", re.MULTILINE)


def printed_model(output):
    """Return the model that the printed lines of Python load."""
    names = {}
    exec(LINES.findall(output)[-1], names)
    return names["model"].eval()


def printed_facts(run, is_chat):
    """Return the answers of the trained model that a run printed, and its held-out loss.

    The loss is None for a lesson, which records none.
    """
    output = (run / "train-0.stdout").read_text()
    answers = (CHAT_ANSWER if is_chat else ROW_ANSWER).findall(output)
    answers = [ast.literal_eval(answer) for answer in answers]
    if not is_chat:
        return answers, None
    evaluations = json.loads((run / "out" / "metrics.json").read_text())["evaluations"]
    return answers[-NUM_SAMPLES:], evaluations[-1]["eval_loss"]  # those before are older


def loaded_facts(model, tokenizer, is_chat):
    """Return the same of a loaded model, document by document, without code of the project."""
    if not is_chat:
        with open("rows/validation.csv", newline="") as file:
            texts = [f"Tweet text : {row['Tweet text']} Label :" for row in csv.DictReader(file)]
        is_seq2seq = model.config.is_encoder_decoder
        longest = len(tokenizer("yes" if is_seq2seq else " yes").input_ids) + 1  # with the end
        prompts = [tokenizer(text).input_ids for text in texts]
        return [answer(model, tokenizer, prompt, longest) for prompt in prompts], None
    with open("chat/test.jsonl") as file:
        chats = [json.loads(line)["messages"] for line in file]
    options = {"return_dict": False}
    prompts = [
        tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, **options)
        for chat in chats
    ]
    documents = [tokenizer.apply_chat_template(chat, **options) for chat in chats]
    loss, count = 0.0, 0
    for prompt, document in zip(prompts, documents):
        ids = torch.tensor([document])
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        first = len(prompt)
        loss += functional.cross_entropy(logits[first - 1 : -1], ids[0, first:], reduction="sum")
        count += len(document) - first
    prompts = prompts[:NUM_SAMPLES]
    answers = [answer(model, tokenizer, prompt, NEW_TOKENS) for prompt in prompts]
    return answers, float(loss) / count


def answer(model, tokenizer, prompt, longest):
    """Return the greedy answer to a prompt of token ids, of at most `longest` tokens."""
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": longest, "do_sample": False, "num_beams": 1}
    with torch.no_grad():
        tokens = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0]
    start = 0 if model.config.is_encoder_decoder else len(prompt)
    return tokenizer.decode(tokens[start:], skip_special_tokens=True).strip()


def logits_of(model):
    """Return the logits of a row of tokens; an encoder-decoder model gets them on both sides."""
    ids = torch.arange(10, 40)[None]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids
    with torch.no_grad():
        return model(**batch).logits


def difference(found, expected):
    """Return "" if answers and loss are equal, else how they differ."""
    answers, loss = found
    wanted, wanted_loss = expected
    if loss is not None and not abs(loss - wanted_loss) <= TOLERANCE * abs(wanted_loss):
        return f"the held-out loss is {loss:.5f}, and the script printed {wanted_loss:.5f}"
    if not wanted or len(answers) != len(wanted):
        return f"{len(answers)} answers, and the script printed {len(wanted)}"
    for one, other in zip(answers, wanted):
        if one != other:
            return f"an answer is {one!r}, and the script printed {other!r}"
    return ""
