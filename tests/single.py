"""Run scripts without a launcher, one after the other in the same interpreter.

`python tests/single.py RUNS.json OUTPUT ...` forks one process for each OUTPUT file, and the
processes work in parallel. RUNS.json contains a list of command lines for each process. After each
run, the process appends a line with the exit code to its OUTPUT. A run does the same as
`python examples/NAME.py`.
"""

import fcntl
import gc
import json
import os
import runpy
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
END = "\x1eexit code "
LIMIT = 1800  # seconds


def run_single(forks, folder, *commands, side_by_side=1):
    """Run commands (script, argument, ...) and return (exit code, output) of each.

    Args:
        forks: the `ForkServer`.
        folder: where the outputs are written.
        side_by_side: number of parallel processes. With more than one, no command may depend on
            another.
    """
    parts = [commands[number::side_by_side] for number in range(side_by_side)]
    outputs = [Path(folder) / f"runs_{number}.txt" for number in range(side_by_side)]
    file = Path(folder) / "runs.json"
    file.write_text(json.dumps([[list(map(str, command)) for command in part] for part in parts]))
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # as the launcher sets it
    done = forks.run(__file__, file, *outputs, cwd=ROOT, timeout=LIMIT, **variables)
    assert done.returncode == 0, done.stdout + "".join(output.read_text() for output in outputs)
    results = []
    for output, part in zip(outputs, parts):
        texts = output.read_text().split(END)
        assert len(texts) == len(part) + 1
        codes = [int(text.partition("\n")[0]) for text in texts[1:]]
        texts = [texts[0], *(text.partition("\n")[2] for text in texts[1:])]
        results.append(list(zip(codes, texts)))
    return [results[n % side_by_side][n // side_by_side] for n in range(len(commands))]


def run_one(script, *arguments):
    """Run the script in this interpreter, reset accelerate's state and return the exit code."""
    from accelerate.state import AcceleratorState, GradientState

    name = Path(script)
    sys.argv = [str(name if name.suffix else ROOT / "examples" / f"{name}.py"), *arguments]
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    gc.collect()
    gc.freeze()  # the scripts collect garbage in every phase; they need not search the libraries
    return code


def run_all(commands, output):
    """Run the commands one after the other and write all that they print to the file `output`.

    Runs may use a folder that another process uses at the same time: they take no lock.
    """
    fcntl.lockf = lambda *args: None
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), 1)
    os.dup2(1, 2)
    for command in commands:
        code = run_one(*command)
        sys.stderr.flush()
        print(f"{END}{code}", flush=True)


def main(file, *outputs):
    """Run the lists of commands in `file` in parallel. Return whether a process failed."""
    os.environ.pop("RANK", None)
    children = []
    for commands, output in zip(json.loads(Path(file).read_text()), outputs, strict=True):
        if (pid := os.fork()) == 0:
            return run_all(commands, output)
        children.append(pid)
    return any([os.waitpid(pid, 0)[1] for pid in children])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
