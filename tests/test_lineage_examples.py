"""tools/lineage.py on the repository's own examples."""

import shutil

from test_lineage import add_line, assert_pages_apply

from tools import lineage
from tools.lineage import EXAMPLES, FROZEN, SECTIONS, THAWED


def test_own_examples_pass():
    report = lineage.check()
    assert report.errors == []
    assert report.scripts == len(list(EXAMPLES.glob("*.py"))) > 0
    assert report.pairs == report.fresh == report.scripts - report.roots > 0
    assert report.pairs == len(list(EXAMPLES.glob("diffs/*.diff")))


def test_own_training_loops_are_one_but_where_that_is_named():
    scripts = lineage.read()
    for script, base in lineage.pairs(scripts):
        assert (script.sections[FROZEN] != base.sections[FROZEN]) == (script.name in THAWED)
        assert base.name not in THAWED, "its loop would become that of all below"
    assert THAWED == {"causal_lm_lora_resume.py"} and THAWED < set(scripts)


def test_own_pages_apply(tmp_path):
    assert_pages_apply(EXAMPLES, tmp_path)


def test_drift_planted_in_own_examples_is_found(tmp_path):
    scripts = lineage.read()
    assert scripts
    planted = 0
    for script, base in lineage.pairs(scripts):
        folder = tmp_path / script.name
        folder.mkdir()
        for name in (script.name, base.name):
            shutil.copy(EXAMPLES / name, folder)
        for section in (section for section in SECTIONS if section not in script.changes):
            original = (folder / script.name).read_bytes()
            add_line(folder / script.name, section)
            wanted = f"examples/{script.name}: {section}: differs from {base.name}"
            assert any(error.startswith(wanted) for error in lineage.check(folder).errors), wanted
            (folder / script.name).write_bytes(original)
            planted += 1
    declared = sum(len(script.changes) for script in scripts.values())
    variants = sum(not script.is_root for script in scripts.values())
    assert planted == variants * len(SECTIONS) - declared > 0
