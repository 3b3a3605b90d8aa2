"""Settings, launch configs, environments and folders that once hung, crashed or went unsaid."""

import contextlib
import io
import json
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from conftest import read_metrics
from models import make_data, make_model
from torch.distributed import DistNetworkError

from utils import deepspeed_checks, environment, folders, launch, launch_checks
from utils.chat import settings as chat_settings
from utils import settings

pytestmark = pytest.mark.cases

OWN = {*environment.GROUP, *environment.NUMBERS, *environment.STRATEGIES, environment.CONFIG_FILE}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "LOCAL_RANK": "0"}
FSDP = {"ACCELERATE_USE_FSDP": "true", "LOCAL_RANK": "0"}
GROUP = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
GROUP |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def variables(monkeypatch):
    """Return a function that sets the launch variables and what started this process."""
    kept = {
        n: v for n, v in os.environ.items() if not n.startswith(("ACCELERATE_", "TORCHELASTIC"))
    }
    monkeypatch.setattr(os, "environ", {n: v for n, v in kept.items() if n not in OWN})

    def variables(given, command=(), config=None, started_with=None):
        os.environ |= given
        monkeypatch.setattr(environment, "launcher", lambda: ([*command], started_with or {}))
        monkeypatch.setattr(environment, "launch_config", lambda: config or {})
        monkeypatch.setattr(deepspeed_checks, "launch_config", lambda: config or {})

    return variables


def refusal(capsys, function, *args):
    """Return the one line with which a call stops."""
    with pytest.raises(SystemExit) as ended:
        function(*args)
    output, error = capsys.readouterr()
    assert ended.value.code == 1 and error.startswith("error: ") and error.count("\n") == 1
    return error


# Variables that another launch left ---------------------------------------------------------------
LEFT = {  # id -> (variables, which of them are ignored)
    "LOCAL_RANK alone": ({"LOCAL_RANK": "0"}, {"LOCAL_RANK"}),
    "LOCAL_RANK of a second process": ({"LOCAL_RANK": "1"}, {"LOCAL_RANK"}),
    "RANK alone": ({"RANK": "3"}, {"RANK"}),
    "WORLD_SIZE of one process": ({"WORLD_SIZE": "1"}, {"WORLD_SIZE"}),
    "a group without an address": (
        {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
        {"RANK", "LOCAL_RANK", "WORLD_SIZE"},
    ),
    "a group without a port": (
        {n: v for n, v in GROUP.items() if n not in ("MASTER_PORT", "WORLD_SIZE")},
        {"RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"},
    ),
}
UNTOUCHED = {
    "no variables": {},
    "an address alone": {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"},
    "a group of one": GROUP | {"WORLD_SIZE": "1"},
    "torchrun": GROUP | {"TORCHELASTIC_RUN_ID": "none"},
}
BROKEN = {  # id -> (variables, words of the error)
    "WORLD_SIZE alone": (
        {"WORLD_SIZE": "2"},
        "WORLD_SIZE is 2 in the environment, and RANK, LOCAL",
    ),
    "WORLD_SIZE without MASTER_PORT": (
        {n: v for n, v in GROUP.items() if n != "MASTER_PORT"},
        "MASTER_PORT are not set: start the script with `accelerate launch`, or unset",
    ),
    "RANK is a word": (GROUP | {"RANK": "zero"}, "RANK is 'zero' in the environment"),
    "LOCAL_RANK is -1": ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1' in the environment"),
    "WORLD_SIZE is a fraction": (GROUP | {"WORLD_SIZE": "1.5"}, "WORLD_SIZE is '1.5'"),
    "MASTER_PORT is a word": (GROUP | {"MASTER_PORT": "auto"}, "MASTER_PORT is 'auto'"),
    "RANK beyond WORLD_SIZE": (
        GROUP | {"RANK": "2"},
        "RANK is 2 in the environment, and WORLD_SIZE",
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_parts_of_a_group_are_ignored_and_named(variables, capsys, case):
    given, ignored = LEFT[case]
    variables(given)
    environment.settle_environment()
    line = capsys.readouterr().out
    assert line.startswith("Ignored: ") and "The script runs in one process." in line
    assert not ignored & {*os.environ} and all(f"{name}=" in line for name in ignored)
    assert environment.launched_strategy() == "single"


@pytest.mark.parametrize("case", UNTOUCHED)
def test_complete_groups_are_left_alone(variables, capsys, case):
    variables(UNTOUCHED[case])
    environment.settle_environment()
    assert capsys.readouterr().out == ""
    assert {name: os.environ[name] for name in UNTOUCHED[case]} == UNTOUCHED[case]


@pytest.mark.parametrize("case", BROKEN)
def test_groups_that_contradict_themselves_are_refused(variables, capsys, case):
    given, words = BROKEN[case]
    variables(given | {environment.STORE: "True"})  # a launcher that is gone is not asked
    assert words in refusal(capsys, environment.settle_environment)


def test_empty_variables_are_no_variables(variables, capsys):
    variables(dict.fromkeys(GROUP, ""))
    environment.settle_environment()
    assert capsys.readouterr().out == "" and not {*GROUP} & {*os.environ}


@pytest.mark.parametrize(
    "more, started_with", [({}, {}), ({"TORCHELASTIC_RUN_ID": "none"}, {"LOCAL_RANK": "0"})]
)
def test_a_process_that_waits_for_others_says_so(variables, capsys, more, started_with):
    variables(GROUP | more, started_with=started_with)
    environment.settle_environment()
    line = capsys.readouterr().out
    assert (
        "this process waits for 1 more at 127.0.0.1:29500. To run alone, unset LOCAL_RANK" in line
    )


ACCELERATE = ("python", "/env/bin/accelerate", "launch", "--config_file", "x.yaml", "script.py")
TORCHRUN = ("python", "/env/bin/torchrun", "--nproc_per_node", "2", "script.py")
WITHOUT = "Ignored: {} in the environment. No launcher started this process.\n"
OTHER = "Ignored: {} in the environment, because another launch set it.\n"
FILE = {environment.CONFIG_FILE: "old.json"}
ZERO2 = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}}
STRATEGIES = {  # id -> (variables, command of the launcher, its config, what is printed, strategy)
    "FSDP without a launcher": (
        {"ACCELERATE_USE_FSDP": "true"},
        (),
        {},
        WITHOUT.format("ACCELERATE_USE_FSDP"),
        "single",
    ),
    "DeepSpeed without a launcher": (
        {"ACCELERATE_USE_DEEPSPEED": "true"},
        (),
        {},
        WITHOUT.format("ACCELERATE_USE_DEEPSPEED"),
        "single",
    ),
    "DeepSpeed in a launch of DDP": (
        GROUP | DEEPSPEED,
        ACCELERATE,
        {"distributed_type": "MULTI_GPU"},
        OTHER.format("ACCELERATE_USE_DEEPSPEED"),
        "ddp",
    ),
    "FSDP in a launch of DeepSpeed": (
        GROUP | DEEPSPEED | FSDP,
        ACCELERATE,
        {"distributed_type": "DEEPSPEED"},
        OTHER.format("ACCELERATE_USE_FSDP"),
        "zero2",
    ),
    "DeepSpeed in a launch of FSDP by flag": (
        GROUP | DEEPSPEED | FSDP,
        (*ACCELERATE, "--use_fsdp"),
        {},
        OTHER.format("ACCELERATE_USE_DEEPSPEED"),
        "fsdp1",
    ),
    "a DeepSpeed config in a launch of DDP": (
        GROUP | FILE,
        ACCELERATE,
        {"distributed_type": "MULTI_GPU"},
        f"Ignored: {environment.CONFIG_FILE}=old.json in the environment. DeepSpeed was not "
        "launched.\n",
        "ddp",
    ),
    "a DeepSpeed config without a launcher": (
        FILE,
        (),
        {},
        f"Ignored: {environment.CONFIG_FILE}=old.json in the environment. DeepSpeed was not "
        "launched.\n",
        "single",
    ),
    "FSDP as asked": (GROUP | FSDP, ACCELERATE, {"distributed_type": "FSDP"}, "", "fsdp1"),
    "DeepSpeed as asked": (
        GROUP | DEEPSPEED,
        ACCELERATE,
        {"distributed_type": "DEEPSPEED"},
        "",
        "zero2",
    ),
    "FSDP=1 under torchrun": (
        GROUP | FSDP | {"ACCELERATE_USE_FSDP": "1"},
        TORCHRUN,
        {},
        "",
        "fsdp1",
    ),
    "FSDP=True under torchrun": (
        GROUP | FSDP | {"ACCELERATE_USE_FSDP": "True", "FSDP_VERSION": "2"},
        TORCHRUN,
        {},
        "",
        "fsdp2",
    ),
    "FSDP=false": ({"ACCELERATE_USE_FSDP": "false"}, (), {}, "", "single"),
}


@pytest.mark.parametrize("case", STRATEGIES)
def test_the_strategy_is_that_of_this_launch(variables, capsys, case):
    given, command, config, printed, strategy = STRATEGIES[case]
    variables(given | {"TORCHELASTIC_RUN_ID": "1"}, command, config)
    environment.settle_environment()
    assert capsys.readouterr().out == printed
    assert environment.launched_strategy() == strategy


def test_a_deepspeed_config_that_another_launch_left_is_ignored(variables, capsys):
    """accelerate's launcher sets the variable together with another one."""
    left = FILE | {environment.FIELDS: "zero_stage"}
    variables(GROUP | DEEPSPEED | FILE | {"TORCHELASTIC_RUN_ID": "1"}, ACCELERATE, ZERO2, left)
    environment.settle_environment()
    told = f"Ignored: {environment.CONFIG_FILE}=old.json in the environment, because another launch"
    assert capsys.readouterr().out == f"{told} set it.\n"
    assert environment.CONFIG_FILE not in os.environ


@pytest.mark.parametrize("command", [ACCELERATE, TORCHRUN])
def test_a_deepspeed_config_that_the_user_names_is_kept(variables, capsys, tmp_path, command):
    (tmp_path / "own.json").write_text('{"zero_optimization": {"stage": 1}}')
    own = {environment.CONFIG_FILE: str(tmp_path / "own.json")}
    variables(GROUP | DEEPSPEED | own | {"TORCHELASTIC_RUN_ID": "1"}, command, ZERO2, own)
    environment.settle_environment()
    assert capsys.readouterr().out == ""
    culprit, content = environment.deepspeed_file()
    assert culprit == f"{environment.CONFIG_FILE}={tmp_path / 'own.json'}"
    assert content == {"zero_optimization": {"stage": 1}}


def test_a_deepspeed_config_of_the_user_and_one_of_the_launch_config_are_refused(variables, capsys):
    config = {"distributed_type": "DEEPSPEED"}
    config |= {"deepspeed_config": {"deepspeed_config_file": "x.json"}}
    variables(GROUP | DEEPSPEED | {environment.CONFIG_FILE: "x.json"}, ACCELERATE, config, FILE)
    error = refusal(capsys, environment.settle_environment)
    assert (
        f"{environment.CONFIG_FILE}=old.json in the environment and deepspeed_config_file" in error
    )
    assert "x.json of the launch config are two configs" in error


@pytest.mark.parametrize(
    "words, expected",
    [
        ("python /env/bin/accelerate launch --cpu x.py", True),
        ("/env/bin/python3.11 -u -m accelerate.commands.accelerate_cli launch x.py", True),
        ("python -m accelerate.commands.launch x.py", True),
        ("python /env/bin/accelerate-launch x.py", True),
        ("python /env/bin/torchrun --nproc_per_node 2 accelerate launch.py", False),
        ("bash", False),
        ("python -m pytest accelerate_launches", False),
    ],
)
def test_accelerate_launch_is_recognized(words, expected):
    assert environment.is_accelerate(words.split()) == expected


def test_the_launcher_is_this_process_s_parent():
    command, variables = environment.launcher()
    assert command and isinstance(variables, dict)


@pytest.mark.parametrize(
    "words, content, use_cpu",
    [
        (["--config_file", "a.yaml"], "use_cpu: true", True),
        (["--config_file=a.yaml"], '{"use_cpu": true}', True),
        (["--config_file", "a.yaml"], "use_cpu: 'no'", "no"),
        (["--config_file", "gone.yaml"], "use_cpu: true", None),
        ([], "use_cpu: true", None),
    ],
)
def test_the_launch_config_is_read_as_yaml(monkeypatch, tmp_path, words, content, use_cpu):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(content)
    monkeypatch.setattr(environment, "default_config_file", tmp_path / "none")
    monkeypatch.setattr(environment, "launcher", lambda: (["accelerate", "launch", *words], {}))
    assert environment.launch_config().get("use_cpu") == use_cpu


def test_a_console_without_unicode_prints_every_line(variables, monkeypatch):
    console = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(console, encoding="ascii"))
    variables({})
    environment.settle_environment()
    print("caf\u00e9 \U0001f642", flush=True)
    assert console.getvalue() == b"caf\\xe9 \\U0001f642\n"


# DeepSpeed's config file --------------------------------------------------------------------------
ZERO3 = {"zero_optimization": {"stage": 3}}
SETTINGS = {
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.5,
    "per_device_train_batch_size": 4,
}
OPTIMIZER = {"optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR"}}
OFFLOAD = "ACCELERATE_DEEPSPEED_OFFLOAD"
GATHER = "stage3_gather_16bit_weights_on_model_save"


def one_bit(name):
    """Return the case of an optimizer that DeepSpeed has removed."""
    words = f"x.json asks for {name}, which DeepSpeed has removed: examples/causal_lm_full_ddp_comp"
    return ZERO3 | {"optimizer": {"type": name}}, {}, words


CONTRADICTIONS = {  # id -> (content of the file, more variables, words of the error)
    "an optimizer": (
        ZERO3 | {"optimizer": {"type": "AdamW"}},
        {},
        "x.json has optimizer, and this script has its own: remove them, or run "
        "examples/causal_lm_full_zero2_config.py, which takes both from the config",
    ),
    "a scheduler": (ZERO3 | {"scheduler": {"type": "WarmupLR"}}, {}, "x.json has scheduler, and"),
    "both": (ZERO3 | OPTIMIZER, {}, "has optimizer and scheduler, and"),
    "an optimizer without a name": (
        ZERO3 | {"optimizer": {}},
        {},
        "x.json has optimizer {}: write",
    ),
    "1-bit Adam": one_bit("OneBitAdam"),
    "0/1 Adam": one_bit("ZeroOneAdam"),
    "1-bit LAMB": one_bit("OneBitLamb"),
    "MiCS": (
        {"zero_optimization": {"stage": 3, "mics_shard_size": 2}},
        {},
        "mics_shard_size, which DeepSpeed has removed: remove it; configs/zero3_hpz.yaml and "
        "configs/fsdp2_hybrid.yaml also gather within a node",
    ),
    "MiCS's other key": (
        {"zero_optimization": {"stage": 3, "mics_hierarchical_params_gather": False}},
        {},
        "configs/zero3_hpz.yaml and configs/fsdp2_hybrid.yaml",
    ),
    "elasticity": (ZERO3 | {"elasticity": {"enabled": False}}, {}, "x.json has elasticity, which"),
    "compression": (
        ZERO3 | {"compression_training": {}},
        {},
        "has removed: remove it; examples/causal",
    ),
    "curriculum": (
        ZERO3 | {"curriculum_learning": {}},
        {},
        "remove it; give the rows' `order` to make_loaders",
    ),
    "activation checkpointing": (
        ZERO3 | {"activation_checkpointing": {"partition_activations": True}},
        {},
        "has no effect on models of Hugging Face: remove it, and give --gradient_checkpointing",
    ),
    "quantized weights on a CPU": (
        {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
        {},
        "zero_quantized_weights, which DeepSpeed computes on a GPU only: use configs/zero3_hpz",
    ),
    "quantized gradients on a CPU": (
        {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}},
        {},
        "zero_quantized_gradients, which",
    ),
    "groups that do not divide the processes": (
        {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
        {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"},
        "zero_hpz_partition_size 2, which does not divide 3 processes: set it to the number of",
    ),
    "an unknown key": (
        {"zero_optimization": {"stage": 3, "reduce_bucket_sise": 8}},
        {},
        "x.json has zero_optimization.reduce_bucket_sise 8: Extra inputs are not permitted",
    ),
    "a bucket that is no number": (
        {"zero_optimization": {"stage": 3, "reduce_bucket_size": "many"}},
        {},
        "x.json has zero_optimization.reduce_bucket_size 'many': Input should be a valid integer",
    ),
    "an old key beside a new one": (
        {"zero_optimization": {"stage": 3, GATHER.replace("16bit", "fp16"): True, GATHER: True}},
        {},
        "has a wrong zero_optimization: Cannot provide deprecated parameter 'stage3_gather_fp16",
    ),
    "an offload by its older name": (
        {"zero_optimization": {"stage": 2, "cpu_offload": True}},
        {},
        'has cpu_offload, which accelerate does not read: write "offload_optimizer": {"device": "c',
    ),
    "an odd bucket": (
        {"zero_optimization": {"stage": 2, "allgather_bucket_size": 7}},
        {},
        "allgather_bucket_size 7: make it even",
    ),
    "fp16 and bf16": (
        ZERO3 | {"fp16": {"enabled": True}, "bf16": {"enabled": True}},
        {},
        "x.json enables fp16 and bf16: enable one of them",
    ),
    "bf16 by its older name": (
        ZERO3 | {"bfloat16": {"enabled": "true"}},
        {},
        "enables bfloat16 by a name that accelerate does not read: call it bf16",
    ),
    "bf16 in a launch of fp16": (
        ZERO3 | {"bf16": {"enabled": True}},
        {"ACCELERATE_MIXED_PRECISION": "fp16"},
        "enables bf16, and accelerate was launched with --mixed_precision fp16",
    ),
    "keys of the YAML file beside it": (
        ZERO3,
        {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", f"{OFFLOAD}_PARAM_DEVICE": "cpu"},
        "x.json contradict each other: zero_stage 2 and stage 3, offload_param_device cpu and "
        "offload_param.device none: make them the same, or remove zero_stage, offload_param_device "
        "from the launch config",
    ),
    "no zero_optimization": ({"bf16": {}}, {}, 'has no "zero_optimization"'),
    "a list": ([1], {}, 'has no "zero_optimization"'),
    "stage as text": ({"zero_optimization": {"stage": "3"}}, {}, "has stage '3': give one of"),
    "stage 4": ({"zero_optimization": {"stage": 4}}, {}, "has stage 4: give one of"),
    "offload as text": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": "cpu"}},
        {},
        "has offload_optimizer 'cpu': write",
    ),
    "precision as a switch": (ZERO3 | {"bf16": True}, {}, 'has bf16 True: write {"enabled": true}'),
}
ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
CLIPPING = "ACCELERATE_GRADIENT_CLIPPING"
UNUSED = {  # id -> (content of the file, more variables, what is printed)
    "auto": (
        ZERO3 | dict.fromkeys(deepspeed_checks.OWN.values(), "auto") | {"train_batch_size": "auto"},
        {},
        [],
    ),
    "equal numbers": (ZERO3 | {"gradient_clipping": 0.5, "train_batch_size": 16}, {}, []),
    "accumulation": (
        ZERO3 | {"gradient_accumulation_steps": 8},
        {},
        ["gradient_accumulation_steps 8 of", "x.json is not used: --gradient_accumulation_steps"],
    ),
    "clipping": (ZERO3 | {"gradient_clipping": 1.0}, {}, ["clipping 1.0 of", "x.json is not"]),
    "micro-batch": (
        ZERO3 | {"train_micro_batch_size_per_gpu": 1},
        {},
        ["train_micro_batch_size_per_gpu 1 of", "x.json is not used: --per_device_train"],
    ),
    "batch": (
        ZERO3 | {"train_batch_size": 64},
        {},
        ["train_batch_size 64 of", "x.json is not used", "sets it to 16."],
    ),
    "YAML without a file": (
        None,
        {ACCUMULATION: "4", CLIPPING: "1.0"},
        ["gradient_accumulation_steps 4 of the", "gradient_clipping 1.0 of the launch config"],
    ),
    "YAML with equal numbers": (None, {ACCUMULATION: "2", CLIPPING: "0.5"}, []),
    "prints per step": (
        ZERO3 | {"steps_per_print": 10},
        {},
        ["has no effect: accelerate turns it"],
    ),
    "an all-gather bucket": (
        {"zero_optimization": {"stage": 2, "allgather_bucket_size": 8}},
        {},
        ["allgather_bucket_size of", "has no effect: torch gathers all parameters in one"],
    ),
    "a number of ZeRO-3 under ZeRO-2": (
        {"zero_optimization": {"stage": 2, "stage3_prefetch_bucket_size": 8}},
        {},
        ["stage3_prefetch_bucket_size of", "has no effect: only ZeRO-3 reads it."],
    ),
    "equal keys of the YAML file beside it": (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
        {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", f"{OFFLOAD}_PARAM_DEVICE": "cpu"},
        [],
    ),
    "keys that the YAML file fills": (
        {"zero_optimization": {"stage": "auto"}},
        {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
        [],
    ),
    "mixed precision no beside it": (
        ZERO3 | {"bf16": {"enabled": True}},
        {environment.FIELDS: "deepspeed_config_file,mixed_precision"},
        [],
    ),
}


@pytest.fixture
def deepspeed(variables, tmp_path):
    """Return a function that writes a deepspeed_config_file and calls the checks of DeepSpeed."""

    def deepspeed(content, more):
        given = GROUP | DEEPSPEED | more
        if content is not None:
            (tmp_path / "x.json").write_text(json.dumps(content))
            given[environment.CONFIG_FILE] = str(tmp_path / "x.json")
        variables(given)
        config = SimpleNamespace(**SETTINGS, dtype="float32")
        launch_checks.check_launch(config, ("zero2", "zero3"), "frozen")

    return deepspeed


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_config_file_that_contradicts_is_refused(deepspeed, capsys, case):
    content, more, words = CONTRADICTIONS[case]
    assert words in refusal(capsys, deepspeed, content, more)


@pytest.mark.parametrize("case", UNUSED)
def test_settings_of_the_launch_config_that_are_not_used_are_named(deepspeed, capsys, case):
    content, more, words = UNUSED[case]
    deepspeed(content, more)
    printed = capsys.readouterr().out
    assert all(word in printed for word in words) and (printed != "" or not words)
    assert os.environ[environment.FIELDS] == ""


@pytest.mark.parametrize("content", ["{", "caf\u00e9"])
def test_a_config_file_that_is_not_json_is_refused(deepspeed, tmp_path, capsys, content):
    (tmp_path / "y.json").write_text(content)
    more = {environment.CONFIG_FILE: str(tmp_path / "y.json")}
    assert "y.json: " in refusal(capsys, deepspeed, None, more)


def test_a_config_file_that_is_missing_is_refused(deepspeed, capsys):
    error = refusal(capsys, deepspeed, None, {environment.CONFIG_FILE: "gone.json"})
    assert "ACCELERATE_DEEPSPEED_CONFIG_FILE=gone.json: " in error


def test_a_zero_stage_that_is_no_number_is_refused(deepspeed, capsys):
    error = refusal(capsys, deepspeed, None, {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "three"})
    assert "zero_stage is 'three'" in error


@pytest.mark.parametrize(
    "precision, told", [("no", "no backend."), ("bf16", "no backend, bf16 mixed precision.")]
)
def test_the_mixed_precision_of_a_run_is_printed(precision, told):
    """It may come from a variable that another launch left."""
    accelerator = SimpleNamespace(
        distributed_type="NO",
        num_processes=1,
        device=SimpleNamespace(type="cpu"),
        mixed_precision=precision,
    )
    assert launch.describe(accelerator).endswith(f"on 1 process, cpu device, {told}")


@pytest.mark.parametrize("part", ["TP", "CP", "SP"])
def test_parallelism_that_the_scripts_do_not_know_is_refused(variables, capsys, part):
    variables({f"PARALLELISM_CONFIG_{part}_SIZE": "2"} | GROUP | FSDP)
    config = SimpleNamespace(dtype="float32")
    error = refusal(capsys, launch_checks.check_launch, config, ("fsdp1",), "frozen")
    assert f"parallelism_config_{part.lower()}_size" in error and "set it to 1" in error


def test_without_deepspeed_a_launch_of_it_says_so(deepspeed, monkeypatch, capsys):
    monkeypatch.setattr(deepspeed_checks.importlib.util, "find_spec", lambda name: None)
    assert "pip install deepspeed" in refusal(capsys, deepspeed, None, {})


def start(monkeypatch, name, error):
    """Start an Accelerator where a function of launch.py raises an error."""

    def raises(*args, **kwargs):
        raise error

    for quiet in ("quiet_libraries", "end_with_launcher", "join_group"):
        monkeypatch.setattr(launch, quiet, lambda: None)
    monkeypatch.setattr(launch, name, raises)
    launch.start_accelerator()


@pytest.mark.parametrize(
    "name, error, words",
    [
        (
            "join_group",
            DistNetworkError("port: 29500, errno: -98\nmore"),
            "no process group at 127.0.0.1:29500: port: 29500, errno: -98; launch with",
        ),
        (
            "Accelerator",
            ValueError("Invalid backward_prefetch\nmore"),
            "accelerate cannot run the launch config, change it: Invalid backward_prefetch",
        ),
    ],
)
def test_what_the_launch_raises_is_one_sentence(variables, monkeypatch, capsys, name, error, words):
    variables(GROUP)
    assert words in refusal(capsys, start, monkeypatch, name, error)


def test_numbers_of_a_config_file_give_way_in_a_real_run(launch, tmp_path):
    """zero.Init reads the file, too, and would stop where its numbers contradict each other."""
    numbers = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 1}
    numbers |= {"gradient_accumulation_steps": 8, "gradient_clipping": 1.0}
    (tmp_path / "x.json").write_text(json.dumps(ZERO3 | numbers | {"bf16": {"enabled": True}}))
    file = {"deepspeed_config_file": str(tmp_path / "x.json"), "zero3_init_flag": True}
    config = {"distributed_type": "DEEPSPEED", "deepspeed_config": file, "mixed_precision": "no"}
    config |= {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "use_cpu": False}
    (tmp_path / "x.yaml").write_text(json.dumps(config))
    model = make_model(tmp_path / "llama", "llama")
    data = make_data(tmp_path / "data", train=8, validation=2)
    flags = ("--model_name_or_path", model, "--dataset_name", data, "--max_steps", 1)
    flags += ("--gradient_accumulation_steps", 2, "--output_dir", tmp_path / "new")
    done = launch("causal_lm_lora_zero3_offload", tmp_path / "x.yaml", *flags, processes=2)
    assert "on 2 processes, cpu device, gloo backend, bf16 mixed precision." in done.stdout
    assert done.stdout.count("x.json is not used: --") == 3
    assert len(read_metrics(tmp_path / "new")["losses"]) == 1


@pytest.mark.slow
def test_one_row_trains_on_two_processes(launch, tmp_path):
    model = make_model(tmp_path / "llama", "llama")
    (tmp_path / "rows.csv").write_text("Tweet text,Label\na,yes\nb,no\n")
    flags = ("--model_name_or_path", model, "--dataset_name", tmp_path / "rows.csv")
    launch("causal_lm_lora", "ddp", *flags, "--output_dir", tmp_path / "new", processes=2)
    assert len(read_metrics(tmp_path / "new")["losses"]) == 1


# Flags --------------------------------------------------------------------------------------------
@dataclass
class Config:
    model_name_or_path: str = "m"
    dataset_name: str = "d"
    output_dir: str = "o"
    checkpoint_dir: str = "c"
    resume_from_checkpoint: str = ""
    chat_template_format: str = "none"
    lexicon_file: str = ""
    prompt_template: str = ""
    target_modules: list[str] = field(default_factory=list)


@pytest.mark.parametrize("name", [name for name in vars(Config()) if name[0] != "t"])
def test_the_home_folder_in_a_path(variables, monkeypatch, name):
    variables({"HOME": "/home/me"})
    monkeypatch.setattr(sys, "argv", ["x.py", f"--{name}=~/a~b"])
    value = getattr(settings.parse_arguments(Config), name)
    assert value == ("~/a~b" if name == "prompt_template" else "/home/me/a~b")


def test_a_schedule_without_a_warmup_says_so(capsys):
    settings.check_numbers(SimpleNamespace(lr_scheduler_type="constant", warmup_ratio=0.1))
    line = "--warmup_ratio 0.1 has no effect with --lr_scheduler_type constant"
    assert line in capsys.readouterr().out


# Two runs with one folder -------------------------------------------------------------------------
@contextlib.contextmanager
def another_run(folder):
    """Hold the lock of a folder in another process; yields its id."""
    reader, writer = os.pipe()
    if (process := os.fork()) == 0:
        folders.LOCKS.clear()
        folders.lock_folder("output_dir", str(folder))
        os.write(writer, b"locked")
        time.sleep(100)
        os._exit(0)
    assert os.read(reader, 6) == b"locked"
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)


@pytest.fixture
def unlocked(variables):
    """No launch variables; and no lock is left of what a test has locked."""
    variables({})
    yield
    for file in list(folders.LOCKS):
        folders.unlock(file, os.getpid())


@pytest.mark.parametrize("kind", ["lesson", "chat_sft", "link", "several/new/folders"])
def test_a_second_run_in_a_folder_stops_at_once(unlocked, tmp_path, monkeypatch, capfd, kind):
    folder = tmp_path / ("new" if "/" not in kind else kind)
    with another_run(folder) as process:
        if kind == "link":
            folder.mkdir()
            (tmp_path / "link").symlink_to(folder)
            folder = tmp_path / "link"
        check = chat_settings.check_run_folder if kind == "chat_sft" else folders.check_output
        config = SimpleNamespace(
            output_dir=str(folder),
            hub_model_id="",
            overwrite_output_dir=True,
            resume_from_checkpoint="True",
        )
        error = refusal(capfd, check, config)
        assert f"belongs to a run that is still active, process {process} on " in error
        assert "wait until it ends, or choose another output_dir" in error
        os.kill(process, signal.SIGKILL)  # the system releases the lock
        os.waitpid(process, 0)
    check(config)


def test_a_lock_is_hidden_beside_the_folder_and_goes_with_its_owner(unlocked, tmp_path):
    config = SimpleNamespace(output_dir=str(tmp_path / "new"), hub_model_id="")
    for _ in range(2):  # a process may check its own folder again
        folders.check_output(config)
    [file] = tmp_path.iterdir()
    assert file.name == ".new.lock" and str(os.getpid()) in file.read_text()
    folders.unlock(file, os.getpid() + 1)  # at the exit of a forked child
    assert file.exists()
    folders.unlock(file, os.getpid())
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_that_its_owner_removes_is_made_anew(unlocked, tmp_path, monkeypatch):
    lockf, calls = folders.fcntl.lockf, []

    def remove_first(*args):
        calls or (tmp_path / ".new.lock").unlink()  # between opening and locking it
        calls.append(lockf(*args))

    monkeypatch.setattr(folders.fcntl, "lockf", remove_first)
    folders.lock_folder("output_dir", str(tmp_path / "new"))
    assert len(calls) == 2 and (tmp_path / ".new.lock").exists()


def test_other_processes_of_a_launch_take_no_lock(unlocked, tmp_path):
    os.environ["RANK"] = "1"
    assert folders.lock_folder("output_dir", str(tmp_path / "new")) == tmp_path / "new"
    assert list(tmp_path.iterdir()) == []


def test_where_no_lock_can_be_held_the_run_goes_on(unlocked, tmp_path, monkeypatch, capsys):
    def lockf(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(folders.fcntl, "lockf", lockf)
    folders.lock_folder("output_dir", str(tmp_path / "new"))
    assert "No lock for --output_dir" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_an_empty_name_is_no_folder(unlocked, capsys):
    assert "--output_dir is empty" in refusal(capsys, folders.lock_folder, "output_dir", "")


# Help texts ---------------------------------------------------------------------------------------
@dataclass
class Base:
    """A Config of a user."""

    learning_rate: float = 1e-3
    seed: int = 42
    """the user's own text,
    on two lines"""
    margin: float = field(default=0.1, metadata={"help": "of the field"})
    """not this one"""


@dataclass
class Explained(Base):
    """A Config that adds fields to another one."""

    curriculum_order: bool = False
    share: float = 0.5
    """50 % of the rows"""


def test_a_help_text_is_that_of_the_field_or_the_common_one():
    parser = settings.make_parser(Explained)
    texts = {action.dest: action.help for action in parser._actions}
    assert texts["learning_rate"] == settings.HELP["learning_rate"]
    assert texts["seed"] == "the user's own text, on two lines"
    assert texts["margin"] == "of the field"
    assert texts["curriculum_order"] == "curriculum order"
    assert "50 % of the rows" in parser.format_help()


def test_flags_work_without_the_source(monkeypatch):
    monkeypatch.setattr(settings.inspect, "getsource", Mock(side_effect=OSError))
    texts = {action.dest: action.help for action in settings.make_parser(Base)._actions}
    assert texts["seed"] == settings.HELP["seed"]
