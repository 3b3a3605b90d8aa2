"""All strategies give the losses, gradient norms, learning rates and scores of a single process."""

import math
import re

import pytest
from conftest import ROOT, read_metrics
from models import make_data, make_model, teach
from single import run_single

UPDATES, WARMUP, RATE = 8, 2, 1e-2
SETTINGS = ("--max_steps", UPDATES, "--learning_rate", RATE, "--warmup_ratio", WARMUP / UPDATES)
SETTINGS += ("--weight_decay", 0.1)
# between the gradient norms of the updates, so that some gradients are clipped and others are not
CLIP = {"causal_lm_lora": 0.2, "seq2seq_lora": 0.3, "causal_lm_full": 0.4, "causal_lm_qlora": 0.2}
# with one row per batch, answers differ in length, and one process finishes before the other
EVAL_1 = ("--per_device_eval_batch_size", 1)
# 8 rows per update, of one process and of two
WHOLE = ("--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2)
HALF = ("--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2, *EVAL_1)
SPLITS = [(8, 1), (4, 2), (2, 4)]  # (rows per micro-batch, micro-batches) of an update
TWO_UPDATES = ("--max_steps", 2, "--learning_rate", RATE)
WEIGHTED = "loss = compute_loss(model, batch) * count / step_targets"
MEAN_OF_MEANS = "loss = compute_loss(model, batch) / config.gradient_accumulation_steps"
PARITY = [  # (script, config, script of the run in one process to compare with)
    ("causal_lm_lora", "ddp", "causal_lm_lora"),
    pytest.param("causal_lm_lora", "zero1", "causal_lm_lora", marks=pytest.mark.slow),
    ("causal_lm_lora", "zero2", "causal_lm_lora"),
    ("causal_lm_lora", "zero2_offload", "causal_lm_lora"),
    pytest.param("causal_lm_lora_fsdp2", "fsdp2", "causal_lm_lora", marks=pytest.mark.slow),
    ("causal_lm_lora_zero3_offload", "zero3", "causal_lm_lora"),
    ("causal_lm_lora_zero3_offload", "zero3_offload", "causal_lm_lora"),
    ("causal_lm_lora_fsdp1", "fsdp1", "causal_lm_lora"),
    ("causal_lm_lora_fsdp2", "fsdp2_offload", "causal_lm_lora"),
    ("seq2seq_lora_fsdp1", "fsdp1_offload", "seq2seq_lora"),
    pytest.param("seq2seq_lora", "ddp", "seq2seq_lora", marks=pytest.mark.slow),
    pytest.param(
        "seq2seq_lora_zero3_offload", "zero3_offload", "seq2seq_lora", marks=pytest.mark.slow
    ),
    ("causal_lm_full_zero3", "zero3", "causal_lm_full"),
    ("causal_lm_qlora", "zero2", "causal_lm_qlora"),
    ("causal_lm_qlora_zero3", "zero3_qlora", "causal_lm_qlora"),
    ("causal_lm_qlora_fsdp1", "fsdp1_qlora", "causal_lm_qlora"),
    ("causal_lm_qlora_fsdp2", "fsdp2_qlora", "causal_lm_qlora"),
]
SCORES = [  # as above, and the number of held-out rows
    pytest.param("causal_lm_lora", "ddp", "causal_lm_lora", 2, marks=pytest.mark.slow),
    pytest.param(
        "causal_lm_lora_zero3_offload", "zero3", "causal_lm_lora", 7, marks=pytest.mark.slow
    ),
    pytest.param("seq2seq_lora_zero3_offload", "zero3", "seq2seq_lora", 2, marks=pytest.mark.slow),
    pytest.param("causal_lm_lora_fsdp1", "fsdp1", "causal_lm_lora", 7, marks=pytest.mark.slow),
    ("causal_lm_lora_fsdp2", "fsdp2", "causal_lm_lora", 2),
    pytest.param("seq2seq_lora_fsdp1", "fsdp1", "seq2seq_lora", 2, marks=pytest.mark.slow),
]


class Run:
    """Metrics and printed predictions of a run."""

    def __init__(self, folder, output):
        self.metrics = read_metrics(folder)
        self.answers = re.findall(r"^  prediction .*$", output, re.MULTILINE)
        self.rows = int(re.search(r"^\d+ of (\d+) held-out rows:$", output, re.MULTILINE)[1])


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """A function that returns the flags of a script's model and data.

    The models are small and briefly trained, so that some of their answers are wrong.
    """
    folder = tmp_path_factory.mktemp("parity")
    models = {"causal": teach(make_model(folder / "llama", "llama"), steps=60)}
    models["seq2seq"] = teach(make_model(folder / "t5", "t5"), steps=120)
    options = {"train": 32, "noise": 0.3}
    data = {n: make_data(folder / f"data_{n}", validation=n, **options) for n in (2, 7)}

    def flags(script, rows=7):
        return ("--model_name_or_path", models[script.split("_")[0]], "--dataset_name", data[rows])

    return flags


@pytest.fixture(scope="module")
def single(arguments, forks, tmp_path_factory):
    """The runs in one process to compare with: name -> Run."""
    folder = tmp_path_factory.mktemp("single")
    commands = {}
    for script, clip in CLIP.items():
        commands[script] = (script, *arguments(script), *SETTINGS, *WHOLE, "--max_grad_norm", clip)
    commands["checkpointing"] = (*commands["causal_lm_lora"], "--gradient_checkpointing")
    means = folder / "mean_of_means" / "causal_lm_lora.py"
    means.parent.mkdir()
    means.write_text((ROOT / "examples" / means.name).read_text().replace(WEIGHTED, MEAN_OF_MEANS))
    assert MEAN_OF_MEANS in means.read_text()
    for script in ("causal_lm_lora", means):
        for rows, steps in SPLITS:
            flags = ("--per_device_train_batch_size", rows, "--gradient_accumulation_steps", steps)
            flags = (*arguments("causal_lm_lora"), *SETTINGS, *flags)
            commands[f"{script} {rows}x{steps}"] = (script, *flags)
    for rows, script in ((2, "causal_lm_lora"), (7, "causal_lm_lora"), (2, "seq2seq_lora")):
        flags = (*arguments(script, rows), *TWO_UPDATES, "--per_device_train_batch_size", 6)
        commands[f"{script} on {rows} rows"] = (script, *flags)
    folders = [folder / str(number) for number in range(len(commands))]
    outputs = zip(commands.values(), folders)
    words = [(*command, "--output_dir", output) for command, output in outputs]
    done = run_single(forks, folder, *words, side_by_side=2)
    assert [code for code, _ in done] == [0] * len(commands), "".join(output for _, output in done)
    runs = {name: Run(output, text) for name, output, (_, text) in zip(commands, folders, done)}
    return {name.replace(str(means), "means"): run for name, run in runs.items()}


def differs(run, other, key="losses"):
    """Return the largest relative difference between two runs in a list of their metrics."""
    pairs = zip(run.metrics[key], other.metrics[key], strict=True)
    return max(abs(one - two) / abs(two) for one, two in pairs)


def assert_same(run, reference, tolerance):
    for key in ("losses", "grad_norms", "learning_rates"):
        assert len(run.metrics[key]) == len(reference.metrics[key]) > 0
        assert run.metrics[key] == pytest.approx(reference.metrics[key], rel=tolerance), key
    for key in ("scores", "target_tokens", "input_tokens"):
        assert run.metrics[key] == reference.metrics[key]
    for key in ("total_parameters", "trainable_parameters"):
        assert run.metrics[key] == reference.metrics[key]
    assert run.answers == reference.answers


@pytest.mark.parametrize("script", CLIP)
def test_reference_run_exercises_warmup_clipping_and_scoring(single, script):
    metrics = single[script].metrics
    assert (metrics["strategy"], metrics["num_processes"]) == ("single", 1)
    assert len(metrics["losses"]) == UPDATES
    assert 0 < metrics["scores"]["accuracy"]["before"] < 1
    assert min(metrics["losses"]) > 0.02
    assert min(metrics["grad_norms"]) < CLIP[script] < max(metrics["grad_norms"])
    plan = [RATE * update / WARMUP for update in range(WARMUP)]
    share = [update / (UPDATES - WARMUP) for update in range(UPDATES - WARMUP)]
    plan += [RATE * (1 + math.cos(math.pi * part)) / 2 for part in share]
    assert metrics["learning_rates"] == pytest.approx(plan)


@pytest.mark.parametrize(("script", "config", "reference"), PARITY)
def test_parity(launch, arguments, single, tmp_path, script, config, reference):
    clip = ("--max_grad_norm", CLIP[reference], "--output_dir", tmp_path / "run")
    # the others have real launches in test_fork_server, test_chat, test_copy and test_runs
    real = config in ("zero1", "fsdp2")
    flags = (*arguments(script), *SETTINGS, *HALF, *clip)
    # an evaluation between two epochs gathers weights; this must not change any loss
    evaluates = config.startswith(("zero3", "fsdp"))
    flags += ("--eval_strategy", "epoch" if evaluates else "no")
    done = launch(script, config, *flags, processes=2, real=real)
    assert done.stdout.count("held-out after epoch 1: accuracy") == evaluates
    run = Run(tmp_path / "run", done.stdout)
    assert (run.metrics["strategy"], run.metrics["num_processes"]) == (config.split("_")[0], 2)
    text = (ROOT / "configs" / f"{config}.yaml").read_text()
    assert run.metrics["offload"] == ("cpu" if "_device: cpu" in text else "none")
    # without a GPU, FSDP's offload is turned off
    turned_off = "Turned off" in done.stdout and "fsdp_offload_params" in done.stdout
    assert turned_off == ("fsdp_offload_params: true" in text)
    held = [sum(sizes.values()) for sizes in run.metrics["engine"]["bytes_held"]]
    full = sum(single[reference].metrics["engine"]["bytes_held"][0].values())
    shards = 2 if config.startswith(("zero3", "fsdp")) else 1
    assert held == pytest.approx([full / shards] * 2, rel=0.1)
    assert run.metrics["engine"]["frozen_gradients"] == 0
    assert_same(run, single[reference], 1e-3)


def test_loss_does_not_depend_on_the_size_of_micro_batches(single):
    one, *others = (single[f"causal_lm_lora {rows}x{steps}"] for rows, steps in SPLITS)
    for other in others:
        assert_same(other, one, 1e-4)


def test_mean_of_means_would_depend_on_the_size_of_micro_batches(single):
    one, *others = (single[f"means {rows}x{steps}"] for rows, steps in SPLITS)
    for other in others:
        assert differs(other, one) > 0.01
        assert differs(other, one, "grad_norms") > 0.01


@pytest.mark.parametrize(("script", "config", "reference", "rows"), SCORES)
def test_three_processes_train_and_score_alike(
    launch, arguments, single, tmp_path, script, config, reference, rows
):
    flags = (*arguments(script, rows), *TWO_UPDATES, "--per_device_train_batch_size", 2, *EVAL_1)
    # test_parity generates with the gathered model
    flags += ("--layerwise_generation",) if config != "ddp" else ()
    done = launch(script, config, *flags, "--output_dir", tmp_path / "run", processes=3)
    run, other = Run(tmp_path / "run", done.stdout), single[f"{reference} on {rows} rows"]
    assert_same(run, other, 1e-3)
    assert run.rows == other.rows == len(run.answers) == rows


BF16 = [
    ("causal_lm_lora", "ddp"),
    pytest.param("causal_lm_lora_zero3_offload", "zero3", marks=pytest.mark.slow),
    ("causal_lm_lora_fsdp1", "fsdp1"),
]


@pytest.mark.parametrize(("script", "config"), BF16)
def test_bf16_takes_effect_and_trains_float32(launch, arguments, single, tmp_path, script, config):
    base = "bfloat16" if config == "fsdp1" else "float32"
    flags = (*arguments(script), *SETTINGS, *HALF, "--max_grad_norm", CLIP["causal_lm_lora"])
    flags += ("--dtype", base, "--output_dir", tmp_path / "run")
    launch(script, config, *flags, processes=2, flags=("--mixed_precision", "bf16"))
    metrics, reference = read_metrics(tmp_path / "run"), single["causal_lm_lora"].metrics
    assert (metrics["mixed_precision"], metrics["trained_dtype"]) == ("bf16", "float32")
    if config == "fsdp1":  # frozen weights keep their dtype; the trainable parameters are float32
        trained = 4 * metrics["trainable_parameters"]
        for held in metrics["engine"]["bytes_held"]:
            assert held["float32"] == pytest.approx(trained / 2, rel=0.1) and held["bfloat16"] > 0
    assert metrics["learning_rates"] == reference["learning_rates"]
    assert metrics["losses"] == pytest.approx(reference["losses"], rel=0.05)
    assert metrics["losses"] != pytest.approx(reference["losses"], rel=1e-5)


def test_gradient_checkpointing_changes_no_loss(launch, arguments, single, tmp_path):
    assert_same(single["checkpointing"], single["causal_lm_lora"], 1e-4)
    script = "causal_lm_lora_zero3_offload"
    flags = (*arguments(script), *SETTINGS, *HALF, "--max_grad_norm", CLIP["causal_lm_lora"])
    flags += ("--gradient_checkpointing", "--output_dir", tmp_path / "run")
    done = launch(script, "zero3", *flags, processes=2)
    assert_same(Run(tmp_path / "run", done.stdout), single["causal_lm_lora"], 1e-3)
