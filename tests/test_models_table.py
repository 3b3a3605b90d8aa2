"""The table of models: its configs, selecting, judging and rendering its cells, and a sample."""

import json

import pytest
from conftest import ROOT
from model_rows import assert_rows_as_committed, groups

from tools.compatibility.results import cell_file, dump, read_cells, versions
from tools.models import measure
from tools.models.architectures import ARCHITECTURES, CAUSAL, SEQ2SEQ
from tools.models.compare import CHAT_ANSWER, LINES, ROW_ANSWER, difference
from tools.models.make import build_model, make_tokenizer
from tools.models.measure import judge
from tools.models.page import PAGE, render
from tools.models.results import RESULTS, has_failed, select
from tools.models.rows import CELLS, COLUMNS, RUNS, run_of
from utils.model_files import ONE_BY_ONE

YES = {"answer": "yes", "reload": "", "seconds": 1.0}
SENTENCE = "GptOss has no sdpa: give --attn_implementation eager"
# Conv1D, experts, linear attention, no packing, an encoder, another attention
SAMPLE = ["gpt2", "llama4", "qwen3_next", "stablelm", "t5", "prophetnet"]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def results(cells):
    head = {"versions": versions(), "hardware": "a test", "date": "2026-01-02"}
    return head | {"cells": cells}


@pytest.mark.parametrize("row", ARCHITECTURES)
def test_every_model_can_be_made(tokenizer, row):
    model = build_model(ARCHITECTURES[row], tokenizer)
    assert sum(parameter.numel() for parameter in model.parameters()) < 200_000
    assert model.config.is_encoder_decoder == ARCHITECTURES[row].is_seq2seq
    embeddings = model.get_input_embeddings()
    if embeddings is not None:  # FSMT has one for each side
        assert embeddings.num_embeddings >= len(tokenizer)
    assert model.config.get_text_config().eos_token_id == tokenizer.eos_token_id


def test_the_table_is_large_enough():
    assert len(CAUSAL) + len(SEQ2SEQ) >= 50
    assert COLUMNS[-2:] == ("reload", "merge") and len(set(CELLS)) == len(CELLS)
    for column in RUNS:
        run = run_of("llama3", column)
        assert (ROOT / "examples" / f"{run.script}.py").is_file()
        assert (ROOT / "configs" / f"{run.config}.yaml").is_file()
    assert {column for column in RUNS if run_of("t5", column)} == {"lesson", "zero3", "fsdp2"}


def test_judge():
    refused = {"kind": "refused", "message": "no, because", "time": 1.0}
    raised = {"kind": "traceback", "message": "ValueError: in /tmp/a/b.py\nmore", "time": 1.0}
    assert judge({}, True) == {"answer": "yes"}
    assert judge(refused, False) == {"answer": "refused", "reason": "no, because"}
    assert judge(refused, True)["answer"] == "stopped"
    assert judge(raised, False) == {"answer": "traceback", "reason": "ValueError: in b.py"}
    assert judge(raised, True)["started"]
    # a process that hangs, or ends without a word, has no kind
    assert judge({"check": "starts", "message": "hangs"}, False)["answer"] == "traceback"


def tried_with(monkeypatch, column, *answers):
    """Return the facts of a cell whose runs give these answers, and the flags of each run."""
    row, tried = measure.RowFolder.__new__(measure.RowFolder), []

    def measure_run(column, flags=()):
        tried.append(flags)
        return dict(answers[len(tried) - 1])

    monkeypatch.setattr(row, "measure_run", measure_run)
    return row.measure_cell(column), tried


def test_the_flags_that_a_sentence_names_are_tried(monkeypatch):
    eager, one = ("--attn_implementation", "eager"), ONE_BY_ONE.split(",")[0].split()
    first = {"answer": "refused", "reason": SENTENCE}
    second = {"answer": "refused", "reason": f"it mixes documents: give {ONE_BY_ONE}"}
    facts, tried = tried_with(monkeypatch, "chat_sft", first, YES)
    assert tried == [(), eager] and facts["setting"] == " ".join(eager)
    assert facts["answer"] == "yes" and facts["without"] == [SENTENCE]
    facts, tried = tried_with(monkeypatch, "chat_sft", first, second, YES)
    assert tried == [(), eager, (*eager, *one)] and len(facts["without"]) == 2
    # a packed row holds several documents
    facts, tried = tried_with(monkeypatch, "packing", first, second)
    assert tried == [(), eager] and facts["answer"] == "refused"
    # a remedy that does not work is a fault
    facts, _ = tried_with(monkeypatch, "chat_sft", first, {"answer": "traceback", "reason": "no"})
    assert facts["answer"] == "traceback" and facts["without"] == [SENTENCE]
    # a circle
    facts, tried = tried_with(monkeypatch, "chat_sft", first, first)
    assert facts["answer"] == "refused" and tried == [(), eager]
    facts, tried = tried_with(monkeypatch, "chat_sft", {"answer": "refused", "reason": "no"})
    assert facts["reason"] == "no" and tried == [()]


def test_printed_lines_are_read():
    output = (
        "  '<s>it's' -> 'a'\n  \"it's\" -> \"b's\"\nfrom peft import A\nmodel = A.load('x')\n"
        "  prediction 'c d'    label 'no'\n  prediction \"e's\" label 'yes'\nother\n"
    )
    assert CHAT_ANSWER.findall(output) == ["'a'", '"b\'s"']
    assert ROW_ANSWER.findall(output) == ["'c d'", '"e\'s"']
    assert LINES.findall(output) == ["from peft import A\nmodel = A.load('x')"]
    settings = "from peft import A\nmodel = A.load('x')\nmodel.get_base_model().settings = B('x')"
    assert LINES.findall(f"saved\n{settings}\nmore") == [settings]
    four = "from peft import A\nfrom transformers import B\nfour = B(\n  x)\nmodel = A(four)"
    assert LINES.findall(f"saved\n{four}\nmore") == [four]


@pytest.mark.parametrize(
    ("found", "word"),
    [
        ((["a", "b"], 2.0), ""),
        ((["a", "b"], 2.0001), ""),
        ((["a", "c"], 2.0), "'c'"),
        ((["a"], 2.0), "1 answers"),
        ((["a", "b"], 2.001), "held-out loss"),
        ((["a", "b"], float("nan")), "held-out loss"),
        ((["a", "b"], None), ""),
    ],
)
def test_every_difference_is_found(found, word):
    told = difference(found, (["a", "b"], 2.0))
    assert word in told if word else told == ""


def test_no_answers_prove_nothing():
    assert difference(([], None), ([], None))


def test_select():
    everything = select([], [], False, {})
    assert sum(map(len, everything.values())) == len(CELLS)
    done = dict.fromkeys(CELLS, YES)
    assert select([], [], False, done) == {}
    assert select(["t5", "qwen3*"], [], False, done) == {
        row: [cell.split("/")[1] for cell in CELLS if cell.startswith(f"{row}/")]
        for row in ("qwen3", "qwen3_moe", "qwen3_next", "t5")
    }
    assert select(["gpt2"], ["zero3"], False, done) == {"gpt2": ["zero3"]}
    # the command merges what another cell has trained
    assert select(["gpt2"], ["merge"], False, done) == {"gpt2": ["chat_sft", "merge"]}
    bad = {"answer": "refused", "reason": "no", "seconds": 1.0}
    assert select([], [], True, done | {"gpt2/packing": bad}) == {"gpt2": ["packing"]}
    assert has_failed(YES | {"reload": "differs"}) and not has_failed({"answer": "nothing"})
    with pytest.raises(SystemExit, match="--rows gpt7 names no row"):
        select(["gpt7"], [], False, {})


def test_resume(tmp_path):
    committed = tmp_path / "models.json"
    committed.write_text(dump(results({"gpt2/lesson": YES, "gone/lesson": YES})))
    file = cell_file(tmp_path, "gpt2/zero3")
    file.parent.mkdir()
    file.write_text(json.dumps(YES | {"versions": versions()}))
    old = YES | {"versions": versions() | {"torch": "0.1"}}
    cell_file(tmp_path, "gpt2/fsdp2").write_text(json.dumps(old))
    assert list(read_cells(tmp_path, committed, CELLS)) == ["gpt2/lesson", "gpt2/zero3"]


def test_render():
    refused = {"answer": "refused", "reason": "no `sdpa` here", "seconds": 1.0}
    stopped = {"answer": "stopped", "reason": "lost", "started": True, "seconds": 1.0}
    raised = {"answer": "traceback", "reason": "KeyError: 1", "seconds": 1.0}
    cells = {
        "gpt2/chat_sft": YES | {"setting": "--attn_implementation eager", "without": ["no"]},
        "gpt2/lesson": refused,
        "gpt2/packing": refused,
        "gpt2/zero3": stopped,
        "gpt2/fsdp2": raised,
        "gpt2/merge": {"answer": "differs", "reason": "an answer", "seconds": 1.0},
        "opt/lesson": raised | {"setting": "--attn_implementation eager", "without": ["no"]},
        "t5/lesson": YES | {"reload": "an answer is 1"},
        "t5/merge": {"answer": "nothing", "seconds": 0.0},
    }
    page = render(results(cells))
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line[:1] == "|"]
    rows = {line[0]: line[1:] for line in lines}
    assert rows["GPT-2 (`gpt2`)"] == [
        "yes, with a setting [1](#n1)",
        "no [2](#n2)",
        "no [2](#n2)",  # one sentence, listed once
        "**fault** [3](#n3)",
        "**fault** [4](#n4)",
        "yes",
        "**differs** [5](#n5)",
    ]
    assert rows["OPT (`opt`)"][1] == "**fault**, with a setting [1](#n1) [4](#n4)"
    assert rows["T5 (`t5`)"][:2] == ["-", "yes"] and rows["T5 (`t5`)"][2] == "-"
    assert rows["T5 (`t5`)"][5:] == ["**differs** [6](#n6)", "-"]
    assert rows["Bloom (`bloom`)"][0] == "not measured"
    assert "2. <a id=\"n2\"></a>`no 'sdpa' here`" in page
    assert "stopped after training had started: `lost`" in page
    assert "traceback before training: `KeyError: 1`" in page
    assert f"2 cells say yes, 2 no, 4 have a fault, 1 runs do not reload, {len(CELLS) - 9}" in page


def test_committed_results_are_complete_and_rendered():
    committed = json.loads(RESULTS.read_text())
    assert list(committed["cells"]) == CELLS
    assert PAGE.read_text() == render(committed)
    for word in ("/tmp", "/root", "site-packages"):
        assert word not in RESULTS.read_text()


@pytest.mark.slow
def test_a_sample_gives_the_committed_answers(environment, tmp_path):
    assert_rows_as_committed(environment, tmp_path, SAMPLE)


def test_every_row_is_measured_again_with_all():
    assert sorted(sum(groups(0) + groups(1), [])) == sorted(ARCHITECTURES)
    assert abs(len(groups(0)) - len(groups(1))) <= 1
