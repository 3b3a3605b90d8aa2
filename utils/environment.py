"""Read how this process was started, and undo what another launch left in its environment."""

import json
import os
import re
import sys
from pathlib import Path

import torch
import yaml
from accelerate.commands.config.config_args import default_config_file
from accelerate.utils import parse_flag_from_env, str_to_bool

from utils.errors import or_refuse, refuse, say

# what each process of a group needs to find the others
GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
STORE = "TORCHELASTIC_USE_AGENT_STORE"  # errors ask torch's launcher there (is_first_to_refuse)
STRATEGIES = {"ACCELERATE_USE_DEEPSPEED": "DEEPSPEED", "ACCELERATE_USE_FSDP": "FSDP"}
CONFIG_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
# keys of the YAML file beside which accelerate refuses a DeepSpeed config; its launcher sets it
FIELDS = "ACCELERATE_CONFIG_DS_FIELDS"


# What started this process ------------------------------------------------------------------------
def launcher():
    """Return the command of this process's parent, as words, and the environment it started with.

    Both are empty where the system does not tell.
    """
    parent = Path(f"/proc/{os.getppid()}")
    try:
        command, environ = ((parent / name).read_bytes() for name in ("cmdline", "environ"))
    except OSError:  # not Linux, or the parent is gone
        return [], {}
    variables = os.fsdecode(environ).split("\0")
    pairs = (variable.partition("=") for variable in variables)
    words = os.fsdecode(command).split("\0")
    # accelerate also takes --config-file for --config_file, and so on
    words = [re.sub(r"^--[^=]+", lambda flag: underscored(flag[0]), word) for word in words]
    return words, {name: value for name, _, value in pairs}


def underscored(flag):
    """Return a flag with underscores for hyphens."""
    return f"--{flag[2:].replace('-', '_')}"


def is_accelerate(command):
    """Return whether a command is `accelerate launch`, in any of its spellings."""
    begin = " ".join(Path(word).name for word in command[:5])
    return re.search(r"accelerate\S*[ .-]launch\b", begin) is not None


def launch_config():
    """Return the content of the YAML file that `accelerate launch` was given; {} where unknown."""
    command, _ = launcher()
    if not is_accelerate(command):
        return {}
    words = "\0".join(command).replace("--config_file=", "--config_file\0").split("\0")
    given = words[words.index("--config_file") + 1] if "--config_file" in words else None
    file = Path(given or default_config_file)
    content = yaml.safe_load(file.read_bytes()) if file.is_file() else None
    return content if isinstance(content, dict) else {}


def names_deepspeed_file():
    """Return whether the launch config or a flag of accelerate names a deepspeed_config_file."""
    command, _ = launcher()
    in_yaml = (launch_config().get("deepspeed_config") or {}).get("deepspeed_config_file")
    return in_yaml is not None or any(
        word.startswith("--deepspeed_config_file") for word in command
    )


def deepspeed_file():
    """Return what the JSON file of DeepSpeed's config is called in a message, and its content.

    It is the deepspeed_config_file of the launch config, or the file that the user has named in the
    environment. Both results are empty where there is none. Stops with an error where it is not
    JSON, or its zero_optimization not of the form that DeepSpeed reads.
    """
    name = os.environ.get(CONFIG_FILE, "none")
    if name == "none":
        return "", {}
    named = is_accelerate(launcher()[0]) and names_deepspeed_file()
    culprit = f"deepspeed_config_file {name}" if named else f"{CONFIG_FILE}={name}"
    content = or_refuse(culprit, lambda: json.loads(Path(name).read_text(encoding="utf-8")))
    zero = content.get("zero_optimization") if isinstance(content, dict) else None
    if not isinstance(zero, dict):
        refuse(f'{culprit} has no "zero_optimization": {{"stage": ...}}, which accelerate needs')
    for part in ("offload_optimizer", "offload_param"):
        if not isinstance(zero.get(part, {}), dict | None):
            refuse(f'{culprit} has {part} {zero[part]!r}: write {{"device": {zero[part]!r}}}')
    if (stage := zero.get("stage", 0)) not in (0, 1, 2, 3, "auto"):
        refuse(f"{culprit} has stage {stage!r}: give one of the numbers 0, 1, 2, 3")
    for block in ("fp16", "bf16", "bfloat16"):
        if not isinstance(content.get(block, {}), dict):
            refuse(f'{culprit} has {block} {content[block]!r}: write {{"enabled": true}} or false')
    return culprit, content


def is_enabled(block):
    """Return whether a block of a DeepSpeed config says "enabled": true."""
    return str((block or {}).get("enabled")).lower() == "true"


def threads_of_the_user():
    """Return the user's own OMP_NUM_THREADS; None where it is unset, or set by a launcher.

    `accelerate launch` and torchrun set it for their processes.
    """
    command, environ = launcher()
    for number, word in enumerate(command):
        if word.startswith("--num_cpu_threads_per_process"):
            return word.partition("=")[2] or command[number + 1]
    if "LOCAL_RANK" in os.environ or "ACCELERATE_DYNAMO_BACKEND" in os.environ:
        return environ.get("OMP_NUM_THREADS")
    return os.environ.get("OMP_NUM_THREADS")


# What was launched --------------------------------------------------------------------------------
def launched_strategy():
    """Return the strategy of the launch config: "single", "ddp", "zero1", "fsdp2", ...

    `accelerate launch` passes it to its processes in environment variables.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return f"zero{deepspeed_settings()['stage']}"
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return f"fsdp{os.environ.get('FSDP_VERSION', 1)}"
    return "ddp" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else "single"


def shards_parameters():
    """Return whether the launched strategy shards the parameters."""
    return launched_strategy() in ("zero3", "fsdp1", "fsdp2")


def deepspeed_settings():
    """Return stage, optimizer offload device and precision of the launched DeepSpeed config."""
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if not stage.isdigit():
        refuse(f"zero_stage is {stage!r} in the launch config: give one of the numbers 0, 1, 2, 3")
    settings = {
        "stage": int(stage),
        "optimizer": os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none"),
        "precision": os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
    }
    _, content = deepspeed_file()
    if content:
        zero = content["zero_optimization"]
        if zero.get("stage") != "auto":
            settings["stage"] = int(zero.get("stage", 0))
        settings["optimizer"] = (zero.get("offload_optimizer") or {}).get("device", "none")
        for precision in ("fp16", "bf16"):
            if is_enabled(content.get(precision)):
                settings["precision"] = precision
    return settings


def launched_precision():
    """Return the launched mixed precision: "no", "bf16", "fp16", or another value of the config."""
    if launched_strategy().startswith("zero"):
        return deepspeed_settings()["precision"]
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def uses_gpu():
    """Return whether this process runs on a GPU: there is one, and `use_cpu` is not set."""
    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


# What is undone -----------------------------------------------------------------------------------
def settle_environment():
    """Make the environment variables say what was launched; each change is printed.

    Also lets a console without Unicode print every line, with escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    settle_group()
    settle_strategy()


def settle_group():
    """Stop if variables of a process group contradict each other; ignore an incomplete set."""
    for name in {*GROUP, *NUMBERS, CONFIG_FILE}:
        if os.environ.get(name) == "":
            del os.environ[name]
    given = {name: os.environ[name] for name in {*GROUP, *NUMBERS} & {*os.environ}}
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & {*given}:
        return
    for name in NUMBERS:
        if not given.get(name, "0").isdigit():
            ignore("RANK", STORE)  # so that this process prints the error
            refuse(f"{name} is {given[name]!r} in the environment, not a number: unset it")
    rank, size = int(given.get("RANK", 0)), int(given.get("WORLD_SIZE", 1))
    missing = [name for name in GROUP if name not in given]
    if missing and size == 1:
        ignore(*GROUP, "LOCAL_WORLD_SIZE", STORE)
        told = [f"{name}={value}" for name, value in sorted(given.items())]
        say(
            f"Ignored: {', '.join(told)} in the environment, without {', '.join(missing)}. The "
            "script runs in one process."
        )
    elif missing:
        ignore("RANK", STORE)
        refuse(
            f"WORLD_SIZE is {size} in the environment, and {', '.join(missing)} are not set: start "
            f"the script with `accelerate launch`, or unset {', '.join(sorted(given))}"
        )
    elif rank >= size:
        ignore("RANK", STORE)
        refuse(f"RANK is {rank} in the environment, and WORLD_SIZE {size}: unset both")
    elif size > 1 and ("TORCHELASTIC_RUN_ID" not in os.environ or "LOCAL_RANK" in launcher()[1]):
        address = f"{given['MASTER_ADDR']}:{given['MASTER_PORT']}"
        print(
            f"RANK is {rank} and WORLD_SIZE {size} in the environment: this process waits for "
            f"{size - 1} more at {address}. To run alone, unset {', '.join(sorted(given))}.",
            flush=True,
        )


def settle_strategy():
    """Ignore the strategy of another launch, which its variables left in the environment."""
    command, _ = launcher()
    flags = {f"--use_{kind.lower()}": kind for kind in STRATEGIES.values()}
    config = launch_config()
    asked = [kind for flag, kind in flags.items() if flag in command]
    asked = asked or [config.get("distributed_type")]
    for name, kind in STRATEGIES.items():
        if not str_to_bool(os.environ.get(name) or "no"):
            continue
        os.environ[name] = "true"  # accelerate takes no other word
        if "LOCAL_RANK" not in os.environ:  # every launcher of a strategy sets it
            ignore(name)
            say(f"Ignored: {name} in the environment. No launcher started this process.")
        elif is_accelerate(command) and asked[0] != kind:
            ignore(name)
            say(f"Ignored: {name} in the environment, because another launch set it.")
    settle_deepspeed_file()


def settle_deepspeed_file():
    """Keep the DeepSpeed config that the user named in the environment; ignore any other.

    accelerate's launcher sets this variable for its own processes, always together with FIELDS. So
    the user has set it if the launcher was started without FIELDS.
    """
    if (told := os.environ.get(CONFIG_FILE)) in (None, "none"):
        return
    command, started_with = launcher()
    of_user = started_with.get(CONFIG_FILE, told)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        ignore(CONFIG_FILE)
        say(f"Ignored: {CONFIG_FILE}={told} in the environment. DeepSpeed was not launched.")
    elif FIELDS in started_with and is_accelerate(command) and not names_deepspeed_file():
        ignore(CONFIG_FILE)
        say(f"Ignored: {CONFIG_FILE}={told} in the environment, because another launch set it.")
    elif FIELDS not in started_with and of_user != told:
        refuse(
            f"{CONFIG_FILE}={of_user} in the environment and deepspeed_config_file {told} of the "
            "launch config are two configs for DeepSpeed: unset the variable, or remove the key"
        )


def ignore(*names):
    """Remove variables from the environment."""
    for name in names:
        os.environ.pop(name, None)
