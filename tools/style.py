"""Readability numbers of training scripts, beside those of peers.

    python -m tools.style [FILE ...]               measure these files, or examples/*.py
    python -m tools.style --peers FOLDER           compare with the median of the files in FOLDER
    python -m tools.style --peers FOLDER --write   also rewrite the tables in docs/style.md

- Lines: all lines of the file.
- Mean code line: mean length of code lines, in characters, indentation included. A code line is
  not blank, not only a comment, and not part of a docstring (a string that is a statement).
- Over 100: lines of any kind with more than 100 characters, also in percent of all lines.
- Imported names: distinct names that import statements bind, anywhere in the file.
- Names before the loop: distinct names bound above the first line of the training loop, at module
  level or in the functions around the loop. Imports, `def`, `class`, assignments, loop variables
  and parameters bind names. Names inside other functions, classes, lambdas and comprehensions do
  not count, nor do attributes. The training loop is the first `for` or `while` statement whose
  body calls `.backward(`. A file without one has `-` in this column.
- Longest function: lines from `def` to the end of the body, nested functions included. If the
  training loop is at module level, the module's own code counts as a function: from its first to
  its last statement, without the docstring and the module's imports, functions and classes.
"""

import ast
import shlex
import sys
import tokenize
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from datetime import date
from pathlib import Path
from statistics import fmean, median

PAGE = Path("docs/style.md")
MARKER = "<!-- python -m tools.style writes between these two lines -->"
IMPORTS = (ast.Import, ast.ImportFrom)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef)


def lines_of(node: ast.AST) -> range:
    return range(node.lineno, node.end_lineno + 1)


def is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str)


def code_lines(text: str, nodes: list[ast.AST]) -> list[str]:
    left_out = {number for node in nodes if is_docstring(node) for number in lines_of(node)}
    for token in tokenize.generate_tokens(iter(text.splitlines(keepends=True)).__next__):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            left_out.add(token.start[0])
    numbered = enumerate(text.splitlines(), start=1)
    return [line for number, line in numbered if line.strip() and number not in left_out]


def bound_names(scope: ast.AST, before: int) -> set[str]:
    """The names that the code of one module or function binds above the line `before`."""
    names, nodes = set(), list(ast.iter_child_nodes(scope))
    while nodes:
        node = nodes.pop()
        match node if getattr(node, "lineno", 0) < before else None:
            case ast.Name(name, ast.Store()) | ast.arg(name) | ast.ExceptHandler(_, str(name)):
                names.add(name)
            case ast.FunctionDef(name) | ast.AsyncFunctionDef(name) | ast.ClassDef(name):
                names.add(name)
            case ast.alias(_, str(name)) | ast.alias(name):
                names.add(name.split(".")[0])
        if isinstance(node, ast.comprehension):  # has its own variables, but `:=` binds outside
            nodes += [node.iter, *node.ifs]
        elif not isinstance(node, (*DEFINITIONS, ast.Lambda)):
            nodes += ast.iter_child_nodes(node)
    return names


def calls_backward(loop: ast.AST) -> bool:
    nodes = [node for statement in loop.body for node in ast.walk(statement)]
    return any(isinstance(n, ast.Call) and getattr(n.func, "attr", 0) == "backward" for n in nodes)


def module_length(body: list[ast.stmt]) -> int:
    apart = [n for n in body if is_docstring(n) or isinstance(n, (*IMPORTS, *DEFINITIONS))]
    own = [n for n in body if n not in apart]
    span = set(range(own[0].lineno, own[-1].end_lineno + 1))
    return len(span.difference(*map(lines_of, apart)))


def measure(path: Path) -> dict[str, float | None]:
    """The numbers of one file, by the heading of their column."""
    text = path.read_text(encoding="utf-8")
    tree, lines = ast.parse(text, path), text.splitlines()
    nodes = list(ast.walk(tree))
    imports = [bound_names(node, len(lines) + 1) for node in nodes if isinstance(node, IMPORTS)]
    functions = [node for node in nodes if isinstance(node, FUNCTIONS)]
    lengths = [len(lines_of(function)) for function in functions]
    loops = [node for node in nodes if isinstance(node, ast.For | ast.While)]
    begin = min((loop.lineno for loop in loops if calls_backward(loop)), default=None)
    if begin:
        holders = [function for function in functions if begin in lines_of(function)]
        names = set().union(*(bound_names(scope, begin) for scope in [tree, *holders]))
        lengths += [] if holders else [module_length(tree.body)]
    over = sum(len(line) > 100 for line in lines)
    return {
        "Lines": len(lines),
        "Mean code line": fmean([len(line) for line in code_lines(text, nodes)] or [0]),
        "Over 100": over,
        "Over 100, %": 100 * over / max(len(lines), 1),
        "Imported names": len(set().union(*imports)),
        "Names before the loop": len(names) if begin else None,
        "Longest function": max(lengths, default=0),
    }


def table(rows: dict[str, dict[str, float | None]], limits: dict[str, float]) -> str:
    """A Markdown table; a number above the limit of its column is bold."""
    headings = list(next(iter(rows.values())))
    lines = [f"| File | {' | '.join(headings)} |", f"|---|{'---:|' * len(headings)}"]
    for file, row in rows.items():
        lines.append(f"| {file} |")
        for heading, n in row.items():
            text = "-" if n is None else f"{n:.1f}" if isinstance(n, float) else str(n)
            bold = "**" if n is not None and n > limits.get(heading, n) else ""
            lines[-1] += f" {bold}{text}{bold} |"
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="default examples/*.py")
    parser.add_argument("--peers", type=Path, metavar="FOLDER", help="folder of the peers' files")
    parser.add_argument("--write", action="store_true", help="rewrite the tables in docs/style.md")
    args = parser.parse_args()
    files = args.files or sorted(Path("examples").glob("*.py"))
    tables, limits = "", {}
    if args.peers or args.write:
        paths = sorted(args.peers.rglob("*.py")) if args.peers else []
        peers = {str(path.relative_to(args.peers)): measure(path) for path in paths}
        if not peers or any(None in row.values() for row in peers.values()):
            parser.error("--peers needs a folder of .py files, each with a training loop")
        limits = {key: median(row[key] for row in peers.values()) for key in measure(paths[0])}
        tables = table(peers | {"**median of the peers**": limits}, {}) + "\n"
    tables += table({str(path): measure(path) for path in files}, limits)
    print(tables)
    if args.write:
        head, _, tail = PAGE.read_text(encoding="utf-8").split(MARKER)
        command = f"`python -m tools.style {shlex.join(sys.argv[1:])}`, {date.today()}:"
        PAGE.write_text(f"{head}{MARKER}\n{command}\n\n{tables}{MARKER}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
