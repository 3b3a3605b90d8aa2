"""Chat data that was once dropped, misread or refused: what is trained on, and what is said."""

import csv
import datetime
import gzip
import json
from contextlib import nullcontext
from types import SimpleNamespace

import datasets
import pytest
import torch
from conftest import ROOT
from models import make_tokenizer
from test_conversations import settings, trained, turns, write_jsonl
from transformers import AutoTokenizer

from examples import chat_sft
from tools.merge_adapter.write import copy_tokenizer
from utils import checkpoint
from utils import chat_templates, documents
from utils.chat import resuming
from utils.chat_templates import build_tokenizer, pin_date
from utils.conversations import DataError
from utils.documents import build_documents, code_digest, preview, read_stream
from utils.splits import read_splits
from utils.vocabulary import check_end, turn_ends

pytestmark = pytest.mark.cases
ASK, SAY = "Where is it?", "It came today."
ONE = turns(ASK, SAY)
TWO = turns("one?", "First.", "two?", "Second.")
CHATML = chat_templates.TEMPLATES["chatml"].text
END = "{{ eos_token }}"
# as Qwen3: thoughts are written after the last question alone, and an answer there always has some
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}{% if m.role != 'assistant' %}{{ m.role }}: {{ m.content }}"
    + END
    + "\n"
    "{% else %}{% set content = m.content or '' %}{% set thought = m.reasoning_content or '' %}"
    "{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set content = content.split('</think>')[-1].strip() %}{% endif %}"
    "assistant: {% if loop.index0 > ns.last and (loop.last or thought) %}"
    "<think>{{ thought }}</think>{% endif %}{{ content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }} "
    "{{ call.function.arguments | tojson }}</call>{% endfor %}" + END + "\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# as DeepSeek-R1: thoughts are never written, the prompt begins one; arguments are text
R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}{% endif %}"
    "{% if m.role == 'tool' %}<T>{{ m.content }}{% endif %}"
    "{% if m.role == 'assistant' %}<A>{% for call in m.tool_calls %}"
    "{{ call.function.name + '(' + call.function.arguments + ')' }}{% endfor %}"
    "{{ (m.content or '').split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<A><think>\n{% endif %}"
)
# as Mistral: the system message stands before the last question
MISTRAL = (
    "{% set system = '' %}{% if messages[0].role == 'system' %}"
    "{% set system = messages[0].content + ' ' %}{% set messages = messages[1:] %}{% endif %}"
    "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ (system if m == asked[-1] else '') + m.content }}[/INST]"
    "{% else %} {{ m.content }}" + END + "{% endif %}{% endfor %}"
)
MARKED = (  # marks what the assistant generates
    "{% for m in messages %}{{ m.role }}> {% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant> {% endif %}"
)
LAST_END = (  # ends the conversation, and no turn
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% else %}" + END + "{% endif %}"
)
COUNTED = (  # every message is written anew when another follows
    "{% for m in messages %}{{ loop.length }} {{ m.role }}: {{ m.content }}" + END + "{% endfor %}"
)
PARTS = (  # as LLaVA: content is a list of parts
    "{% for m in messages %}{{ m.role }}: {% for part in m.content | selectattr('type', 'equalto', "
    "'text') %}{{ part.text }}{% endfor %}" + END + "{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
KEYS = (  # writes the keys name and reasoning_content, and trims
    "{% for m in messages %}{{ m.role }} {{ m.name }}: {{ m.reasoning_content }}"
    "{{ m.content | trim }}" + END + "{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
DATED = "Today is {{ strftime_now('%d %b %Y') }}. " + CHATML
SCHEMA = {"type": "function", "function": {"name": "track", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "track", "arguments": {"number": 7}}}
TOOLS = [
    {"role": "user", "content": ASK},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "in the van"},
    {"role": "assistant", "content": SAY},
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of datasets that the test leaves behind, and no network."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for library in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{library}.HF_HUB_OFFLINE", True)


@pytest.fixture
def train(tmp_path, capsys):
    """train(rows or path, template, **settings) -> what is trained on, as texts, and what is said.

    rows: of a .jsonl file. labels: of each document the texts with a label.
    """

    def train(rows, template="chatml", **values):
        path = rows if not isinstance(rows, list) else write_jsonl(tmp_path / "in/x.jsonl", rows)
        model = values.pop("model", ROOT / "assets/tiny-causal-lm")
        if template not in ("none", "chatml", "zephyr"):
            (tmp_path / "own.jinja").write_text(template)
            template = str(tmp_path / "own.jinja")
        values |= {"model_name_or_path": str(model), "dataset_name": str(path)}
        config = settings(chat_template_format=template, **values)
        splits = chat_sft.read_rows(config)
        tokenizer, _ = build_tokenizer(config, splits.is_chat)
        accelerator = SimpleNamespace(local_main_process_first=nullcontext)
        whose = (config, accelerator, splits.train, "train", splits.unread)
        found, facts = build_documents(*whose, tokenizer=tokenizer, shape=splits.shape)
        labels = [[text.strip() for text in trained(tokenizer, one)] for one in found]
        texts = [preview(tokenizer, document) for document in found]
        said = capsys.readouterr().out
        return SimpleNamespace(labels=labels, texts=texts, said=said, facts=facts)

    return train


# Rows ---------------------------------------------------------------------------------------------
E = "<|im_end|>"  # of chatml
PLAIN = [[SAY + E]]
PAIRS = [["Hello", "Hi"], ["Well?", "Yes."]]
BEFORE = [["Hi" + E, "Yes." + E, SAY + E]]
ASKED = {"instruction": ASK, "output": SAY}
ROWS = {  # id -> row; its labels; what is in the first text or said
    "system column beside messages": (
        {"messages": ONE, "system": "Be brief."},
        PLAIN,
        ["Be brief"],
    ),
    "system column, own system": (
        {"messages": turns(ASK, SAY, system="Own."), "system": "Be brief."},
        PLAIN,
        ["Own.", "column system beside a system message, which is used (1 rows)"],
    ),
    "system_prompt, question, response": (
        {"system_prompt": "Be brief.", "question": ASK, "response": SAY},
        PLAIN,
        ["system\nBe brief."],
    ),
    "system beside an instruction": (ASKED | {"system": "Be brief."}, PLAIN, ["system\nBe brief."]),
    "system beside conversations": (
        {"conversations": [{"from": "human", "value": ASK}, {"from": "gpt", "value": SAY}]}
        | {"system": "Be brief."},
        PLAIN,
        ["Be brief.", "role human read as user (1 messages)", "role gpt read as assistant"],
    ),
    "history of pairs": (ASKED | {"history": PAIRS}, BEFORE, ["user\nHello", "user\nWell?"]),
    "history as text": (ASKED | {"history": json.dumps(PAIRS)}, BEFORE, ["user\nHello"]),
    "history of messages": (ASKED | {"history": turns("Hello", "Hi")}, [["Hi" + E, SAY + E]], []),
    "no history": (ASKED | {"history": None, "system": "", "input": None}, PLAIN, []),
    "query and response": ({"query": ASK, "response": SAY}, PLAIN, []),
    "prompt and response": ({"prompt": ASK, "response": SAY}, PLAIN, []),
    "input and output": ({"input": ASK, "output": SAY}, PLAIN, []),
    "conversation": ({"conversation": ONE}, PLAIN, []),
    "other columns": (
        {"messages": ONE, "id": 7, "source": "mail", "score": None},
        PLAIN,
        ["column id (1 rows); column source (1 rows)."],
    ),
    "prompt of text, answer of messages": ({"prompt": ASK, "completion": ONE[1:]}, PLAIN, []),
    "prompt of messages, answer of text": ({"prompt": ONE[:1], "completion": SAY}, PLAIN, []),
    "messages as JSON": (
        {"messages": json.dumps(ONE)},
        PLAIN,
        ["messages as text, which is parsed (1 rows)"],
    ),
    "messages as Python writes them": ({"messages": str(ONE)}, PLAIN, ["is parsed (1 rows)"]),
    "a number as the answer": ({"question": ASK, "answer": 12}, [["12" + E]], []),
    "weight 0": (
        {"messages": [TWO[0], TWO[1] | {"weight": 0}, *TWO[2:]]},
        [["Second." + E]],
        ["First.", "turns with weight 0 or false, which have no label (1 turns)"],
    ),
    "train false": (
        {"messages": [*TWO[:3], TWO[3] | {"train": False}]},
        [["First." + E]],
        ["(1 turns)"],
    ),
    "training false": (
        {"messages": [*TWO[:3], TWO[3] | {"training": False}]},
        [["First." + E]],
        ["training 0 or false, which have no label (1 turns)"],
    ),
    "loss_mask 0": (
        {"messages": [*TWO[:3], TWO[3] | {"loss_mask": 0}]},
        [["First." + E]],
        ["loss_mask 0 or false, which have no label (1 turns)"],
    ),
    "loss false": (
        {"messages": [*TWO[:3], TWO[3] | {"loss": False}]},
        [["First." + E]],
        ["loss 0 or false, which have no label (1 turns)"],
    ),
    "loss as a number": (
        {"messages": [ONE[0], ONE[1] | {"loss": 0.25}]},
        PLAIN,
        ["key loss (1 messages)"],
    ),
    "weight 1 of a question": (
        {"messages": [ONE[0] | {"weight": 1}, ONE[1] | {"weight": 1}]},
        PLAIN,
        ["key weight of messages that are not the assistant's (1 messages)"],
    ),
    "keys that no template writes": (
        {"messages": [ONE[0] | {"name": "Ann"}, ONE[1] | {"reasoning_content": "r", "id": 3}]},
        PLAIN,
        ["key id (1 messages); key name (1 messages); key reasoning_content (1 messages)"],
    ),
    "parts of text": (
        {"messages": turns([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], SAY)},
        PLAIN,
        ["user\na\nb", "content in several parts, joined by line breaks (1 messages)"],
    ),
    "a part as an object": ({"messages": turns({"type": "text", "text": ASK}, SAY)}, PLAIN, [ASK]),
    "parts of output_text": (
        {"messages": turns(ASK, [{"type": "output_text", "text": SAY}])},
        PLAIN,
        [ASK],
    ),
    "one question after the other": (
        {"messages": [{"role": "user", "content": "So."}, *ONE]},
        PLAIN,
        ["user\nSo."],
    ),
    "one answer after the other": ({"messages": [*ONE, ONE[1]]}, [[SAY + E] * 2], []),
    "the assistant first": (
        {"messages": [ONE[1], *TWO[:2]]},
        [[SAY + E, "First." + E]],
        ["answers found by their text, without a header (1 turns)"],
    ),
    "system in the middle": (
        {"messages": [*TWO[:2], {"role": "system", "content": "Now brief."}, *TWO[2:]]},
        [["First." + E, "Second." + E]],
        ["system\nNow brief."],
    ),
    "a role of its own": (
        {"messages": [{"role": "critic", "content": "Hm."}, *ONE]},
        PLAIN,
        ["critic\nHm.", "messages of the role critic, which have no label (1 messages)"],
    ),
    "roles in capitals": (
        {"messages": [{"role": "User", "content": ASK}, {"role": "Assistant", "content": SAY}]},
        PLAIN,
        ["role User read as user (1 messages); role Assistant read as assistant"],
    ),
    "role model": (
        {"messages": [ONE[0], {"role": "model", "content": SAY}]},
        PLAIN,
        ["role model read as assistant (1 messages)"],
    ),
    "an empty system message": (
        {"messages": turns(ASK, SAY, system="")},
        PLAIN,
        ["messages of the role system without text (1 messages)"],
    ),
    "an empty result of a tool": (
        {"messages": [*ONE, {"role": "tool", "content": ""}, ONE[1]]},
        [[SAY + E] * 2],
        ["messages of the role tool without text (1 messages)"],
    ),
    "a result of a tool as data": (
        {"messages": [*ONE, {"role": "tool", "content": {"place": "van"}}, ONE[1]]},
        [[SAY + E] * 2],
        ['{"place": "van"}', "results of tools as data, written as JSON (1 messages)"],
    ),
    "an answer without text": (
        {"messages": [TWO[0], {"role": "assistant", "content": None}, *TWO[2:]]},
        [["Second." + E]],
        ["turns of the assistant without text, which have no label (1 turns)"],
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows(train, name):
    row, labels, words = ROWS[name]
    done = train([row])
    assert done.labels == labels
    assert [part for part in words if part not in done.texts[0] + done.said] == []
    assert ("not used" in done.said) == any("(1 " in part for part in words)


EMPTY = {  # id -> a row with nothing to learn; what is said
    "no answer": (ASKED | {"output": ""}, "rows with an empty output, which are left out (1 rows)"),
    "null answer": (ASKED | {"output": None}, "rows with an empty output"),
    "no turn of the assistant": (ASKED | {"output": " "}, "rows with an empty output"),
}


@pytest.mark.parametrize("name", EMPTY)
def test_rows_with_nothing_to_learn_are_left_out_and_counted(train, name):
    row, words = EMPTY[name]
    done = train([ASKED, row, ASKED])
    assert done.labels == PLAIN * 2 and "1 of 3 left out" in done.said and words in done.said


def test_conversations_without_an_answer_are_left_out_and_counted(train):
    rows = [{"messages": messages} for messages in (ONE, ONE[:1], [], None, ONE)]
    done = train(rows)
    assert done.labels == PLAIN * 2 and "3 of 5 left out" in done.said
    assert "rows without a turn to learn, which are left out (1 rows)" in done.said
    assert "rows with an empty messages, which are left out (2 rows)" in done.said


def test_a_column_of_conversations_is_named(train):
    done = train([{"dialog": ONE, "system": "Be brief."}], dataset_text_field="dialog")
    assert done.labels == PLAIN and "Be brief." in done.texts[0]


def test_counts_are_those_of_the_rows(train):
    rows = [{"messages": ONE}, {"messages": ONE, "id": 1}, {"messages": ONE, "id": 2, "x": 1}]
    assert "column id (2 rows); column x (1 rows)." in train(rows).said


def test_a_system_column_beside_prompts_of_text_is_named(train):
    done = train([{"prompt": "a", "completion": " b", "system": "c"}], template="none")
    assert "column system beside prompts of text (1 rows)" in done.said


def test_weights_have_no_effect_where_all_is_trained_on(train):
    done = train([{"messages": [*TWO[:3], TWO[3] | {"weight": 0}]}], train_on="all")
    assert "weight 0 or false, all trained on (1 turns)" in done.said


WRONG = {  # id -> row; the sentence
    "image": (
        turns([{"type": "image_url", "image_url": "x"}], SAY),
        "a part of the kind image_url",
    ),
    "audio": (
        turns(ASK, [{"type": "audio", "audio": "x"}]),
        "message 2 has a part of the kind audio",
    ),
    "weight": ([ONE[0], ONE[1] | {"weight": 0.5}], "has {'weight': 0.5}: it must be 0 or 1"),
    "train": ([ONE[0], ONE[1] | {"train": "no"}], "has {'train': 'no'}: it must be 0 or 1"),
    "tools in chatml": (TOOLS, "calls tools, which the chat template does not write"),
    "a list of texts": (["a", "b"], 'message 1 is not {"role": ..., "content": ...}'),
    "a text": ("once upon a time", "holds a str, not a list of messages"),
    "a number": (turns(ASK, 2.5), "message 2 (assistant) has no text, but float"),
}


@pytest.mark.parametrize("name", WRONG)
def test_one_sentence(train, name):
    messages, words = WRONG[name]
    with pytest.raises(DataError) as error:
        train([{"messages": messages}])
    assert str(error.value).startswith("row 1 of train") and words in str(error.value)


# Tools --------------------------------------------------------------------------------------------
def test_tools_are_handed_to_the_template(train):
    done = train([{"messages": TOOLS, "tools": [SCHEMA]}], QWEN3)
    said = ['<think></think><call>track {"number": 7}</call></s>', f"<think></think>{SAY}</s>"]
    assert sum(done.labels, []) == said
    assert all(text.startswith(f"<tools>{json.dumps(SCHEMA)}</tools>") for text in done.texts)
    assert "tool: in the van" in done.texts[-1] and "column tools" not in done.said


FORMS = {
    "as JSON": {"tools": json.dumps([SCHEMA])},
    "empty text": {"tools": "[]"},
    "empty list": {"tools": []},
    "null": {"tools": None},
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_tools(train, name):
    done = train([{"messages": ONE} | FORMS[name]], QWEN3)
    assert done.texts[0].startswith("<tools>") == (name == "as JSON")
    assert done.labels == [[f"<think></think>{SAY}</s>"]]


def test_tools_that_no_template_writes_are_named(train):
    done = train([{"messages": ONE, "tools": [SCHEMA]}, {"messages": ONE, "tools": "[]"}])
    assert "column tools, which the template does not write (1 rows)" in done.said


@pytest.mark.parametrize("template", [QWEN3, R1], ids=["objects", "text"])
@pytest.mark.parametrize("arguments", [{"number": 7}, '{"number": 7}'], ids=["object", "text"])
def test_arguments_are_written_as_the_template_wants_them(train, template, arguments):
    call = {"type": "function", "function": {"name": "track", "arguments": arguments}}
    done = train(
        [{"messages": [TOOLS[0], TOOLS[1] | {"tool_calls": [call]}, *TOOLS[2:]]}], template
    )
    wanted = '<call>track {"number": 7}</call>' if template == QWEN3 else 'track({"number": 7})'
    assert wanted in sum(done.labels, [])[0]


def test_arguments_of_other_rows_are_not_added(train):
    """Arrow would give each call the keys of all others, as null."""
    other = {"type": "function", "function": {"name": "ask", "arguments": {"who": "Bo", "at": 1.0}}}
    rows = [{"messages": TOOLS}, {"messages": [TOOLS[0], TOOLS[1] | {"tool_calls": [other]}]}]
    done = train(rows, QWEN3)
    assert '<call>track {"number": 7}</call>' in done.texts[0]
    assert '<call>ask {"who": "Bo", "at": 1.0}</call>' in done.texts[-1]


# Templates ----------------------------------------------------------------------------------------
THOUGHT = turns("one?", "<think>a</think>First.", "two?", "<think>b</think>Second.")
OWN = "earlier turns that the template rewrites, each in its own document"
SEEN = {  # id -> template, messages; labels of each document; what is said
    "as Qwen3": (
        (QWEN3, TWO),
        [["<think></think>First.</s>"], ["<think></think>Second.</s>"]],
        [f"{OWN} (1 documents)"],
    ),
    "as Qwen3, thoughts": (
        (QWEN3, THOUGHT),
        [["<think>a</think>First.</s>"], ["<think>b</think>Second.</s>"]],
        [f"{OWN} (1 documents)"],
    ),
    "as Qwen3, a question at the end": (
        (QWEN3, [*TWO, TWO[0]]),
        [["<think></think>First.</s>"], ["<think></think>Second.</s>"]],
        [f"{OWN} (2 documents)"],
    ),
    "as DeepSeek-R1": (
        (R1, TWO),
        [["First.</s>", "Second.</s>"]],
        ["answers whose beginning differs from the prompt for generation (2 turns)"],
    ),
    "as DeepSeek-R1, thoughts": (
        (R1, THOUGHT),
        [["First.</s>", "Second.</s>"]],
        ["messages whose text the template changes or leaves out (2 messages)"],
    ),
    "as Mistral": (
        (MISTRAL, [{"role": "system", "content": "Be brief."}, *TWO]),
        [["First.</s>"], ["Second.</s>"]],
        [f"{OWN} (1 documents)"],
    ),
    "as Mistral, without system": ((MISTRAL, TWO), [["First.</s>", "Second.</s>"]], []),
    "generation": ((MARKED, TWO), [["First.</s>", "Second.</s>"]], []),
    "generation, weight 0": (
        (MARKED, [*TWO[:3], TWO[3] | {"weight": 0}]),
        [["First.</s>"]],
        ["weight 0"],
    ),
    "the end at the end": (
        (LAST_END, TWO),
        [["First.\n</s>"], ["Second.\n</s>"]],
        [f"{OWN} (1 documents)"],
    ),
    "counted messages": (
        (COUNTED, TWO),
        [["First.</s>"], ["Second.</s>"]],
        ["answers found by their text, without a header (2 turns)"],
    ),
    "keys": (
        (KEYS, [TWO[0] | {"name": "Ann"}, TWO[1] | {"reasoning_content": "r "}, *TWO[2:]]),
        [["r First.</s>", "Second.</s>"]],
        [],
    ),
    "parts": ((PARTS, TWO), [["First.</s>", "Second.</s>"]], []),
    "trimmed": ((KEYS, turns(" one? \n", " First. ")), [["First.</s>"]], []),
}


@pytest.mark.parametrize("name", SEEN)
def test_turns_are_learned_after_what_the_model_sees(train, name):
    (template, messages), labels, words = SEEN[name]
    done = train([{"messages": messages}], template)
    assert done.labels == labels
    assert [part for part in words if part not in done.said] == []
    assert words or "not used" not in done.said
    assert done.facts.startswith(f"{len(labels)} documents, ")


def test_each_turn_of_its_own_follows_its_history(train):
    done = train([{"messages": THOUGHT}], QWEN3)
    assert done.texts == [
        "user: one?</s>\nassistant: «<think>a</think>First.</s>»\n",
        "user: one?</s>\nassistant: First.</s>\nuser: two?</s>\n"
        "assistant: «<think>b</think>Second.</s>»\n",
    ]


def test_thoughts_in_a_key_are_written_or_counted(train):
    rows = [{"messages": [ONE[0], ONE[1] | {"reasoning_content": "The van left."}]}]
    assert train(rows, QWEN3).labels == [[f"<think>The van left.</think>{SAY}</s>"]]
    earlier = [TWO[0], TWO[1] | {"reasoning_content": "dropped", "weight": 0}, *TWO[2:3]]
    earlier += [TWO[3] | {"reasoning_content": "kept"}]
    done = train([{"messages": earlier}], QWEN3)
    assert done.labels == [["<think>kept</think>Second.</s>"]]
    assert "key reasoning_content, which the template leaves out there (1 messages)" in done.said


def test_all_of_a_conversation_is_one_document(train):
    done = train([{"messages": THOUGHT}], QWEN3, train_on="all")
    assert len(done.texts) == 1 and done.texts[0].startswith("«user: one?")
    assert "messages whose text the template changes or leaves out (1 messages)" in done.said


def test_several_documents_of_a_row_are_streamed(train, tmp_path):
    rows = [{"messages": TWO}] * 3
    (tmp_path / "own.jinja").write_text(QWEN3)
    config = settings(
        model_name_or_path=str(ROOT / "assets/tiny-causal-lm"),
        chat_template_format=str(tmp_path / "own.jinja"),
    )
    tokenizer, _ = build_tokenizer(config, True)
    splits = read_splits(str(write_jsonl(tmp_path / "x.jsonl", rows)), streaming=True)
    encoding = {"tokenizer": tokenizer, "shape": ("messages",)}
    found = list(read_stream(config, splits.train, [], 0, **encoding))
    labels = [trained(tokenizer, one)[0].strip() for one in found]
    assert labels == ["<think></think>First.</s>", "<think></think>Second.</s>"] * 3


RAISING = {  # id -> template; what the sentence says
    "a word": ("{{ raise_exception('not a\n word') }}", "(not a word)"),
    "an index": ("{{ messages[9].content }}", "raises an error"),
    "syntax": ("{% for %}", "raises an error"),
    "a type": ("{{ messages[0].content + 1 }}", "raises an error"),
    "no words": ("{{ raise_exception('') }}", "(TemplateError)"),
    "no text of the answer": (COUNTED.replace("m.content", "m.content | upper"), "does not show"),
}


@pytest.mark.parametrize("name", RAISING)
def test_what_a_template_raises_is_one_sentence(train, name):
    template, words = RAISING[name]
    with pytest.raises(DataError, match="^row 1 of train: the chat template") as error:
        train([{"messages": ONE}], template)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def named(tmp_path):
    """named(templates) -> folder of a tokenizer with these chat templates."""

    def named(templates):
        tokenizer = make_tokenizer("Qwen2Tokenizer", "qwen2")
        tokenizer.chat_template = templates
        tokenizer.save_pretrained(tmp_path / "named")
        return tmp_path / "named"

    return named


def test_of_named_templates_default_is_used(train, named):
    model = named({"default": KEYS, "tool_use": QWEN3})
    rows = [{"messages": ONE}, {"messages": ONE, "tools": [SCHEMA]}]
    done = train(rows, "none", model=model)
    assert done.texts[0].startswith("user :") and done.texts[1].startswith("<tools>")
    assert "default is used, and tool_use for rows with tools" in done.said


def test_a_named_template_is_chosen(named, capsys):
    model = named({"default": KEYS, "tool_use": QWEN3})
    config = settings(model_name_or_path=str(model), chat_template_format="tool_use")
    assert build_tokenizer(config, True)[0].chat_template == QWEN3
    assert "The chat template tool_use is used and saved, without the others (default)" in (
        capsys.readouterr().out
    )


CHOICES = {  # id -> templates, choice; what the line says
    "unknown name": ({"default": KEYS, "x": KEYS}, "rag", "the tokenizer, which has default, x"),
    "no default": ({"rag": KEYS, "tool_use": KEYS}, "none", "name one of rag, tool_use in"),
    "no names": (KEYS, "rag", "which names none"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_a_template_that_is_not_there(named, capsys, name):
    templates, choice, words = CHOICES[name]
    config = settings(model_name_or_path=str(named(templates)), chat_template_format=choice)
    with pytest.raises(SystemExit):
        build_tokenizer(config, True)
    assert words in capsys.readouterr().err


def test_an_answer_without_an_end_is_said(train):
    endless = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert "ends an answer without a special token" in train([{"messages": ONE}], endless).said
    assert "special token" not in train([{"messages": ONE}], QWEN3).said


def test_generation_stops_where_the_template_ends_an_answer():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/tiny-causal-lm")
    assert turn_ends(tokenizer) == {tokenizer.eos_token_id}
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = CHATML  # as a base model of Qwen: another eos token
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert turn_ends(tokenizer) == {tokenizer.eos_token_id, end}


def test_a_template_with_an_end_of_its_own_needs_no_eos_token(capsys):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/tiny-causal-lm")
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    tokenizer.eos_token, tokenizer.chat_template = None, CHATML
    check_end("a model", tokenizer, ends_turns=True)
    for template, ends_turns in ((CHATML, False), ("{{ messages[-1].content }}", True)):
        tokenizer.chat_template = template
        with pytest.raises(SystemExit):
            check_end("a model", tokenizer, ends_turns)
        assert "a tokenizer without eos_token" in capsys.readouterr().err


def test_a_checkpoint_and_a_merge_hold_a_folder_of_templates(tmp_path, monkeypatch):
    values = {"is_main_process": True, "process_index": 0, "num_processes": 1, "scaler": None}
    values |= {"distributed_type": "NO", "wait_for_everyone": lambda: None, "_models": []}
    monkeypatch.setattr(checkpoint, "gather_object", list)
    weight = torch.nn.Parameter(torch.ones(2))
    tokenizer = make_tokenizer("Qwen2Tokenizer", "qwen2")
    tokenizer.chat_template = {"default": KEYS, "tool_use": QWEN3}
    optimizer = torch.optim.SGD([weight], lr=0.1)
    whose = (SimpleNamespace(**values), tmp_path, 1, optimizer, {}, tokenizer.save_pretrained)
    folder = checkpoint.save_checkpoint(*whose)
    assert checkpoint.read_state(folder)["step"] == 1 and checkpoint.checkpoints(tmp_path) == [
        folder
    ]
    assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template
    (tmp_path / "merged").mkdir()
    copy_tokenizer(tmp_path / "merged", [folder])
    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged.chat_template == tokenizer.chat_template
    write(folder / "additional_chat_templates/tool_use.jinja", "x")
    with pytest.raises(
        checkpoint.CheckpointError, match="tool_use.jinja is missing or is not what"
    ):
        checkpoint.read_state(folder)


# Dates --------------------------------------------------------------------------------------------
class Later(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2031, 5, 4, 3, 2, 1)


@pytest.mark.parametrize("form", ["text", "named"])
def test_a_run_resumes_with_the_date_of_its_first_start(monkeypatch, form):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/tiny-causal-lm")
    tokenizer.chat_template = DATED if form == "text" else {"default": DATED, "other": CHATML}

    def written(date):
        pinned, date = pin_date(tokenizer, date)
        return pinned.apply_chat_template(ONE, tokenize=False), date

    text, date = written(None)
    monkeypatch.setattr(chat_templates, "datetime", Later)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Later)
    assert "04 May 2031" not in text and written(date) == (text, date)
    assert "Today is 04 May 2031" in written(None)[0]
    assert "04 May 2031" in tokenizer.apply_chat_template(ONE, tokenize=False)  # which is saved


def test_the_date_is_a_part_of_the_checkpoint():
    config = settings(model_name_or_path="x")
    accelerator = SimpleNamespace(num_processes=1)

    def identity(date):
        data = SimpleNamespace(facts="x", template_date=date)
        return resuming.identify(config, accelerator, data)

    assert identity("2026-01-02T03:04:05")["template_date"] == "2026-01-02T03:04:05"
    assert "template_date" not in identity(None)  # checkpoints of before have none


def test_a_template_without_a_date_stays():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/tiny-causal-lm")
    tokenizer.chat_template = CHATML
    assert pin_date(tokenizer, None) == (tokenizer, None)


# Files --------------------------------------------------------------------------------------------
def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


LINES = json.dumps({"messages": ONE}) + "\n"
DATA = {"messages": ONE}
TABLE = "prompt,completion\na,b\n"
FILES = {  # id -> files; what to read; number of rows; what is not read
    "capitals": ({"CHAT.JSONL": LINES}, "CHAT.JSONL", 1, []),
    "capitals in a folder": ({"in/Train.JSONL": LINES}, "in", 1, []),
    "glob characters": ({"[2025] run/chat*?.jsonl": LINES}, "[2025] run/chat*?.jsonl", 1, []),
    "a folder with glob characters": ({"a[1]*/chat.jsonl": LINES}, "a[1]*", 1, []),
    "csv with glob characters": ({"[x].csv": "question,answer\na,b\n"}, "[x].csv", 1, []),
    "parts of one split": ({"in/a.jsonl": LINES, "in/b.jsonl": LINES}, "in", 2, []),
    "folders as splits": (
        {"in/train/a.jsonl": LINES, "in/dev/b.jsonl": LINES, "in/c.jsonl": LINES},
        "in",
        1,
        ["files c.jsonl (read: dev/b.jsonl, train/a.jsonl)"],
    ),
    "mixed formats": (
        {"in/train.jsonl": LINES, "in/more.csv": TABLE},
        "in",
        1,
        ["files more.csv (read: train.jsonl)"],
    ),
    "mixed formats of one split": (
        {"in/a.jsonl": LINES, "in/b.jsonl": LINES, "in/c.csv": TABLE},
        "in",
        2,
        ["files c.csv (read: a.jsonl, b.jsonl)"],
    ),
    "formats of splits": ({"in/train.jsonl": LINES, "in/test.csv": TABLE}, "in", 1, []),
    "foreign files": (
        {"in/train.jsonl": LINES, "in/notes.txt": "x", "in/README.md": "x", "in/.hidden": "x"},
        "in",
        1,
        ["files notes.txt (read: train.jsonl)"],
    ),
    "other splits": (
        {"in/train.jsonl": LINES, "in/test.jsonl": LINES, "in/valid.jsonl": LINES * 2},
        "in",
        1,
        ["split validation (2 rows)"],
    ),
    "shards": (
        {"in/data/sft-00000-of-00001.jsonl": LINES, "in/data/rl-00000-of-00001.jsonl": LINES},
        "in",
        1,
        ["split sft (1 rows)"],
    ),
    "rows in an object": (
        {"x.json": json.dumps({"version": 2, "data": [DATA, DATA]}, indent=1)},
        "x.json",
        2,
        ["key version of x.json"],
    ),
    "rows in an object on a line": ({"x.json": json.dumps({"rows": [DATA]})}, "x.json", 1, []),
    "one row on several lines": ({"x.json": json.dumps(DATA, indent=1)}, "x.json", 1, []),
    "one row with lists": (
        {"x.jsonl": json.dumps({"question": "a", "answer": "b", "choices": [{"c": 1}]})},
        "x.jsonl",
        1,
        [],
    ),
    "a table": ({"x.json": json.dumps({"prompt": ["a"], "completion": ["b"]})}, "x.json", 1, []),
    "a table of pandas": (
        {
            "x.json": json.dumps(
                {"prompt": {"0": "a", "1": "c"}, "completion": {"0": "b", "1": "d"}}
            )
        },
        "x.json",
        2,
        [],
    ),
    "a list of texts": ({"x.json": '["a", "b"]'}, "x.json", 2, []),
    "a list of conversations": ({"x.json": json.dumps([ONE, ONE])}, "x.json", 2, []),
    "conversations in an object": ({"x.json": json.dumps({"data": [ONE, ONE]})}, "x.json", 2, []),
    "a list after a blank line": ({"x.json": "\n " + json.dumps([DATA])}, "x.json", 1, []),
    "a list in .jsonl": ({"x.jsonl": json.dumps([DATA] * 2)}, "x.jsonl", 2, []),
    "blank lines": ({"x.jsonl": f"\n{LINES}\n \n{LINES}"}, "x.jsonl", 2, []),
    "ndjson": ({"x.ndjson": LINES}, "x.ndjson", 1, []),
    "tsv": ({"x.tsv": "question\tanswer\na, b\t01\n"}, "x.tsv", 1, []),
    "gzip": ({"x.jsonl.gz": gzip.compress(LINES.encode())}, "x.jsonl.gz", 1, []),
    "gzip in a folder": ({"in/x.jsonl.gz": gzip.compress(LINES.encode())}, "in", 1, []),
}


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path, name):
    files, source, count, unread = FILES[name]
    for file, content in files.items():
        write(tmp_path / file, content)
    splits = read_splits(str(tmp_path / source))
    assert len(list(splits.train)) == count and splits.unread == unread


def test_what_is_not_read_is_said_in_one_line(train, tmp_path):
    rows = json.dumps({"messages": [ONE[0] | {"name": "x"}, ONE[1]], "id": 1}) + "\n"
    for name, text in {"train.jsonl": rows, "dev.jsonl": LINES, "test.jsonl": LINES}.items():
        write(tmp_path / "data" / name, text)
    write(tmp_path / "data/more.csv", TABLE)
    [line] = [one for one in train(tmp_path / "data").said.splitlines() if "not used" in one]
    assert line == (
        "train, not used or changed: files more.csv (read: dev.jsonl, test.jsonl, "
        "train.jsonl); split validation (1 rows); column id (1 rows); key name (1 messages)."
    )


BAD = {  # id -> files; what the sentence says
    "several lists": (
        json.dumps({"train": [DATA], "test": [DATA]}),
        "x.json holds several lists of rows (train, test): write each to a file of its own",
    ),
    "an empty list": ('{"data": []}', "x.json has no rows"),
    "numbers": ("[1, 2]", "x.json, row 1 is a int, not {...}"),
    "broken": ('{"data": [{"a": 1}', "x.json cannot be read: Expecting ',' delimiter"),
    "a number": ("5", "x.json has no rows"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_json_file_is_refused_for_its_true_reason(tmp_path, name):
    content, words = BAD[name]
    with pytest.raises(DataError) as error:
        read_splits(str(write(tmp_path / "x.json", content)))
    assert words in str(error.value)


KEPT = {  # id -> answers of rows, which stay as they stand
    "dates": ["2024-01-01", "2024-01-02"],
    "numbers as text": ["01", "1.50"],
    "times": ["2024-01-01 10:00:00"],
    "separators of lines": ["a\u2028b\x85c"],
    "types": ["text", [{"type": "text", "text": "part"}]],
}


@pytest.mark.parametrize("streaming", [False, True], ids=["read", "streamed"])
@pytest.mark.parametrize("name", KEPT)
def test_json_stays_as_it_stands(tmp_path, name, streaming):
    rows = [{"question": "x", "answer": answer} for answer in KEPT[name]]
    for file in ("x.jsonl", "x.json"):
        text = json.dumps(rows) if file == "x.json" else "".join(f"{json.dumps(r)}\n" for r in rows)
        splits = read_splits(str(write(tmp_path / file, text)), streaming=streaming)
        assert [row["answer"] for row in splits.train] == KEPT[name]


def test_a_cell_of_json_is_parsed(train, tmp_path):
    path = tmp_path / "chats.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["messages", "id"], [json.dumps(ONE), "7"], [str(ONE), "8"]])
    done = train(path)
    assert done.labels == PLAIN * 2
    assert "column id (2 rows); messages as text, which is parsed (2 rows)" in done.said


def test_nulls_that_arrow_adds_are_no_keys(train, tmp_path):
    rows = [{"messages": TOOLS}, {"messages": [ONE[0] | {"name": "Ann"}, ONE[1]]}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    done = train(tmp_path / "x.parquet", QWEN3)
    assert '<call>track {"number": 7}</call>' in done.texts[0]
    assert "key name (1 messages)" in done.said and "tool_calls" not in done.said


def test_a_configuration_is_chosen(tmp_path):
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("main", "extra")
    )
    write(tmp_path / "set/README.md", card + "---\n")
    for name, count in {"main": 1, "extra": 2}.items():
        write(tmp_path / f"set/{name}.jsonl", LINES * count)
    with pytest.raises(DataError, match="configurations .*main.*: name one in --dataset_config"):
        read_splits(str(tmp_path / "set"))
    splits = read_splits(str(tmp_path / "set"), "extra")
    assert len(splits.train) == 2 and splits.unread == ["files main.jsonl (read: extra.jsonl)"]


def test_a_home_folder_and_a_url(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "x.jsonl", LINES)
    assert len(read_splits("~/x.jsonl").train) == 1
    with pytest.raises(DataError, match="is a URL: download the file"):
        read_splits("https://example.org/x.jsonl")


# Caches -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("where", ["under a file", "proc"])
def test_a_cache_that_cannot_be_written(train, tmp_path, monkeypatch, where):
    write(tmp_path / "file", "x")
    cache = "/proc/none" if where == "proc" else tmp_path / "file/cache"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    done = train([{"messages": ONE}])
    assert done.labels == PLAIN and f"The cache {cache} cannot be written" in done.said


def test_the_key_of_the_cache_covers_all_code_that_fills_it(monkeypatch):
    """Every file that `encode` or the reader imports, but for printing and packing."""
    found, names = set(), ["documents", "splits"]
    while names:
        name = names.pop()
        found.add(name)
        text = (ROOT / f"utils/{name}.py").read_text()
        lines = [line.split()[1] for line in text.splitlines() if line.startswith("from utils.")]
        names += {line.removeprefix("utils.") for line in lines} - found
    assert found - set(documents.CACHED) == {"errors", "packing"}
    before = code_digest.__wrapped__()
    for name in documents.CACHED:
        monkeypatch.setattr(documents, "CACHED", [one for one in documents.CACHED if one != name])
        assert code_digest.__wrapped__() != before
        monkeypatch.undo()


# Streams ------------------------------------------------------------------------------------------
@pytest.fixture
def stream(tmp_path, capsys):
    """stream(text of a .jsonl file, **settings) -> number of documents, what is said."""

    def stream(text, **values):
        model = str(ROOT / "assets/tiny-causal-lm")
        config = settings(model_name_or_path=model, chat_template_format="chatml", **values)
        rows = read_splits(str(write(tmp_path / "x.jsonl", text)), streaming=True).train
        tokenizer, _ = build_tokenizer(config, True)
        encoding = {"tokenizer": tokenizer, "shape": ("messages",)}
        first = next(read_stream(config, rows, ["file y"], 0, is_strict=True, **encoding))
        found = list(read_stream(config, rows, ["file y"], 0, **encoding))
        assert first in found
        return len(found), capsys.readouterr().out

    return stream


def test_of_a_stream_is_counted_what_is_not_used(stream):
    extra = json.dumps({"messages": ONE, "id": 1}) + "\n"
    empty = json.dumps({"messages": []}) + "\n"
    count, said = stream(LINES * 3 + extra * 2 + empty)
    assert count == 5 and "counted at the end of each epoch" in said and "file y" in said
    assert "New in the stream, not used or changed: column id (1 rows)" in said
    [line] = [line for line in said.splitlines() if line.startswith("The stream, epoch 1")]
    assert line.startswith("The stream, epoch 1: 5 documents of 6 rows, not used")
    assert "column id (2 rows)" in line and "empty messages, which are left out (1 rows)" in line


def test_of_a_stream_long_documents_are_counted(stream):
    long = json.dumps({"messages": turns("word " * 90, SAY)}) + "\n"
    count, said = stream(LINES * 2 + long, max_length=60, shuffle=False)
    assert count == 2 and "longer than --max_length, truncated (1 documents)" in said
    assert "without a label within --max_length, left out (1 documents)" in said


BROKEN = {
    "no JSON": "{\n",
    "no object": "[1]\n",
    "no UTF-8": b'{"messages": "caf\xe9"}\n',
    "no messages": '{"messages": 5}\n',
    "a template's error": json.dumps({"messages": [ONE[0] | {"content": 2.5}, ONE[1]]}) + "\n",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_row_of_a_stream_that_cannot_be_trained_on_is_left_out(stream, monkeypatch, name):
    """After training has started no row stops the run."""
    monkeypatch.setattr("utils.splits.BEGINNING", 3)
    bad = BROKEN[name].encode() if isinstance(BROKEN[name], str) else BROKEN[name]
    count, said = stream(LINES.encode() * 3 + bad + LINES.encode(), shuffle=False)
    assert count == 4 and "Left out: row 4 of the stream" in said
    assert "rows that cannot be trained on, which are left out (1 rows)" in said


def test_the_beginning_of_a_stream_is_checked(tmp_path):
    with pytest.raises(DataError, match=r"row 2 of the stream is not a JSON object \(.*\): fix it"):
        read_splits(str(write(tmp_path / "x.jsonl", LINES + "{\n")), streaming=True)


@pytest.mark.parametrize(
    ("splits", "counts"), {"train[2:],train[:2]": (3, 2), "train[1:3]": (2, 0)}.items()
)
def test_a_stream_is_sliced_by_numbers_of_rows(tmp_path, splits, counts):
    path = write(tmp_path / "x.jsonl", LINES * 5)
    train, held_out, *_ = read_splits(str(path), splits=splits, streaming=True)
    assert (len(list(train)), len(held_out or [])) == counts
