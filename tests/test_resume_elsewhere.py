"""chat_sft resumes on another number of processes: same sequences, same losses."""

import json
import random
import shutil

import pytest
from conftest import read_metrics
from models import FILLERS, make_model

STOP, UPDATES = 3, 8
SIZES = {1: (12, 1), 2: (3, 2), 3: (4, 1), 4: (3, 1)}  # processes -> batch size and accumulation
FLAGS = ("--packing", "--max_length", 48, "--learning_rate", 1e-2, "--max_steps", UPDATES)
FLAGS += ("--save_strategy", "steps", "--save_steps", STOP, "--eval_strategy", "no")
FLAGS += ("--lr_scheduler_type", "linear", "--num_samples", 0, "--logging_strategy", "no")
METHODS = {"full": (), "lora": ("--use_peft_lora", "--lora_r", 4)}
ON = ("--resume_from_checkpoint", True)
DEFAULT = [("ddp", "full", 1), ("zero1", "lora", 1), ("zero2", "full", 1), ("zero3", "lora", 1)]
DEFAULT += [("fsdp1", "full", 1), ("fsdp2", "lora", 1), ("zero3", "lora", 3)]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Flags of a small model with tied weights, and of texts of different lengths."""
    folder, draw = tmp_path_factory.mktemp("small"), random.Random(3)
    model = make_model(folder / "qwen2", "qwen2")
    words = FILLERS.split()
    texts = [" ".join(draw.choices(words, k=draw.randint(3, 30))) for _ in range(150)]
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "train.jsonl").write_text("\n".join(lines))
    return ("--model_name_or_path", model, "--dataset_name", folder / "train.jsonl", *FLAGS)


@pytest.fixture(scope="module")
def train(launch, small, tmp_path_factory):
    """Return a function that runs chat_sft, at most once for the same arguments."""
    folder, outputs = tmp_path_factory.mktemp("runs"), {}

    def train(strategy, method, processes, resumed=None):
        """Return the output folder and output of a run, that resumes the one of `resumed`."""
        name = f"{strategy}-{method}-{processes}-{resumed}"
        if name not in outputs:
            flags = (*small, *METHODS[method], "--output_dir", folder / name)
            size, accumulation = SIZES[processes]
            flags += ("--per_device_train_batch_size", size)
            flags += ("--gradient_accumulation_steps", accumulation)
            if resumed:
                source = train(strategy, method, resumed)[0]
                (folder / name).mkdir()
                for one in (f"checkpoint-{STOP}", "log.jsonl"):
                    copy = shutil.copytree if one.startswith("check") else shutil.copy
                    copy(source / one, folder / name / one)
                flags += ON
            # FSDP does not run on one process
            is_alone = processes == 1 and strategy.startswith("fsdp")
            config = "single" if is_alone else strategy
            done = launch("chat_sft", config, *flags, processes=processes)
            outputs[name] = done.stdout
        return folder / name, outputs[name]

    return train


def slow(cases):
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases if case not in DEFAULT]


STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp1", "fsdp2")
OTHERS = [(strategy, method, to) for strategy in STRATEGIES for method in METHODS for to in (1, 3)]


@pytest.mark.parametrize("strategy, method, to", [*DEFAULT, *slow(OTHERS)])
def test_two_processes_resume_elsewhere(train, strategy, method, to):
    check(train, strategy, method, 2, to)


def check(train, strategy, method, was, to):
    whole, _ = train(strategy, method, was)
    resumed, output = train(strategy, method, to, was)
    theirs, ours = read_metrics(whole), read_metrics(resumed)
    assert f"num_processes {was} (now {to})" in output and "not bit-equal" in output
    for name in ("target_tokens", "input_tokens", "learning_rates"):
        assert ours[name] == theirs[name], name
    assert ours["losses"][:STOP] == theirs["losses"][:STOP]
    # a step count that is lost, or counted twice, changes the losses by 1e-4
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
    assert ours["grad_norms"] == pytest.approx(theirs["grad_norms"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("was, to", [(1, 2), (4, 2)])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_or_four_processes_resume_elsewhere(train, strategy, method, was, to):
    check(train, strategy, method, was, to)
