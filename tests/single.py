"""Run scripts as one process each, one after the other in one interpreter, which saves the seconds that a start takes.

`python tests/single.py RUNS.json`, where the file holds command lines, prints after each run a line with its exit
code. What such a run does is what `python examples/NAME.py` does; the strategies go through `accelerate launch`.
"""

import gc
import json
import os
import runpy
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
END = "\x1eexit code "


def run_single(environment, folder, *commands):
    """Run (script, argument, ...) commands and return for each its exit code and its output."""
    file = Path(folder) / "runs.json"
    file.write_text(json.dumps([list(map(str, command)) for command in commands]))
    done = subprocess.run(
        [sys.executable, __file__, file],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},  # as the launcher sets it
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    outputs = done.stdout.split(END)
    assert len(outputs) == len(commands) + 1, done.stdout
    codes = [int(output.partition("\n")[0]) for output in outputs[1:]]
    texts = [outputs[0], *(output.partition("\n")[2] for output in outputs[1:])]
    return list(zip(codes, texts))


def run_one(script, *arguments):
    """Run the script in this interpreter and return its exit code."""
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
    gc.freeze()  # what the libraries hold is not searched again at the start and end of every phase
    return code


if __name__ == "__main__":
    os.environ.pop("RANK", None)
    os.dup2(1, 2)
    for command in json.loads(Path(sys.argv[1]).read_text()):
        code = run_one(*command)
        sys.stderr.flush()
        print(f"{END}{code}", flush=True)
