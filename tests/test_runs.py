"""The README's main command, and the console output, metrics and output folders of runs."""

import dataclasses
import json
import math
import re
import shlex

import pytest
import torch
from conftest import ACCELERATE, ROOT, read_metrics
from models import make_data, make_model
from single import run_single
from test_failures import ABORTS
from test_models import load

MAIN = "seq2seq_lora_zero3_offload"
KEYS = """config versions strategy offload device num_processes mixed_precision trained_dtype engine
base_model trainable_parameters total_parameters losses learning_rates grad_norms quantization
scores target_tokens input_tokens train_seconds tokens_per_second memory saved""".split()
MOMENTS = ("begin", "end", "peak")
MEMORY = [f"{kind}_{moment}" for kind in ("gpu", "gpu_reserved", "cpu") for moment in MOMENTS]
FACTS = """adamw_mode bytes_held frozen_gradients offload_optimizer offload_param optimizer
parameters_held""".split()
KINDS = ("GPU", "CPU") if torch.cuda.is_available() else ("CPU",)
LINES = [
    "Memory before entering the {0} : N",
    "Memory consumed at the end of the {0} (end-begin): N",
    "Peak Memory consumed during the {0} (max-begin): N",
    "Total Peak Memory consumed during the {0} (max): N",
]
REPORT = [f"{kind} {line}" for kind in KINDS for line in LINES]


@pytest.fixture(scope="module")
def main_job(launch, tmp_path_factory):
    """The README's first command on a part of its data: (output, output folder, metrics)."""
    folder = tmp_path_factory.mktemp("main_job")
    (folder / "data").mkdir()
    for name, rows in (("train", 48), ("validation", 16), ("test", 1)):
        lines = (ROOT / f"assets/complaints/{name}.csv").read_text().splitlines(keepends=True)
        (folder / f"data/{name}.csv").write_text("".join(lines[: rows + 1]))
    words = ("--dataset_name", folder / "data", "--output_dir", folder / "run")
    done = launch(MAIN, "zero3_offload", *words, processes=2, real=True)
    output = done.stdout.replace(str(folder / "data"), "assets/complaints")
    return output, folder / "run", read_metrics(folder / "run")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Flags of a small model and small data."""
    folder = tmp_path_factory.mktemp("small")
    model = make_model(folder / "llama", "llama")
    data = make_data(folder / "data", train=40, validation=12)
    steps = ("--max_steps", 2, "--warmup_ratio", 0)
    return ("--model_name_or_path", model, "--dataset_name", data, *steps)


def test_readme_gives_that_command():
    lines = (ROOT / "README.md").read_text().splitlines()
    [command] = [line for line in lines if f"/{MAIN}.py" in line and "pip" in line]
    words = shlex.split(command.strip(" `"))
    start = words.index("launch")
    wanted = ["launch", "--config_file", "configs/zero3_offload.yaml"]
    wanted += ["--num_processes", "2", f"examples/{MAIN}.py"]
    assert words[start:] in (wanted, [*wanted[:3], *wanted[5:]])


def form(text, is_part):
    """Return the lines of an output, without progress bars, with N for each number.

    A run on a part of the data gives other answers, and shorter numbers.
    """
    if is_part:
        text = re.sub("(prediction|label) '.*?'", r"\1 ''", text)
        text = re.sub(" +", " ", text)
    lines = [re.sub(r"-?\d[\d.,e-]*", "N", line.rstrip()) for line in text.splitlines()]
    return [line for line in lines if line.strip() and "|" not in line]


def assert_readme_shows(output, folder, is_part):
    """A run prints all lines of the README's block in that order; only numbers may differ."""
    readme = (ROOT / "README.md").read_text()
    [block] = [part for part in readme.split("```") if "saved in outputs/" in part]
    assert "GPU Memory" not in block and re.search(r"loss=[\d.]+, lr=.*, grad_norm=", block)
    printed = iter(form(output.replace(str(folder), f"outputs/{MAIN}"), is_part))
    missing = [line for line in form(block, is_part) if line not in printed]
    assert missing == []


def test_readme_shows_the_output_of_that_command(main_job):
    assert_readme_shows(*main_job[:2], is_part=True)


@pytest.mark.slow
def test_readmes_command_learns(launch, tmp_path):
    done = launch(MAIN, "zero3_offload", "--output_dir", tmp_path / "run", processes=2, real=True)
    assert_readme_shows(done.stdout, tmp_path / "run", is_part=False)
    score = read_metrics(tmp_path / "run")["scores"]["accuracy"]
    assert score["before"] <= 0.65 and score["after"] >= 0.90


def test_main_job_prints_its_scores(main_job):
    output, _, metrics = main_job
    score = metrics["scores"]["accuracy"]
    scores = f"{score['after']:.4f} (before training {score['before']:.4f})"
    assert f"held-out accuracy: {scores}" in output


def test_main_job_prints_the_memory_in_the_words_of_the_guide(main_job):
    lines = [re.sub(r"-?\d+$", "N", line) for line in main_job[0].splitlines()]
    for phase in ("train", "eval"):
        report = [line.format(phase) for line in REPORT]
        start = lines.index(report[0])
        assert lines[start : start + len(report)] == report


def test_main_job_shows_predictions_files_and_how_to_load(main_job):
    output, folder, metrics = main_job
    lines = output.splitlines()
    [saved] = [number for number, line in enumerate(lines) if line == f"saved in {folder}:"]
    predictions = lines[saved - 11 : saved - 1]
    assert len(predictions) == 10
    assert all(line.startswith("  prediction ") and "  label " in line for line in predictions)
    paths = [path for path in folder.rglob("*") if path.is_file()]
    files = {str(path.relative_to(folder)): path.stat().st_size for path in paths}
    wanted = {"adapter_model.safetensors", "adapter_config.json", "README.md", "memory.png"}
    assert wanted < set(files)
    del files["metrics.json"]
    assert metrics["saved"] == files
    rows = [f"  {size:>12,} bytes  {name}" for name, size in sorted(files.items())]
    assert sorted(lines[saved + 1 : saved + 1 + len(rows)]) == sorted(rows)
    assert lines[saved + 1 + len(rows) : saved + 6 + len(rows)] == [
        "Load the result with:",
        "from peft import AutoPeftModelForSeq2SeqLM",
        "from transformers import GenerationConfig",
        f'model = AutoPeftModelForSeq2SeqLM.from_pretrained("{folder}")',
        f'model.get_base_model().generation_config = GenerationConfig.from_pretrained("{folder}")',
    ]
    picture = (folder / "memory.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and picture.endswith(b"IEND\xaeB`\x82")


def test_main_job_is_readable(main_job):
    lines = [line for line in main_job[0].splitlines() if line.strip()]
    # on a console, each of these lines replaces the one before
    bar = [line for line in lines if re.match(r" *\d+%\|", line)]
    assert len([line for line in bar if "| 0/" in line]) == 1
    assert len(lines) - len(bar) <= 80, main_job[0]
    assert not re.search(r"(Future|User|Deprecation)Warning", main_job[0])


def test_main_job_runs_the_real_engine(main_job):
    metrics = main_job[2]
    assert [word for word in ABORTS if word in main_job[0]] == []
    engine = metrics["engine"]
    assert (metrics["strategy"], metrics["offload"]) == ("zero3", "cpu")
    assert metrics["num_processes"] == 2
    assert (engine["optimizer"], engine["adamw_mode"]) == ("DeepSpeedCPUAdam", True)
    assert (engine["offload_optimizer"], engine["offload_param"]) == ("cpu", "cpu")
    half = pytest.approx(metrics["total_parameters"] / 2, rel=0.01)
    assert engine["parameters_held"] == [half, half]


def test_main_job_logs_and_draws_every_update(main_job):
    output, folder, metrics = main_job
    assert re.search(r"loss=[\d.]+, lr=[\d.e-]+, grad_norm=[\d.]+", output)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == metrics["losses"]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    keys = ["step", "epoch", "loss", "learning_rate", "grad_norm", "target_tokens", "input_tokens"]
    assert list(lines[0]) == keys
    epochs = re.findall(r"epoch (\d+): mean loss ([\d.]+), perplexity exp\(loss\) ([\d.]+)", output)
    assert [int(number) for number, *_ in epochs] == list(range(1, len(epochs) + 1))
    for number, loss, perplexity in epochs:
        part = [line for line in lines if math.ceil(line["epoch"] - 1e-9) == int(number)]
        tokens = sum(line["target_tokens"] for line in part)
        mean = sum(line["loss"] * line["target_tokens"] for line in part) / tokens
        assert float(loss) == pytest.approx(mean, abs=1e-4)
        assert float(perplexity) == pytest.approx(math.exp(mean), rel=1e-3)
    assert (folder / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert "GPU" not in "".join(line for line in output.splitlines() if "Memory" in line)


def test_a_script_without_a_strategy_trains_without_a_launch_config(forks, small, tmp_path):
    script = ROOT / "examples/causal_lm_lora.py"
    evaluates = ("--eval_strategy", "epoch", "--per_device_train_batch_size", 40)
    command = (*ACCELERATE, script, *small, *evaluates, "--output_dir", tmp_path / "run")
    done = forks.run(*map(str, command), cwd=ROOT)
    assert done.returncode == 0, done.stdout
    assert read_metrics(tmp_path / "run")["strategy"] == "single"
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    # each of the two updates is an epoch, and held-out rows are scored between them
    assert [sorted(json.loads(line))[0] for line in lines] == ["epoch", "accuracy", "epoch"]
    assert done.stdout.count("held-out after epoch 1: accuracy") == 1


def test_a_script_with_a_strategy_stops_with_the_command_to_copy(forks, small, tmp_path):
    script = f"examples/{MAIN}.py"
    command = (*ACCELERATE, script, *small, "--output_dir", tmp_path / "run")
    done = forks.run(*map(str, command), cwd=ROOT)
    assert done.returncode == 1
    [line] = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert f"`accelerate launch --config_file configs/zero3_offload.yaml {script}`" in line


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_facts_come_from_the_engine(launch, small, tmp_path, real):
    flags = (*small, "--output_dir", tmp_path / "run")
    launch("causal_lm_lora", "zero2", *flags, processes=2, real=real)
    metrics = read_metrics(tmp_path / "run")
    engine = metrics["engine"]
    assert (metrics["strategy"], metrics["offload"]) == ("zero2", "none")
    assert engine["offload_param"] == "none"
    assert "CPUAdam" not in engine["optimizer"]
    assert engine["optimizer"].endswith(("AdamW", "FusedAdam"))
    assert engine["parameters_held"] == 2 * [metrics["total_parameters"]]
    assert_complete(metrics, 2, "causal_lm_lora")


@pytest.mark.slow
def test_causal_lm_lora_learns(launch, tmp_path):
    launch("causal_lm_lora", "ddp", "--output_dir", tmp_path / "run", processes=2)
    metrics = read_metrics(tmp_path / "run")
    assert metrics["scores"]["accuracy"]["before"] <= 0.65
    assert metrics["scores"]["accuracy"]["after"] >= 0.90
    assert_complete(metrics, 2, "causal_lm_lora")


def assert_complete(metrics, processes, script):
    """Check that metrics.json has all keys, and a memory entry for every phase and process."""
    assert sorted(metrics) == sorted(KEYS)
    fields = [field.name for field in dataclasses.fields(load(script).Config)]
    assert list(metrics["config"]) == fields
    libraries = {"torch", "accelerate", "deepspeed", "peft", "transformers", "datasets"}
    assert libraries <= set(metrics["versions"])
    assert sorted(metrics["engine"]) == FACTS
    assert list(metrics["memory"]) == ["load", "train", "eval"]
    for entries in metrics["memory"].values():
        assert [sorted(entry) for entry in entries] == processes * [sorted(MEMORY)]
        assert all(entry["cpu_peak"] >= entry["cpu_begin"] > 0 for entry in entries)
    for key in ("losses", "learning_rates", "grad_norms"):
        assert len(metrics[key]) == len(metrics["losses"])
        assert all(isinstance(value, float) for value in metrics[key])
    assert 0 < metrics["target_tokens"] < metrics["input_tokens"]
    speed = metrics["input_tokens"] / metrics["train_seconds"]
    assert metrics["tokens_per_second"] == pytest.approx(speed)
    assert 0 < metrics["trainable_parameters"] <= metrics["total_parameters"]


def test_main_job_leaves_complete_metrics(main_job):
    assert_complete(main_job[2], 2, MAIN)
    assert main_job[2]["trained_dtype"] == "float32" and main_job[2]["mixed_precision"] == "no"


@pytest.fixture(scope="module")
def repeated(forks, small, tmp_path_factory):
    """Runs in one process: two equal ones, one with another seed, and one of another script.

    After these, two more runs write into the first folder: the first without, the second with
    --overwrite_output_dir.

    Returns:
        The parent folder, the files of the first folder before the last two runs (path -> bytes),
        and (exit code, output) of each of these two.
    """
    folder = tmp_path_factory.mktemp("repeated")
    lora = ("causal_lm_lora", *small, "--output_dir", folder / "one")
    full = ("causal_lm_full", *small, "--output_dir")
    # two updates are an epoch; the second run also evaluates after it, which must change nothing
    dropout = ("--lora_dropout", 0.3, "--per_device_train_batch_size", 20, "--max_steps", 4)
    evaluates = ("--eval_strategy", "epoch")
    runs = [
        (*lora, *dropout),
        ("causal_lm_lora", *small, *dropout, *evaluates, "--output_dir", folder / "two"),
        ("causal_lm_lora", *small, *dropout, "--output_dir", folder / "three", "--seed", 43),
        (*full, folder / "full"),
    ]
    first = run_single(forks, folder, *runs, side_by_side=2)
    assert [code for code, _ in first] == [0] * 4, first
    (folder / "one" / "notes.txt").write_text("mine")
    (folder / "one" / "sub").mkdir()
    (folder / "one" / "sub" / "more.txt").write_text("mine too")
    before = {file: file.read_bytes() for file in (folder / "one").rglob("*") if file.is_file()}
    overwriting = (*full, folder / "one", "--overwrite_output_dir")
    refused, overwritten = run_single(forks, folder, lora, overwriting)
    return folder, before, refused, overwritten


def test_same_seed_same_losses_bit_for_bit(repeated):
    folder, before, *_ = repeated
    one = json.loads(before[folder / "one" / "metrics.json"])
    two, three = read_metrics(folder / "two"), read_metrics(folder / "three")
    for key in ("losses", "grad_norms"):
        assert one[key] == two[key]
        assert all(value != other for value, other in zip(one[key], three[key]))
    assert one["engine"] == two["engine"]


def test_every_script_leaves_the_same_metrics(repeated):
    assert_complete(read_metrics(repeated[0] / "two"), 1, "causal_lm_lora")
    assert_complete(read_metrics(repeated[0] / "full"), 1, "causal_lm_full")


def test_output_is_replaced_only_when_asked_and_other_files_stay(repeated):
    folder, before, (refused, message), (code, output) = repeated
    assert refused == 1 and "--overwrite_output_dir" in message
    assert code == 0, output
    files = {file for file in (folder / "one").rglob("*") if file.is_file()}
    metrics = read_metrics(folder / "one")
    others = {folder / "one" / "notes.txt", folder / "one" / "sub" / "more.txt"}
    assert others < files and all(file.read_bytes() == before[file] for file in others)
    written = {folder / "one" / name for name in (*metrics["saved"], "metrics.json")}
    assert files - others == written
    # of the first run; the assertion above shows that it was deleted
    assert folder / "one" / "adapter_model.safetensors" in before
    assert folder / "one" / "model.safetensors" in files
    assert not list(folder.glob(".*"))


def test_a_failed_push_ends_with_an_error_and_loses_nothing(launch, small, tmp_path):
    flags = ("--output_dir", tmp_path / "run", "--hub_model_id", "some/name")
    done = launch("causal_lm_lora", "ddp", *small, *flags, processes=2, code=None)
    assert done.returncode != 0
    errors = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith("error: not pushed to some/name: ")
    assert f"hf upload some/name {tmp_path / 'run'}" in errors[0]
    assert done.stdout.index("saved in") < done.stdout.index("error: not pushed")
    metrics = read_metrics(tmp_path / "run")
    for name, size in metrics["saved"].items():
        assert (tmp_path / "run" / name).stat().st_size == size


def test_the_full_model_is_saved_without_the_setting_in_the_launch_config(launch, small, tmp_path):
    config = tmp_path / "zero3.yaml"
    lines = (ROOT / "configs" / "zero3.yaml").read_text().splitlines()
    config.write_text("\n".join(line for line in lines if "zero3_save_16bit_model" not in line))
    launch("causal_lm_full_zero3", config, *small, "--output_dir", tmp_path / "run", processes=2)
    assert read_metrics(tmp_path / "run")["saved"]["model.safetensors"] > 0
