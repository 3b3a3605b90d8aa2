"""The strategies on real GPUs: parity, bf16, memory, the CPU optimizer, and what is refused."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import ROOT, read_metrics
from guides import GUIDES
from models import make_data, make_model, teach
from processes import plant
from safetensors.torch import load_file
from test_saving import FILL, SAVE, assert_slices

pytestmark = pytest.mark.gpu

GPUS = torch.cuda.device_count()
two_gpus = pytest.mark.skipif(GPUS < 2, reason=f"needs two GPUs, there are {GPUS}")
VISIBLE = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(GPUS))))}
VISIBLE |= {"real": True}  # libraries read it at import
BF16 = ("--mixed_precision", "bf16")
UPDATES = ("--max_steps", 8, "--learning_rate", 1e-2, "--warmup_ratio", 0.25, "--weight_decay", 0.1)
CLIP = 0.2  # between the norms of the updates


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Flags of a small model that was taught a little, small data, and 8 updates."""
    folder = tmp_path_factory.mktemp("small")
    model = teach(make_model(folder / "llama", "llama"), steps=60)
    data = make_data(folder / "data", validation=7, noise=0.3)
    return ("--model_name_or_path", model, "--dataset_name", data, *UPDATES, "--max_grad_norm", CLIP)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Flags of a model of 100 million weights: 1.6 GB of float32 weights, gradients and AdamW states."""
    folder = tmp_path_factory.mktemp("large")
    size = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 14, "num_attention_heads": 12}
    model = make_model(folder / "llama", "llama", **size, num_key_value_heads=12, head_dim=64)
    data = make_data(folder / "data", train=32, validation=4)
    return (
        "--model_name_or_path",
        model,
        "--dataset_name",
        data,
        "--max_steps",
        2,
        "--per_device_train_batch_size",
        1,
    )


@pytest.fixture
def metrics_of(launch, tmp_path):
    """Launch a script on the GPUs and return its metrics.json."""

    def run(script, config, *arguments, processes=1, flags=()):
        folder = tmp_path / f"{script}_{Path(config).stem}_{len(list(tmp_path.iterdir()))}"
        launch(script, config, *arguments, "--output_dir", folder, processes=processes, flags=flags, **VISIBLE)
        metrics = read_metrics(folder)
        assert metrics["num_processes"] == processes and metrics["device"] != "cpu"
        return metrics

    return run


def batch(rows, steps):
    return ("--per_device_train_batch_size", rows, "--gradient_accumulation_steps", steps)


def assert_same(metrics, reference, tolerance):
    for key in ("losses", "grad_norms", "learning_rates"):
        assert metrics[key] == pytest.approx(reference[key], rel=tolerance), key


def gpu_peak(metrics):
    return max(entry["gpu_peak"] for entry in metrics["memory"]["train"])


def test_parity_on_one_gpu(metrics_of, small):
    single = metrics_of("causal_lm_lora", "single", *small, *batch(4, 2))
    assert min(single["grad_norms"]) < CLIP < max(single["grad_norms"])
    for config in ("zero3", "zero3_offload"):
        metrics = metrics_of("causal_lm_lora_zero3_offload", config, *small, *batch(4, 2))
        assert_same(metrics, single, 1e-3)
        assert metrics["score"] == single["score"]


def test_bf16_on_one_gpu(metrics_of, small):
    exact = metrics_of("causal_lm_lora", "single", *small, *batch(4, 2))
    for script, config in (
        ("causal_lm_lora", "single"),
        ("causal_lm_lora_zero3_offload", "zero3"),
        ("causal_lm_lora_zero3_offload", "zero3_offload"),
    ):
        metrics = metrics_of(script, config, *small, *batch(4, 2), flags=BF16)
        assert (metrics["mixed_precision"], metrics["trained_dtype"]) == ("bf16", "float32")
        assert metrics["losses"] == pytest.approx(exact["losses"], rel=0.05)
        assert metrics["losses"] != pytest.approx(exact["losses"], rel=1e-5)
        assert metrics["learning_rates"] == exact["learning_rates"]


def test_cpu_adam_steps_like_torch(metrics_of, small):
    torch_adam = metrics_of("causal_lm_full_zero3", "zero3", *small, *batch(4, 2))
    cpu_adam = metrics_of("causal_lm_full_zero3", "zero3_offload", *small, *batch(4, 2))
    assert "CPUAdam" not in torch_adam["engine"]["optimizer"]
    assert (cpu_adam["engine"]["optimizer"], cpu_adam["engine"]["adamw_mode"]) == ("DeepSpeedCPUAdam", True)
    assert_same(cpu_adam, torch_adam, 1e-3)


def test_offload_frees_the_gpu(metrics_of, large):
    single = metrics_of("causal_lm_full", "single", *large)
    offload = metrics_of("causal_lm_full_zero3", "zero3_offload", *large)
    assert gpu_peak(single) > 4 * 4 * single["total_parameters"]  # weight, gradient, two states, in float32
    assert gpu_peak(offload) < 0.6 * gpu_peak(single)


@two_gpus
@pytest.mark.parametrize("config", ["ddp", "zero1", "zero2", "zero2_offload"])
def test_parity_on_two_gpus(metrics_of, small, config):
    single = metrics_of("causal_lm_lora", "single", *small, *batch(4, 2))
    metrics = metrics_of("causal_lm_lora", config, *small, *batch(2, 2), processes=2)
    assert_same(metrics, single, 1e-3)
    assert metrics["score"] == single["score"]


@two_gpus
def test_memory_falls_from_ddp_to_zero3(metrics_of, large):
    ddp = metrics_of("causal_lm_full", "ddp", *large, processes=2)
    zero3 = metrics_of("causal_lm_full_zero3", "zero3", *large, processes=2)
    offload = metrics_of("causal_lm_full_zero3", "zero3_offload", *large, processes=2)
    assert gpu_peak(zero3) < 0.75 * gpu_peak(ddp)
    assert gpu_peak(offload) < 0.75 * gpu_peak(zero3)


FSDP = [
    ("causal_lm_lora_fsdp1", "fsdp1"),
    ("causal_lm_lora_fsdp1", "fsdp1_offload"),
    ("causal_lm_lora_fsdp2", "fsdp2"),
    ("causal_lm_lora_fsdp2", "fsdp2_offload"),
    ("causal_lm_qlora_fsdp1", "fsdp1_qlora"),
    ("causal_lm_qlora_fsdp2", "fsdp2_qlora"),
]


@two_gpus
@pytest.mark.parametrize(("script", "config"), FSDP)
def test_fsdp_on_two_gpus(metrics_of, small, script, config):
    reference = script.rpartition("_")[0]
    single = metrics_of(reference, "single", *small, *batch(4, 2))
    metrics = metrics_of(script, config, *small, *batch(2, 2), processes=2)
    assert_same(metrics, single, 1e-3)
    assert metrics["score"] == single["score"]
    assert metrics["offload"] == ("none" if config in ("fsdp1", "fsdp2") else "cpu")
    half = sum(single["engine"]["bytes_held"][0].values()) / 2
    assert [sum(held.values()) for held in metrics["engine"]["bytes_held"]] == pytest.approx([half] * 2, rel=0.1)


@two_gpus
@pytest.mark.parametrize(("script", "config"), FSDP)
def test_fsdp_in_bf16_on_two_gpus(metrics_of, small, script, config):
    dtype = ("--dtype", "bfloat16")
    single = metrics_of(script.rpartition("_")[0], "single", *small, *dtype, *batch(4, 2), flags=BF16)
    metrics = metrics_of(script, config, *small, *dtype, *batch(2, 2), processes=2, flags=BF16)
    assert metrics["losses"] == pytest.approx(single["losses"], rel=0.05)
    assert metrics["learning_rates"] == single["learning_rates"]


def test_qlora_under_zero3_on_one_gpu(metrics_of, small):
    single = metrics_of("causal_lm_qlora", "single", *small, *batch(4, 2))
    metrics = metrics_of("causal_lm_qlora_zero3", "zero3_qlora", *small, *batch(4, 2))
    assert_same(metrics, single, 1e-3)
    assert metrics["score"] == single["score"]


@two_gpus
def test_qlora_under_zero3_in_bf16_on_two_gpus(metrics_of, small):
    dtype = ("--dtype", "bfloat16")
    single = metrics_of("causal_lm_qlora", "single", *small, *dtype, *batch(4, 2), flags=BF16)
    metrics = metrics_of("causal_lm_qlora_zero3", "zero3_qlora", *small, *dtype, *batch(2, 2), processes=2, flags=BF16)
    assert metrics["losses"] == pytest.approx(single["losses"], rel=0.05)


@two_gpus
@pytest.mark.parametrize("config", ["fsdp1", "fsdp1_offload"])
def test_sequence_to_sequence_under_fsdp1_on_two_gpus(metrics_of, small, tmp_path, config):
    model = ("--model_name_or_path", teach(make_model(tmp_path / "t5", "t5"), steps=60))
    single = metrics_of("seq2seq_lora", "single", *small, *model, *batch(4, 2))
    metrics = metrics_of("seq2seq_lora_fsdp1", config, *small, *model, *batch(2, 2), processes=2)
    assert_same(metrics, single, 1e-3)


@two_gpus
@pytest.mark.parametrize("layerwise", [(), ("--layerwise_generation",)])
@pytest.mark.parametrize(
    ("script", "config"),
    [
        ("causal_lm_lora_zero3_offload", "zero3"),
        ("causal_lm_lora_fsdp1", "fsdp1"),
        ("causal_lm_lora_fsdp2", "fsdp2"),
    ],
)
def test_a_tied_head_trained_whole_on_two_gpus(metrics_of, small, tmp_path, script, config, layerwise):
    model = teach(make_model(tmp_path / "qwen2", "qwen2"), steps=60)
    flags = (*small, "--model_name_or_path", model, "--modules_to_save", "lm_head")
    single = metrics_of("causal_lm_lora", "single", *flags, *batch(4, 2))
    metrics = metrics_of(script, config, *flags, *batch(2, 2), *layerwise, processes=2)
    assert_same(metrics, single, 1e-3)
    assert metrics["score"] == single["score"]


@two_gpus
def test_offload_frees_the_gpus_under_qlora_and_fsdp1(metrics_of, large, tmp_path):
    text = (ROOT / "configs/fsdp1_qlora.yaml").read_text()
    assert "fsdp_offload_params: true" in text
    kept = tmp_path / "kept.yaml"
    kept.write_text(text.replace("fsdp_offload_params: true", "fsdp_offload_params: false"))
    script, flags = "causal_lm_qlora_fsdp1", (*large, "--dtype", "bfloat16")
    without = metrics_of(script, kept, *flags, processes=2, flags=BF16)
    offload = metrics_of(script, ROOT / "configs/fsdp1_qlora.yaml", *flags, processes=2, flags=BF16)
    print("GPU bytes of a process in training, without and with offload:", gpu_peak(without), gpu_peak(offload))
    assert gpu_peak(offload) < gpu_peak(without)


@two_gpus
@pytest.mark.parametrize(("script", "config"), FSDP)
def test_the_slice_of_every_gpu_is_saved(launch, small, tmp_path, script, config):
    copy = plant(tmp_path, script, (SAVE, SAVE + FILL))
    launch(copy, config, *small, "--output_dir", tmp_path / "run", processes=2, **VISIBLE)
    assert_slices(load_file(tmp_path / "run" / "adapter_model.safetensors"))


@two_gpus
@pytest.mark.parametrize("guide", [guide for guide in GUIDES if not guide.startswith("seq2seq")])
def test_launch_configs_of_the_guides_run_as_they_are(launch, small, tmp_path, guide):
    script, flags, config = GUIDES[guide]
    file = tmp_path / "guide.yaml"
    file.write_text(json.dumps(config))
    launch(script, file, *small, *flags, "--output_dir", tmp_path / "run", processes=2, **VISIBLE)


def test_more_processes_than_gpus_are_refused(launch, small, tmp_path):
    flags = ("--output_dir", tmp_path / "run")
    done = launch("causal_lm_lora", "ddp", *small, *flags, processes=GPUS + 1, code=None, **VISIBLE)
    assert done.returncode != 0
    errors = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and f"{GPUS + 1} processes for {GPUS} GPU(s)" in errors[0]
    assert not (tmp_path / "run").exists()
