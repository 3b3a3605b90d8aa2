"""utils/data.py and utils/rows.py: rows as they are, and a line or an error for all else."""

import json
from types import SimpleNamespace

import datasets
import pytest
from models import make_tokenizer

from utils import data, rows

COLUMNS = {"text_column": "t", "label_column": "l"}
MIXED = "Column 'l' of {} holds {}: all its cells are read as text."
READ = [  # file, its content, the rows
    ("a.csv", "t,l\n01,NA\n,x\n", [{"t": "01", "l": "NA"}, {"t": "", "l": "x"}]),
    ("a.csv", 't,l\n"a ""b""\nc",x\n\n', [{"t": 'a "b"\nc', "l": "x"}]),
    ("a.csv", "\ufefft,l\nx\n", [{"t": "x", "l": None}]),
    ("a.csv", "t,l,,\nx,y,,\n", [{"t": "x", "l": "y"}]),
    ("a.json", '\n[{"t": "x", "l": 1}]', [{"t": "x", "l": 1}]),
    (
        "a.jsonl",
        '{"t": "x"}\n\n{"t": "y", "l": 2}\n',
        [{"t": "x", "l": None}, {"t": "y", "l": 2}],
    ),
]
XY = [{"t": "x", "l": "1"}, {"t": "y", "l": "2"}]
# Once refused, changed or dropped: id -> (file, content, rows, unused cells, printed)
READ_CASES = {
    "csv in capitals": ("A.CSV", "t,l\nx,1\ny,2\n", XY, {}, ""),
    "jsonl in capitals": ("A.JSONL", '{"t": "x", "l": "1"}{"t": "y", "l": "2"}', XY, {}, ""),
    "glob characters": ("[20]?*{a,b}.csv", "t,l\nx,1\ny,2\n", XY, {}, ""),
    "index without a name": ("a.csv", ",t,l\n0,x,1\n1,y,2\n", XY, {"": 2}, ""),
    "two columns without a name": ("a.csv", ",t,,l\n0,x,,1\n,y,7,2\n", XY, {"": 2}, ""),
    "empty cells are not counted": ("a.csv", "t,l,m\nx,1,\ny,2,z\n", XY, {"m": 1}, ""),
    "columns of lists are not read": (
        "a.jsonl",
        '{"t": "x", "l": "1", "m": [1]}\n{"t": "y", "l": "2", "m": "a", "n": {"k": 1}}',
        XY,
        {"m": 2, "n": 1},
        "",
    ),
    "rows under a key": (
        "a.json",
        '{"version": "1.1", "data": [{"t": "x", "l": "1"}, {"t": "y", "l": "2"}]}',
        XY,
        {"version": 1},
        "",
    ),
    "rows under a key, on many lines": (
        "a.json",
        json.dumps({"rows": XY, "about": {"by": "me"}, "total": 2}, indent=2),
        XY,
        {"about": 1, "total": 1},
        "",
    ),
    "objects on many lines": ("a.json", "\n".join(json.dumps(r, indent=1) for r in XY), XY, {}, ""),
    "one object": ("a.json", '{"t": "x", "l": "1"}', XY[:1], {}, ""),
    "integers and floats": (
        "a.jsonl",
        '{"t": "x", "l": 1}\n{"t": "y", "l": 2.5}',
        [{"t": "x", "l": "1"}, {"t": "y", "l": "2.5"}],
        {},
        MIXED.format("a.jsonl", "float and int"),
    ),
    "numbers and text": (
        "a.jsonl",
        '{"t": "x", "l": 1}\n{"t": "y", "l": "2"}',
        XY,
        {},
        MIXED.format("a.jsonl", "int and str"),
    ),
    "truth and integers": (
        "a.jsonl",
        '{"t": "x", "l": true}\n{"t": "y", "l": 1}\n{"t": "z", "l": null}',
        [{"t": "x", "l": "True"}, {"t": "y", "l": "1"}, {"t": "z", "l": None}],
        {},
        MIXED.format("a.jsonl", "bool and int"),
    ),
    "an integer of more than 64 bits": (
        "a.jsonl",
        '{"t": "x", "l": 123456789012345678901}',
        [{"t": "x", "l": "123456789012345678901"}],
        {},
        MIXED.format("a.jsonl", "integers of more than 64 bits"),
    ),
    "NaN is an empty cell": ("a.json", '[{"t": "x", "l": NaN}]', [{"t": "x", "l": None}], {}, ""),
}
REFUSED = [  # file, its content, what the line says
    ("a.csv", 't,l\n1,x\n2,"y\n3,z\n', "unexpected end of data"),
    ("a.csv", "t,l\n1,x,y\n", "row 1 has 3 cells for 2 columns"),
    ("a.csv", "t,t\n1,x\n", "two columns are called 't'"),
    ("a.jsonl", '{"t": "x"}\n[1]\n', "row 2 is a list"),
    ("a.jsonl", '{"t": "x"}\n{"t"\n', "row 2 is not JSON"),
]
REFUSED_CASES = {
    "blank lines": ("a.csv", "\n\n", "has no rows"),
    "semicolons": ("a.csv", "t;l\nx;1\n", "its header is 't;l'; separate the cells by commas"),
    "tabs": ("a.csv", "t\tl\nx\t1\n", "separate the cells by commas"),
    "two lists": ("a.json", json.dumps({"train": XY, "test": XY}), "the lists train, test; write"),
    "a key twice": ("a.jsonl", '{"t": "x", "l": 1, "l": 2}', "the key 'l' twice"),
    "lists and text": ("a.jsonl", '{"t": "x", "l": [1]}\n{"t": "y", "l": "a"}', "--label_column"),
    "an open object": ("a.json", '{\n"data": [{"t": "x"}\n', "row 1 is not JSON: Expecting"),
    "a number": ("a.json", "42", "row 1 is a int"),
    "text after the rows": ("a.jsonl", '{"t": "x"}\nend', "row 2 is not JSON"),
    "an empty list": ("a.json", "[]", "has no rows"),
    "an empty object": ("a.json", "{}", "has no rows"),
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(name, content):
        file = data.Path(name)
        file.parent.mkdir(exist_ok=True)
        file.write_text(content, encoding="utf-8")
        return file

    return write


@pytest.mark.parametrize(("name", "content", "wanted"), READ)
def test_rows_are_read_as_they_are(write, name, content, wanted):
    assert rows.read_file(write(name, content), COLUMNS)[0].to_list() == wanted


@pytest.mark.cases
@pytest.mark.parametrize("case", READ_CASES)
def test_files_that_can_be_read_are_read(write, capsys, case):
    name, content, wanted, unused, printed = READ_CASES[case]
    found, others, _ = rows.read_file(write(name, content), COLUMNS)
    assert (found.to_list(), dict(others)) == (wanted, unused)
    assert capsys.readouterr().out.strip() == printed


@pytest.mark.parametrize(("name", "content", "words"), REFUSED)
def test_broken_files_are_errors(write, capsys, name, content, words):
    assert_refused(capsys, words, rows.read_file, write(name, content), COLUMNS)


@pytest.mark.cases
@pytest.mark.parametrize("case", REFUSED_CASES)
def test_an_error_names_the_true_reason(write, capsys, case):
    name, content, words = REFUSED_CASES[case]
    assert_refused(capsys, words, rows.read_file, write(name, content), COLUMNS)


def assert_refused(capsys, words, function, *args):
    with pytest.raises(SystemExit):
        function(*args)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error, error


def test_columns_to_keep_stay_as_they_are(write):
    file = write("a.jsonl", '{"t": "x", "l": "1", "m": [1, 2]}\n{"t": "y", "l": "2"}')
    found, unused, _ = rows.read_file(file, COLUMNS, keep=["m"])
    assert found["m"] == [[1, 2], None] and not unused


# Folders and splits -------------------------------------------------------------------------------
LINES = "t,l\n" + "".join(f"text {number},{number % 2}\n" for number in range(10))
# id -> (files of the folder, what the line of unused things says, rows to train on and held out)
FOLDERS = {
    "another split": (["train.csv", "validation.csv", "test.csv"], "file test.csv", 10, 10),
    "files of other kinds": (
        ["train.csv", "notes.txt", "b.xlsx"],
        "file b.xlsx, file notes.txt",
        8,
        2,
    ),
    "a folder": (["train.csv", "old/train.csv"], "folder old", 8, 2),
    "capitals": (["Train.CSV", "VALIDATION.csv", "readme.md"], "file readme.md", 10, 10),
    "another name of validation": (["train.csv", "val.csv"], "file val.csv", 8, 2),
    "hidden files are not named": (["train.csv", ".DS_Store"], "", 8, 2),
}


@pytest.mark.cases
@pytest.mark.parametrize("case", FOLDERS)
def test_files_that_are_not_read_are_named(write, capsys, case):
    files, told, *sizes = FOLDERS[case]
    for name in files:
        write(f"folder/{name}", "") if "/" not in name else data.Path("folder/old").mkdir()
        (data.Path("folder") / name).write_text(LINES)
    train, valid = data.load_data("folder", COLUMNS)
    assert [len(train), len(valid)] == sizes
    assert capsys.readouterr().out == (f"Unused in folder: {told}.\n" if told else "")


@pytest.mark.cases
def test_columns_that_are_not_read_are_named_once_with_their_cells(write, capsys):
    for split in ("train", "validation"):
        lines = LINES.replace("t,l", "t,l,id,day").replace("\n", ",7,\n").replace("day,7,", "day")
        write(f"folder/{split}.csv", lines)
    train, _ = data.load_data("folder", COLUMNS)
    assert train.column_names == ["t", "l"]
    told = "Unused in folder: column 'day' (0 cells), column 'id' (20 cells).\n"
    assert capsys.readouterr().out == told


@pytest.mark.cases
def test_a_folder_without_train_says_what_it_holds(write, capsys):
    write("folder/tests.csv", LINES)
    words = "holds no train.csv, train.json or train.jsonl, only file tests.csv"
    assert_refused(capsys, words, data.load_data, "folder", COLUMNS)


def hub(monkeypatch, **splits):
    """Let `load_dataset` return these splits, each a dict of columns and features."""
    found = {name: datasets.Dataset.from_dict(*one) for name, one in splits.items()}
    monkeypatch.setattr(data, "load_dataset", lambda name: datasets.DatasetDict(found))
    monkeypatch.setattr(data, "check_hub", lambda culprit: None)


CLASSES = datasets.ClassLabel(names=["World", "Sports"])
FEATURES = datasets.Features(t=datasets.Value("string"), l=CLASSES, id=datasets.Value("int64"))


@pytest.mark.cases
def test_of_the_hub_splits_and_columns_are_named_and_class_numbers_get_their_names(
    monkeypatch, capsys
):
    split = {"t": ["a", "b"], "l": [0, 1], "id": [7, 8]}
    hub(monkeypatch, train=(split, FEATURES), validation=(split, FEATURES), test=(split, FEATURES))
    train, valid = data.load_data("a/b", COLUMNS)
    assert train.to_list() == [{"t": "a", "l": "World"}, {"t": "b", "l": "Sports"}]
    printed = capsys.readouterr().out
    assert "Unused in a/b: column 'id' (4 cells), split test (2 rows).\n" in printed
    assert (
        "Column 'l' of train holds class numbers: their names are used, World, Sports." in printed
    )


@pytest.mark.cases
def test_a_row_of_the_hub_without_a_class_has_no_label(monkeypatch, capsys):
    hub(monkeypatch, train=({"t": ["a", "b"], "l": [0, -1], "id": [7, 8]}, FEATURES))
    assert_refused(capsys, "row 2 of train has no label", data.load_data, "a/b", COLUMNS)


@pytest.mark.cases
def test_bytes_are_not_text(monkeypatch, capsys):
    features = datasets.Features(t=datasets.Value("binary"), l=datasets.Value("string"))
    hub(monkeypatch, train=({"t": [b"a", b"b"], "l": ["x", "y"]}, features))
    assert_refused(capsys, "'t' holds binary, not text", data.load_data, "a/b", COLUMNS)


@pytest.mark.cases
def test_a_number_as_text_is_text_and_0_is_not_empty(write, capsys):
    write("a.jsonl", "".join(json.dumps({"t": n, "l": "x"}) + "\n" for n in range(10)))
    train, valid = data.load_data("a.jsonl", COLUMNS)
    assert sorted([*train["t"], *valid["t"]]) == [str(n) for n in range(10)]
    assert capsys.readouterr().out == ""


@pytest.mark.cases
def test_empty_texts_are_counted(write, capsys):
    write("a.csv", LINES + ",x\n ,y\n")
    data.load_data("a.csv", COLUMNS)
    told = "2 of 12 rows of train have an empty 't', row 11 first; they are used.\n"
    assert told in capsys.readouterr().out


# Held-out rows ------------------------------------------------------------------------------------
def split_texts(write, texts):
    write("a.csv", "t,l\n" + "".join(f"{text},{n % 2}\n" for n, text in enumerate(texts)))
    train, valid = data.load_data("a.csv", COLUMNS)
    assert not set(train["t"]) & set(valid["t"])
    assert sorted([*train["t"], *valid["t"]]) == sorted(texts)  # no row is left out
    return train, valid


def test_without_repeated_texts_a_fifth_is_held_out(write, capsys):
    train, valid = split_texts(write, [f"text {number}" for number in range(20)])
    assert (len(train), len(valid), capsys.readouterr().out) == (16, 4, "")


# id -> (texts, how many rows are held out)
REPEATED = {
    "four texts ten times": ([f"text {n % 4}" for n in range(40)], 10),
    "five texts four times": ([f"text {n % 5}" for n in range(20)], 4),
    "one text in most rows": (["a"] * 30 + [f"text {n}" for n in range(10)], 8),
    "two texts": (["a"] * 9 + ["b"], 1),
    "two rows": (["a", "b"], 1),
}


@pytest.mark.cases
@pytest.mark.parametrize("case", REPEATED)
def test_rows_of_one_text_stay_together_and_none_is_left_out(write, capsys, case):
    texts, held_out = REPEATED[case]
    train, valid = split_texts(write, texts)
    assert len(valid) == held_out and len(train) > 0
    told = f"{len(texts)} rows have {len(set(texts))} different 't'"
    assert (told in capsys.readouterr().out) == (len(set(texts)) < len(texts))


@pytest.mark.cases
@pytest.mark.parametrize(
    "texts, words",
    [(["a"] * 6, "all 6 rows of --dataset_name a.csv are equal in 't'"), (["a"], "has 1 row")],
)
def test_rows_that_cannot_be_divided_are_an_error(write, capsys, texts, words):
    assert_refused(capsys, words, split_texts, write, texts)


# Labels -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tokenizers():
    """A tokenizer that knows every character, and one that knows ASCII letters alone."""
    return {kind: make_tokenizer(kind, "") for kind in ("LlamaTokenizer", "T5Tokenizer")}


def check(tokenizers, kind, train, held_out=()):
    tokenizer = tokenizers[kind]
    labels = dict.fromkeys([*train, *held_out])
    targets = {one: tokenizer(f" {one}", add_special_tokens=False).input_ids for one in labels}
    return data.check_labels(train, targets, tokenizer, 999, 1)[0]


FREE = [f"answer {number} of many" for number in range(9)]
# id -> (tokenizer, training labels, what is printed)
LABELS = {
    "a blank before": (
        "LlamaTokenizer",
        [" good", "good"] * 3,
        "' good' (3 training rows) and 'good' (3)",
    ),
    "a blank behind": ("LlamaTokenizer", ["yes", "yes "] * 9, "'yes' (9 training rows) and 'yes '"),
    "one label alone": ("LlamaTokenizer", ["yes"] * 4, "All 4 training rows have the label 'yes'"),
    "free text with an unknown character": ("T5Tokenizer", [*FREE, "ok 🙂"], "'ok 🙂' to 'ok'"),
    "free text that becomes equal": (
        "T5Tokenizer",
        [*FREE, "ok 🙂", "ok 🙁"],
        "'ok 🙂' (1 training rows) and 'ok 🙁' (1)",
    ),
    "free text of unknown characters alone": ("T5Tokenizer", [*FREE, "🙂"], "'🙂' to ''"),
    "a class with an unknown character": ("T5Tokenizer", ["ok 🙂", "no"] * 3, "'ok 🙂' to 'ok'"),
}


@pytest.mark.cases
@pytest.mark.parametrize("case", LABELS)
def test_labels_that_can_be_learned_are_accepted_and_what_changes_is_said(tokenizers, capsys, case):
    kind, train, printed = LABELS[case]
    answers = check(tokenizers, kind, train)
    assert set(answers) == set(train) and printed in capsys.readouterr().out


@pytest.mark.cases
@pytest.mark.parametrize(
    "train, words",
    [
        (["ok 🙂", "ok 🙁"] * 3, "'ok 🙂' (3 training rows) and 'ok 🙁' (3), become the same text"),
        (["🙂", "no"] * 3, "label '🙂' becomes empty text"),
    ],
)
def test_classes_that_cannot_be_told_apart_are_an_error(tokenizers, capsys, train, words):
    assert_refused(capsys, words, check, tokenizers, "T5Tokenizer", train)


def test_ordinary_labels_print_nothing(tokenizers, capsys):
    answers = check(tokenizers, "LlamaTokenizer", ["yes", "no"] * 3, ["maybe"])
    assert answers == {one: one for one in ("yes", "no", "maybe")}
    assert capsys.readouterr().out == ""


# Loaders ------------------------------------------------------------------------------------------
def make(order=None, **settings):
    """Return the training batches of five rows on two processes, a batch per process and update."""
    values = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "seed": 1}
    values |= {"gradient_accumulation_steps": 1, "num_train_epochs": 2.0, "max_steps": -1}
    config, rows = SimpleNamespace(**values | settings), list("abcde")
    accelerator = SimpleNamespace(num_processes=2)
    train, valid = data.make_loaders(config, accelerator, rows, rows, "".join, "".join, order)
    assert list(valid) == ["ab", "cd", "e"]
    return list(train)


def test_a_loader_holds_the_batches_of_all_updates():
    drawn = make()
    assert len(drawn) == 6 and all(len(batch) == 2 for batch in drawn)  # 10 rows, 3 updates of 4
    assert sorted("".join(drawn)[:5]) == sorted("".join(drawn)[5:10]) == list("abcde")
    assert make() == drawn != make(seed=2)
    assert len(make(max_steps=7)) == 14
    assert len(make(gradient_accumulation_steps=3)) == 6  # one update of 12 rows


def test_the_order_of_the_rows_may_be_given():
    assert make(order=range(5)) == ["ab", "cd", "ea", "bc", "de", "ab"]


def test_an_order_that_leaves_out_rows_is_printed_and_a_wrong_one_refused(capsys):
    assert make(order=[4, 0], max_steps=1) == ["ea", "ea"]
    assert "The given order names 2 of 5 training rows." in capsys.readouterr().out
    with pytest.raises(SystemExit):
        make(order=[])
    assert "the given order is empty" in capsys.readouterr().err
    for wrong in ([0, 5], [-1], ["a"], [0.5]):
        with pytest.raises(SystemExit):
            make(order=wrong)
        assert (
            f"holds {wrong[-1]!r}: give indices of the 5 training rows" in capsys.readouterr().err
        )


def test_a_kept_column_that_is_missing_is_named(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"t": "a", "tags": []}\n{"t": "b", "tags": ["x"]}\n')
    train, _ = data.load_data(str(file), {"text_column": "t"}, keep=["tags"])
    assert set(train.column_names) == {"t", "tags"}
    with pytest.raises(SystemExit):
        data.load_data(str(file), {"text_column": "t"}, keep=["tagz"])
    assert "column 'tagz' is not in train: the columns are 't', 'tags'" in capsys.readouterr().err
