"""Rows of every usual shape and source; labels on exactly what the assistant says."""

import json
import os
import random
from contextlib import nullcontext
from types import SimpleNamespace

import datasets
import pytest
from conftest import ROOT
from models import make_tokenizer
from tokenizers import processors
from transformers import AutoTokenizer, HfArgumentParser

from examples import chat_sft
from utils import documents as documents_module
from utils.chat_templates import TEMPLATES, build_tokenizer
from utils.conversations import Conversation, DataError, EmptyRow, as_document
from utils.conversations import holds_chats, shape_of
from utils.documents import build_documents, read_stream
from utils.documents import encode as encode_row
from utils.splits import read_splits


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of datasets that the test leaves behind, and no network."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for library in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{library}.HF_HUB_OFFLINE", True)


def turns(*contents, system=None):
    """Return messages of user and assistant in turn, the user first."""
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents)]
    return [{"role": "system", "content": system}] * (system is not None) + messages


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# Shapes -------------------------------------------------------------------------------------------
PAIR = turns("a question", "an answer")
SHARED = [{"from": "human", "value": "a question"}, {"from": "gpt", "value": "an answer"}]
SHAPES = {  # name -> row; the columns of its shape; messages and the first to learn, or texts
    "messages": ({"messages": PAIR}, ("messages",), (PAIR, 0)),
    "conversations": ({"conversations": SHARED}, ("conversations",), (PAIR, 0)),
    "beside others": ({"id": 7, "text": "all", "messages": PAIR}, ("messages",), (PAIR, 0)),
    "developer": (
        {"messages": [{"role": "developer", "content": "be brief"}, *PAIR]},
        ("messages",),
        ([{"role": "system", "content": "be brief"}, *PAIR], 0),
    ),
    "tools": (
        {"messages": [*PAIR, *[{"role": "tool", "content": "42"}] * 2, PAIR[1]]},
        ("messages",),
        ([*PAIR, *[{"role": "tool", "content": "42"}] * 2, PAIR[1]], 0),
    ),
    "null keys": (
        {"messages": [dict.fromkeys(("role", "content")) | message for message in SHARED]},
        ("messages",),
        (PAIR, 0),
    ),
    "prompt": ({"prompt": "a", "completion": " b"}, ("prompt", "completion"), ("a", " b")),
    "prompt of messages": (
        {"prompt": turns("1", "2", "3"), "completion": [{"role": "assistant", "content": "4"}]},
        ("prompt", "completion"),
        (turns("1", "2", "3", "4"), 3),
    ),
    "output": (
        {"instruction": "do", "output": "x"},
        ("instruction", "output"),
        (turns("do", "x"), 0),
    ),
    "input": (
        {"instruction": "do", "input": "it", "output": "x"},
        ("instruction", "output"),
        (turns("do\n\nit", "x"), 0),
    ),
    "no input": (
        {"instruction": "do", "input": "", "output": "x"},
        ("instruction", "output"),
        (turns("do", "x"), 0),
    ),
    "response": (
        {"instruction": "do", "response": "x"},
        ("instruction", "response"),
        (turns("do", "x"), 0),
    ),
    "answer": (
        {"question": "who", "answer": "x"},
        ("question", "answer"),
        (turns("who", "x"), 0),
    ),
    "text": ({"text": "all of it", "other": 1}, ("text",), ("all of it",)),
}


def read(row, shape):
    """Return messages and the index of the first one to learn; or the texts of a row."""
    parts = as_document(row, shape, "row")
    if isinstance(parts, Conversation):
        roles = [message["role"] for message in parts.messages]
        answers = [number for number, role in enumerate(roles) if role == "assistant"]
        first = 0 if parts.learned == answers else parts.learned[0]
        assert parts.learned == [number for number in answers if number >= first]
        return parts.messages, first
    return parts


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(tmp_path, name, streaming):
    row, shape, document = SHAPES[name]
    rows, *_ = read_splits(
        str(write_jsonl(tmp_path / "rows.jsonl", [row] * 3)), streaming=streaming
    )
    assert shape_of(rows) == shape
    assert [read(row, shape) for row in rows] == [document] * 3
    assert holds_chats(rows, shape) == isinstance(document[-1], int)


def test_a_column_of_text_is_named():
    rows = [{"body": "all of it", "title": "x"}]
    assert shape_of(rows, "body") == ("body",)
    assert as_document(rows[0], ("body",), "row 1") == ("all of it",)
    with pytest.raises(DataError, match=r"the columns are body, title: .*it says text"):
        shape_of(rows)


# Sources ------------------------------------------------------------------------------------------
ROWS = [{"question": f"what is {number:02}?", "answer": f"{number:02}"} for number in range(20)]


def sources(folder):
    """Write ROWS in every form: name -> the path."""
    whole, first, second = (
        datasets.Dataset.from_list(rows) for rows in (ROWS, ROWS[:15], ROWS[15:])
    )
    (folder / "rows.json").write_text(json.dumps(ROWS))
    (folder / "indented.json").write_text(json.dumps(ROWS, indent=1))
    write_jsonl(folder / "rows.jsonl", ROWS)
    write_jsonl(folder / "lines.json", ROWS)
    (folder / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + (folder / "rows.jsonl").read_bytes())
    whole.to_csv(folder / "rows.csv")
    whole.to_parquet(folder / "rows.parquet")
    for kind in ("jsonl", "csv", "parquet"):
        (folder / kind).mkdir()
        for name, part in (("train", first), ("test", second)):
            getattr(part, f"to_{kind.removesuffix('l')}")(folder / kind / f"{name}.{kind}")
    whole.save_to_disk(folder / "disk")
    datasets.DatasetDict(train=first, validation=second).save_to_disk(folder / "splits")
    datasets.DatasetDict(one=first, two=second).save_to_disk(folder / "named")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("sources")
    sources(folder)
    return folder


ALONE = [
    "rows.json",
    "indented.json",
    "rows.jsonl",
    "lines.json",
    "bom.jsonl",
    "rows.csv",
    "rows.parquet",
    "disk",
]


@pytest.mark.parametrize("name", ALONE)
def test_a_file_is_one_split_and_its_text_stays_as_it_stands(folder, name):
    rows, held_out, *_ = read_splits(str(folder / name))
    assert list(rows) == ROWS and held_out is None


@pytest.mark.parametrize("name", ["jsonl", "csv", "parquet", "splits"])
def test_a_folder_has_splits(folder, name):
    rows, held_out, *_ = read_splits(str(folder / name))
    assert (list(rows), list(held_out)) == (ROWS[:15], ROWS[15:])


@pytest.mark.parametrize(
    "name", ["rows.json", "rows.jsonl", "rows.csv", "rows.parquet", "jsonl", "csv", "parquet"]
)
def test_sources_are_streamed(folder, name):
    rows, held_out, *_ = read_splits(str(folder / name), streaming=True)
    assert not hasattr(rows, "__len__") and (held_out is None or len(held_out) == 5)
    assert list(rows) + list(held_out or []) == ROWS


def test_cells_of_a_table_stay_text(tmp_path):
    cells = ["01", "1.50", "NA", "null", "true", "2024-01-01", " x ", "a\nb", 'a "b", c']
    datasets.Dataset.from_dict({"prompt": cells, "completion": cells}).to_csv(tmp_path / "rows.csv")
    rows, *_ = read_splits(str(tmp_path / "rows.csv"))
    assert rows["completion"][:] == cells == rows["prompt"][:]


SLICES = {  # splits -> the numbers of the rows to train on, and of those held out
    "train": (range(15), None),
    "train,test": (range(15), range(15, 20)),
    " test , train ": (range(15, 20), range(15)),
    "train[:4]": (range(4), None),
    "train[:80%],train[80%:]": (range(12), range(12, 15)),
    "train[:-3],train[-3:]": (range(12), range(12, 15)),
    "train[2:5],test[1:]": (range(2, 5), range(16, 20)),
    "train[:33%],train[33%:]": (range(4), range(4, 15)),
    "test[:100]": (range(15, 20), None),
    "train[:15],train[15:]": (range(15), range(0)),
    "train[9:3]": (range(0), None),
}


@pytest.mark.parametrize("splits", SLICES)
def test_splits_are_named_and_sliced(folder, splits):
    found = read_splits(str(folder / "jsonl"), splits=splits)[:2]
    assert [rows if rows is None else [ROWS.index(row) for row in rows] for rows in found] == [
        numbers if numbers is None else list(numbers) for numbers in SLICES[splits]
    ]


def test_without_a_split_called_train_the_first_is_taken(folder):
    rows, held_out, *_ = read_splits(str(folder / "named"))
    assert list(rows) == ROWS[:15] and held_out is None
    assert list(read_splits(str(folder / "named"), splits="two,one").held_out) == ROWS[:15]


# What is refused ----------------------------------------------------------------------------------
GOOD = json.dumps({"messages": PAIR})
FILES = {  # file -> what it holds; what the sentence says
    "nothing.txt": ("", "not a .json, .jsonl, .ndjson, .csv, .tsv, .parquet, .arrow file"),
    "empty.jsonl": ("", "is empty"),
    "empty.csv": ("", "is empty"),
    "blank.jsonl": ("\n\n", "has no rows"),
    "list.json": ("[]", "has no rows"),
    "header.csv": ("question,answer\n", "has no rows"),
    "broken.jsonl": (
        f'{GOOD}\n{GOOD}\n\n{{"messages": [\n{GOOD}\n',
        "broken.jsonl, line 4 is not a JSON object",
    ),
    "number.jsonl": (f"{GOOD}\n5\n", "number.jsonl, line 2 is not a JSON object (it is not {...})"),
    "late.jsonl": (f"{GOOD}\n" * 3000 + "{", "late.jsonl, line 3001 is not a JSON object"),
    "lines.json": (f'{GOOD}\n{{"messages": [\n{GOOD}\n', "lines.json, line 2 is not a JSON object"),
    "list_broken.json": (f"[{GOOD}, {GOOD}", "list_broken.json cannot be read"),
    "ragged.csv": ("question,answer\na,b\na,b,c\n", "line 3, saw 3"),
    "latin.csv": (b"text\ncaf\xe9\n", "utf-8"),
    "latin.jsonl": (
        GOOD.encode() + b'\n{"text": "caf\xe9"}\n',
        "latin.jsonl, line 2 is not UTF-8 text",
    ),
    "no.parquet": ("PAR", "Parquet"),
}


STREAMED = [
    (name, True) for name in FILES if name not in ("latin.jsonl", "late.jsonl")
]  # of a stream only the beginning is read here


@pytest.mark.parametrize(("name", "streaming"), [*((name, False) for name in FILES), *STREAMED])
def test_files_that_cannot_be_read(tmp_path, capfd, name, streaming):
    content, words = FILES[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if streaming and ", line" in words:  # a stream counts rows, and no blank lines
        words = "of the stream is not a JSON object"
    with pytest.raises(DataError) as error:
        shape_of(read_splits(str(tmp_path / name), streaming=streaming).train)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert capfd.readouterr().err == ""  # the libraries' own words would come before the one line


def test_a_broken_line_in_a_folder_is_named(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    (tmp_path / "test.jsonl").write_text(json.dumps(ROWS[0]) + "\n{")
    with pytest.raises(
        DataError, match=r"test.jsonl, line 2 is not a JSON object \(.*column 2\): fix it"
    ):
        read_splits(str(tmp_path))


NAMES = [  # dataset_name, splits; what the sentence says
    ("", "", "--dataset_name is empty"),
    ("missing.jsonl", "", "missing.jsonl is not there"),
    ("./missing", "", "missing is not there"),
    ("/data/missing/folder", "", "/data/missing/folder is not there"),
    ("nobody/nothing", "", "nobody/nothing cannot be read"),
    ("n" * 300, "", "cannot be read"),
    ("jsonl", "train,test,dev", "--splits train,test,dev names 3 splits"),
    ("jsonl", "dev", "has no split dev, it has train, test"),
    ("jsonl", "train,dev[:5]", "has no split dev[:5], it has train, test"),
    ("jsonl", "train[5]", "--splits train[5]: a slice is [a:b]"),
    ("jsonl", "train[a:b]", "--splits train[a:b]: a slice is [a:b]"),
    ("jsonl", "train[:5", "--splits train[:5: a slice is [a:b]"),
    ("jsonl", "train[::2]", "--splits train[::2]: a slice is [a:b]"),
]


@pytest.mark.parametrize(("name", "splits", "words"), NAMES)
def test_names_that_lead_nowhere(folder, monkeypatch, name, splits, words):
    monkeypatch.chdir(folder)
    with pytest.raises(DataError) as error:
        read_splits(name, splits=splits)
    assert words in str(error.value)


def test_a_stream_cannot_be_sliced_by_its_length(folder):
    with pytest.raises(DataError, match="a stream has no known length"):
        read_splits(str(folder / "jsonl"), splits="train[:50%]", streaming=True)


def said(*roles):
    return [{"role": role, "content": "x"} for role in roles]


MESSAGES = [  # messages; what the sentence says of row 7
    (said("user", ["assistant"]), "message 2 has the role ['assistant']: it must be text"),
    (said(None, "assistant"), 'message 1 is not {"role": ..., "content": ...}'),
    (turns("x", [{"type": "image"}]), "message 2 has a part of the kind image"),
    (turns("x", [["y"]]), "message 2 has a part of the kind list"),
    (turns("x", 2.5), "message 2 (assistant) has no text, but float: convert it"),
    (turns("x", True), "message 2 (assistant) has no text, but bool: convert it"),
    ([{"content": "x"}], 'message 1 is not {"role": ..., "content": ...}'),
    (["x"], 'message 1 is not {"role": ..., "content": ...}'),
    ([PAIR[0], PAIR[1] | {"weight": 0.5}], "message 2 has {'weight': 0.5}: it must be 0 or 1"),
    ([PAIR[0], PAIR[1] | {"tool_calls": "x"}], "message 2 has tool_calls that are not a list"),
    ("x", "holds a str, not a list of messages"),
    ({"role": "user"}, "holds a dict, not a list of messages"),
    (5, "holds a int, not a list of messages"),
]


@pytest.mark.parametrize(("messages", "words"), MESSAGES, ids=str)
def test_conversations_that_cannot_be_trained_on(messages, words):
    with pytest.raises(DataError) as error:
        as_document({"messages": messages}, ("messages",), "row 7")
    assert str(error.value).startswith("row 7") and words in str(error.value)


PROMPTS, QUESTIONS = ("prompt", "completion"), ("question", "answer")
OTHERS = [  # row, shape; what the sentence says
    ({"prompt": "x", "completion": 5.5}, PROMPTS, "no text in completion, but float"),
    ({"prompt": {"a": 1}, "completion": "x"}, PROMPTS, "no text in prompt, but dict"),
    ({"question": "x", "answer": 1.5}, QUESTIONS, "no text in answer, but float"),
    ({"question": "x", "input": ["x"], "answer": "x"}, QUESTIONS, "no text in input, but list"),
    ({"question": "x", "answer": "x", "history": "x"}, QUESTIONS, "history that is not pairs"),
    ({"question": "x", "answer": "x", "tools": "x"}, QUESTIONS, "tools that are not a list"),
    ({"question": "x", "answer": "x", "system": ["x"]}, QUESTIONS, "no text in system, but list"),
    ({"text": ["x"]}, ("text",), "message 1 is not {"),
    ({"text": 5.5}, ("text",), "no text in text, but float"),
]


@pytest.mark.parametrize(("row", "shape", "words"), OTHERS, ids=str)
def test_rows_that_cannot_be_trained_on(row, shape, words):
    with pytest.raises(DataError) as error:
        as_document(row, shape, "row 7")
    assert words in str(error.value) and "row 7" in str(error.value)


EMPTY = [  # rows with nothing to learn
    ({"prompt": "x", "completion": None}, PROMPTS),
    ({"prompt": "x"}, PROMPTS),
    ({"question": "x", "answer": " "}, QUESTIONS),
    ({"messages": []}, ("messages",)),
    ({"messages": None}, ("messages",)),
    ({"text": ""}, ("text",)),
    ({"text": None}, ("text",)),
    ({"body": "x"}, ("text",)),
]


@pytest.mark.parametrize(("row", "shape"), EMPTY, ids=str)
def test_rows_with_nothing_to_learn(row, shape):
    with pytest.raises(EmptyRow, match=f"rows with an empty {shape[-1]}, which are left out"):
        as_document(row, shape, "row 7")


@pytest.mark.parametrize("rows", [[], iter([]), [{}]], ids=["empty", "iterator", "no column"])
def test_no_rows(rows):
    with pytest.raises(DataError, match="the data has no rows"):
        shape_of(rows)


# What is trained on -------------------------------------------------------------------------------
def settings(**values):
    [config] = HfArgumentParser(chat_sft.Config).parse_dict(values)
    return config


def own_tokenizer(kind):
    """Return a tokenizer: the shipped one, or one of another family, with a template of its own."""
    if kind == "shipped":
        return AutoTokenizer.from_pretrained(ROOT / "assets/tiny-causal-lm")
    return make_tokenizer(
        *{"qwen": ("Qwen2Tokenizer", "qwen2"), "llama": ("LlamaTokenizer", "llama")}[kind]
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of tokenizers: kind -> folder."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for kind in ("shipped", "qwen", "llama"):
        own_tokenizer(kind).save_pretrained(folder / kind)
    return folder


OWN = (  # as Llama 2 writes it: no header of the assistant, the system's message within the user's
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{% set system = messages[0].content + '\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}"
    "[INST] {{ (system if loop.first else '') + m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
REWRITES = (  # as Qwen3 does: what the assistant thought is in its last turn alone
    "{% for m in messages %}{{ m.role }}: "
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def encode(saved, tmp_path):
    """encode(row, tokenizer=..., template=..., **settings) -> tokenizer, document of the row."""

    def encode(row, tokenizer="shipped", template="chatml", **values):
        if template not in ("none", "chatml", "zephyr"):
            (tmp_path / "own.jinja").write_text(template)
            template = str(tmp_path / "own.jinja")
        values = {
            "model_name_or_path": str(saved / tokenizer),
            "chat_template_format": template,
        } | values
        config, shape = settings(**values), shape_of([row])
        tokenizer, _ = build_tokenizer(config, holds_chats([row], shape))
        [document] = encode_row(row, 0, config, tokenizer, shape, "train")
        return tokenizer, document

    return encode


def trained(tokenizer, document):
    """Return the runs of label tokens as texts; each label must be its token."""
    runs, before = [], False
    for token, label in zip(document["input_ids"], document["labels"]):
        assert label in (token, -100)
        if label != -100:
            runs = [*runs[:-1], [*runs[-1], token]] if before else [*runs, [token]]
        before = label != -100
    return [tokenizer.decode(run) for run in runs]


CHAT = {"messages": turns("one?", "First it is.", "two?", "Second, then.", system="be brief")}


@pytest.mark.parametrize("template", ["chatml", "zephyr", OWN], ids=["chatml", "zephyr", "own"])
def test_every_turn_of_the_assistant_is_trained_on_and_nothing_else(encode, template):
    tokenizer, document = encode(CHAT, template=template)
    end, own = tokenizer.eos_token, template == OWN
    assert end == ("<|im_end|>" if template == "chatml" else "</s>")
    answers = [message["content"] for message in CHAT["messages"] if message["role"] == "assistant"]
    assert trained(tokenizer, document) == [
        f" {one} {end}" if own else f"{one}{end}" for one in answers
    ]
    text = tokenizer.apply_chat_template(CHAT["messages"], tokenize=False)
    assert tokenizer.decode(document["input_ids"]) == text
    assert document["length"] == len(document["input_ids"])


def test_the_texts_that_the_templates_write(encode):
    row = {"messages": turns("hi", "ho", system="be")}
    texts = [
        tokenizer.decode(document["input_ids"])
        for tokenizer, document in (encode(row), encode(row, template="zephyr"))
    ]
    assert texts[0] == (
        "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\nho<|im_end|>\n"
    )
    assert texts[1] == "<|system|>\nbe</s>\n<|user|>\nhi</s>\n<|assistant|>\nho</s>\n"


@pytest.mark.parametrize("format", ["chatml", "zephyr"])
def test_the_tokens_of_a_template_are_each_one_token(encode, format):
    tokenizer, document = encode(CHAT, template=format)
    for token in TEMPLATES[format].tokens:
        assert tokenizer(token, add_special_tokens=False).input_ids == [
            tokenizer.convert_tokens_to_ids(token)
        ]
        assert tokenizer.convert_tokens_to_ids(token) in document["input_ids"]


def test_without_any_template_chatml_is_taken_and_said(encode, capsys):
    tokenizer, document = encode(CHAT, template="none")
    assert document == encode(CHAT)[1]
    assert "so chatml is used" in capsys.readouterr().out


def test_the_template_of_the_tokenizer_is_taken(saved, encode):
    tokenizer = AutoTokenizer.from_pretrained(saved / "qwen")
    tokenizer.chat_template = OWN.replace("{{ bos_token }}", "")
    tokenizer.save_pretrained(saved / "with_template")
    _, document = encode(CHAT, tokenizer="with_template", template="none")
    assert trained(tokenizer, document) == [
        " First it is. <|endoftext|>",
        " Second, then. <|endoftext|>",
    ]


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no system here') }}", "{{ messages[9].content }}", "{% for %}"],
)
def test_a_template_that_raises_is_refused(encode, template):
    with pytest.raises(DataError, match="row 1 of train: the chat template raises an error"):
        encode(CHAT, template=template)


def test_of_a_prompt_of_messages_the_completion_is_trained_on(encode):
    row = {
        "prompt": turns("one?", "First.", "two?"),
        "completion": [{"role": "assistant", "content": "Second."}],
    }
    tokenizer, document = encode(row)
    assert trained(tokenizer, document) == ["Second.<|im_end|>"]


def test_of_a_pair_the_completion_and_the_end_are_trained_on(encode):
    tokenizer, document = encode(
        {"prompt": "Question: one? Answer:", "completion": " First it is."}
    )
    assert trained(tokenizer, document) == [" First it is.</s>"]
    assert tokenizer.decode(document["input_ids"]) == "<s>Question: one? Answer: First it is.</s>"


@pytest.mark.parametrize("kind", ["shipped", "qwen"])
def test_a_token_over_the_border_of_prompt_and_completion_is_trained_on(encode, kind):
    tokenizer, document = encode(
        {"prompt": "Question: one? Answer: ", "completion": "12"}, tokenizer=kind
    )
    assert trained(tokenizer, document)[0].strip().startswith("12")


def test_of_a_text_all_is_trained_on(encode):
    tokenizer, document = encode({"text": "It is  all one."})
    assert trained(tokenizer, document) == ["It is  all one.</s>"]


def test_an_end_that_the_tokenizer_adds_itself_is_trained_on(saved, encode):
    tokenizer = own_tokenizer("shipped")
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    template = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.save_pretrained(saved / "with_end")
    for row in ({"text": "all one."}, {"prompt": "all", "completion": " one."}):
        tokenizer, document = encode(row, tokenizer="with_end")
        assert document["input_ids"].count(tokenizer.eos_token_id) == 1
        assert document["labels"][-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("kind", ["shipped", "qwen", "trims"])
def test_spaces_within_an_answer_are_trained_on(saved, encode, kind):
    if kind == "trims":  # leaves spaces out of the places of its tokens, as RoBERTa's
        tokenizer = own_tokenizer("shipped")
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        tokenizer.save_pretrained(saved / "trims")
    code = "def f():\n    return  1\n\n\n# é 🙂 end"
    tokenizer, document = encode({"messages": turns("write", code)}, tokenizer=kind)
    assert trained(tokenizer, document) == [code + "<|im_end|>"]


def test_special_tokens_and_the_end_are_added_as_asked_for(encode):
    for row, is_chat in ((CHAT, True), ({"text": "all one."}, False)):
        for around in (None, False, True):
            for ends in (None, False, True):
                tokenizer, document = encode(
                    row,
                    template="zephyr" if is_chat else "none",
                    add_special_tokens=around,
                    append_concat_token=ends,
                )
                ids, expects_start = (
                    document["input_ids"],
                    around if around is not None else not is_chat,
                )
                assert (ids[0] == tokenizer.bos_token_id) == expects_start
                assert ids.count(tokenizer.bos_token_id) == expects_start
                assert (ids[-1] == tokenizer.eos_token_id) == (
                    ends if ends is not None else not is_chat
                )


@pytest.mark.parametrize(
    "row",
    [CHAT, {"prompt": "a", "completion": " b"}, {"text": "all"}],
    ids=["chat", "pair", "text"],
)
def test_all_tokens_are_trained_on_where_asked_for(encode, row):
    _, document = encode(row, train_on="all")
    assert document["labels"] == document["input_ids"]


# Pairs of questions and answers, as GSM8K has them ------------------------------------------------
def worded_problems(count, seed=0):
    """Return questions about prices, and worked answers that end with `#### ` and the number."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        name = draw.choice(["Ana", "Björn", "Chloé", "Dimitri", "Oğuz", "Zoë"])
        thing = draw.choice(["apples", "pencils", "crème brûlées", "tickets", "5-litre cans"])
        number, price, paid = draw.randint(2, 40), draw.randint(1, 25), draw.choice([1000, 2000])
        cost, change = number * price, paid - number * price
        question = (
            f"{name} buys {number} {thing} at ${price} each and pays with ${paid:,}. What is the "
            "change?"
        )
        answer = (
            f"The {thing} cost {number} * {price} = $<<{number}*{price}={cost}>>{cost}.\n"
            f"So {name} gets {paid} - {cost} = ${change} back.\n#### {change}"
        )
        rows.append({"question": question, "answer": answer})
    return rows


@pytest.mark.parametrize(
    ("kind", "template"),
    [("shipped", "chatml"), ("shipped", "zephyr"), ("qwen", "chatml"), ("llama", "zephyr")],
)
def test_of_worded_problems_exactly_the_answers_are_trained_on(saved, tmp_path, kind, template):
    problems = worded_problems(400)
    assert len({row["question"] for row in problems}) > 390
    rows, *_ = read_splits(str(write_jsonl(tmp_path / "problems.jsonl", problems)))
    config = settings(
        model_name_or_path=str(saved / kind),
        chat_template_format=template,
        max_length=10**6,
        output_dir=str(tmp_path),
    )
    tokenizer, _ = build_tokenizer(config, True)
    accelerator = SimpleNamespace(local_main_process_first=nullcontext)
    encoding = {"tokenizer": tokenizer, "shape": shape_of(rows)}
    documents, facts = build_documents(config, accelerator, rows, "train", **encoding)
    assert len(documents) == 400 and facts.startswith("400 documents")
    for document, problem in zip(documents, problems):
        [said] = trained(tokenizer, document)
        assert said == problem["answer"] + tokenizer.eos_token
        target = [label for label in document["labels"] if label != -100]
        assert target[-1] == tokenizer.eos_token_id and target.count(tokenizer.eos_token_id) == 1
        assert problem["question"] in tokenizer.decode(document["input_ids"])


@pytest.mark.parametrize("bad", [None, 17])
def test_several_processes_encode_as_one_does(saved, tmp_path, monkeypatch, bad):
    """The same documents and checksum, from the same cache; a bad row is refused by its number."""
    rows = worded_problems(40)
    if bad:
        rows[bad - 1]["answer"] = 2.5
    rows, *_ = read_splits(str(write_jsonl(tmp_path / "problems.jsonl", rows)))
    config = settings(model_name_or_path=str(saved / "shipped"), output_dir=str(tmp_path))
    tokenizer, _ = build_tokenizer(config, True)
    accelerator = SimpleNamespace(local_main_process_first=nullcontext)
    encoding = {"tokenizer": tokenizer, "shape": shape_of(rows)}
    found = []
    for cores in (2, 1):
        monkeypatch.setattr(documents_module, "ROWS_PER_WORKER", 10)
        monkeypatch.setattr(os, "sched_getaffinity", lambda process, cores=cores: range(cores))
        if bad:
            with pytest.raises(DataError, match=f"row {bad} of train"):
                build_documents(config, accelerator, rows, "train", **encoding)
        else:
            whose = (config, accelerator, rows, "train")
            documents, facts = build_documents(*whose, **encoding)
            found.append((documents["input_ids"], documents["labels"], facts))
    assert bad or found[0] == found[1]


def test_no_cache_outlives_the_code_that_filled_it(saved, tmp_path, monkeypatch):
    """datasets knows `encode` by its name alone, so the digest of the code has to tell."""
    rows, *_ = read_splits(str(write_jsonl(tmp_path / "chats.jsonl", [CHAT] * 3)))
    config = settings(model_name_or_path=str(saved / "shipped"), chat_template_format="chatml")
    tokenizer, _ = build_tokenizer(config, True)
    accelerator = SimpleNamespace(local_main_process_first=nullcontext)

    def labels():
        encoding = {"tokenizer": tokenizer, "shape": ("messages",)}
        documents, _ = build_documents(config, accelerator, rows, "train", **encoding)
        return documents["labels"][:]

    digest, before = documents_module.code_digest(), labels()
    monkeypatch.setattr(documents_module, "label_spans", lambda ids, *_: ids)  # an edit
    assert labels() == before  # from the cache
    monkeypatch.setattr(documents_module, "code_digest", lambda: f"not {digest}")
    assert labels() != before


# Long documents -----------------------------------------------------------------------------------
def built(saved, rows, **values):
    """Return the documents of a training split from build_documents, and the tokenizer."""
    config = settings(
        model_name_or_path=str(saved / "shipped"), chat_template_format="chatml", **values
    )
    tokenizer, _ = build_tokenizer(config, True)
    encoding = {"tokenizer": tokenizer, "shape": shape_of(rows)}
    accelerator = SimpleNamespace(local_main_process_first=nullcontext)
    dataset = datasets.Dataset.from_list(rows)
    return build_documents(config, accelerator, dataset, "the training split", **encoding)[
        0
    ], tokenizer


LONG = [
    {"messages": turns("short?", "Short it is.")},
    {"messages": turns("short?", "long " * 100)},
    {"messages": turns("long " * 100, "Short it is.")},
    {"messages": turns("short?", "Short it is.", "long " * 100, "Short it is.")},
]


def test_long_documents_are_cut_and_those_without_a_label_left_out(saved, capsys):
    documents, tokenizer = built(saved, LONG, max_length=60)
    assert [len(document["input_ids"]) for document in documents] == [
        documents[0]["length"],
        60,
        60,
    ]
    texts = [trained(tokenizer, document) for document in documents]
    assert [len(text) for text in texts] == [1, 1, 1]
    assert texts[0] == texts[2] == ["Short it is.<|im_end|>"] and texts[1][0].startswith(
        "long long"
    )
    said = capsys.readouterr().out
    assert (
        "3 documents" in said
        and "3 longer than --max_length truncated" in said
        and "1 of 4 left out" in said
    )


def test_long_documents_are_dropped_where_asked_for(saved, capsys):
    documents, tokenizer = built(saved, LONG, max_length=60, long_documents="drop")
    assert [trained(tokenizer, document) for document in documents] == [["Short it is.<|im_end|>"]]
    assert "3 longer than --max_length dropped, 3 of 4 left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    "values", [{"max_length": 5}, {"max_length": 10, "long_documents": "drop"}], ids=str
)
def test_no_document_left_is_refused(saved, values):
    with pytest.raises(
        DataError, match="no row of the training split has a token to train on within --max_length"
    ):
        built(saved, LONG, **values)


def test_a_row_is_refused_by_its_number(saved):
    with pytest.raises(DataError, match="row 3 of the training split, message 1 is not "):
        built(saved, [*LONG[:2], {"messages": [{"role": None, "content": "x"}]}])


def test_a_stream_leaves_out_what_has_no_label(saved):
    config = settings(
        model_name_or_path=str(saved / "shipped"), chat_template_format="chatml", max_length=60
    )
    tokenizer, _ = build_tokenizer(config, True)
    rows = datasets.Dataset.from_list(LONG).to_iterable_dataset()
    stream = list(read_stream(config, rows, [], 0, tokenizer=tokenizer, shape=("messages",)))
    assert sorted(document["length"] for document in stream) == sorted(
        document["length"] for document in built(saved, LONG, max_length=60)[0]
    )
