"""The main job as the README gives it, and what a run says, leaves behind and replaces."""

import dataclasses
import json
import re
import shlex

import pytest
from conftest import ROOT, read_metrics
from models import make_data, make_model
from single import run_single
from test_failures import ABORTS
from test_models import load

MAIN = "seq2seq_lora_zero3_offload"
KEYS = """config versions strategy offload device num_processes mixed_precision trained_dtype engine
trainable_parameters total_parameters losses learning_rates grad_norms score target_tokens input_tokens train_seconds
tokens_per_second memory saved""".split()
MEMORY = [
    f"{kind}_{moment}"
    for kind in ("gpu", "gpu_reserved", "cpu")
    for moment in ("begin", "end", "peak")
]
FACTS = "adamw_mode bytes_held frozen_gradients offload_optimizer offload_param optimizer parameters_held".split()
REPORT = [
    f"{kind} {words}"
    for kind in ("GPU", "CPU")
    for words in (
        "Memory before entering the {0} : N",
        "Memory consumed at the end of the {0} (end-begin): N",
        "Peak Memory consumed during the {0} (max-begin): N",
        "Total Peak Memory consumed during the {0} (max): N",
    )
]


@pytest.fixture(scope="module")
def main_job(launch, tmp_path_factory):
    """The run of the README's first command, into a folder of its own: its output, folder and metrics."""
    folder = tmp_path_factory.mktemp("main_job") / "run"
    done = launch(MAIN, "zero3_offload", "--output_dir", folder, processes=2, real=True)
    return done.stdout, folder, read_metrics(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Flags of a small model and small data."""
    folder = tmp_path_factory.mktemp("small")
    model, data = (
        make_model(folder / "llama", "llama"),
        make_data(folder / "data", train=40, validation=12),
    )
    return (
        "--model_name_or_path",
        model,
        "--dataset_name",
        data,
        "--max_steps",
        2,
        "--warmup_ratio",
        0,
    )


def test_readme_gives_that_command():
    [command] = [
        line
        for line in (ROOT / "README.md").read_text().splitlines()
        if f"/{MAIN}.py" in line and "pip" in line
    ]
    words = shlex.split(command.strip(" `"))
    start = words.index("launch")
    wanted = [
        "launch",
        "--config_file",
        "configs/zero3_offload.yaml",
        "--num_processes",
        "2",
        f"examples/{MAIN}.py",
    ]
    assert words[start:] in (wanted, [*wanted[:3], *wanted[5:]])


def test_main_job_learns(main_job):
    output, _, metrics = main_job
    score = metrics["score"]
    assert score["metric"] == "accuracy"
    assert score["before"] <= 0.65 and score["after"] >= 0.90
    assert (
        f"accuracy={score['after']:.4f} on 100 held-out rows (before training {score['before']:.4f})"
        in output
    )


def test_main_job_prints_the_memory_in_the_words_of_the_guide(main_job):
    lines = [re.sub(r"-?\d+$", "N", line) for line in main_job[0].splitlines()]
    for phase in ("train", "eval"):
        report = [line.format(phase) for line in REPORT]
        start = lines.index(report[0])
        assert lines[start : start + 8] == report


def test_main_job_shows_predictions_files_and_how_to_load(main_job):
    output, folder, metrics = main_job
    lines = output.splitlines()
    [saved] = [number for number, line in enumerate(lines) if line == f"saved in {folder}:"]
    assert [
        line.startswith("  prediction ") and "  label " in line
        for line in lines[saved - 10 : saved]
    ] == [True] * 10
    files = {
        str(file.relative_to(folder)): file.stat().st_size
        for file in folder.rglob("*")
        if file.is_file()
    }
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "memory.png"} < set(
        files
    )
    del files["metrics.json"]
    assert metrics["saved"] == files
    rows = [f"  {size:>12,} bytes  {name}" for name, size in sorted(files.items())]
    assert sorted(lines[saved + 1 : saved + 1 + len(rows)]) == sorted(rows)
    assert lines[saved + 1 + len(rows) : saved + 3 + len(rows)] == [
        "from peft import AutoPeftModelForSeq2SeqLM",
        f'model = AutoPeftModelForSeq2SeqLM.from_pretrained("{folder}")',
    ]
    picture = (folder / "memory.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and picture.endswith(b"IEND\xaeB`\x82")


def test_main_job_is_readable(main_job):
    lines = [line for line in main_job[0].splitlines() if line.strip()]
    bar = [
        line for line in lines if re.match(r" *\d+%\|", line)
    ]  # on a console each of these is drawn over the last
    assert len([line for line in bar if "| 0/" in line]) == 1
    assert len(lines) - len(bar) <= 80, main_job[0]
    assert not re.search(r"(Future|User|Deprecation)Warning", main_job[0])


def test_main_job_runs_the_real_engine(main_job):
    metrics = main_job[2]
    assert [word for word in ABORTS if word in main_job[0]] == []
    engine = metrics["engine"]
    assert (metrics["strategy"], metrics["offload"], metrics["num_processes"]) == (
        "zero3",
        "cpu",
        2,
    )
    assert (engine["optimizer"], engine["adamw_mode"]) == ("DeepSpeedCPUAdam", True)
    assert (engine["offload_optimizer"], engine["offload_param"]) == ("cpu", "cpu")
    assert engine["parameters_held"] == 2 * [
        pytest.approx(metrics["total_parameters"] / 2, rel=0.01)
    ]


def test_facts_come_from_the_engine(launch, small, tmp_path):
    flags = (*small, "--output_dir", tmp_path / "run")
    launch("causal_lm_lora", "zero2", *flags, processes=2, real=True)
    metrics = read_metrics(tmp_path / "run")
    engine = metrics["engine"]
    assert (metrics["strategy"], metrics["offload"], engine["offload_param"]) == (
        "zero2",
        "none",
        "none",
    )
    assert "CPUAdam" not in engine["optimizer"] and engine["optimizer"].endswith(
        ("AdamW", "FusedAdam")
    )
    assert engine["parameters_held"] == 2 * [metrics["total_parameters"]]
    assert_complete(metrics, 2, "causal_lm_lora")


def test_causal_lm_lora_learns(launch, tmp_path):
    launch("causal_lm_lora", "ddp", "--output_dir", tmp_path / "run", processes=2)
    metrics = read_metrics(tmp_path / "run")
    assert metrics["score"]["before"] <= 0.65 and metrics["score"]["after"] >= 0.90
    assert_complete(metrics, 2, "causal_lm_lora")


def assert_complete(metrics, processes, script):
    """metrics.json has the keys that every run's has, and one entry of memory per phase and process."""
    assert sorted(metrics) == sorted(KEYS)
    assert list(metrics["config"]) == [
        field.name for field in dataclasses.fields(load(script).Config)
    ]
    assert {"torch", "accelerate", "deepspeed", "peft", "transformers", "datasets"} <= set(
        metrics["versions"]
    )
    assert sorted(metrics["engine"]) == FACTS
    assert list(metrics["memory"]) == ["load", "train", "eval"]
    for entries in metrics["memory"].values():
        assert [sorted(entry) for entry in entries] == processes * [sorted(MEMORY)]
        assert all(entry["cpu_peak"] >= entry["cpu_begin"] > 0 for entry in entries)
    for key in ("losses", "learning_rates", "grad_norms"):
        assert len(metrics[key]) == len(metrics["losses"]) and all(
            isinstance(value, float) for value in metrics[key]
        )
    assert 0 < metrics["target_tokens"] < metrics["input_tokens"]
    assert metrics["tokens_per_second"] == pytest.approx(
        metrics["input_tokens"] / metrics["train_seconds"]
    )
    assert 0 < metrics["trainable_parameters"] <= metrics["total_parameters"]


def test_main_job_leaves_complete_metrics(main_job):
    assert_complete(main_job[2], 2, MAIN)
    assert main_job[2]["trained_dtype"] == "float32" and main_job[2]["mixed_precision"] == "no"


@pytest.fixture(scope="module")
def repeated(forks, small, tmp_path_factory):
    """Runs in one process: twice the same, another seed, again into the first folder, and another script."""
    folder = tmp_path_factory.mktemp("repeated")
    lora = ("causal_lm_lora", *small, "--output_dir", folder / "one")
    dropout = ("--lora_dropout", 0.3)
    runs = [
        (*lora, *dropout),
        ("causal_lm_lora", *small, *dropout, "--output_dir", folder / "two"),
        ("causal_lm_lora", *small, *dropout, "--output_dir", folder / "three", "--seed", 43),
        ("causal_lm_full", *small, "--output_dir", folder / "full"),
    ]
    first = run_single(forks, folder, *runs, side_by_side=2)
    assert [code for code, _ in first] == [0] * 4, first
    (folder / "one" / "notes.txt").write_text("mine")
    (folder / "one" / "sub").mkdir()
    (folder / "one" / "sub" / "more.txt").write_text("mine too")
    before = {file: file.read_bytes() for file in (folder / "one").rglob("*") if file.is_file()}
    refused, full = run_single(
        forks,
        folder,
        lora,
        ("causal_lm_full", *small, "--output_dir", folder / "one", "--overwrite_output_dir"),
    )
    return folder, before, refused, full


def test_same_seed_same_losses_bit_for_bit(repeated):
    one, two, three = (
        json.loads(repeated[1][repeated[0] / "one" / "metrics.json"])
        if name == "one"
        else read_metrics(repeated[0] / name)
        for name in ("one", "two", "three")
    )
    for key in ("losses", "grad_norms"):
        assert one[key] == two[key]
        assert all(value != other for value, other in zip(one[key], three[key]))
    assert one["engine"] == two["engine"]


def test_every_script_leaves_the_same_metrics(repeated):
    assert_complete(read_metrics(repeated[0] / "two"), 1, "causal_lm_lora")
    assert_complete(read_metrics(repeated[0] / "full"), 1, "causal_lm_full")


def test_output_is_replaced_only_when_asked_and_a_stranger_stays(repeated):
    folder, before, (refused, message), (code, output) = repeated
    assert refused == 1 and "--overwrite_output_dir" in message
    assert code == 0, output
    files = {file for file in (folder / "one").rglob("*") if file.is_file()}
    metrics = read_metrics(folder / "one")
    strangers = {folder / "one" / "notes.txt", folder / "one" / "sub" / "more.txt"}
    assert strangers < files and all(file.read_bytes() == before[file] for file in strangers)
    assert files - strangers == {
        folder / "one" / name for name in (*metrics["saved"], "metrics.json")
    }
    assert folder / "one" / "adapter_model.safetensors" in before  # of the earlier run, gone now
    assert folder / "one" / "model.safetensors" in files
    assert not list(folder.glob(".*"))


def test_failed_push_says_so_and_loses_nothing(launch, small, tmp_path):
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


def test_the_full_model_is_saved_though_the_launch_config_forgets_it(launch, small, tmp_path):
    config = tmp_path / "zero3.yaml"
    lines = (ROOT / "configs" / "zero3.yaml").read_text().splitlines()
    config.write_text("\n".join(line for line in lines if "zero3_save_16bit_model" not in line))
    launch("causal_lm_full_zero3", config, *small, "--output_dir", tmp_path / "run", processes=2)
    assert read_metrics(tmp_path / "run")["saved"]["model.safetensors"] > 0
