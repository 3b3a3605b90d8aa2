"""What one process of a cell does: make the model, run a script, merge, or reload what was saved.

measure.py forks the processes from one that has imported this file, and so the libraries. Nothing
of utils/ or examples/ is imported before the fork: a process that reloads has the libraries alone.
"""

import functools
import gc
import importlib
import json
import os
import re
import runpy
import sys
import time
import traceback
from pathlib import Path

import accelerate
import cpuinfo
import torch
import transformers

from tools.models.architectures import ARCHITECTURES
from tools.models.compare import difference, loaded_facts, logits_of, printed_facts, printed_model
from tools.models.make import save_data, save_model

LIBRARIES = """accelerate.commands.launch bitsandbytes datasets deepspeed deepspeed.runtime.zero
matplotlib.backends.backend_agg matplotlib.figure peft torch.distributed.fsdp
torch.distributed.tensor transformers.models.auto.modeling_auto transformers.optimization""".split()
for library in LIBRARIES:
    importlib.import_module(library)
# DeepSpeed calls this slow function several times
cpuinfo.get_cpu_info = functools.partial(dict, cpuinfo.get_cpu_info())
gc.collect()
gc.freeze()  # the scripts collect garbage in every phase; they need not search the libraries


def main(step, job):
    """Run a step in this process. Its output goes to files, its error to error-RANK.json.

    Args:
        step: a key of STEPS.
        job: the dict that measure.py makes. `folder` is the row's working directory, `run` the
            folder of the cell in it.
    """
    os.chdir(job["folder"])
    run, rank = Path(job["run"]), job["rank"]
    for stream, number in (("stdout", 1), ("stderr", 2)):
        file = os.open(run / f"{step}-{rank}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
    sys.stdout.reconfigure(write_through=True)
    torch.set_num_threads(1)
    code, error = 0, {}
    try:
        STEPS[step](job, run)
    except SystemExit as end:
        code = int(bool(end.code))
        printed = (run / f"{step}-{rank}.stderr").read_text()
        refused = re.findall(r"^error: (.*)$", printed, re.MULTILINE)
        error = {"kind": "refused", "message": refused[-1]} if refused else {}
    except BaseException as raised:  # whatever a library raises is what is being measured
        traceback.print_exc()
        code = 1
        error = {"kind": "traceback", "message": f"{type(raised).__name__}: {raised}"}
    if code and error:  # a process may end without a line of its own, because another prints it
        content = error | {"time": time.time()}
        (run / f"error-{rank}.json").write_text(json.dumps(content))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # skip exit handlers: they may wait for a process that has failed


def make(job, run):
    """Write the model of a row and the data."""
    save_model(ARCHITECTURES[job["row"]], "model")
    save_data(".")


def train(job, run):
    """Run a script as `accelerate launch` does, and note when its training starts."""
    from tools.compatibility.cell import set_environment

    set_environment(job)
    accumulate = accelerate.Accelerator.accumulate

    def noted(self, *models):
        (run / "started").touch()
        return accumulate(self, *models)

    accelerate.Accelerator.accumulate = noted  # every script calls it first in an update
    sys.argv = [job["script"], *job["arguments"]]
    sys.path.insert(0, str(Path(job["script"]).parent))
    runpy.run_path(job["script"], run_name="__main__")


def merge(job, run):
    """Merge the adapter with the command of the repository."""
    from tools import merge_adapter

    merge_adapter.main([str(run / "out"), "--output_dir", str(run / "merged")])


def reload(job, run):
    """Load what the script saved by the lines that it printed, and compare.

    Writes to reload.json how the two differ, "" if they do not. Equal answers of a model whose
    adapter does nothing would prove nothing, so that counts as a difference.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "out")
    model = printed_model((run / "train-0.stdout").read_text())
    expected = printed_facts(run, job["is_chat"])
    problem = difference(loaded_facts(model, tokenizer, job["is_chat"]), expected)
    if not problem:
        adapted = logits_of(model)
        with model.disable_adapter():
            problem = "the adapter changes nothing" if adapted.equal(logits_of(model)) else ""
    (run / "reload.json").write_text(json.dumps(problem))


def reload_merged(job, run):
    """Load the merged model by the lines that the command printed; write reload_merged.json."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "merged")
    model = printed_model((run / "merge-0.stdout").read_text())
    expected = printed_facts(run, job["is_chat"])
    problem = difference(loaded_facts(model, tokenizer, job["is_chat"]), expected)
    (run / "reload_merged.json").write_text(json.dumps(problem))


STEPS = {
    "make": make,
    "train": train,
    "reload": reload,
    "merge": merge,
    "reload_merged": reload_merged,
}
