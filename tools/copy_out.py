"""Copy an example out of the repository, with everything that it needs to run.

    python -m tools.copy_out causal_lm_lora ../my_project
    python -m tools.copy_out examples/chat_sft.py ../my_project --config zero3

The new folder holds the script, the files of utils/ that it imports, its launch config, its default
model and data, a requirements.txt, and a README.md with the command that runs it.
"""

import argparse
import ast
import functools
import re
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from tools.lineage import BANNERS

ROOT = Path(__file__).resolve().parents[1]
# utils/ imports these inside functions: only some runs need them
OPTIONAL = {"deepspeed", "bitsandbytes"}
CHECKS = ("check_settings", "read_settings")  # one of them is given the strategies of a script
SECTIONS = {  # number of a section -> what to change in it
    "1": "your model, your data and your hyperparameters: the defaults of `Config`",
    "2": "how a row of your data becomes tokens and labels",
    "3": "which model is loaded and which of its parameters are trained",
    "4": "how the model is scored on held-out data",
}


class Launch(NamedTuple):
    """How a copy is launched: the words of its run line, and its launch config, if it takes one."""

    command: list[str]
    config: Path | None = None
    measured: Path | None = None  # the config that the numbers in the docstring were measured with


# Read ---------------------------------------------------------------------------------------------
def find_script(name):
    """Return the path of a script of examples/, given as a name or as a path."""
    folder = ROOT / "examples"
    path = folder / f"{name.removesuffix('.py')}.py" if Path(name).name == name else Path(name)
    for candidate in (path.resolve(), (ROOT / path).resolve()):
        if candidate.is_file() and candidate.parent == folder:
            return candidate
    names = ", ".join(sorted(path.stem for path in folder.glob("*.py")))
    raise SystemExit(f"error: there is no script {name} in examples/: give one of {names}")


@functools.cache  # scripts share the files of utils/
def imported(path):
    """Return the dotted names that a file imports, of `from a import b` both a and a.b."""
    names, packages = set(), path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = packages[: len(packages) - node.level + 1] if node.level else ()
            module = ".".join([*parents, *filter(None, [node.module])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def find_utils(script):
    """Return the files of utils/ that a script imports, directly or through one another."""
    found, queue = [], [script]
    while queue:
        for name in sorted(imported(queue.pop())):
            parts = name.split(".") if name.startswith("utils.") else []
            modules = [ROOT.joinpath(*parts[: n + 1]) for n in range(len(parts))]
            for path in modules:  # importing a file runs the packages that hold it
                for file in (path.with_suffix(".py"), path / "__init__.py"):
                    if file.is_file() and file not in found:
                        found.append(file)
                        queue.append(file)
    return sorted(found)


def find_strategies(tree):
    """Return the strategies that a script names where it checks its settings; empty means all."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    values = {getattr(node.targets[0], "id", None): node.value for node in assigned}
    for call in (call for call in calls if ast.unparse(call.func).split(".")[-1] in CHECKS):
        for argument in [*call.args, *(keyword.value for keyword in call.keywords)]:
            argument = values.get(getattr(argument, "id", ""), argument)
            words = [getattr(word, "value", None) for word in getattr(argument, "elts", [])]
            if words and all(isinstance(word, str) for word in words):
                return words
    return []


def find_launch(script, tree, config_name=None):
    """Return how the script is launched, with the config of its `Run:` line or with another one."""
    match = re.search(r"^Run: +(.*)$", ast.get_docstring(tree) or "", re.MULTILINE)
    if not match:
        raise SystemExit(f"error: the docstring of {script.name} has no `Run:` line: add one")
    command = shlex.split(match[1].replace(f"examples/{script.name}", script.name))
    if "--config_file" not in command:
        if config_name:
            raise SystemExit(f"error: {script.name} takes no launch config: leave out --config")
        return Launch(command)
    place = command.index("--config_file") + 1
    own = Path(command[place])
    config = Path("configs", f"{config_name}.yaml") if config_name else own
    if not (ROOT / config).is_file():
        names = ", ".join(sorted(path.stem for path in (ROOT / "configs").glob("*.yaml")))
        raise SystemExit(f"error: there is no {config.as_posix()}: give one of {names}")
    names = ", ".join(find_strategies(tree))
    if names and config.stem.split("_")[0] not in names.split(", "):
        raise SystemExit(f"error: {script.name} runs under {names}, not with {config.as_posix()}")
    command[place] = config.as_posix()
    return Launch(command, config, own)


def find_assets(tree, command):
    """Return the files and folders of assets/ that a script or its run line names."""
    texts = [str(node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    paths = {text for text in [*texts, *command] if re.fullmatch(r"assets/[\w./-]+", text)}
    return [Path(text) for text in sorted(paths) if (ROOT / text).exists()]


def find_requirements(script, utils, launch):
    """Return the lines of requirements.txt that the copy needs."""
    needed = imported(script) | ({"accelerate"} & set(launch.command))
    for path in utils:
        needed |= {name for name in imported(path) if name.split(".")[0] not in OPTIONAL}
    if launch.config and "DEEPSPEED" in (ROOT / launch.config).read_text():
        needed.add("deepspeed")
    if "BitsAndBytesConfig(" in script.read_text():
        needed.add("bitsandbytes")
    packages = {name.split(".")[0].replace("_", "-") for name in needed}
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [line for line in lines if line.partition("==")[0].replace("_", "-") in packages]


# Change -------------------------------------------------------------------------------------------
def adapt(text, launch):
    """Return the text of the script for a copy: its docstring made true, sys.path left alone."""
    tree = ast.parse(text)
    lines = text.splitlines(keepends=True)
    names = set()  # those in the removed lines
    for node in tree.body:
        is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        if is_call and "sys.path" in ast.unparse(node):
            names |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
            blank(lines, node)
    used = {node.id for node in ast.walk(ast.parse("".join(lines))) if isinstance(node, ast.Name)}
    for node in tree.body:
        is_import = isinstance(node, ast.Import | ast.ImportFrom)
        if is_import and {alias.asname or alias.name for alias in node.names} <= names - used:
            blank(lines, node)
    end = tree.body[0].end_lineno
    head = re.sub(r"^(Base|Changes):.*\n([ \t]+\S.*\n)*", "", "".join(lines[:end]), flags=re.M)
    run = shlex.join(launch.command)
    if launch.config != launch.measured:
        run += f"\nNote:    Needs and Expect were measured with {launch.measured.as_posix()}"
    head = head.replace("\\\n", "")  # a Run line on two lines
    head = re.sub(r"^(Run: +).*$", lambda match: match[1] + run, head, flags=re.M)
    return head + "".join(lines[end:])


def blank(lines, node):
    """Empty the lines of a statement and of the comment above it."""
    begin = node.lineno - 1
    while lines[begin - 1].startswith("#"):
        begin -= 1
    lines[begin : node.end_lineno] = [""] * (node.end_lineno - begin)


def describe(path):
    """Return what a file is, in one sentence: the first of its docstring or comment."""
    if path.suffix not in (".py", ".yaml"):
        is_asset = path.parts[0] == "assets"
        return "used unless you name your own" if is_asset else "settings of DeepSpeed"
    text = (ROOT / path).read_text()
    comments = re.findall(r"^#(.*)", text, flags=re.M)
    if path.suffix == ".py":
        comments = [ast.get_docstring(ast.parse(text)) or "makes the folder a package"]
    return " ".join(" ".join(comments).partition("\n\n")[0].split()).partition(". ")[0].rstrip(".")


def make_readme(script, launch, files):
    """Return the text of README.md: how to run the copy, what each file is, what to change."""
    titles = [title for banner, title in BANNERS.items() if banner in script.read_text()]
    changes = [f"- `# {title}`: {SECTIONS[title[0]]}" for title in titles if title[0] in SECTIONS]
    others = [f"`# {title}`" for title in titles if title[0] not in SECTIONS]
    changes += ["", f"Leave {', '.join(others)} unchanged: they do not depend on the task."]
    lines = [f"# {script.stem}", "", f"A copy of `examples/{script.name}` with all that it needs."]
    lines += ["To run it in this folder:", "", "```bash", "pip install -r requirements.txt"]
    lines += [shlex.join(launch.command), "```", "", "## Files", ""]
    lines += [f"- `{name}`: {what}" for name, what in files.items()] + ["", "## What to change", ""]
    lines += changes if titles else ["The script has no sections: read it from top to bottom."]
    return "\n".join(lines) + "\n"


# Copy ---------------------------------------------------------------------------------------------
def copy(name, folder, config_name=None):
    """Copy a script into a new folder; return its run line and name of a file -> what it is."""
    folder = Path(folder).resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise SystemExit(f"error: {folder} exists and is not an empty folder: give another one")
    script = find_script(name)
    tree = ast.parse(script.read_text())
    launch = find_launch(script, tree, config_name)
    utils = find_utils(script)
    paths = [path.relative_to(ROOT) for path in utils]
    if launch.config:
        text = (ROOT / launch.config).read_text()
        paths += [launch.config, *map(Path, re.findall(r"deepspeed_config_file: *(\S+)", text))]
    paths += find_assets(tree, launch.command)
    files = {script.name: describe(script.relative_to(ROOT))}
    files |= {path.as_posix(): describe(path) for path in paths}
    files |= {"requirements.txt": "the packages that these files need"}
    made = {script.name: adapt(script.read_text(), launch)}
    made |= {"README.md": make_readme(script, launch, files)}
    made |= {"requirements.txt": "\n".join(find_requirements(script, utils, launch)) + "\n"}
    parent = next(path for path in folder.parents if path.exists())
    # the copy is made beside its target and then renamed, so that a failure leaves nothing
    with tempfile.TemporaryDirectory(prefix=".copy_out-", dir=parent) as staging:
        copied = Path(staging) / "copy"
        copied.mkdir()
        for path in paths:
            (copied / path).parent.mkdir(parents=True, exist_ok=True)
            put = shutil.copytree if (ROOT / path).is_dir() else shutil.copy
            put(ROOT / path, copied / path)
        for file, text in made.items():
            (copied / file).write_text(text)
        folder.parent.mkdir(parents=True, exist_ok=True)
        copied.rename(folder)
    return shlex.join(launch.command), files | {"README.md": "how to run it and what to change"}


def main(arguments=None):
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.copy_out", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("script", metavar="SCRIPT", help="script of examples/, a name or a path")
    parser.add_argument("folder", metavar="FOLDER", help="folder to make; if it exists, empty")
    parser.add_argument(
        "--config", metavar="NAME", help="launch config configs/NAME.yaml (default: the script's)"
    )
    options = parser.parse_args(arguments)
    try:
        command, files = copy(options.script, options.folder, options.config)
    except OSError as error:
        raise SystemExit(f"error: nothing was copied: {error}") from error
    print(f"copied to {options.folder}:", *(f"  {a}: {b}" for a, b in files.items()), sep="\n")
    print(f"To run it:\n  cd {shlex.quote(options.folder)}\n  {command}")


if __name__ == "__main__":
    main()
