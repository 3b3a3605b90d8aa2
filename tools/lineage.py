"""Check that every example equals its base script, except in the sections that it declares.

    python -m tools.lineage check          list undeclared differences, broken banners, stale pages
    python -m tools.lineage fix            copy undeclared sections from each base to its variants
    python -m tools.lineage show SCRIPT    print the diff of a script to its base
    python -m tools.lineage write          write examples/diffs/, one page per variant
    python -m tools.lineage tree           print which script derives from which

A variant is a script with a base; a root has none. `fix` overwrites edits in the undeclared
sections of a variant: to keep such an edit, declare the section first.
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
ROOT = "none"  # the value of `Base:` in a root
NO_SECTIONS = "no sections"  # the value of `Changes:` in a root that does not train
HEAD = "docstring and imports"  # the text before the first banner; may differ in every script
NAMES = ("Settings", "Data", "Model", "Evaluation", "Setup", "Training loop", "Save")
# no variant may declare it, so it is byte-identical in a root and in all that derives from it
FROZEN = "6. Training loop"
THAWED = {"causal_lm_lora_resume.py"}  # the exception: its lesson is saving inside the loop
MAX_CHANGED_LINES = 120  # added plus removed: two screenfuls; a longer diff is no help to a reader
CONTEXT = 3  # unchanged lines around a change, as in git


def banner(number: int, name: str) -> str:
    """Return the comment that opens a section: dashes up to column 100, indented inside main()."""
    indent = " " * 4 if number in (5, 6) else ""
    return f"{indent}# {number}. {name} ".ljust(100, "-")


BANNERS = {banner(number, name): f"{number}. {name}" for number, name in enumerate(NAMES, 1)}
SECTIONS = list(BANNERS.values())


@dataclass(eq=False)
class Script:
    """One example.

    Attributes:
        name: file name.
        summary: first sentence of the docstring.
        base: file name of the base, or ROOT.
        changes: titles of the sections that the docstring declares.
        sections: title -> text, HEAD first; empty if it has none or the banners are broken.
        problems: what is wrong with its form.
    """

    name: str
    summary: str = ""
    base: str = ""
    changes: list[str] = field(default_factory=list)
    sections: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def is_root(self) -> bool:
        return self.base == ROOT


class Report(NamedTuple):
    """What `check` found, and how much it compared: no errors in no pairs is not success."""

    errors: list[str]
    scripts: int
    roots: int
    pairs: int
    fresh: int

    def __str__(self) -> str:
        text = f"{self.scripts} scripts, {self.roots} roots, {self.pairs} pairs compared, "
        text += f"{self.fresh} diff pages fresh"
        return f"{text}, {len(self.errors)} errors" if self.errors else text


def parse(path: Path) -> Script:
    """Read a script; what is wrong with its form goes into its `problems`."""
    text = path.read_bytes().decode()  # read_text would hide different line endings
    script = Script(path.name)
    try:
        declared = parse_docstring(script, ast.get_docstring(ast.parse(text)) or "")
    except SyntaxError as error:
        declared = ""
        script.problems.append(f"line {error.lineno}: not valid Python, {error.msg}; repair it")
    if declared != NO_SECTIONS:
        parse_sections(script, text)
    elif not script.is_root or any(line in BANNERS for line in text.splitlines()):
        remedy = "remove the banners and the base, or declare what changes"
        script.problems.append(f"Changes: `{NO_SECTIONS}` is for a root without banners; {remedy}")
    return script


def parse_docstring(script: Script, docstring: str) -> str:
    """Fill in the script's summary, base and changes, and return the text after `Changes:`."""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    script.summary = re.split(r"(?<=\.)\s", paragraph, maxsplit=1)[0]
    lines = re.findall(r"^(Base|Changes|Run|Needs|Expect):(.*)$", docstring, re.MULTILINE)
    keys = [key for key, _ in lines]
    wanted = ["Base", "Changes", "Run", "Needs", "Expect"]
    if keys not in (wanted, [key for key in wanted if key != "Changes"]):
        remedy = f"write {', '.join(wanted)} once each"
        script.problems.append(f"docstring: has the lines {keys}; {remedy}")
    values = {key: value.strip() for key, value in lines}
    script.base, declared = values.get("Base", ""), values.get("Changes", "none")
    script.changes = [] if declared in ("none", NO_SECTIONS) else declared.split(", ")
    if script.changes != [section for section in SECTIONS if section in script.changes]:
        remedy = f"list these, in this order: {', '.join(SECTIONS)}"
        script.problems.append(f"Changes: `{declared}` is not a list of sections; {remedy}")
    if script.is_root and script.changes:
        remedy = "remove the line or name a base"
        script.problems.append(f"Changes: a root has nothing to change; {remedy}")
    elif FROZEN in script.changes and script.name not in THAWED:
        remedy = "change other sections or make it a root"
        script.problems.append(f"{FROZEN}: no variant may declare it; {remedy}")
    return declared


def parse_sections(script: Script, text: str) -> None:
    """Split the text at its banners; all seven must be there, in their order."""
    problems, found, sections = [], [], {HEAD: ""}
    # not str.splitlines, which also splits at form feeds
    for number, line in enumerate(StringIO(text), 1):
        title = BANNERS.get(line.removesuffix("\n"))
        if title:
            found.append(title)
            sections[title] = ""
        elif re.match(r"\s*#.*---\s*$", line):
            title = line.strip().strip(" -#")
            problems.append(
                f"line {number}: `{title}` looks like a banner but is none of the seven"
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
    """Return file name -> script of all scripts in the folder, none excluded."""
    return {path.name: parse(path) for path in sorted(folder.glob("*.py"))}


def descent(scripts: dict[str, Script], script: Script) -> list[Script]:
    """Return the script, its base, the base's base and so on; a cycle ends before it repeats."""
    chain = [script]
    base = scripts.get(script.base)
    while base and base not in chain:
        chain.append(base)
        base = scripts.get(base.base)
    return chain


def malformed(scripts: dict[str, Script]) -> list[str]:
    """Return the errors that must be repaired before a section can be copied or a page written."""
    errors = [] if scripts else ["examples/: holds no scripts, so nothing was compared"]
    for script in scripts.values():
        problems = list(script.problems)
        if not script.is_root and script.base not in scripts:
            remedy = f"name one of the scripts, or `{ROOT}`"
            problems.append(f"Base: `{script.base}` does not exist; {remedy}")
        if descent(scripts, script)[-1].base == script.name:
            problems.append(f"Base: `{script.base}` derives from this script; break the cycle")
        errors += [f"examples/{script.name}: {problem}" for problem in problems]
    return errors


def load(folder: Path) -> dict[str, Script]:
    """Return the scripts, each after its base; stop with all errors if one is malformed."""
    scripts = read(folder)
    if errors := malformed(scripts):
        raise SystemExit("\n".join(f"error: {error}" for error in errors))
    return dict(sorted(scripts.items(), key=lambda item: len(descent(scripts, item[1]))))


def pairs(scripts: dict[str, Script]) -> list[tuple[Script, Script]]:
    """Return (variant, base) of every variant, unless the banners of one of them are broken."""
    variants = [script for script in scripts.values() if script.base in scripts]
    found = [(script, scripts[script.base]) for script in variants]
    return [(script, base) for script, base in found if script.sections and base.sections]


def differing(script: Script, base: Script) -> list[str]:
    """Return the titles of the sections that are not byte-identical to the base's."""
    return [section for section in SECTIONS if script.sections[section] != base.sections[section]]


def hunks(script: Script, base: Script) -> list[str]:
    """Return the lines of a unified diff from base to script; each hunk names its section."""
    # paired with the section's title, a line never matches an equal line of another section
    old, new = (
        [(name, line) for name, text in s.sections.items() for line in StringIO(text)]
        for s in (base, script)
    )
    lines = []
    for group in SequenceMatcher(None, old, new, autojunk=False).get_grouped_opcodes(CONTEXT):
        (_, i1, _, j1, _), (_, _, i2, _, j2) = group[0], group[-1]
        tag, i, k, j, _ = next(opcode for opcode in group if opcode[0] != "equal")
        section = old[i][0] if i < k else new[j][0]
        lines.append(f"@@ -{i1 + 1},{i2 - i1} +{j1 + 1},{j2 - j1} @@ {section}\n")
        for tag, i1, i2, j1, j2 in group:
            if tag == "equal":
                lines += [" " + line for _, line in old[i1:i2]]
            else:
                lines += ["-" + line for _, line in old[i1:i2]]
                lines += ["+" + line for _, line in new[j1:j2]]
    return lines


def page(script: Script, base: Script) -> str:
    """Return the text of a diff page. `git apply` makes the script from it, if the base exists."""
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
    """Return the path of a variant's page."""
    return folder / "diffs" / script.name.replace(".py", ".diff")


def is_fresh(path: Path, text: str) -> bool:
    """Return whether a page is byte-identical to the text that `write` would write."""
    return path.exists() and path.read_bytes() == text.encode()


def orphans(folder: Path, scripts: dict[str, Script]) -> list[Path]:
    """Return the pages of scripts that were removed or have become roots."""
    owned = {page_path(folder, script) for script in scripts.values() if not script.is_root}
    return sorted(set(folder.glob("diffs/*.diff")) - owned)


def drift(script: Script, base: Script) -> list[str]:
    """Return the errors of a pair: undeclared or unneeded declarations, and too long a diff."""
    differ, declared = set(differing(script, base)), set(script.changes)
    problems = []
    for section in SECTIONS:
        if section in differ - declared:
            remedy = "declare it, or let `fix` copy the base's text over it"
            problems.append(f"{section}: differs from {base.name}; {remedy}")
        elif section in declared - differ:
            remedy = "remove it from Changes"
            problems.append(f"{section}: declared, but equal to {base.name}; {remedy}")
    count = sum(line[0] in "+-" for line in hunks(script, base))
    if count > MAX_CHANGED_LINES:
        limit = f"more than {MAX_CHANGED_LINES}"
        problems.append(f"diff: {count} lines differ from {base.name}, {limit}; find a nearer base")
    return [f"examples/{script.name}: {problem}" for problem in problems]


def check(folder: Path = EXAMPLES) -> Report:
    """List undeclared differences, broken banners, and pages that `write` would change."""
    scripts = read(folder)
    errors, compared, fresh = malformed(scripts), 0, 0
    for script, base in pairs(scripts):
        compared += 1
        errors += drift(script, base)
        path = page_path(folder, script)
        if is_fresh(path, page(script, base)):
            fresh += 1
        else:
            state = "stale" if path.exists() else "missing"
            errors.append(f"examples/diffs/{path.name}: {state}; run `write`")
    for path in orphans(folder, scripts):
        errors.append(f"examples/diffs/{path.name}: belongs to no variant; run `write`")
    roots = sum(script.is_root for script in scripts.values())
    counts = f"{compared} pairs of {len(scripts)} scripts, {roots} roots"
    assert errors or compared == len(scripts) - roots, counts
    return Report(errors, len(scripts), roots, compared, fresh)


def replace(path: Path, text: str) -> None:
    """Write a file atomically, and keep its mode."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(text.encode())
    if path.exists():
        shutil.copymode(path, temporary)
    os.replace(temporary, path)


def fix(folder: Path = EXAMPLES) -> list[str]:
    """Copy undeclared sections from each base to its variants, roots first."""
    done = []
    for script, base in pairs(load(folder)):
        copied = [section for section in differing(script, base) if section not in script.changes]
        if copied:
            script.sections |= {section: base.sections[section] for section in copied}
            replace(folder / script.name, "".join(script.sections.values()))
            for section in copied:
                done.append(f"examples/{script.name}: {section}: copied from {base.name}")
    return done


def write(folder: Path = EXAMPLES) -> list[str]:
    """Write the page of every variant, and remove the pages that belong to none."""
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
    """Print the diff of a script, given as `examples/x.py`, `x.py` or `x`, to its base."""
    scripts = load(folder)
    script = scripts.get(f"{Path(name).stem}.py")
    if not script:
        raise SystemExit(f"error: no script `{name}`; there are {', '.join(sorted(scripts))}")
    if script.is_root:
        return f"{script.name} is a root: {script.summary}"
    return page(script, scripts[script.base]).removesuffix("\n")


def tree(folder: Path = EXAMPLES) -> str:
    """Print which script derives from which."""
    scripts = load(folder)

    def below(base: str, prefix: str) -> list[str]:
        lines = []
        children = sorted(script.name for script in scripts.values() if script.base == base)
        for child in children:
            branch, trunk = ("`- ", "   ") if child == children[-1] else ("|- ", "|  ")
            lines += [prefix + branch + child.removesuffix(".py"), *below(child, prefix + trunk)]
        return lines

    return "\n".join(line[3:] for line in below(ROOT, ""))  # a root has no branch


def main() -> int:
    """Run the command line; return 1 if `check` found an error, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.lineage", description=__doc__.partition("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for function in (check, fix, show, write, tree):
        text = function.__doc__.rstrip(".")
        command = commands.add_parser(function.__name__, help=text, description=function.__doc__)
        command.set_defaults(function=function)
    commands.choices["show"].add_argument("name", metavar="SCRIPT", help="name or path of a script")
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
