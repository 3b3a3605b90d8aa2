"""chat_sft resumes on another number of processes: same sequences, same losses."""

import json
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import read_metrics
from models import FILLERS, make_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from single import run_single

from utils.chat import resuming
from utils.checkpoint import CheckpointError, digest
from utils.training_state import StateError, metadata_of, read_metadata, read_pieces

STOP, UPDATES = 3, 8
SIZES = {1: (12, 1), 2: (3, 2), 3: (4, 1), 4: (3, 1)}  # processes -> batch size and accumulation
FLAGS = ("--packing", "--max_length", 48, "--learning_rate", 1e-2, "--max_steps", UPDATES)
FLAGS += ("--save_strategy", "steps", "--save_steps", STOP, "--eval_strategy", "no")
FLAGS += ("--lr_scheduler_type", "linear", "--num_samples", 0, "--logging_strategy", "no")
METHODS = {"full": (), "lora": ("--use_peft_lora", "--lora_r", 4)}
ON = ("--resume_from_checkpoint", True)
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp1", "fsdp2")
# two processes -> one without a launcher; these are run in one interpreter
ALONE = [("zero2", "lora"), ("fsdp1", "full"), ("fsdp2", "lora")]
# two processes -> one or three, under the same strategy
TWO = [("ddp", "lora", 1), ("zero1", "full", 1), ("zero2", "lora", 1), ("zero3", "full", 1)]
TWO += [("zero3", "full", 3)]
REST = [(strategy, method, to) for strategy in STRATEGIES for method in METHODS for to in (1, 3)]
REST = [case for case in REST if case not in TWO]
# the default suite resumes on one process with every strategy
assert {case[0] for case in ALONE} | {case[0] for case in TWO if case[2] == 1} == set(STRATEGIES)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Flags of a small model with tied weights, and of texts of different lengths."""
    folder, draw = tmp_path_factory.mktemp("small"), random.Random(3)
    model = make_model(folder / "qwen2", "qwen2")
    words = FILLERS.split()
    texts = [" ".join(draw.choices(words, k=draw.randint(3, 30))) for _ in range(150)]
    (folder / "train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return ("--model_name_or_path", model, "--dataset_name", folder / "train.jsonl", *FLAGS)


def flags_of(small, method, processes, output_dir):
    size, accumulation = SIZES[processes]
    batch = ("--per_device_train_batch_size", size, "--gradient_accumulation_steps", accumulation)
    return (*small, *METHODS[method], *batch, "--output_dir", output_dir)


def stopped(source, folder):
    """Make an output folder with the checkpoint and the log of a run that was stopped there."""
    folder.mkdir()
    shutil.copytree(source / f"checkpoint-{STOP}", folder / f"checkpoint-{STOP}")
    shutil.copy(source / "log.jsonl", folder)
    return folder


@pytest.fixture(scope="module")
def train(launch, small, tmp_path_factory):
    """Return a function that runs chat_sft, at most once for the same arguments."""
    folder, outputs = tmp_path_factory.mktemp("runs"), {}

    def train(strategy, method, processes, resumed=None, source=None):
        """Return the output folder and output of a run.

        It resumes one of `resumed` processes under the strategy `source`, by default the same one.
        """
        name = f"{strategy}-{method}-{processes}-{resumed}-{source}"
        if name not in outputs:
            flags = flags_of(small, method, processes, folder / name)
            if resumed:
                stopped(train(source or strategy, method, resumed)[0], folder / name)
                flags += ON
            # FSDP does not run on one process
            is_alone = processes == 1 and strategy.startswith("fsdp")
            config = "single" if is_alone else strategy
            outputs[name] = launch("chat_sft", config, *flags, processes=processes).stdout
        return folder / name, outputs[name]

    return train


@pytest.fixture(scope="module")
def alone(train, small, forks, tmp_path_factory):
    """(strategy, method) -> output folder and output of a run on one process that resumes it."""
    folder, commands = tmp_path_factory.mktemp("alone"), []
    for strategy, method in ALONE:
        target = stopped(train(strategy, method, 2)[0], folder / f"{strategy}-{method}")
        commands.append(("chat_sft", *flags_of(small, method, 1, target), *ON))
    done = run_single(forks, folder, *commands)
    assert [code for code, _ in done] == [0] * len(ALONE), done
    return {case: (folder / "-".join(case), text) for case, (_, text) in zip(ALONE, done)}


def check(whole, resumed, output, was, to):
    theirs, ours = read_metrics(whole), read_metrics(resumed)
    assert f"num_processes {was} (now {to})" in output and "not bit-equal" in output
    for name in ("target_tokens", "input_tokens", "learning_rates"):
        assert ours[name] == theirs[name], name
    assert ours["losses"][:STOP] == theirs["losses"][:STOP]
    # a step count that is lost, or counted twice, changes the losses by 1e-4
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
    assert ours["grad_norms"] == pytest.approx(theirs["grad_norms"], rel=1e-4)


@pytest.mark.parametrize("strategy, method", ALONE)
def test_two_processes_resume_on_one(train, alone, strategy, method):
    resumed, output = alone[strategy, method]
    check(train(strategy, method, 2)[0], resumed, output, 2, 1)


@pytest.mark.parametrize(
    "strategy, method, to", [*TWO, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)]
)
def test_two_processes_resume_elsewhere(train, strategy, method, to):
    resumed, output = train(strategy, method, to, 2)
    check(train(strategy, method, 2)[0], resumed, output, 2, to)
    is_alone = to == 1 and strategy.startswith("fsdp")
    assert read_metrics(resumed)["strategy"] == ("single" if is_alone else strategy)


@pytest.mark.slow
@pytest.mark.parametrize("was, to", [(1, 2), (4, 2)])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_or_four_processes_resume_elsewhere(train, strategy, method, was, to):
    check(train(strategy, method, was)[0], *train(strategy, method, to, was), was, to)


@pytest.mark.slow
@pytest.mark.parametrize(
    "source, strategy",
    [("zero3", "fsdp2"), ("fsdp1", "zero2_offload"), ("zero2_offload", "zero3"), ("ddp", "zero1")],
)
def test_another_strategy_resumes(train, source, strategy):
    resumed, output = train(strategy, "full", 2, 2, source)
    assert f"strategy {source.split('_')[0]} (now {strategy.split('_')[0]})" in output
    theirs, ours = (read_metrics(one) for one in (train(source, "full", 2)[0], resumed))
    assert ours["target_tokens"] == theirs["target_tokens"]
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)


# What is refused, and what older checkpoints lack -------------------------------------------------
def refused(wanted, size, accumulation, processes):
    """Return the error for a run whose updates read `wanted` sequences, resumed like this."""
    config = SimpleNamespace(
        per_device_train_batch_size=size, gradient_accumulation_steps=accumulation
    )
    with pytest.raises(CheckpointError) as caught:
        resuming.check_split("run", {resuming.PER_UPDATE: wanted}, config, processes)
    return str(caught.value)


def test_another_product_is_refused_with_numbers_that_fit():
    line = refused(12, 4, 1, 2)
    assert "12 sequences per update" in line and "on 2 processes make 8" in line
    assert line.endswith("give 6 and 1 or 3 and 2 or 2 and 3 or 1 and 6")
    line = refused(12, 2, 1, 5)
    assert line.endswith("launch a number of processes that divides 12: 1, 2, 3, 4, 6, 12")


def make_older(folder):
    """Make a checkpoint one of before it said which part of which parameter a process holds."""
    state = json.loads((folder / "state.json").read_text())
    del state["sequences"], state["identity"][resuming.PER_UPDATE]
    for file in folder.glob("process-*"):
        with safe_open(file, framework="pt") as stored:
            numbers, _ = read_metadata(stored)
        save_file(load_file(file), file, {"numbers": json.dumps(numbers)})
        state["files"][file.name] = digest(file)
    (folder / "state.json").write_text(json.dumps(state))


def test_an_older_checkpoint_resumes_as_it_was(alone, small, forks, tmp_path):
    source = alone["zero2", "lora"][0]  # on one process since its update 3
    for name in ("same", "other"):
        (tmp_path / name).mkdir()
        shutil.copytree(source / "checkpoint-6", tmp_path / name / "checkpoint-6")
        make_older(tmp_path / name / "checkpoint-6")
    commands = [("chat_sft", *flags_of(small, "lora", 1, tmp_path / "same"), *ON)]
    other = flags_of(small, "lora", 2, tmp_path / "other")  # as many sequences, in smaller batches
    commands.append(("chat_sft", *other, "--per_device_train_batch_size", 6, *ON))
    (code, text), (bad, error) = run_single(forks, tmp_path, *commands)
    assert code == 0, text
    assert read_metrics(tmp_path / "same")["losses"] == read_metrics(source)["losses"]
    assert bad == 1 and "per_device_train_batch_size 12 (now 6)" in error


def test_pieces_in_an_entry_of_their_own_are_read(tmp_path):
    """So they were written on 2026-11-28."""
    pieces = [[["first", 0, 0, 4]]]
    metadata = {"numbers": json.dumps({"0.step": 3}), "pieces": json.dumps(pieces)}
    save_file({"0.value": torch.arange(4.0)}, tmp_path / "old.safetensors", metadata)
    with safe_open(tmp_path / "old.safetensors", framework="pt") as stored:
        assert read_metadata(stored) == ({"0.step": 3}, pieces)


@pytest.mark.parametrize("key, numel", [("exp_avg", 6), ("step", 1), ("absmax1", 2)])
def test_state_that_belongs_to_blocks_is_not_divided(tmp_path, key, numel):
    file = tmp_path / "process-00000-of-00001.safetensors"
    tensors = {"0.value": torch.arange(6.0), f"0.{key}": torch.arange(float(numel)) + 1}
    pieces = [[["first", 0, 0, 4], ["second", 0, 4, 2]]]
    save_file(tensors, file, metadata_of({}, pieces))
    wanted = ([[("second", 0, 0, 2)], []], [torch.Size([2, 1]), torch.Size([0])])
    with safe_open(file, framework="pt") as stored:
        if key == "absmax1":
            with pytest.raises(StateError, match="absmax1 of the optimizer's state"):
                read_pieces({file: stored}, tmp_path / "other", *wanted)
            return
        found, _ = read_pieces({file: stored}, tmp_path / "other", *wanted)
        assert found["0.value"].tolist() == [[4], [5]] and found["1.value"].numel() == 0
        assert found[f"0.{key}"].tolist() == ([[5], [6]] if key == "exp_avg" else [1])
        with pytest.raises(StateError, match="no element 2 of second"):
            read_pieces({file: stored}, tmp_path / "other", [[("second", 0, 0, 3)]], [(3,)])


def test_parts_of_several_files_are_joined(tmp_path):
    """The second file begins before the first, and both hold elements 4 and 5, as replicas do."""
    places = {"a.safetensors": (4, 10), "b.safetensors": (0, 6), "c.safetensors": (12, 14)}
    for name, (start, end) in places.items():
        tensors = {"0.value": torch.arange(float(start), end)}
        save_file(tensors, tmp_path / name, metadata_of({}, [[["one", start, 0, end - start]]]))
    files = {tmp_path / n: safe_open(tmp_path / n, framework="pt") for n in places}
    for first, last in ((2, 9), (4, 6), (0, 10), (12, 14)):
        pieces, shapes = [[("one", first, 0, last - first)]], [(last - first,)]
        found, _ = read_pieces(files, tmp_path / "other", pieces, shapes)
        assert found["0.value"].tolist() == list(range(first, last))
    with pytest.raises(StateError, match="no element 10 of one"):
        read_pieces(files, tmp_path / "other", [[("one", 8, 0, 5)]], [(5,)])
