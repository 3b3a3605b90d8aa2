"""chat_sft: the guides' commands, the same training under every strategy, what a run leaves."""

import functools
import json
import math
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, read_metrics
from hub_server import TOKEN, serve_hub
from processes import plant
from single import run_single
from safetensors.torch import load_file

COMMANDS = sorted((ROOT / "docs/commands").glob("*.sh"))
STRATEGIES = ["ddp", pytest.param("zero2", marks=pytest.mark.slow), "zero3", "fsdp1", "fsdp2"]
HALF = ("--per_device_train_batch_size", 2)  # of two processes each
WHOLE = ("--per_device_train_batch_size", 4)
SETTINGS = (
    "--max_steps",
    4,
    "--gradient_accumulation_steps",
    2,
    "--num_samples",
    1,
    "--max_new_tokens",
    8,
)
LORA = ("--use_peft_lora", "--packing", "--max_length", 128, *SETTINGS)


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def words_of(command):
    """Return script and arguments of a command file, as a shell would hand them over."""
    words = shlex.split(command.read_text().replace("\\\n", " "))
    return words[words.index("examples/chat_sft.py") + 1 :], words[words.index("--config_file") + 1]


NAMES = [command.stem for command in COMMANDS]
# The default suite runs those with LoRA, with small batches and one short answer.
BRIEF = ["brief lora_fsdp", "brief lora_zero3"]
WHOLE_ONES = [pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name != "lora_zero3"]


@pytest.fixture(scope="module")
def guides(launch, tmp_path_factory):
    """A function that runs a command once, with an output folder of its own: (output, folder)."""

    @functools.cache
    def run(name):
        stem = name.removeprefix("brief ")
        arguments, config = words_of(ROOT / f"docs/commands/{stem}.sh")
        folder = tmp_path_factory.mktemp("guides") / stem
        arguments[arguments.index("--output_dir") + 1] = folder
        if name != stem:
            for flag in ("--per_device_train_batch_size", "--per_device_eval_batch_size"):
                arguments[arguments.index(flag) + 1] = 1
            arguments += ["--num_samples", 1, "--max_new_tokens", 8]
        # the launch of FSDP1 is a real one; test_copy.py has that of ZeRO-3
        real = name == "lora_fsdp"
        return launch("chat_sft", ROOT / config, *arguments, real=real).stdout, folder

    return run


def test_there_are_four_commands():
    assert NAMES == ["lora_fsdp", "lora_zero3", "qlora_fsdp", "qlora_zero3"]


@pytest.mark.parametrize("name", BRIEF + WHOLE_ONES)
def test_guides_command_acts(guides, name):
    output, folder = guides(name)
    metrics = read_metrics(folder)
    config = metrics["config"]
    assert (
        metrics["strategy"] == ("zero3" if "zero3" in name else "fsdp1")
        and metrics["num_processes"] == 2
    )
    assert metrics["mixed_precision"] == "bf16" and metrics["trained_dtype"] == "float32"
    assert config["max_length"] == 512 and config["lora_r"] == 8 and config["seed"] == 100
    for said in (
        "--bf16 overrides mixed_precision no",
        "--max_length 2048 exceeds the model's 512 positions",
        "--use_flash_attn",
        "--dataset_text_field content is unused",
        "2 new tokens: embed_tokens, lm_head are trained and saved in full.",
        "% used",
        "hub: not pushed to",
    ):
        assert said in output, said
    updates = len(metrics["losses"])
    assert (folder / f"checkpoint-{updates}" / "state.json").is_file()
    assert not list(folder.glob(".checkpoint-*"))
    assert any(key.endswith("embed_tokens.weight") for key in adapter(folder))
    if "qlora" in name:
        assert "bfloat16" in str(metrics["engine"]["bytes_held"])


PAIRS = ["brief lora", pytest.param("qlora", marks=pytest.mark.slow)]


@pytest.mark.parametrize("pair", PAIRS)
def test_guides_commands_train_alike(guides, pair):
    one, other = (guides(f"{pair}_{strategy}")[1] for strategy in ("zero3", "fsdp"))
    first, second = read_metrics(one), read_metrics(other)
    one_score, other_score = (run["scores"]["perplexity"] for run in (first, second))
    assert one_score["before"] == pytest.approx(other_score["before"], rel=1e-3)
    assert first["losses"] == pytest.approx(second["losses"], rel=1e-3)
    assert first["grad_norms"] == pytest.approx(second["grad_norms"], rel=1e-2)
    left, right = adapter(one), adapter(other)
    assert left.keys() == right.keys()
    for (
        key
    ) in left:  # Adam's first updates are signs, times the rate, of gradients that bf16 rounds
        assert (left[key] - right[key]).norm() <= 0.1 * right[key].norm(), key
        assert (left[key] - right[key]).abs().max() <= 2.1 * sum(first["learning_rates"]), key


@pytest.fixture(scope="module")
def alone(forks, tmp_path_factory):
    """The runs in one process that others are compared with: name -> folder."""
    folder = tmp_path_factory.mktemp("alone")
    runs = {"lora": LORA, "full": LORA[1:], "pairs": ("--num_samples", 1, "--max_steps", 2)}
    commands = [
        ("chat_sft", *flags, *WHOLE, "--output_dir", folder / name) for name, flags in runs.items()
    ]
    commands.append(("chat_sft", "--use_peft_lora", "--output_dir", folder / "default"))
    for code, output in run_single(forks, folder, *commands, side_by_side=2):
        assert code == 0, output
    (folder / "output.txt").write_text(output)
    return folder


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_lora_trains_as_in_one_process(launch, alone, strategy, tmp_path):
    launch(
        "chat_sft",
        strategy,
        *LORA,
        *HALF,
        "--gradient_checkpointing",
        "--output_dir",
        tmp_path / "run",
    )
    assert_alike(tmp_path / "run", alone / "lora")


@pytest.mark.parametrize(
    "strategy",
    ["zero3", *(pytest.param(strategy, marks=pytest.mark.slow) for strategy in ("fsdp1", "fsdp2"))],
)
def test_all_weights_train_as_in_one_process(launch, alone, strategy, tmp_path):
    launch("chat_sft", strategy, *LORA[1:], *HALF, "--output_dir", tmp_path / "run")
    assert_alike(tmp_path / "run", alone / "full")


def assert_alike(folder, reference):
    ours, theirs = read_metrics(folder), read_metrics(reference)
    for key in ("losses", "grad_norms", "learning_rates"):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key
    assert ours["target_tokens"] == theirs["target_tokens"]
    for one, other in zip(ours["evaluations"], theirs["evaluations"], strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    [name] = [name for name in theirs["saved"] if name.endswith("model.safetensors")]
    left, right = load_file(folder / name), load_file(reference / name)
    assert left.keys() == right.keys()
    for key in left:
        assert (left[key] - right[key]).norm() <= 1e-3 * right[key].norm(), key


def test_default_run_learns_and_shows(alone):
    output, metrics = (alone / "output.txt").read_text(), read_metrics(alone / "default")
    assert set(metrics["scores"]) == {"perplexity", "token_accuracy", "eval_loss"}
    score = metrics["scores"]["perplexity"]
    assert score["after"] < 0.5 * score["before"]
    assert (
        metrics["evaluations"][-1]["token_accuracy"] > metrics["evaluations"][0]["token_accuracy"]
    )
    assert math.log(score["after"]) == pytest.approx(metrics["evaluations"][-1]["eval_loss"])
    assert {"losses.png", "memory.png"} < set(metrics["saved"])
    epochs = re.findall(r"epoch (\d): mean loss ([\d.]+), perplexity exp\(loss\) ([\d.]+)", output)
    assert [number for number, _, _ in epochs] == ["1", "2", "3"]
    means = [float(loss) for _, loss, _ in epochs]
    assert means == sorted(means, reverse=True)
    assert [float(one) for *_, one in epochs] == pytest.approx(list(map(math.exp, means)), rel=1e-3)
    assert re.search(r"38/38 .*loss=[\d.]+, lr=[\de.-]+, grad_norm=[\d.]+\]", output)  # the bar
    assert re.search(r"^  '.*<\|im_start\|>assistant\\n' -> '", output, re.MULTILINE)  # a sample
    assert "\u00ab" in output and "<|im_end|>\u00bb" in output  # what is trained on, marked
    log = [json.loads(line) for line in (alone / "default/log.jsonl").read_text().splitlines()]
    assert [entry for entry in log if "loss" in entry][0]["step"] == 5
    assert {
        "loss",
        "learning_rate",
        "grad_norm",
        "epoch",
        "tokens_per_second",
        "seconds_left",
    } < set(log[1])
    assert [entry["step"] for entry in log if "perplexity" in entry] == [0, 13, 25, 38]
    assert sorted(path.name for path in (alone / "default").glob("checkpoint-*")) == [
        "checkpoint-13",
        "checkpoint-25",
        "checkpoint-38",
    ]


def test_adapter_reloads_in_plain_peft(alone, forks):
    """In a process without this project the adapter has the held-out loss that was measured."""
    program = """
import json, sys, torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1]).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
loss = count = 0
for line in open(sys.argv[2]):
    messages = json.loads(line)["messages"]
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    labels, at = [-100] * len(ids), 0
    for number, message in enumerate(messages):
        end = len(tokenizer.apply_chat_template(messages[: number + 1], return_dict=False))
        if message["role"] == "assistant":
            before = {"add_generation_prompt": True, "return_dict": False}
            begin = len(tokenizer.apply_chat_template(messages[:number], **before))
            newline = len(tokenizer("\\n", add_special_tokens=False).input_ids)
            labels[begin : end - newline] = ids[begin : end - newline]
    n = sum(label != -100 for label in labels)
    with torch.no_grad():
        loss += model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.item() * n
    count += n
print(loss / count)
"""
    data = ROOT / "assets/chat/test.jsonl"
    done = forks.run("-c", program, alone / "default", data, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    measured = read_metrics(alone / "default")["evaluations"][-1]["eval_loss"]
    assert float(done.stdout.splitlines()[-1]) == pytest.approx(measured, rel=1e-5)


def test_tensorboard_is_read_back(launch, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ("--use_peft_lora", "--max_steps", 4, "--logging_steps", 2, "--num_samples", 0, *HALF)
    launch(
        "chat_sft", "ddp", *flags, "--report_to", "tensorboard", "--output_dir", tmp_path / "run"
    )
    events = EventAccumulator(str(tmp_path / "run/runs/chat_sft")).Reload()
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    for name in ("loss", "perplexity", "tokens_per_second"):
        written = [(entry["step"], entry[name]) for entry in log if name in entry]
        assert [(event.step, event.value) for event in events.Scalars(name)] == [
            (step, pytest.approx(value, rel=1e-6)) for step, value in written
        ]


def test_no_tracker_imports_none(forks, tmp_path):
    flags = ["--use_peft_lora", "--max_steps", "1", "--eval_strategy", "no"]
    flags += ["--output_dir", str(tmp_path / "run")]
    program = f"import sys, runpy; sys.argv = {['examples/chat_sft.py', *flags]}; "
    program += (
        "runpy.run_path(sys.argv[0], run_name='__main__'); print('tensorboard' in sys.modules)"
    )
    done = forks.run("-c", program, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "False", done.stdout


def test_streaming_trains_alike_on_two_processes(launch, forks, tmp_path):
    """Without shuffling, a stream gives the documents that a run with all of them reads."""
    flags = ("--use_peft_lora", "--shuffle", "False", "--max_steps", 4, "--eval_strategy", "no")
    flags += ("--save_strategy", "no")
    launch("chat_sft", "ddp", *flags, *HALF, "--streaming", "--output_dir", tmp_path / "stream")
    command = ("chat_sft", *flags, *WHOLE, "--output_dir", tmp_path / "run")
    [(code, output)] = run_single(forks, tmp_path, command)
    assert code == 0, output
    one, other = read_metrics(tmp_path / "stream"), read_metrics(tmp_path / "run")
    assert one["losses"] == pytest.approx(other["losses"], rel=1e-4)


@pytest.mark.parametrize("loss", ["float('nan')", "0.0"])
def test_a_loss_that_is_nan_stops_the_run_and_one_of_zero_does_not(forks, tmp_path, loss):
    line = "                    loss = compute_loss(model, batch) / step_targets"
    worse = f"{line} * ({loss} if len(progress.updates) == 2 else 1)"
    script = plant(tmp_path, "chat_sft", (line, worse))
    flags = ("--use_peft_lora", "--max_steps", 4, "--num_samples", 0)
    flags += ("--save_strategy", "steps", "--save_steps", 1)
    command = (script, *flags, "--output_dir", tmp_path / "run")
    [(code, output)] = run_single(forks, tmp_path, command)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert (tmp_path / "run/metrics.json").exists() == (loss == "0.0")
    if loss == "0.0":
        assert (code, errors) == (0, [])
        assert output.count("The loss of update 3 is exactly 0") == 1
    else:
        assert code == 1
        [line] = errors
        assert "the loss of update 3 is " in line and str(tmp_path / "run/checkpoint-2") in line


@pytest.mark.cases
def test_data_that_one_process_cannot_read_stops_both_with_a_checkpoint(launch, tmp_path):
    """The second process fails when it reads its fourth update, while the third one runs."""
    line = "        reader = chat.signals.UpdateReader(data.train_loader, accumulated, num_updates)"
    fails = """
        if not accelerator.is_main_process:
            broken = (1 / 0 for _ in range(1))
            reader.batches = __import__("itertools").chain([next(reader.batches)] * 2, broken)"""
    script = plant(tmp_path, "chat_sft", (line, line + fails))
    flags = ("--use_peft_lora", "--max_steps", 6, "--eval_strategy", "no", "--save_strategy", "no")
    done = launch(script, "ddp", *flags, *HALF, "--output_dir", tmp_path / "run", code=1)
    assert done.stdout.count("Stopped by unreadable data after update 3 of 6") == 1
    assert done.stdout.count("error: division by zero") == 1
    assert (tmp_path / "run/checkpoint-3/state.json").is_file()


@pytest.mark.cases
@pytest.mark.parametrize("accumulated", [1, 2])
def test_updates_are_read_one_ahead_and_no_further(accumulated):
    from utils.chat.signals import UpdateReader

    read = []
    loader = (read.append(number) or number for number in range(99))
    reader = UpdateReader(loader, accumulated, num_updates=3)
    for update in range(3):
        expected = [*range(update * accumulated, (update + 1) * accumulated)]
        assert reader.take() == expected
        assert len(read) == min(update + 2, 3) * accumulated
        assert not any(reader.flags("cpu").values())
    reader.check()


@pytest.mark.cases
def test_data_that_cannot_be_read_at_all_is_an_error_before_the_first_update(capsys):
    from utils.chat.signals import UpdateReader

    with pytest.raises(SystemExit):
        UpdateReader((1 / 0 for _ in range(1)), 1, 3)
    assert capsys.readouterr().err == "error: division by zero\n"


@pytest.fixture
def hub():
    with serve_hub() as server:
        yield server


def hub_variables(hub, token=TOKEN):
    return {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
    }


HUB = (
    "--use_peft_lora",
    "--max_steps",
    4,
    "--save_strategy",
    "steps",
    "--save_steps",
    2,
    "--eval_strategy",
    "no",
)
HUB += ("--save_total_limit", 1, "--push_to_hub")


def test_every_save_is_pushed_and_no_failure_stops_the_run(launch, hub, tmp_path):
    hub.fail_next(1, 500, "commit")
    folder = tmp_path / "chats"
    done = launch("chat_sft", "ddp", *HUB, "--output_dir", folder, real=True, **hub_variables(hub))
    assert f"hub: pushed to {hub.url}/someone/chats" in done.stdout
    repo = hub.repos["someone/chats"]
    assert (
        repo.private and repo.commits[-1] == "End of training"
    )  # earlier pushes that waited gave way
    assert repo.commits[0].startswith("Update ")
    assert (
        repo.files["adapter_model.safetensors"]
        == (folder / "adapter_model.safetensors").read_bytes()
    )
    assert {"adapter_config.json", "tokenizer.json", "README.md"} < set(repo.files)
    assert not any(
        "process-" in name or "state.json" in name or "checkpoint-" in name for name in repo.files
    )


@pytest.mark.slow
def test_all_checkpoints_are_pushed_to_the_repository_named(environment, hub, tmp_path):
    flags = [
        *HUB,
        "--hub_strategy",
        "all_checkpoints",
        "--hub_model_id",
        "team/model",
        "--hub_private_repo",
        "False",
    ]
    command = [sys.executable, "examples/chat_sft.py", *flags, "--output_dir", tmp_path / "run"]
    variables = environment | hub_variables(hub)
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    repo = hub.repos["team/model"]
    assert not repo.private
    for step in (2, 4):
        assert {
            f"checkpoint-{step}/state.json",
            f"checkpoint-{step}/process-00000-of-00001.safetensors",
        } < set(repo.files)


@pytest.mark.slow  # test_hub.py has the same fault in one process
def test_a_bad_token_is_a_line(environment, hub, tmp_path):
    command = [sys.executable, "examples/chat_sft.py", *HUB, "--output_dir", tmp_path / "run"]
    variables = environment | hub_variables(hub, "hf_bad")
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0 and "hub: not pushed to run" in done.stderr
    assert read_metrics(tmp_path / "run")["losses"]
