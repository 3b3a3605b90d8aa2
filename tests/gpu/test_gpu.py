"""Tests of the scripts on real GPUs: all steps of tests/gpu/run.sh, and tests too long for it.

With one GPU, two processes share it and use gloo. With two GPUs, they use NCCL.
"""

import json
import os
from importlib.util import find_spec

import launches
import pytest
import steps
from guides import GUIDES
from launches import GPUS, Run, compare
from models import make_model, teach
from processes import plant
from safetensors.torch import load_file
from test_saving import FILL, SAVE, assert_slices

pytestmark = pytest.mark.gpu

SHARDED = {name: steps.LESSONS[name] for name in steps.LESSONS if name.startswith("fsdp")}


@pytest.fixture(scope="module")
def work(environment, tmp_path_factory):
    """The folder that the steps share. They use the CPU Adam that the tests have built."""
    name = "TORCH_EXTENSIONS_DIR"
    before = os.environ.get(name)
    os.environ[name] = environment[name]
    folder = tmp_path_factory.mktemp("work")
    steps.make_inputs(folder, [Run("", "", "", steps.small(folder))])
    yield folder
    del os.environ[name]
    if before is not None:
        os.environ[name] = before


@pytest.mark.parametrize("name", steps.STEPS)
def test_step(work, name):
    if name == "liger" and find_spec("liger_kernel") is None:
        pytest.skip("needs liger-kernel")
    print(steps.do(work, name))


def test_cpu_adam_steps_like_torch(work):
    flags = steps.lesson(work, "causal_lm_full_zero3", "no")
    torch_adam, cpu_adam = (
        launches.run(work, Run(f"adam_{config}", "causal_lm_full_zero3", config, flags))
        for config in ("zero3", "zero3_offload")
    )
    assert "CPUAdam" not in torch_adam["engine"]["optimizer"]
    engine = cpu_adam["engine"]
    assert (engine["optimizer"], engine["adamw_mode"]) == ("DeepSpeedCPUAdam", True)
    compare(cpu_adam, torch_adam, 1e-3)


def test_offload_frees_the_gpu(work):
    flags = steps.large(work)
    runs = [
        Run("large_one", "causal_lm_full", "single", flags),
        Run("large_one_offload", "causal_lm_full_zero3", "zero3_offload", flags),
    ]
    steps.make_inputs(work, runs)
    single, offload = (launches.run(work, one) for one in runs)
    # weight, gradient and two optimizer states, in float32
    assert steps.peaks(single) > 4 * 4 * single["total_parameters"]
    assert steps.peaks(offload) < 0.6 * steps.peaks(single)


@pytest.mark.parametrize("layerwise", [(), ("--layerwise_generation",)])
@pytest.mark.parametrize("name", ["zero3", "fsdp1", "fsdp2"])
def test_a_tied_head_trained_in_full_on_two_processes(work, name, layerwise):
    script, config, base = steps.LESSONS[name]
    model = work / "inputs" / "qwen2"
    if not model.exists():
        teach(make_model(model, "qwen2"), steps=60)
    added = ("--model_name_or_path", model, "--modules_to_save", "lm_head")
    whole = (*steps.lesson(work, base, "no"), *added, "--per_device_train_batch_size", 4)
    half = (*steps.lesson(work, script, "no"), *added, "--per_device_train_batch_size", 2)
    single = launches.run(work, Run("tied", base, "single", whole, shared=True))
    run_name = f"tied_{name}_{len(layerwise)}"
    metrics = launches.run(work, Run(run_name, script, config, (*half, *layerwise), 2))
    compare(metrics, single, 1e-3)
    assert metrics["scores"] == single["scores"]


@pytest.mark.parametrize("name", SHARDED)
def test_the_slice_of_every_process_is_saved(work, tmp_path, name):
    script, config, _ = SHARDED[name]
    copy = plant(tmp_path, script, (SAVE, SAVE + FILL))
    one = Run(f"slices_{name}", str(copy), config, (*steps.small(work), "--max_steps", 2), 2)
    launches.launch(work, one)
    assert_slices(load_file(work / "runs" / one.name / "adapter_model.safetensors"))


@pytest.mark.parametrize("guide", GUIDES)
def test_launch_configs_of_the_guides_run_as_they_are(work, tmp_path, guide):
    script, flags, config = GUIDES[guide]
    file = tmp_path / "guide.yaml"
    file.write_text(json.dumps(config))
    model = "t5" if script.startswith("seq2seq") else "llama"
    arguments = (*steps.small(work, model), "--max_steps", 2, *flags)
    one = Run(f"config_{guide}", script, str(file), arguments, 2, config["mixed_precision"])
    steps.make_inputs(work, [one])
    launches.launch(work, one)


def test_more_processes_than_gpus_are_refused(launch, work, tmp_path):
    flags = (*steps.small(work), "--output_dir", tmp_path / "run")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(GPUS))))
    options = {"processes": GPUS + 1, "code": None, "real": True, "CUDA_VISIBLE_DEVICES": visible}
    done = launch("causal_lm_lora", "ddp", *flags, **options)
    assert done.returncode != 0
    errors = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and f"{GPUS + 1} processes for {GPUS} GPU(s)" in errors[0]
    assert not (tmp_path / "run").exists()
