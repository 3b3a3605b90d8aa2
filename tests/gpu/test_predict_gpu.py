"""predict.py on a GPU: two processes, sharded or not, write the lines that one process writes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(1, str(Path(__file__).parent))
from launches import ROOT, Run, wait_for
from models import make_model, make_rows, teach

pytestmark = pytest.mark.gpu
SAMPLED = ("--temperature", 0.8, "--top_p", 0.9)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a model, prompts, and texts to score."""
    folder = tmp_path_factory.mktemp("predict")
    (folder / "runs").mkdir()
    teach(make_model(folder / "llama", "llama"), steps=60)
    prompts = [{"prompt": f"Tweet text : {text} Label :"} for text, _ in make_rows(21, 3)]
    rows = [*prompts, *({"text": text} for text, _ in make_rows(10, 4))]
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def predict(work, config, processes, *more):
    """Return the rows that a launch wrote."""
    name = f"{config}_{processes}_{len(more)}.jsonl"
    flags = ("--model_name_or_path", work / "llama", "--input_file", work / "in.jsonl")
    flags += ("--max_new_tokens", 8, "--per_device_eval_batch_size", 4, *more)
    one = Run(name, "predict", config, flags, processes, output="--output_file")
    commands, machines = one.commands(work), []
    for number, command in enumerate(commands):
        variables = one.environment(work, number, len(commands))
        machines.append(subprocess.Popen(command, cwd=ROOT, env=variables))
    wait_for(machines)
    assert not any(machine.returncode for machine in machines)
    return [json.loads(line) for line in (work / "runs" / name).read_text().splitlines()]


def test_two_processes_write_what_one_writes(work):
    alone = predict(work, "single", 1, *SAMPLED)
    for config in ("ddp", "zero3", "fsdp1", "fsdp2"):
        for row, wanted in zip(predict(work, config, 2, *SAMPLED), alone, strict=True):
            if "text" in wanted:
                assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-3), config
            else:
                assert row == wanted, config
    assert {"prediction", "finish_reason"} <= set(alone[0]) and alone[-1]["tokens"] > 1
