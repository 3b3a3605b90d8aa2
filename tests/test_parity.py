"""Every strategy trains alike: the losses, gradient norms, learning rates and scores of one process."""

import math
import re

import pytest
from conftest import ROOT, read_metrics
from models import make_data, make_model, teach
from single import run_single

UPDATES, WARMUP, RATE = 8, 2, 1e-2
SETTINGS = ("--max_steps", UPDATES, "--learning_rate", RATE, "--warmup_ratio", WARMUP / UPDATES)
SETTINGS += ("--weight_decay", 0.1)
# between the norms of the updates, so that some are cut and others are not
CLIP = {"causal_lm_lora": 0.2, "seq2seq_lora": 0.3, "causal_lm_full": 0.4, "causal_lm_qlora": 0.2}
ALONE = (
    "--per_device_eval_batch_size",
    1,
)  # answers of unlike lengths: one process is done before the other
WHOLE = ("--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2)
HALF = (
    "--per_device_train_batch_size",
    2,
    "--gradient_accumulation_steps",
    2,
    *ALONE,
)  # of two processes each
CUTS = [(8, 1), (4, 2), (2, 4)]
SIX = ("--max_steps", 2, "--learning_rate", RATE)
WEIGHTED = "loss = model(**batch, use_cache=False).loss * count[0] / step_tokens[0]"
MEAN_OF_MEANS = "loss = model(**batch, use_cache=False).loss / config.gradient_accumulation_steps"
PARITY = [
    ("causal_lm_lora", "ddp", "causal_lm_lora"),
    pytest.param("causal_lm_lora", "zero1", "causal_lm_lora", marks=pytest.mark.slow),
    ("causal_lm_lora", "zero2", "causal_lm_lora"),
    ("causal_lm_lora", "zero2_offload", "causal_lm_lora"),
    ("causal_lm_lora_zero3_offload", "zero3", "causal_lm_lora"),
    ("causal_lm_lora_zero3_offload", "zero3_offload", "causal_lm_lora"),
    ("causal_lm_lora_fsdp1", "fsdp1", "causal_lm_lora"),
    ("causal_lm_lora_fsdp2", "fsdp2_offload", "causal_lm_lora"),
    ("seq2seq_lora_fsdp1", "fsdp1_offload", "seq2seq_lora"),
    pytest.param("seq2seq_lora", "ddp", "seq2seq_lora", marks=pytest.mark.slow),
    ("seq2seq_lora_zero3_offload", "zero3_offload", "seq2seq_lora"),
    ("causal_lm_full_zero3", "zero3", "causal_lm_full"),
    ("causal_lm_qlora", "zero2", "causal_lm_qlora"),
    ("causal_lm_qlora_zero3", "zero3_qlora", "causal_lm_qlora"),
    ("causal_lm_qlora_fsdp1", "fsdp1_qlora", "causal_lm_qlora"),
    ("causal_lm_qlora_fsdp2", "fsdp2_qlora", "causal_lm_qlora"),
]
SCORES = [
    pytest.param("causal_lm_lora", "ddp", "causal_lm_lora", 2, marks=pytest.mark.slow),
    ("causal_lm_lora_zero3_offload", "zero3", "causal_lm_lora", 7),
    pytest.param("seq2seq_lora_zero3_offload", "zero3", "seq2seq_lora", 2, marks=pytest.mark.slow),
    ("causal_lm_lora_fsdp1", "fsdp1", "causal_lm_lora", 7),
    ("causal_lm_lora_fsdp2", "fsdp2", "causal_lm_lora", 2),
    pytest.param("seq2seq_lora_fsdp1", "fsdp1", "seq2seq_lora", 2, marks=pytest.mark.slow),
]


class Run:
    """What a run said and left."""

    def __init__(self, folder, output):
        self.metrics = read_metrics(folder)
        self.answers = re.findall(r"^  prediction .*$", output, re.MULTILINE)
        self.rows = int(
            re.search(r"^accuracy=[\d.]+ on (\d+) held-out rows", output, re.MULTILINE)[1]
        )


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Return a function from a script to the flags of its model and data: random models, taught a little, who err."""
    folder = tmp_path_factory.mktemp("parity")
    models = {
        "causal": teach(make_model(folder / "llama", "llama"), steps=60),
        "seq2seq": teach(make_model(folder / "t5", "t5"), steps=120),
    }
    data = {rows: make_data(folder / f"data_{rows}", validation=rows, noise=0.3) for rows in (2, 7)}

    def flags(script, rows=7):
        return ("--model_name_or_path", models[script.split("_")[0]], "--dataset_name", data[rows])

    return flags


@pytest.fixture(scope="module")
def single(arguments, forks, tmp_path_factory):
    """The runs in one process that the others are compared with: name -> Run."""
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
        for rows, steps in CUTS:
            cut = ("--per_device_train_batch_size", rows, "--gradient_accumulation_steps", steps)
            commands[f"{script} {rows}x{steps}"] = (
                script,
                *arguments("causal_lm_lora"),
                *SETTINGS,
                *cut,
            )
    for rows, script in ((2, "causal_lm_lora"), (7, "causal_lm_lora"), (2, "seq2seq_lora")):
        flags = (*arguments(script, rows), *SIX, "--per_device_train_batch_size", 6)
        commands[f"{script} on {rows} rows"] = (script, *flags)
    folders = [folder / str(number) for number in range(len(commands))]
    done = run_single(
        forks,
        folder,
        *(
            (*command, "--output_dir", output)
            for command, output in zip(commands.values(), folders)
        ),
        side_by_side=2,
    )
    assert [code for code, _ in done] == [0] * len(commands), "".join(output for _, output in done)
    runs = {name: Run(output, text) for name, output, (_, text) in zip(commands, folders, done)}
    return {name.replace(str(means), "means"): run for name, run in runs.items()}


def differs(run, other, key="losses"):
    """The largest relative difference of two runs."""
    pairs = zip(run.metrics[key], other.metrics[key], strict=True)
    return max(abs(one - two) / abs(two) for one, two in pairs)


def assert_same(run, reference, tolerance):
    for key in ("losses", "grad_norms", "learning_rates"):
        assert len(run.metrics[key]) == len(reference.metrics[key]) > 0
        assert run.metrics[key] == pytest.approx(reference.metrics[key], rel=tolerance), key
    for key in (
        "score",
        "target_tokens",
        "input_tokens",
        "total_parameters",
        "trainable_parameters",
    ):
        assert run.metrics[key] == reference.metrics[key]
    assert run.answers == reference.answers


@pytest.mark.parametrize("script", CLIP)
def test_reference_is_worth_comparing_with(single, script):
    metrics = single[script].metrics
    assert (metrics["strategy"], metrics["num_processes"]) == ("single", 1)
    assert len(metrics["losses"]) == UPDATES
    assert 0 < metrics["score"]["before"] < 1
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
    real = config in ("zero1", "fsdp2_offload")
    flags = (*arguments(script), *SETTINGS, *HALF, *clip)
    done = launch(script, config, *flags, processes=2, real=real)
    run = Run(tmp_path / "run", done.stdout)
    assert (run.metrics["strategy"], run.metrics["num_processes"]) == (config.split("_")[0], 2)
    text = (ROOT / "configs" / f"{config}.yaml").read_text()
    assert run.metrics["offload"] == ("cpu" if "_device: cpu" in text else "none")
    turned_off = (
        "Turned off" in done.stdout and "fsdp_offload_params" in done.stdout
    )  # as FSDP's is without a GPU
    assert turned_off == ("fsdp_offload_params: true" in text)
    held = [sum(sizes.values()) for sizes in run.metrics["engine"]["bytes_held"]]
    whole = sum(single[reference].metrics["engine"]["bytes_held"][0].values())
    shards = 2 if config.startswith(("zero3", "fsdp")) else 1
    assert held == pytest.approx([whole / shards] * 2, rel=0.1)
    assert run.metrics["engine"]["frozen_gradients"] == 0
    assert_same(run, single[reference], 1e-3)


def test_loss_does_not_depend_on_the_cut_into_micro_batches(single):
    one, *others = (single[f"causal_lm_lora {rows}x{steps}"] for rows, steps in CUTS)
    for other in others:
        assert_same(other, one, 1e-4)


def test_mean_of_means_would_depend_on_it(single):
    one, *others = (single[f"means {rows}x{steps}"] for rows, steps in CUTS)
    for other in others:
        assert differs(other, one) > 0.01
        assert differs(other, one, "grad_norms") > 0.01


@pytest.mark.parametrize(("script", "config", "reference", "rows"), SCORES)
def test_three_processes_train_and_score_alike(
    launch, arguments, single, tmp_path, script, config, reference, rows
):
    flags = (*arguments(script, rows), *SIX, "--per_device_train_batch_size", 2, *ALONE)
    flags += (
        ("--layerwise_generation",) if config != "ddp" else ()
    )  # test_parity generates with the whole model
    done = launch(script, config, *flags, "--output_dir", tmp_path / "run", processes=3)
    run, other = Run(tmp_path / "run", done.stdout), single[f"{reference} on {rows} rows"]
    assert_same(run, other, 1e-3)
    assert run.rows == other.rows == len(run.answers) == rows


@pytest.mark.parametrize(
    ("script", "config"),
    [
        ("causal_lm_lora", "ddp"),
        ("causal_lm_lora_zero3_offload", "zero3"),
        ("causal_lm_lora_fsdp1", "fsdp1"),
    ],
)
def test_bf16_acts_and_trains_float32(launch, arguments, single, tmp_path, script, config):
    flags = (
        *SETTINGS,
        *HALF,
        "--max_grad_norm",
        CLIP["causal_lm_lora"],
        "--output_dir",
        tmp_path / "run",
    )
    base = "bfloat16" if config == "fsdp1" else "float32"
    launch(
        script,
        config,
        *arguments(script),
        *flags,
        "--dtype",
        base,
        processes=2,
        flags=("--mixed_precision", "bf16"),
    )
    metrics, reference = read_metrics(tmp_path / "run"), single["causal_lm_lora"].metrics
    assert (metrics["mixed_precision"], metrics["trained_dtype"]) == ("bf16", "float32")
    if (
        config == "fsdp1"
    ):  # the frozen weights stay as they were loaded, beside float32 ones that are trained
        trained = 4 * metrics["trainable_parameters"]
        for held in metrics["engine"]["bytes_held"]:
            assert held["float32"] == pytest.approx(trained / 2, rel=0.1) and held["bfloat16"] > 0
    assert metrics["learning_rates"] == reference["learning_rates"]
    assert metrics["losses"] == pytest.approx(reference["losses"], rel=0.05)
    assert metrics["losses"] != pytest.approx(reference["losses"], rel=1e-5)


def test_gradient_checkpointing_changes_no_loss(launch, arguments, single, tmp_path):
    assert_same(single["checkpointing"], single["causal_lm_lora"], 1e-4)
    script = "causal_lm_lora_zero3_offload"
    flags = (
        *SETTINGS,
        *HALF,
        "--max_grad_norm",
        CLIP["causal_lm_lora"],
        "--output_dir",
        tmp_path / "run",
    )
    done = launch(
        script, "zero3", *arguments(script), *flags, "--gradient_checkpointing", processes=2
    )
    assert_same(Run(tmp_path / "run", done.stdout), single["causal_lm_lora"], 1e-3)
