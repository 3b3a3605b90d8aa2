"""Sharded QLoRA on two GPUs: while the model loads, no GPU holds the full 4-bit model."""

import os

import pytest
import torch
from conftest import read_metrics
from models import make_data, make_model

pytestmark = pytest.mark.gpu

GPUS = torch.cuda.device_count()
two_gpus = pytest.mark.skipif(GPUS < 2, reason=f"needs two GPUs, there are {GPUS}")
ALL = ",".join(map(str, range(GPUS)))
# 16 layers with 8.4 MB of 4-bit weights each, and 6 MB of other weights
SIZE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "head_dim": 64}
SIZE |= {"num_attention_heads": 16, "num_key_value_heads": 16}
# (script, config, largest share of the model on one of two GPUs while it loads). The shares are
# computed and rounded up. A GPU holds half of the parameters under ZeRO-3 and none under FSDP with
# offload. The scales (3 %), one layer (6 %; 2.5 layers under FSDP1) and a few MB of LoRA are added.
MOST = [
    ("causal_lm_qlora_fsdp1", "fsdp1_qlora", 0.4),
    ("causal_lm_qlora_fsdp2", "fsdp2_qlora", 0.4),
    ("causal_lm_qlora_zero3", "zero3_qlora", 0.8),
]


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Flags of a model with 270 million weights, small data and one update."""
    folder = tmp_path_factory.mktemp("packed")
    model = make_model(folder / "llama", "llama", **SIZE)
    data = make_data(folder / "data", train=32, validation=4)
    steps = ("--max_steps", 1, "--per_device_train_batch_size", 1, "--lora_r", 1)
    return ("--model_name_or_path", model, "--dataset_name", data, *steps, "--dtype", "bfloat16")


@two_gpus
@pytest.mark.parametrize(("script", "config", "most"), MOST)
def test_no_gpu_holds_the_full_model_at_load(launch, flags, tmp_path, script, config, most):
    options = {"flags": ("--mixed_precision", "bf16"), "processes": 2, "real": True}
    # libraries read this variable at import
    options["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", ALL)
    launch(script, config, *flags, "--output_dir", tmp_path / "run", **options)
    metrics = read_metrics(tmp_path / "run")
    assert metrics["num_processes"] == 2 and metrics["device"] != "cpu"
    full = sum(sum(held.values()) for held in metrics["engine"]["bytes_held"])
    assert full > 130e6
    peaks = [entry["gpu_peak"] for entry in metrics["memory"]["load"]]
    print(f"{config}: GPU bytes of each process while it loads: {peaks}; the full model: {full:,}")
    assert 0 < max(peaks) < most * full
