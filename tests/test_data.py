"""utils/data.py: rows of files as they are, or one sentence that says what is wrong with them."""

import pytest

from utils import data

COLUMNS = {"text_column": "t", "label_column": "l"}
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
REFUSED = [  # file, its content, what the line says
    ("a.csv", 't,l\n1,x\n2,"y\n3,z\n', "unexpected end of data"),
    ("a.csv", "t,l\n1,x,y\n", "row 1 has 3 cells for 2 columns"),
    ("a.csv", "t,l,\n1,x,y\n", "row 1 has a cell in a column without a name"),
    ("a.csv", "t,t\n1,x\n", "two columns are called 't'"),
    ("a.jsonl", '{"t": "x", "l": 1}\n{"t": "y", "l": "a"}\n', "--label_column 'l' has values"),
    (
        "a.jsonl",
        '{"t": "x", "l": 123456789012345678901234567890}\n',
        "--label_column 'l' has values",
    ),
    ("a.jsonl", '{"t": "x"}\n[1]\n', "row 2 is a list"),
    ("a.jsonl", '{"t": "x"}\n{"t"\n', "row 2 is not JSON"),
]


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        (tmp_path / name).write_text(content, encoding="utf-8")
        return tmp_path / name

    return write


@pytest.mark.parametrize(("name", "content", "rows"), READ)
def test_rows_are_read_as_they_are(write, name, content, rows):
    assert data.read_file(write(name, content), COLUMNS).to_list() == rows


@pytest.mark.parametrize(("name", "content", "words"), REFUSED)
def test_broken_files_are_errors(write, capsys, name, content, words):
    with pytest.raises(SystemExit):
        data.read_file(write(name, content), COLUMNS)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error


def test_a_column_that_cannot_be_stored_and_is_not_read_is_left_out(write, capsys):
    file = write("a.jsonl", '{"t": "x", "l": 1, "m": 1}\n{"t": "y", "l": 2, "m": "s"}\n')
    assert data.read_file(file, COLUMNS).column_names == ["t", "l"]
    assert "Column 'm' of" in capsys.readouterr().out


def test_rows_with_a_held_out_text_are_left_out_and_counted(write, capsys):
    rows = "".join(f"text {number % 5},{number % 2}\n" for number in range(20))
    train, valid = data.load_data(str(write("a.csv", "t,l\n" + rows)), COLUMNS)
    assert not set(train["t"]) & set(valid["t"])
    left_out = 20 - len(train) - len(valid)
    assert left_out > 0
    assert (
        f"{left_out} training rows are left out: their 't' is held out" in capsys.readouterr().out
    )


def test_training_rows_of_one_label_are_an_error(capsys):
    with pytest.raises(SystemExit):
        data.check_labels(["yes", "yes"], {"yes": [1], "no": [2]}, None, 9, 1)
    assert "all training rows have the label 'yes'" in capsys.readouterr().err
