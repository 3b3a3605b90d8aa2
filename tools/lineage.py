"""The diff is the lesson: every example equals its base but for the sections that it declares.

    python -m tools.lineage check          name every divergence, every broken banner, every stale diff page
    python -m tools.lineage fix            copy undeclared sections from base to variant, oldest first
    python -m tools.lineage show SCRIPT    print what a script changes in its base
    python -m tools.lineage write          render examples/diffs/, one page per variant
    python -m tools.lineage tree           print who descends from whom

`fix` overwrites what was edited in an undeclared section of a variant: declare it first, or lose it.
"""

import argparse
import ast
import os
import re
import shutil
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from io import StringIO
from pathlib import Path
from typing import NamedTuple

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
ROOT = "none"  # what a root writes after `Base:`
HEAD = "docstring and imports"  # the text before the first banner, free in every script
NAMES = ("Settings", "Data", "Model", "Evaluation", "Setup", "Training loop", "Save")
FROZEN = "6. Training loop"  # no variant may declare it, so it is byte-identical from a root down to the last leaf
THAWED = {
    "causal_lm_lora_resume.py"
}  # but where the change is the lesson: it saves inside the loop
MAX_CHANGED_LINES = (
    120  # added plus removed: two screenfuls; who must read more has no use for the base
)
CONTEXT = 3  # unchanged lines around a change, as in git


def banner(number: int, name: str) -> str:
    """The one line that opens a section: a comment filled with dashes up to column 100, indented inside main()."""
    indent = " " * 4 if number >= 5 else ""
    return f"{indent}# {number}. {name} ".ljust(100, "-")


BANNERS = {banner(number, name): f"{number}. {name}" for number, name in enumerate(NAMES, 1)}
SECTIONS = list(BANNERS.values())


@dataclass(eq=False)
class Script:
    """One example: what its docstring declares, its text per section, and what is wrong with its form."""

    name: str
    summary: str = ""
    base: str = ""
    changes: list[str] = field(default_factory=list)
    sections: dict[str, str] = field(default_factory=dict)  # empty where the banners are broken
    problems: list[str] = field(default_factory=list)

    @property
    def is_root(self) -> bool:
        return self.base == ROOT


class Report(NamedTuple):
    """What `check` found, and how much it looked at: a guard that compared nothing must not look like a pass."""

    errors: list[str]
    scripts: int
    roots: int
    pairs: int
    fresh: int

    def __str__(self) -> str:
        errors = f", {len(self.errors)} errors" * bool(self.errors)
        return (
            "{1} scripts, {2} roots, {3} pairs compared, {4} diff pages fresh".format(*self)
            + errors
        )


def parse(path: Path) -> Script:
    """Read one script; whatever breaks the form goes into its `problems`."""
    text = path.read_bytes().decode()  # read_text would hide a difference in line endings
    script = Script(path.name)
    try:
        parse_docstring(script, ast.get_docstring(ast.parse(text)) or "")
    except SyntaxError as error:
        script.problems.append(f"line {error.lineno}: no valid Python, {error.msg}; repair it")
    parse_sections(script, text)
    return script


def parse_docstring(script: Script, docstring: str) -> None:
    """Fill in summary, base and changes."""
    script.summary = re.split(
        r"(?<=\.)\s", " ".join(docstring.split("\n\n")[0].split()), maxsplit=1
    )[0]
    lines = re.findall(r"^(Base|Changes|Run|Needs|Expect):(.*)$", docstring, re.MULTILINE)
    keys = [key for key, _ in lines]
    if keys not in (
        ["Base", "Changes", "Run", "Needs", "Expect"],
        ["Base", "Run", "Needs", "Expect"],
    ):
        script.problems.append(
            f"docstring: has the lines {keys}; write Base, Changes, Run, Needs, Expect once each"
        )
    values = {key: value.strip() for key, value in lines}
    script.base, declared = values.get("Base", ""), values.get("Changes", "none")
    script.changes = [] if declared == "none" else declared.split(", ")
    if script.changes != [section for section in SECTIONS if section in script.changes]:
        script.problems.append(
            f"Changes: `{declared}` is no list, in order and once each, of {', '.join(SECTIONS)}"
        )
    if script.is_root and script.changes:
        script.problems.append(
            "Changes: a root has nothing to change; remove the line or name a base"
        )
    elif FROZEN in script.changes and script.name not in THAWED:
        script.problems.append(
            f"{FROZEN}: no variant may declare it; change other sections or make it a root"
        )


def parse_sections(script: Script, text: str) -> None:
    """Cut the text at its banners, if these are the seven in their order."""
    problems, found, sections = [], [], {HEAD: ""}
    for number, line in enumerate(StringIO(text), 1):  # str.splitlines would also cut at form feeds
        title = BANNERS.get(line.removesuffix("\n"))
        if title:
            found.append(title)
            sections[title] = ""
        elif re.match(r"\s*#.*---\s*$", line):
            problems.append(
                f"line {number}: `{line.strip().strip(' -#')}` is ruled like a banner but is none of the seven"
            )
        sections[found[-1] if found else HEAD] += line
    for line, title in BANNERS.items():
        if title not in found:
            problems.append(f"{title}: banner missing; insert `{line}`")
        elif found.count(title) > 1:
            problems.append(f"{title}: banner repeated; keep one")
    if not problems and found != SECTIONS:
        problems.append(f"banners out of order: {', '.join(found)}; reorder the sections")
    if not text.endswith("\n"):
        problems.append(f"{SECTIONS[-1]}: the last line needs a newline")
    if not problems:
        script.sections = sections
    script.problems += problems


def read(folder: Path = EXAMPLES) -> dict[str, Script]:
    """Every script of the folder by file name: a glob, nothing excluded."""
    return {path.name: parse(path) for path in sorted(folder.glob("*.py"))}


def descent(scripts: dict[str, Script], script: Script) -> list[Script]:
    """The script, its base, the base's base and so on; a cycle is left before a script comes again."""
    chain = [script]
    while (base := scripts.get(chain[-1].base)) and base not in chain:
        chain.append(base)
    return chain


def malformed(scripts: dict[str, Script]) -> list[str]:
    """What must be right before anything can be copied or rendered: docstrings, banners, bases."""
    errors = [] if scripts else ["examples/: holds no scripts, so nothing was compared"]
    for script in scripts.values():
        problems = list(script.problems)
        if not script.is_root and script.base not in scripts:
            problems.append(
                f"Base: `{script.base}` does not exist; name one of the scripts, or `{ROOT}`"
            )
        if descent(scripts, script)[-1].base == script.name:
            problems.append(f"Base: `{script.base}` descends from this script; break the cycle")
        errors += [f"examples/{script.name}: {problem}" for problem in problems]
    return errors


def load(folder: Path) -> dict[str, Script]:
    """The scripts, oldest first; a refusal that names every flaw if one of them is malformed."""
    scripts = read(folder)
    if errors := malformed(scripts):
        raise SystemExit("\n".join(f"error: {error}" for error in errors))
    return dict(sorted(scripts.items(), key=lambda item: len(descent(scripts, item[1]))))


def pairs(scripts: dict[str, Script]) -> list[tuple[Script, Script]]:
    """Every variant with its base, where the banners of both are whole."""
    found = [
        (script, scripts[script.base]) for script in scripts.values() if script.base in scripts
    ]
    return [(script, base) for script, base in found if script.sections and base.sections]


def differing(script: Script, base: Script) -> list[str]:
    """The sections whose text is not, byte for byte, that of the base."""
    return [section for section in SECTIONS if script.sections[section] != base.sections[section]]


def hunks(script: Script, base: Script) -> list[str]:
    """Unified diff lines from base to script, each hunk headed by its section."""
    # Paired with its section's name, a line never matches an equal line of another section.
    old, new = (
        [(name, line) for name, text in s.sections.items() for line in StringIO(text)]
        for s in (base, script)
    )
    lines = []
    for group in SequenceMatcher(None, old, new, autojunk=False).get_grouped_opcodes(CONTEXT):
        (_, i1, _, j1, _), (_, _, i2, _, j2) = group[0], group[-1]
        section = next(
            old[i][0] if i < k else new[j][0] for tag, i, k, j, _ in group if tag != "equal"
        )
        lines.append(f"@@ -{i1 + 1},{i2 - i1} +{j1 + 1},{j2 - j1} @@ {section}\n")
        for tag, i1, i2, j1, j2 in group:
            if tag == "equal":
                lines += [" " + line for _, line in old[i1:i2]]
            else:
                lines += ["-" + line for _, line in old[i1:i2]] + [
                    "+" + line for _, line in new[j1:j2]
                ]
    return lines


def page(script: Script, base: Script) -> str:
    """The lesson: a diff that `git apply` turns into the script wherever the base is there and the script is not."""
    header = [
        f"# {script.name}, from {base.name}: {script.summary}",
        f"# Changes: {', '.join(script.changes) or 'none'}",
        "# Rendered by `python -m tools.lineage write`.",
        f"diff --git a/examples/{base.name} b/examples/{script.name}",
        f"copy from examples/{base.name}",
        f"copy to examples/{script.name}",
        f"--- a/examples/{base.name}",
        f"+++ b/examples/{script.name}",
    ]
    return "\n".join(header) + "\n" + "".join(hunks(script, base))


def page_path(folder: Path, script: Script) -> Path:
    """Where the page of a variant lies."""
    return folder / "diffs" / script.name.replace(".py", ".diff")


def is_fresh(path: Path, text: str) -> bool:
    """Whether the page holds, byte for byte, what `write` would render."""
    return path.exists() and path.read_bytes() == text.encode()


def orphans(folder: Path, scripts: dict[str, Script]) -> list[Path]:
    """Pages of scripts that are gone or have become roots."""
    owned = {page_path(folder, script) for script in scripts.values() if not script.is_root}
    return sorted(set(folder.glob("diffs/*.diff")) - owned)


def drift(script: Script, base: Script) -> list[str]:
    """Where what differs is not what is declared, in both directions, and a diff too long to be a lesson."""
    differ, declared = set(differing(script, base)), set(script.changes)
    problems = []
    for section in SECTIONS:
        if section in differ - declared:
            problems.append(
                f"{section}: differs from {base.name}; declare it, or let `fix` copy the base's over it"
            )
        elif section in declared - differ:
            problems.append(
                f"{section}: declared, but equal to {base.name}; take it out of Changes"
            )
    count = sum(line[0] in "+-" for line in hunks(script, base))
    if count > MAX_CHANGED_LINES:
        problems.append(
            f"diff: {count} lines differ from {base.name}, cap {MAX_CHANGED_LINES}; find a nearer base"
        )
    return [f"examples/{script.name}: {problem}" for problem in problems]


def check(folder: Path = EXAMPLES) -> Report:
    """Compare every script with its base, and every diff page with what `write` would render."""
    scripts = read(folder)
    errors, compared, fresh = malformed(scripts), 0, 0
    for script, base in pairs(scripts):
        compared += 1
        errors += drift(script, base)
        path = page_path(folder, script)
        if is_fresh(path, page(script, base)):
            fresh += 1
        else:
            errors.append(
                f"examples/diffs/{path.name}: {'stale' if path.exists() else 'missing'}; run `write`"
            )
    errors += [
        f"examples/diffs/{path.name}: belongs to no variant; run `write`"
        for path in orphans(folder, scripts)
    ]
    roots = sum(script.is_root for script in scripts.values())
    assert errors or compared == len(scripts) - roots, (
        f"{compared} pairs of {len(scripts)} scripts, {roots} roots"
    )
    return Report(errors, len(scripts), roots, compared, fresh)


def replace(path: Path, text: str) -> None:
    """Write the whole file or nothing of it, and keep its mode."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(text.encode())
    if path.exists():
        shutil.copymode(path, temporary)
    os.replace(temporary, path)


def fix(folder: Path = EXAMPLES) -> list[str]:
    """Copy undeclared sections from base to variant, oldest first, so that a repair in the trunk reaches all."""
    done = []
    for script, base in pairs(load(folder)):
        copied = [section for section in differing(script, base) if section not in script.changes]
        if copied:
            script.sections |= {section: base.sections[section] for section in copied}
            replace(folder / script.name, "".join(script.sections.values()))
            done += [
                f"examples/{script.name}: {section}: copied from {base.name}" for section in copied
            ]
    return done


def write(folder: Path = EXAMPLES) -> list[str]:
    """Render the page of every variant, remove the pages that belong to none."""
    scripts, done = load(folder), []
    (folder / "diffs").mkdir(exist_ok=True)
    for script, base in pairs(scripts):
        path, text = page_path(folder, script), page(script, base)
        if not is_fresh(path, text):
            replace(path, text)
            done.append(f"examples/diffs/{path.name}: written")
    for path in orphans(folder, scripts):
        path.unlink()
        done.append(f"examples/diffs/{path.name}: removed")
    return done


def show(name: str, folder: Path = EXAMPLES) -> str:
    """Print what a script, given as `examples/x.py`, `x.py` or `x`, changes in its base."""
    scripts = load(folder)
    script = scripts.get(f"{Path(name).stem}.py")
    if not script:
        raise SystemExit(f"error: no script `{name}`; there are {', '.join(sorted(scripts))}")
    if script.is_root:
        return f"{script.name} is a root: {script.summary}"
    return page(script, scripts[script.base]).removesuffix("\n")


def tree(folder: Path = EXAMPLES) -> str:
    """Print who descends from whom."""
    scripts = load(folder)

    def below(base: str, prefix: str) -> list[str]:
        lines, children = (
            [],
            sorted(script.name for script in scripts.values() if script.base == base),
        )
        for child in children:
            branch, trunk = ("`- ", "   ") if child == children[-1] else ("|- ", "|  ")
            lines += [prefix + branch + child.removesuffix(".py"), *below(child, prefix + trunk)]
        return lines

    return "\n".join(line[3:] for line in below(ROOT, ""))  # the roots hang on nothing


def main() -> int:
    """The command line; 1 where something is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.lineage", description=__doc__.partition("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for function in (check, fix, show, write, tree):
        commands.add_parser(function.__name__, help=function.__doc__).set_defaults(
            function=function
        )
    commands.choices["show"].add_argument("name", metavar="SCRIPT")
    arguments = vars(parser.parse_args())
    command, function = arguments.pop("command"), arguments.pop("function")
    result = function(**arguments)
    if command == "check":
        print(*result.errors, result, sep="\n")
        return int(bool(result.errors))
    print(result if isinstance(result, str) else "\n".join(result) or "nothing to do")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
