"""Configs for DeepSpeed's own JSON: optimizer and schedule, hpZ, buckets, a dict, a variable."""

import json
import math

import pytest
import yaml
from conftest import ROOT
from deepspeed.runtime import config as deepspeed_config
from models import make_data, make_model
from single import run_single
from test_parity import Run, assert_same

from utils import deepspeed_checks

DRIVER = ROOT / "tests/deepspeed_driver.py"
LESSON = ROOT / "examples/causal_lm_full_zero2_config.py"
UPDATES, WARMUP, RATE, LOW = 8, 2, 1e-2, 1e-3
SETTINGS = ("--max_steps", UPDATES, "--learning_rate", RATE, "--warmup_ratio", WARMUP / UPDATES)
SETTINGS += ("--weight_decay", 0.1, "--max_grad_norm", 0.4, "--per_device_eval_batch_size", 1)
# 8 rows per update, of 1, 2 and 4 processes
ROWS = {1: 4, 2: 2, 4: 1}


def batches(processes):
    """Return the flags that make 8 rows per update."""
    rows = ("--per_device_train_batch_size", ROWS[processes], "--gradient_accumulation_steps", 2)
    return (*SETTINGS, *rows)


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """The flags of a model and its data."""
    folder = tmp_path_factory.mktemp("deepspeed")
    data = make_data(folder / "data", train=32, validation=7, noise=0.3)
    return ("--model_name_or_path", make_model(folder / "llama", "llama"), "--dataset_name", data)


@pytest.fixture(scope="module")
def single(flags, forks, tmp_path_factory):
    """A function that returns the run of a script in one process."""
    runs = {}

    def run(script, *more):
        if (script, *more) not in runs:
            folder = tmp_path_factory.mktemp("single")
            command = (script, *flags, *batches(1), *more, "--output_dir", folder / "run")
            [(code, output)] = run_single(forks, folder, command)
            assert code == 0, output
            runs[script, *more] = Run(folder / "run", output)
        return runs[script, *more]

    return run


# Optimizer and schedule in the config -------------------------------------------------------------
def log_warmup(update):
    """Return the rate of DeepSpeed's default warmup."""
    return RATE * math.log(update + 1) / math.log(WARMUP)


SCHEDULES = {  # type -> (params, rate of an update, counted from 0)
    "WarmupLR": (
        dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto"),
        lambda update: log_warmup(update) if update < WARMUP else RATE,
    ),
    "WarmupCosineLR": (
        {"warmup_num_steps": "auto", "total_num_steps": "auto", "cos_min_ratio": 0.0},
        lambda update: (
            log_warmup(update)
            if update < WARMUP
            else RATE * (1 + math.cos(math.pi * (update - WARMUP + 1) / (UPDATES - WARMUP))) / 2
        ),
    ),
    "OneCycle": (
        {"cycle_min_lr": LOW, "cycle_max_lr": RATE, "cycle_first_step_size": UPDATES // 2},
        lambda update: LOW + (RATE - LOW) * min(update, UPDATES - update) / (UPDATES // 2),
    ),
    "LRRangeTest": (
        {"lr_range_test_min_lr": LOW, "lr_range_test_step_size": 2},
        lambda update: LOW * (1 + update / 2),
    ),
}


def run_lesson(launch, folder, flags, config, **variables):
    """Run the lesson on two processes; return its output, its metrics and the rates it used."""
    words = (folder / "facts.json", LESSON, *flags, *batches(2), "--output_dir", folder / "run")
    done = launch(DRIVER, config, *words, processes=2, **variables)
    rates = json.loads((folder / "facts.json").read_text())["rates"]
    return Run(folder / "run", done.stdout), rates, done.stdout


def test_optimizer_and_schedule_of_the_config_train_as_planned(launch, flags, single, tmp_path):
    """WarmupDecayLR is transformers' linear schedule."""
    run, rates, output = run_lesson(launch, tmp_path, flags, "zero2_optimizer")
    plan = [RATE * update / WARMUP for update in range(WARMUP)]
    plan += [RATE * (UPDATES - update) / (UPDATES - WARMUP) for update in range(WARMUP, UPDATES)]
    assert rates == pytest.approx(plan) and run.metrics["learning_rates"] == pytest.approx(plan)
    assert (run.metrics["strategy"], run.metrics["num_processes"]) == ("zero2", 2)
    assert output.count("Optimizer: AdamW (torch)\n") == 1
    assert_same(run, single("causal_lm_full", "--lr_scheduler_type", "linear"), 1e-3)


def write_config(folder, content):
    """Write a DeepSpeed config and a launch config that names it; return the path of the latter."""
    (folder / "x.json").write_text(json.dumps(content))
    launch_config = yaml.safe_load((ROOT / "configs/zero2_optimizer.yaml").read_text())
    launch_config["deepspeed_config"]["deepspeed_config_file"] = str(folder / "x.json")
    (folder / "x.yaml").write_text(json.dumps(launch_config))
    return folder / "x.yaml"


def example(**changes):
    """Return configs/deepspeed/zero2_optimizer.json with some blocks replaced."""
    return json.loads((ROOT / "configs/deepspeed/zero2_optimizer.json").read_text()) | changes


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
def test_other_schedules_train_as_planned(launch, flags, tmp_path, name):
    params, rate = SCHEDULES[name]
    config = write_config(tmp_path, example(scheduler={"type": name, "params": params}))
    run, rates, _ = run_lesson(launch, tmp_path, flags, config)
    plan = [rate(update) for update in range(UPDATES)]
    assert rates == pytest.approx(plan) and run.metrics["learning_rates"] == pytest.approx(plan)


@pytest.mark.slow
def test_a_config_that_the_environment_names(launch, flags, single, tmp_path):
    """Its stage equals that of the launch config, so that they do not contradict each other."""
    file = ROOT / "configs/deepspeed/zero2_optimizer.json"
    variables = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    run, _, _ = run_lesson(launch, tmp_path, flags, "zero2", **variables)
    assert_same(run, single("causal_lm_full", "--lr_scheduler_type", "linear"), 1e-3)
    variables["real"] = True
    refused = launch(LESSON, "zero1", *flags, processes=2, code=1, **variables)
    words = "the launch config and ACCELERATE_DEEPSPEED_CONFIG_FILE="
    [line] = [line for line in refused.stdout.splitlines() if line.startswith("error: ")]
    assert words in line and "zero_stage 1 and stage 2: make them the same" in line


ACCELERATOR = "start_accelerator(config.gradient_accumulation_steps, tf32=config.tf32)"
PLUGIN = """start_accelerator(
        config.gradient_accumulation_steps,
        tf32=config.tf32,
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=CONTENT),
    )"""


def with_dict(folder, script, content):
    """Write a copy of a script that passes a dict as DeepSpeed's config; return its path."""
    text = (ROOT / "examples" / f"{script}.py").read_text()
    assert ACCELERATOR in text
    text = text.replace(ACCELERATOR, PLUGIN.replace("CONTENT", repr(content)))
    imports = "import transformers\n"
    assert text.count(imports) == 1
    text = text.replace(imports, f"{imports}from accelerate import DeepSpeedPlugin\n")
    (folder / f"{script}.py").write_text(text)
    return folder / f"{script}.py"


@pytest.mark.slow
def test_a_dict_in_the_script(launch, flags, single, tmp_path):
    content = {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000},
        "gradient_clipping": 9,
    }
    script = with_dict(tmp_path, "causal_lm_full", content)
    words = (*flags, *batches(2), "--lr_scheduler_type", "linear", "--output_dir", tmp_path / "run")
    facts = tmp_path / "facts.json"
    done = launch(DRIVER, "zero2", facts, script, *words, processes=2, PYTHONPATH=str(ROOT))
    assert json.loads(facts.read_text())["sizes"]["reduce_bucket_size"] == 1000
    told = "gradient_clipping 9 of the DeepSpeedPlugin of the script is not used: --max_grad_norm"
    assert told in done.stdout
    run = Run(tmp_path / "run", done.stdout)
    assert_same(run, single("causal_lm_full", "--lr_scheduler_type", "linear"), 1e-3)
    for config, error in (
        ("zero1", "asks for zero2, and the script was launched with zero1: launch with a config"),
        ("ddp", "asks for zero2, and the script was launched with ddp"),
        ("zero2_offload", "offloads the optimizer to none, and the launch config to cpu: make"),
        ("zero2_buckets", "zero2_buckets.json are two configs for DeepSpeed: remove one of them"),
    ):
        more = (*words, "--overwrite_output_dir")
        done = launch(script, config, *more, processes=2, code=1, PYTHONPATH=str(ROOT))
        [line] = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
        assert error in line


# What a config with an optimizer may say ----------------------------------------------------------
class Script:
    """The settings of the lesson that the checks read."""

    dtype = "float32"

    def __init__(self):
        self.gradient_accumulation_steps, self.per_device_train_batch_size = 2, 4
        self.learning_rate, self.weight_decay, self.warmup_ratio = RATE, 0.1, 0.25
        self.max_grad_norm = 1.0


def refusal(capsys, content):
    """Return the error for a config of the lesson, or what is printed if there is none."""
    deepspeed_checks.SCRIPT.update(config=Script(), optimizer_in_config=True)
    try:
        deepspeed_checks.check_content("x.json", {"zero_optimization": {"stage": 2}} | content)
    except SystemExit:
        return capsys.readouterr().err
    return capsys.readouterr().out


def scheduler(name, **params):
    return {"scheduler": {"type": name, "params": params}}


def optimizer(name, **params):
    return {"optimizer": {"type": name, "params": params}}


DECAY = dict.fromkeys(("warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto")
SAID = {  # id -> (blocks that differ from the example's, what is printed)
    "as shipped": ({}, ""),
    "no scheduler": ({"scheduler": None}, "x.json has no scheduler: start from configs/deepspeed/"),
    "no optimizer": ({"optimizer": None}, "x.json has no optimizer: start from"),
    "an unknown optimizer": (
        optimizer("AdamV"),
        "asks for the optimizer AdamV: choose one of Adam",
    ),
    "no optimizer of torch": (optimizer("lr_scheduler"), "asks for the optimizer lr_scheduler"),
    "an optimizer of torch": (optimizer("RAdam", lr="auto", weight_decay="auto"), ""),
    "a parameter of another optimizer": (
        optimizer("AdamW", lr="auto", weight_decay="auto", torch_adam=True, cuda_aware=True),
        "wrong params for AdamW: got an unexpected keyword argument 'cuda_aware'",
    ),
    "FusedAdam": (
        optimizer("Adam", lr="auto", weight_decay="auto", adam_w_mode=False),
        "x.json asks for Adam: FusedAdam, which DeepSpeed compiles in the first run. ",
    ),
    "an unknown scheduler": (
        scheduler("StepLR"),
        "asks for the scheduler StepLR: choose one of WarmupLR, WarmupDecayLR",
    ),
    "auto that nothing fills": (
        scheduler("OneCycle", cycle_min_lr="auto", cycle_max_lr=0.1),
        'x.json has scheduler.params.cycle_min_lr "auto", which nothing fills: set it',
    ),
    "a parameter of another schedule": (
        scheduler("WarmupCosineLR", warmup_max_lr="auto", total_num_steps="auto"),
        "wrong params for WarmupCosineLR: got an unexpected keyword argument 'warmup_max_lr'",
    ),
    "a parameter too few": (
        scheduler("WarmupDecayLR"),
        "wrong params for WarmupDecayLR: missing a required argument: 'total_num_steps'",
    ),
    "no peak": (
        scheduler("WarmupDecayLR", **{k: v for k, v in DECAY.items() if "max_lr" not in k}),
        "x.json: the learning rate of WarmupDecayLR is 0.001. --learning_rate 0.01 of the script",
    ),
    "a peak of its own": (
        scheduler("WarmupDecayLR", **DECAY | {"warmup_max_lr": 0.5}),
        "x.json: the learning rate of WarmupDecayLR is 0.5. --learning_rate 0.01 of the script is",
    ),
    "a warmup of its own": (
        scheduler("WarmupDecayLR", **DECAY | {"warmup_num_steps": 3}),
        "x.json: the warmup of WarmupDecayLR takes 3 updates. --warmup_ratio 0.25 of the script is",
    ),
    "a schedule without a warmup": (
        scheduler("OneCycle", cycle_min_lr=0.1, cycle_max_lr=0.2),
        "x.json: the learning rate of OneCycle is 0.2. --learning_rate 0.01 of the script is not "
        "used.\nx.json: the warmup of OneCycle takes 0 updates. --warmup_ratio 0.25",
    ),
    "an unknown key": (
        {"gradient_cliping": 1.0},
        "gradient_cliping of x.json has no effect: DeepSpeed does not know it.",
    ),
    "no weight decay": (
        optimizer("AdamW", lr="auto", torch_adam=True),
        "x.json: the weight decay is the optimizer's default. --weight_decay 0.1 of the script is",
    ),
}


@pytest.mark.parametrize("case", SAID)
def test_what_a_config_with_an_optimizer_may_say(capsys, monkeypatch, case):
    for name in ("RANK", "WORLD_SIZE", "ACCELERATE_DEEPSPEED_ZERO_STAGE"):
        monkeypatch.delenv(name, raising=False)
    changes, printed = SAID[case]
    content = {key: block for key, block in example(**changes).items() if block is not None}
    said = refusal(capsys, content)
    assert printed in said and said.count("\n") <= 2 and (printed != "" or said == "")


class Watched(dict):
    """A dict that notes the keys that somebody asks for."""

    asked = set()

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def keys(self):
        return self

    def __copy__(self):
        return self


def test_the_known_keys_are_those_that_deepspeed_reads():
    content = Watched(train_batch_size=1, zero_optimization={"stage": 2})
    deepspeed_config.DeepSpeedConfig(content)
    read = content.asked - {*deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS}
    assert read == {*deepspeed_checks.KNOWN.split()}


def test_all_that_deepspeed_has_removed_is_refused_by_name():
    zero = {f"zero_optimization.{key}" for key in deepspeed_config._REMOVED_ZERO_CONFIG_KEYS}
    assert {*deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS, *zero} <= {*deepspeed_checks.REMOVED}


# hpZ and buckets ----------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("script", ["causal_lm_full", "causal_lm_lora"])
def test_hpz_trains_like_zero3_in_two_groups_of_two(launch, flags, single, tmp_path, script):
    name = f"{script}_zero3" + ("_offload" if "lora" in script else "")
    runs = {}
    for config in ("zero3", "zero3_hpz"):
        words = (tmp_path / "facts.json", ROOT / f"examples/{name}.py", *flags, *batches(4))
        words += ("--eval_strategy", "epoch", "--output_dir", tmp_path / config)
        done = launch(DRIVER, config, *words, processes=4)
        runs[config] = Run(tmp_path / config, done.stdout)
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["group"] == 2
    whole = 4 * runs["zero3"].metrics["total_parameters"]
    assert facts["second_copy"] == pytest.approx(whole / 2, rel=0.05)
    assert "ZeRO stage 3, parameters also sharded in groups of 2 on 4 processes" in done.stdout
    assert_same(runs["zero3_hpz"], runs["zero3"], 1e-6)
    assert_same(runs["zero3_hpz"], single(script), 1e-3)


@pytest.mark.slow
def test_hybrid_sharding_trains_like_one_process(launch, flags, single, tmp_path):
    """The other successor of MiCS: FSDP2 in two groups of two."""
    words = (*flags, *batches(4), "--output_dir", tmp_path / "run")
    done = launch("causal_lm_lora_fsdp2", "fsdp2_hybrid", *words, processes=4)
    run, alone = Run(tmp_path / "run", done.stdout), single("causal_lm_lora")
    assert_same(run, alone, 1e-3)
    held = [sum(one.values()) for one in run.metrics["engine"]["bytes_held"]]
    full = sum(alone.metrics["engine"]["bytes_held"][0].values())
    assert held == pytest.approx([full / 2] * 4, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "script"),
    [("zero2_buckets", "causal_lm_full"), ("zero3_buckets", "causal_lm_full_zero3")],
)
def test_sizes_of_a_config_win(launch, flags, single, tmp_path, config, script):
    words = (tmp_path / "facts.json", ROOT / f"examples/{script}.py", *flags, *batches(2))
    done = launch(DRIVER, config, *words, "--output_dir", tmp_path / "run", processes=2)
    assert_same(Run(tmp_path / "run", done.stdout), single("causal_lm_full"), 1e-3)
    sizes = json.loads((tmp_path / "facts.json").read_text())["sizes"]
    zero = json.loads((ROOT / f"configs/deepspeed/{config}.json").read_text())["zero_optimization"]
    del zero["stage"]
    assert zero == {name: sizes[name] for name in zero} and len(zero) >= 1
