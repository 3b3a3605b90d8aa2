"""tools/lineage.py on small made-up trees of scripts, then on the repository's own examples."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools import lineage
from tools.lineage import BANNERS, FROZEN, MAX_CHANGED_LINES, SECTIONS, banner

# script -> its base and the sections that it changes: a root, its child and grandchild (which a
# glob finds before the child), then a second root with a child
TREE = {
    "full.py": ("none", []),
    "lora.py": ("full.py", ["3. Model", "7. Save"]),
    "fsdp_lora.py": ("lora.py", ["4. Evaluation", "5. Setup"]),
    "chat.py": ("none", []),
    "chat_packed.py": ("chat.py", ["2. Data"]),
}
VARIANTS = {name: changes for name, (base, changes) in TREE.items() if base != "none"}
UNDECLARED = [
    (name, section)
    for name, changes in VARIANTS.items()
    for section in SECTIONS
    if section not in changes
]
LINE = {title: line for line, title in BANNERS.items()}


def body(section, author):
    """The text of a section as `author` wrote it, with lines that other sections have too."""
    if int(section[0]) < 5:
        text = f"common = 0\nvalue_{section[0]} = '{author}'\n\n\n"
        return text + "def main():\n" if section.startswith("4") else text
    end = '\n\nif __name__ == "__main__":\n    main()\n' if section.startswith("7") else "\n"
    return f"    common = 0\n    value_{section[0]} = '{author}'\n" + end


def author(name, section):
    """The nearest ancestor that declares the section, or the root."""
    base, changes = TREE[name]
    return name if base == "none" or section in changes else author(base, section)


@pytest.fixture
def examples(tmp_path):
    """A folder with the planted tree and its pages, for which check passes."""
    folder = tmp_path / "examples"
    folder.mkdir()
    for name, (base, changes) in TREE.items():
        declared = f"Changes: {', '.join(changes)}\n" if changes else ""
        head = (
            f'"""Trains {name[:-3]}. More about it.\n\nBase:    {base}\n{declared}'
            'Run:     accelerate launch\nNeeds:   a CPU\nExpect:  accuracy 1.0\n"""\n\n'
            "import os\n\n"
        )
        sections = [
            f"{LINE[section]}\n{body(section, author(name, section))}" for section in SECTIONS
        ]
        (folder / name).write_text(head + "".join(sections))
    lineage.write(folder)
    return folder


def assert_pages_apply(folder: Path, target: Path):
    """Assert that each page makes its script, byte for byte, from nothing but the base."""
    pages = sorted(folder.glob("diffs/*.diff"))
    assert pages
    for page in pages:
        [base] = re.findall(r"^copy from examples/(.*)$", page.read_text(), re.MULTILINE)
        place = target / page.stem
        (place / "examples").mkdir(parents=True)
        shutil.copy(folder / base, place / "examples")
        environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(place.parent)}
        subprocess.run(["git", "apply", page], cwd=place, env=environment, check=True)
        assert (place / "examples" / f"{page.stem}.py").read_bytes() == (
            folder / f"{page.stem}.py"
        ).read_bytes()


def edit(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1, f"{text.count(old)} times {old!r}"
    path.write_text(text.replace(old, new))


def add_line(path, section):
    """A comment just below the banner."""
    edit(path, LINE[section] + "\n", LINE[section] + "\n# drift\n")


def texts(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_banners_are_a_hundred_columns_wide():
    assert [line.strip(" -") for line in BANNERS] == [f"# {section}" for section in SECTIONS]
    assert {len(line) for line in BANNERS} == {100}
    assert [len(line) - len(line.lstrip()) for line in BANNERS] == [0, 0, 0, 0, 4, 4, 0]
    assert banner(3, "Model") == "# 3. Model " + "-" * 89


def test_check_passes_on_a_sound_tree(examples):
    report = lineage.check(examples)
    assert report == ([], 5, 2, 3, 3)
    assert str(report) == "5 scripts, 2 roots, 3 pairs compared, 3 diff pages fresh"


@pytest.mark.parametrize(("name", "section"), UNDECLARED)
def test_check_finds_an_undeclared_difference(examples, name, section):
    add_line(examples / name, section)
    assert any(
        e.startswith(f"examples/{name}: {section}: differs") for e in lineage.check(examples).errors
    )


@pytest.mark.parametrize(
    ("name", "section"), [(name, s) for name, changes in VARIANTS.items() for s in changes]
)
def test_check_finds_a_declared_section_that_does_not_differ(examples, name, section):
    base = (examples / TREE[name][0]).read_text()
    following = [*SECTIONS, None][SECTIONS.index(section) + 1]
    bodies = [
        text[text.index(LINE[section]) : text.index(LINE[following]) if following else None]
        for text in ((examples / name).read_text(), base)
    ]
    edit(examples / name, *bodies)
    lineage.write(examples)
    assert [
        e
        for e in lineage.check(examples).errors
        if name in e and f"{section}: declared, but equal" in e
    ]


@pytest.mark.parametrize("change", ["\r\n", " \n", "\n\n"])
def test_check_compares_bytes(examples, change):
    path = examples / "lora.py"
    path.write_bytes(
        path.read_bytes().replace(b"value_2 = 'full.py'\n", f"value_2 = 'full.py'{change}".encode())
    )
    assert any("2. Data: differs" in error for error in lineage.check(examples).errors)


MODEL, DATA = LINE["3. Model"], LINE["2. Data"]
BROKEN = {
    "missing banner": (MODEL + "\n", "", "3. Model: banner missing"),
    "misspelt banner": (MODEL, MODEL.replace("Model", "Modell"), "`3. Modell` looks like a banner"),
    "banner with a dash too few": (MODEL, MODEL[:-1], "3. Model: banner missing"),
    "banner indented": (MODEL, " " + MODEL, "3. Model: banner missing"),
    "repeated banner": (MODEL, f"{MODEL}\n{MODEL}", "3. Model: banner repeated"),
    "eighth banner": (MODEL, f"{banner(4, 'Model')}\n{MODEL}", "`4. Model` looks like a banner"),
    "no Base line": ("Base:    full.py\n", "", "docstring: has the lines ['Changes'"),
    "two Base lines": (
        "Base:    full.py\n",
        "Base:    full.py\nBase:    chat.py\n",
        "docstring: has the lines ['Base', 'B",
    ),
    "empty Base line": ("Base:    full.py\n", "Base:\n", "Base: `` does not exist"),
    "no Expect line": ("Expect:  accuracy 1.0\n", "", "docstring: has the lines"),
    "no docstring": ('"""Trains', 'text = """Trains', "docstring: has the lines []"),
    "base that is not there": ("full.py\nCh", "gone.py\nCh", "Base: `gone.py` does not exist"),
    "its own base": ("full.py\nCh", "lora.py\nCh", "derives from this script"),
    "cycle": ("full.py\nCh", "fsdp_lora.py\nCh", "derives from this script"),
    "root that declares": ("full.py\nCh", "none\nCh", "Changes: a root has nothing to change"),
    "no such section": (
        "3. Model,",
        "3. Models,",
        "Changes: `3. Models, 7. Save` is not a list of sections",
    ),
    "number and name at odds": (
        "3. Model,",
        "2. Model,",
        "Changes: `2. Model, 7. Save` is not a list of sections",
    ),
    "declared out of order": (
        "3. Model, 7. Save",
        "7. Save, 3. Model",
        "Changes: `7. Save, 3. Model` is not a list of sections",
    ),
    "declared twice": ("3. Model,", "3. Model, 3. Model,", "is not a list of sections"),
    "declared over two lines": (
        "3. Model, 7",
        "3. Model,\n         7",
        "Changes: `3. Model,` is not a list of sections",
    ),
    "training loop declared": (
        "3. Model, 7",
        "3. Model, 6. Training loop, 7",
        f"{FROZEN}: no variant may declare it",
    ),
    "variant without sections": (
        "3. Model, 7. Save",
        "no sections",
        "is for a root without banners",
    ),
    "not Python": ("import os", "import", "not valid Python"),
}


@pytest.mark.parametrize(("old", "new", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_form_is_found_and_refused(examples, old, new, message):
    edit(examples / "lora.py", old, new)
    add_line(examples / "full.py", "1. Settings")  # fix would copy it, write would write it
    assert any(
        e.startswith("examples/lora.py: ") and message in e for e in lineage.check(examples).errors
    )
    before = texts(examples)
    for command in (lineage.fix, lineage.write, lineage.tree):
        with pytest.raises(SystemExit, match=re.escape(message)):
            command(examples)
    assert texts(examples) == before


def test_the_training_loop_may_change_only_where_that_is_named(examples, monkeypatch):
    edit(examples / "lora.py", "3. Model, 7", "3. Model, 6. Training loop, 7")
    add_line(examples / "lora.py", FROZEN)
    add_line(examples / "chat_packed.py", FROZEN)
    monkeypatch.setattr(lineage, "THAWED", {"lora.py"})
    lineage.write(examples)
    errors = lineage.check(examples).errors
    assert [error.partition(";")[0] for error in errors] == [
        f"examples/chat_packed.py: {FROZEN}: differs from chat.py",
        f"examples/fsdp_lora.py: {FROZEN}: differs from lora.py",
    ]


def test_banners_out_of_order_are_found(examples):
    path = examples / "lora.py"
    path.write_text(path.read_text().replace(DATA, "@").replace(MODEL, DATA).replace("@", MODEL))
    assert any(
        "lora.py: banners out of order: 1. Settings, 3. Model, 2" in e
        for e in lineage.check(examples).errors
    )


def test_a_last_line_without_newline_is_found(examples):
    path = examples / "lora.py"
    path.write_text(path.read_text()[:-1])
    assert any(
        "lora.py: 7. Save: the last line needs a newline" in e
        for e in lineage.check(examples).errors
    )


def test_both_scripts_of_a_cycle_are_named_but_not_those_below(examples):
    edit(examples / "full.py", "Base:    none", "Base:    lora.py")
    cycles = [error for error in lineage.check(examples).errors if "cycle" in error]
    assert [error.split(":")[0] for error in cycles] == ["examples/full.py", "examples/lora.py"]


def test_an_empty_folder_is_an_error(tmp_path):
    assert lineage.check(tmp_path).errors == [
        "examples/: holds no scripts, so nothing was compared"
    ]
    for command in (lineage.fix, lineage.write, lineage.tree):
        with pytest.raises(SystemExit, match="holds no scripts"):
            command(tmp_path)


def test_all_errors_are_named_not_only_the_first(examples):
    edit(examples / "lora.py", MODEL, MODEL.replace("Model", "Modell"))
    edit(examples / "chat_packed.py", "Changes: 2. Data", "Changes: 1. Data")
    add_line(examples / "chat_packed.py", "4. Evaluation")
    add_line(examples / "chat_packed.py", FROZEN)
    report = lineage.check(examples)
    wanted = [
        "3. Model: banner missing",
        "Changes: `1. Data`",
        "2. Data: differs",
        "4. Evaluation: diff",
        f"{FROZEN}: diff",
    ]
    assert [text for text in wanted if not any(text in error for error in report.errors)] == []
    assert (
        str(report)
        == f"5 scripts, 2 roots, 1 pairs compared, 0 diff pages fresh, {len(report.errors)} errors"
    )


def test_a_diff_over_the_cap_is_an_error(examples):
    path = examples / "chat_packed.py"
    changed = sum(
        line[0] in "+-" for line in lineage.show("chat_packed", examples).splitlines()[8:]
    )
    edit(path, "import os\n", "import os\n" + "os\n" * (MAX_CHANGED_LINES - changed))
    lineage.write(examples)
    assert lineage.check(examples).errors == []
    edit(path, "import os\n", "import os\n# one more\n")
    lineage.write(examples)
    [error] = lineage.check(examples).errors
    count, limit = MAX_CHANGED_LINES + 1, MAX_CHANGED_LINES
    assert f"diff: {count} lines differ from chat.py, more than {limit};" in error


def test_check_finds_stale_missing_and_orphaned_pages_and_write_repairs_them(examples):
    # the head may differ, and yet it is part of the page
    edit(examples / "lora.py", "import os", "import re")
    (examples / "diffs" / "fsdp_lora.diff").unlink()
    for name in ("gone.diff", "full.diff"):
        (examples / "diffs" / name).write_text("")
    report = lineage.check(examples)
    assert [error.partition(";")[0] for error in report.errors] == [
        "examples/diffs/fsdp_lora.diff: missing",
        "examples/diffs/lora.diff: stale",
        "examples/diffs/full.diff: belongs to no variant",
        "examples/diffs/gone.diff: belongs to no variant",
    ]
    assert report.fresh == 1
    assert len(lineage.write(examples)) == 4
    assert lineage.check(examples) == ([], 5, 2, 3, 3)
    before = texts(examples)
    assert lineage.write(examples) == []
    assert texts(examples) == before


@pytest.mark.parametrize("section", ["1. Settings", "2. Data", FROZEN])
def test_fix_carries_a_repair_from_the_trunk_to_the_grandchild(examples, section):
    (examples / "fsdp_lora.py").chmod(0o755)
    add_line(examples / "full.py", section)
    untouched = texts(examples)
    assert lineage.fix(examples) == [
        f"examples/lora.py: {section}: copied from full.py",
        f"examples/fsdp_lora.py: {section}: copied from lora.py",
    ]
    lineage.write(examples)
    assert lineage.check(examples).errors == []
    written = {
        path.name
        for path, text in texts(examples).items()
        if path.suffix == ".py" and text != untouched[path]
    }
    assert written == {"lora.py", "fsdp_lora.py"}
    assert (examples / "fsdp_lora.py").read_text().count("# drift") == 1
    assert (examples / "fsdp_lora.py").stat().st_mode & 0o777 == 0o755
    assert lineage.fix(examples) == []


@pytest.mark.parametrize(("name", "section"), UNDECLARED)
def test_fix_undoes_a_drift(examples, name, section):
    before = texts(examples)
    add_line(examples / name, section)
    assert f"examples/{name}: {section}: copied from {TREE[name][0]}" in lineage.fix(examples)
    assert texts(examples) == before


def test_fix_leaves_declared_sections_and_heads_alone(examples):
    add_line(examples / "full.py", "3. Model")  # lora declares it, so the change must end there
    add_line(examples / "full.py", "7. Save")
    edit(examples / "full.py", "import os", "import re")
    before = texts(examples)
    assert lineage.fix(examples) == []
    assert texts(examples) == before


def test_fix_cut_off_leaves_whole_scripts(examples, monkeypatch):
    def cut_off(*paths):
        raise KeyboardInterrupt

    add_line(examples / "full.py", "1. Settings")
    before = {path: path.read_bytes() for path in examples.glob("*.py")}
    monkeypatch.setattr(lineage.os, "replace", cut_off)
    with pytest.raises(KeyboardInterrupt):
        lineage.fix(examples)
    assert {path: path.read_bytes() for path in examples.glob("*.py")} == before


def test_a_page_applies_to_the_base(examples, tmp_path):
    edit(examples / "lora.py", "    main()\n", "    main()\n    main()\n")  # a hunk at the very end
    lineage.write(examples)
    assert_pages_apply(examples, tmp_path / "applied")


def test_a_page_names_the_lesson_and_heads_each_hunk_with_its_section(examples):
    add_line(examples / "lora.py", "7. Save")
    lines = lineage.show("lora", examples).splitlines()
    assert lines[:2] == ["# lora.py, from full.py: Trains lora.", "# Changes: 3. Model, 7. Save"]
    assert "-value_3 = 'full.py'" in lines
    assert "+value_3 = 'lora.py'" in lines
    headings = [line.split(" @@ ")[1] for line in lines if line.startswith("@@")]
    assert headings == ["docstring and imports", "3. Model", "7. Save"]
    script = (examples / "lora.py").read_text().splitlines()
    for number, line in enumerate(lines):
        if line.startswith("@@"):  # git tolerates a wrong line number, a reader does not
            kept = next(after for after in lines[number + 1 :] if after[0] in " +")
            assert script[int(re.search(r"\+(\d+)", line)[1]) - 1] == kept[1:]


@pytest.mark.parametrize("name", ["fsdp_lora", "fsdp_lora.py", "examples/fsdp_lora.py"])
def test_show_takes_three_forms_of_a_name(examples, name):
    assert (
        lineage.show(name, examples) + "\n" == (examples / "diffs" / "fsdp_lora.diff").read_text()
    )


def test_show_of_a_root_says_so(examples):
    assert lineage.show("full", examples) == "full.py is a root: Trains full."


def test_tree(examples):
    edit(examples / "chat_packed.py", "Base:    chat.py", "Base:    full.py")
    assert lineage.tree(examples).splitlines() == [
        "chat",
        "full",
        "|- chat_packed",
        "`- lora",
        "   `- fsdp_lora",
    ]


def command_line(folder, *arguments):
    """Run a copy of the tool beside the made-up examples, which it finds by its own path."""
    package = folder.parent / "tools"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").touch()
    shutil.copy(lineage.__file__, package)
    command = [sys.executable, "-m", "tools.lineage", *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        command, cwd=folder.parent, env=environment, capture_output=True, text=True
    )


def test_command_line(examples):
    passed = command_line(examples, "check")
    assert (passed.returncode, passed.stdout) == (
        0,
        "5 scripts, 2 roots, 3 pairs compared, 3 diff pages fresh\n",
    )
    add_line(examples / "full.py", "2. Data")
    failed = command_line(examples, "check")
    assert failed.returncode == 1
    assert failed.stdout.splitlines()[0].startswith(
        "examples/lora.py: 2. Data: differs from full.py"
    )
    assert [
        command_line(examples, command).returncode for command in ("fix", "write", "check")
    ] == [0, 0, 0]
    assert command_line(examples, "fix").stdout == "nothing to do\n"
    assert (
        command_line(examples, "show", "lora").stdout
        == (examples / "diffs" / "lora.diff").read_text()
    )
    assert command_line(examples, "tree").stdout == lineage.tree(examples) + "\n"
    wrong = command_line(examples, "show", "lora_fsdp3")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    names = ", ".join(sorted(TREE))
    assert wrong.stderr == f"error: no script `lora_fsdp3`; there are {names}\n"
    for arguments in ([], ["chekc"], ["show"]):
        usage = command_line(examples, *arguments)
        assert (usage.returncode, usage.stderr.split()[0]) == (2, "usage:")
