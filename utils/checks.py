"""Refuse bad settings in one sentence, before a model is loaded.

Every refusal is one line, `error: ` and what is wrong and what to do, and ends the process with exit code 1. Settings
and files look the same to all processes, so all of them refuse. The first one prints the line.

This file imports no other file of the project and can be copied along with a script. What it needs of transformers is
handed in by the script.
"""

import contextlib
import csv
import dataclasses
import glob
import importlib.util
import json
import math
import os
import re
import ssl
import sys
import tempfile
import time
import urllib.request
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate.utils import LoggerType
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from torch.distributed import TCPStore
from torch.utils import cpp_extension

FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json"}
SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")
LINEAR = ("Linear", "Conv1D")
DTYPES = ("float32", "bfloat16", "float16")
OPTIMIZERS = ("adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")
HALF = {"bf16": "bfloat16", "fp16": "float16"}
POSITIVE = (
    "max_length",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "num_train_epochs",
    "logging_steps",
    "eval_steps",
    "save_steps",
    "max_new_tokens",
    "lora_r",
    "lora_alpha",
)


def refuse(message):
    """Print `error: message` once for all processes of the launch; end this one with code 1."""
    if is_first_to_refuse():
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(1)


def is_first_to_refuse():
    """Return whether this process prints the error for all processes of the launch.

    torch's launcher keeps a TCPStore that all processes reach, even before there is a process
    group. The first to count itself there prints. Without the store rank 0 prints at once. Other
    ranks wait 60 s, in which the launcher ends them, and else print too.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        with contextlib.suppress(RuntimeError):  # the launcher is gone
            store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=60))
            restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
            return store.add(f"refused by {sys.argv[0]}, restart {restart}", 1) == 1
    elif int(os.environ.get("RANK", 0)) > 0:
        time.sleep(60)  # there is no store; a launcher ends this process once another has failed
    return True


def say(text):
    """Print a line once, from the first process, also before there is an Accelerator."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, flush=True)


@contextlib.contextmanager
def refusing(*errors):
    """Refuse with the sentence of an error of these classes that the body raises."""
    try:
        yield
    except errors as error:
        refuse(str(error))


def or_refuse(culprit, function, *args, **kwargs):
    """Return `function(*args, **kwargs)`, or refuse with the culprit and the first line of what it raised."""
    try:
        return function(*args, **kwargs)
    except Exception as error:  # libraries raise anything for a missing, foreign or corrupt file
        reason = error.__cause__ or error
        refuse(f"{culprit}: {next(iter(str(reason).strip().splitlines()), type(reason).__name__)}")


def read_settings(parser):
    """Parse the command line with an `HfArgumentParser` of one dataclass and return its instance."""
    parser.error = lambda message: refuse(f"{message}: --help lists the flags")
    parser.allow_abbrev = False
    if {"-h", "--help"} & set(sys.argv) and int(os.environ.get("RANK", 0)) > 0:
        raise SystemExit(0)
    config, unknown = parser.parse_args_into_dataclasses(
        return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        parser.error(f"{' '.join(unknown)} is no flag of this script")
    return config


def check_settings(config, strategies, auto_classes):
    """Refuse settings that cannot work, before anything is loaded.

    Args:
        config: the script's Config.
        strategies: those that the script can run, of "single", "ddp", "zero1", "zero2", "zero3", "fsdp1", "fsdp2".
        auto_classes: `AutoConfig`, `AutoTokenizer` and the auto class of the model.
    """
    check_numbers(config)
    if config.prompt_template.count("{text}") != 1:
        refuse(f"--prompt_template is {config.prompt_template!r}: it must hold {{text}} once")
    if config.text_column == config.label_column:
        refuse(
            f"--text_column and --label_column are both {config.text_column!r}: the label would stand in the prompt"
        )
    check_launch(config, strategies)
    check_output(config)
    for split, file in data_files(config.dataset_name).get("data_files", {}).items():
        check_file(config, split, Path(file))
    check_model(config, *auto_classes)


def check_chat_settings(config, auto_classes, templates):
    """Refuse settings of chat_sft that cannot work, before anything is loaded.

    Args:
        config: its Config, `dtype` and `attn_implementation` resolved.
        auto_classes: as for `check_settings`.
        templates: the names of chat templates that the script brings.
    """
    check_choices(config, templates)
    view = SimpleNamespace(**vars(config))  # as the other scripts have their settings
    if config.use_4bit_quantization:
        view.bnb_4bit_quant_storage = config.bnb_4bit_quant_storage_dtype or config.dtype
    if config.use_peft_lora:
        view.target_modules = config.lora_target_modules.split(",")
    else:
        del view.lora_r, view.lora_alpha, view.lora_dropout
    check_numbers(view)
    check_launch(view, ("single", "ddp", "zero1", "zero2", "zero3", "fsdp1", "fsdp2"))
    if config.use_8bit_quantization and launched_strategy() in ("zero3", "fsdp1", "fsdp2"):
        refuse(
            "--use_8bit_quantization: bitsandbytes keeps 8-bit weights whole in every process, whatever the strategy "
            "does: give --use_4bit_quantization, or launch with configs/ddp.yaml"
        )
    check_run_folder(config)
    view.max_length = 1  # a longer one than the model has positions for is cut to those, aloud
    check_model(view, *auto_classes)


def check_choices(config, templates):
    """Refuse a value that is none of a flag's, flags that contradict each other, and a tracker that is not there."""
    epochs = ("no", "steps", "epoch")
    choices = {
        "dtype": DTYPES,
        "train_on": ("assistant", "all"),
        "long_documents": ("truncate", "drop"),
        "logging_strategy": epochs,
        "eval_strategy": epochs,
        "save_strategy": epochs,
        "hub_strategy": ("end", "every_save", "checkpoint", "all_checkpoints"),
        "bnb_4bit_quant_type": ("nf4", "fp4"),
        "bnb_4bit_compute_dtype": ("", *DTYPES),
        "log_level": ("debug", "info", "warning", "error", "critical"),
    }
    for name, known in choices.items():
        if getattr(config, name) not in known:
            refuse(
                f"--{name} is {getattr(config, name)!r}: choose one of {', '.join(filter(None, known))}"
            )
    template = config.chat_template_format
    if template not in ("none", *templates) and not (
        template.endswith(".jinja") and Path(template).is_file()
    ):
        refuse(
            f"--chat_template_format is {template!r}: choose {', '.join(templates)}, none or a .jinja file"
        )
    if template not in ("none", *templates):
        or_refuse(f"--chat_template_format {template} cannot be read", Path(template).read_text)
    if config.bf16 and config.fp16:
        refuse("--bf16 and --fp16 contradict each other: give one of them")
    if config.use_4bit_quantization and config.use_8bit_quantization:
        refuse(
            "--use_4bit_quantization and --use_8bit_quantization contradict each other: give one of them"
        )
    if (config.use_4bit_quantization or config.use_8bit_quantization) and not config.use_peft_lora:
        refuse("quantized weights cannot be trained: add --use_peft_lora, or drop the quantization")
    if config.streaming and config.max_steps < 1:
        refuse("--streaming has no length: give --max_steps, the number of updates")
    if config.streaming and "epoch" in (
        config.save_strategy,
        config.eval_strategy,
        config.logging_strategy,
    ):
        refuse(
            "--streaming has no epochs: give --save_strategy, --eval_strategy and --logging_strategy steps, or no"
        )
    say_what_is_unused(config)
    if config.hub_model_id and not config.push_to_hub:
        refuse(
            "--hub_model_id names a repository, and nothing is pushed: add --push_to_hub, or drop it"
        )
    if config.resume_from_checkpoint.lower() not in ("", "false") and config.overwrite_output_dir:
        refuse(
            "--resume_from_checkpoint goes on with what --overwrite_output_dir would replace: give one of them"
        )
    for name in config.report_to.split(",") if config.report_to != "none" else ():
        if name not in LoggerType.list() or importlib.util.find_spec(name) is None:
            refuse(
                f"--report_to {config.report_to}: {name!r} is not installed, or no tracker of accelerate: install it, "
                "or give none"
            )


def say_what_is_unused(config):
    """Say each flag that was given and cannot act, for another one decides."""
    sharded = launched_strategy() in ("zero3", "fsdp1", "fsdp2")
    quantization = (
        "use_nested_quant bnb_4bit_quant_type bnb_4bit_compute_dtype bnb_4bit_quant_storage_dtype"
    )
    groups = (
        (
            "--use_peft_lora",
            config.use_peft_lora,
            "lora_r lora_alpha lora_dropout lora_target_modules",
        ),
        ("--use_4bit_quantization", config.use_4bit_quantization, quantization),
        ("--gradient_checkpointing", config.gradient_checkpointing, "use_reentrant"),
        ("--push_to_hub", config.push_to_hub, "hub_strategy hub_private_repo"),
        ("--logging_strategy steps", config.logging_strategy == "steps", "logging_steps"),
        ("--eval_strategy steps", config.eval_strategy == "steps", "eval_steps"),
        (
            "an --eval_strategy",
            config.eval_strategy != "no",
            "num_samples max_new_tokens per_device_eval_batch_size",
        ),
        ("--save_strategy steps", config.save_strategy == "steps", "save_steps"),
        ("a --save_strategy", config.save_strategy != "no", "save_total_limit"),
        ("a strategy that shards the model", sharded, "layerwise_generation"),
    )
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for decider, acts, names in groups:
        given = [f"--{name}" for name in names.split() if getattr(config, name) != defaults[name]]
        if given and not acts:
            say(f"{', '.join(given)}: unused without {decider}.")


def check_run_folder(config):
    """Refuse an output folder that would mix two runs, or that is none of a run's; one to resume from may be there."""
    if config.hub_model_id:
        or_refuse("--hub_model_id", validate_repo_id, config.hub_model_id)
    folder, wanted = Path(config.output_dir), config.resume_from_checkpoint
    is_run = or_refuse(f"--output_dir {folder}", (folder / "log.jsonl").is_file)
    if not is_run and not any(folder.glob("checkpoint-*/state.json")):
        if wanted and folder.is_dir() and not any(folder.iterdir()):
            return  # the first start of a job that always goes on
        return check_output(config)
    goes_on = wanted.lower() == "true" or (
        wanted.lower() not in ("", "false") and Path(wanted).resolve().parent == folder.resolve()
    )
    if config.overwrite_output_dir and (folder / "metrics.json").is_file():
        culprit = f"--output_dir {folder} has a metrics.json that cannot be read, choose another"
        or_refuse(culprit, lambda: list(json.loads((folder / "metrics.json").read_text())["saved"]))
    if not goes_on and not config.overwrite_output_dir:
        refuse(
            f"--output_dir {folder} holds a run: add --resume_from_checkpoint True to go on with it, "
            "--overwrite_output_dir to replace it, or choose another"
        )


def check_numbers(config):
    """Refuse values out of range, each by its flag."""
    values = vars(config)
    for name in POSITIVE:
        if name in values and not 0 < values[name] < math.inf:
            refuse(f"--{name} is {values[name]}: give a number above 0")
    for name in ("warmup_ratio", "lora_dropout"):
        if name in values and not 0 <= values[name] < 1:
            refuse(f"--{name} is {values[name]}: give a share from 0 to below 1")
    limits = {"weight_decay": math.inf, "max_grad_norm": math.inf, "seed": 2**32}
    limits |= dict.fromkeys(("save_total_limit", "num_samples", "dataloader_num_workers"), math.inf)
    for name, limit in limits.items():
        if name in values and not 0 <= values[name] < limit:
            refuse(f"--{name} is {values[name]}: give a number from 0 to below {limit}")
    if config.max_steps != -1 and config.max_steps < 1:
        refuse(
            f"--max_steps is {config.max_steps}: give the number of updates, or -1 to train for --num_train_epochs"
        )
    if config.lr_scheduler_type not in SCHEDULES:
        refuse(
            f"--lr_scheduler_type is {config.lr_scheduler_type!r}: choose one of {', '.join(SCHEDULES)}"
        )
    if config.lr_scheduler_type == "constant" and config.warmup_ratio:
        refuse(
            "--lr_scheduler_type constant has no warmup: give constant_with_warmup, or --warmup_ratio 0"
        )
    if config.dtype not in DTYPES:
        refuse(f"--dtype is {config.dtype!r}: choose one of {', '.join(DTYPES)}")
    if getattr(config, "optim", "adamw_torch") not in OPTIMIZERS:
        refuse(f"--optim is {config.optim!r}: choose one of {', '.join(OPTIMIZERS)}")


def launched_strategy():
    """Return the strategy that `accelerate launch` asked for, as it tells its processes in their environment."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return f"zero{deepspeed_settings()['stage']}"
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return f"fsdp{os.environ.get('FSDP_VERSION', 1)}"
    return "ddp" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else "single"


def deepspeed_settings():
    """Return stage, offload devices and precision of the launched DeepSpeed config, in YAML or in a JSON file."""
    environ = os.environ
    settings = {
        "stage": int(environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2)),
        "optimizer": environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none"),
        "precision": environ.get("ACCELERATE_MIXED_PRECISION", "no"),
    }
    file = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file != "none":
        deepspeed = or_refuse(
            f"deepspeed_config_file {file}", lambda: json.loads(Path(file).read_text())
        )
        zero = deepspeed.get("zero_optimization", {})
        settings["stage"] = zero.get("stage", 0)
        settings["optimizer"] = zero.get("offload_optimizer", {}).get("device", "none")
        for precision in ("fp16", "bf16"):
            if deepspeed.get(precision, {}).get("enabled") is True:
                settings["precision"] = precision
    return settings


def launched_precision():
    """Return the mixed precision that was launched: "no", "bf16", "fp16", or what else the config says."""
    if launched_strategy().startswith("zero"):
        return deepspeed_settings()["precision"]
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def launch_config():
    """Return the text of the YAML that `accelerate launch`, this process's parent, was given; "" where unknown."""
    parent = Path(f"/proc/{os.getppid()}/cmdline")
    if not parent.is_file():
        return ""
    command = parent.read_text().replace("--config_file=", "--config_file\0").split("\0")
    file = (
        Path(command[command.index("--config_file") + 1]) if "--config_file" in command else Path()
    )
    return file.read_text() if file.is_file() else ""


def check_launch(config, strategies):
    """Refuse a launch config that does not fit the script or the machine."""
    strategy, precision = launched_strategy(), launched_precision()
    command = f"accelerate launch --config_file configs/NAME.yaml {sys.argv[0]}"
    if strategy not in strategies:
        refuse(
            f"{Path(sys.argv[0]).name} runs with {', '.join(strategies)}, and was launched with {strategy}: start it "
            f"with `{command}`, where NAME is or begins with one of those"
        )
    if strategy.startswith("zero"):
        if re.search(r"^use_cpu:\s*['\"]?true", launch_config(), re.IGNORECASE | re.MULTILINE):
            refuse(
                "the launch config says use_cpu: true, which accelerate does not heed with DeepSpeed: set it to false"
            )
        if precision == "no" and config.dtype != "float32":
            refuse(
                f"--dtype {config.dtype} under DeepSpeed needs `accelerate launch --mixed_precision`: bf16 or fp16"
            )
        if deepspeed_settings()["optimizer"] != "none":
            check_extension_lock("cpu_adam")
    elif config.dtype != "float32" and not hasattr(config, "lora_r"):
        refuse(
            f"--dtype {config.dtype} would train in {config.dtype}: leave it, launch with --mixed_precision"
        )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        refuse(
            f"--dynamo_backend {backend} compiles the model, whose answers and saving are not proven here: drop it"
        )
    if precision not in ("no", "bf16", "fp16"):
        refuse(
            f"mixed precision {precision} is not supported: launch with `--mixed_precision bf16`, fp16 or no"
        )
    if precision == "fp16" and not torch.cuda.is_available():
        refuse(
            "mixed precision fp16 needs a GPU: launch with `--mixed_precision bf16` or `--mixed_precision no`"
        )
    if strategy.startswith("fsdp"):
        check_fsdp(strategy)
    if getattr(config, "optim", "adamw_torch") != "adamw_torch":
        check_optimizer(config.optim, strategy)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        refuse(
            f"{processes} processes for {torch.cuda.device_count()} GPU(s): launch with fewer `--num_processes`"
        )


def check_fsdp(strategy):
    """Refuse settings of FSDP under which it would shard nothing, or nothing layer by layer."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        refuse(
            "FSDP on one process shards nothing: launch with more --num_processes, or a script for configs/single"
        )
    if strategy == "fsdp1" and os.environ.get("FSDP_USE_ORIG_PARAMS") == "true":
        refuse(
            "fsdp_use_orig_params is true, its default, with which frozen weights get gradients: set it to false"
        )
    sharding = os.environ.get("FSDP_SHARDING_STRATEGY", "FULL_SHARD")
    if strategy == "fsdp1" and sharding not in ("FULL_SHARD", "SHARD_GRAD_OP", "1", "2"):
        refuse(
            f"fsdp_sharding_strategy {sharding} copies the model: set FULL_SHARD, or take configs/fsdp2_hybrid.yaml"
        )
    policy = os.environ.get("FSDP_AUTO_WRAP_POLICY")
    if strategy == "fsdp2" and policy != "TRANSFORMER_BASED_WRAP":
        refuse(
            f"fsdp_auto_wrap_policy {policy} does not gather layer by layer: set it to TRANSFORMER_BASED_WRAP"
        )


def check_optimizer(optim, strategy):
    """Refuse an optimizer of bitsandbytes where it cannot step, or where no checkpoint could hold its state."""
    if strategy.startswith("zero") and deepspeed_settings()["optimizer"] != "none":
        refuse(
            f"--optim {optim} cannot be offloaded, DeepSpeed's CPU Adam steps there: give --optim adamw_torch"
        )
    if strategy == "fsdp1":
        refuse(
            f"--optim {optim} under fsdp1 has a state of which only one slice would be saved: give adamw_torch"
        )
    if strategy == "fsdp2":
        refuse(
            f"--optim {optim} cannot step the DTensors of fsdp2: give adamw_torch, or use zero2 or zero3"
        )


def check_quantization(config, culprit, saved):
    """Refuse quantized weights that cannot be trained beside, or that the strategy would cast, replicate or lose.

    Args:
        config: the script's Config; one with bnb_4bit_quant_storage quantizes what the checkpoint holds.
        culprit: how to name the model.
        saved: the checkpoint's own `quantization_config`; empty where its weights are not quantized.
    """
    strategy, precision = launched_strategy(), launched_precision()
    quantizes = hasattr(config, "bnb_4bit_quant_storage")
    if saved and saved.get("quant_method") != "bitsandbytes":
        refuse(
            f"{culprit} is quantized by {saved.get('quant_method')}, not bitsandbytes: take the original model"
        )
    if saved and not hasattr(config, "lora_r"):
        refuse(
            f"{culprit} holds quantized weights, which cannot be trained: take the original, or a script with LoRA"
        )
    if not (saved or quantizes):
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        refuse(
            "4-bit and 8-bit weights need bitsandbytes, which is not installed: pip install bitsandbytes"
        )
    sharded = strategy in ("zero3", "fsdp1", "fsdp2")
    if saved.get("load_in_8bit"):
        if sharded:
            refuse(
                f"{culprit} holds 8-bit weights, which bitsandbytes keeps whole in every process, whatever {strategy} "
                f"does: train the original with causal_lm_qlora_{strategy}.py, or launch with configs/ddp.yaml"
            )
        if quantizes:
            refuse(
                f"{culprit} holds 8-bit weights already: take the original, or causal_lm_lora.py"
            )
        return
    if sharded and not quantizes:
        refuse(
            f"{culprit} holds 4-bit weights, which this script cannot shard: take causal_lm_qlora_{strategy}.py"
        )
    if saved:
        storage, source = (
            saved.get("bnb_4bit_quant_storage", "uint8"),
            f"{culprit}: its bnb_4bit_quant_storage",
        )
    else:
        storage, source = config.bnb_4bit_quant_storage or config.dtype, "--bnb_4bit_quant_storage"
    if storage not in (*DTYPES, "uint8"):
        refuse(f"{source} is {storage!r}: choose one of uint8, {', '.join(DTYPES)}")
    if strategy.startswith("fsdp") and storage != config.dtype:
        refuse(
            f"{source} is {storage}, and --dtype {config.dtype}: {strategy} shards both alike, so make them the same"
        )
    if (
        strategy not in ("single", "ddp")
        and precision in HALF
        and storage not in ("uint8", HALF[precision])
    ):
        refuse(
            f"{source} is {storage}, which {strategy} in mixed precision {precision} would cast and so destroy: give "
            f"--dtype {HALF[precision]}"
        )


def check_wrap_classes(culprit, skeleton):
    """Refuse classes of layers that the model has not; where the config names none, transformers must know some."""
    classes = {type(module).__name__ for module in skeleton.modules()}
    if named := os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP"):
        missing = sorted(set(named.split(",")) - classes)
    else:
        missing = [] if skeleton._no_split_modules else ["known class"]
    if missing:
        layers = sorted(name for name in classes if name.endswith(("Layer", "Block")))
        refuse(
            f"{culprit} has no {missing[0]} for fsdp_transformer_layer_cls_to_wrap: name one of {', '.join(layers)}"
        )


def check_extension_lock(name):
    """Refuse when a killed compilation left its lock behind: torch would wait for it without end."""
    lock = Path(cpp_extension._get_build_directory(name, verbose=False)).resolve() / "lock"
    if (
        lock.exists() and not is_open(lock) and lock.exists()
    ):  # again: its owner may have ended meanwhile
        refuse(
            f"{lock} was left by a compilation that was killed, and DeepSpeed would wait for it: delete that file"
        )


def is_open(path):
    """Return whether a process that this user may look into has the file open, as one that compiles has its lock."""
    for link in glob.iglob("/proc/[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # another user's, or gone by now
            if os.readlink(link) == str(path):
                return True
    return False


def check_output(config):
    """Refuse an output folder that exists, unless an earlier run wrote it and may be replaced, or cannot be made."""
    if config.hub_model_id:
        or_refuse("--hub_model_id", validate_repo_id, config.hub_model_id)
    folder = Path(config.output_dir)
    if or_refuse(f"--output_dir {folder}", folder.is_dir):
        if not config.overwrite_output_dir:
            refuse(f"--output_dir {folder} exists: choose another, or add --overwrite_output_dir")
        if any(folder.iterdir()):
            culprit = (
                f"--output_dir {folder} holds no metrics.json of an earlier run, choose another"
            )
            or_refuse(
                culprit, lambda: list(json.loads((folder / "metrics.json").read_text())["saved"])
            )
    elif folder.exists():
        refuse(f"--output_dir {folder} is a file: choose another")
    parent = next(path for path in folder.absolute().parents if path.exists())
    culprit = f"--output_dir {folder} cannot be made, choose another"
    name = f".{folder.name}."  # the run is written into a folder of such a name first
    or_refuse(culprit, lambda: tempfile.TemporaryDirectory(prefix=name, dir=parent).cleanup())


def data_files(dataset_name):
    """Return the arguments of `datasets.load_dataset` for a .csv, .json or .jsonl file, a folder of them, or a Hub id.

    A folder holds train.* and, if it likes, validation.*, all of one format. Cells stay text as they stand in a .csv:
    empty ones, NA and 01 too.
    """
    path = Path(dataset_name)
    if or_refuse(f"--dataset_name {path}", path.is_dir):
        found = [file for file in sorted(path.iterdir()) if file.suffix in FORMATS]
        files = {file.stem: file for file in found}
        if twice := [
            file.name
            for file in found
            if file.stem in ("train", "validation") and files[file.stem] != file
        ]:
            refuse(
                f"--dataset_name {path} holds {twice[0]} and {files[Path(twice[0]).stem].name}: keep one of them"
            )
        if "train" not in files:
            refuse(
                f"--dataset_name {path} holds no train.csv, train.json or train.jsonl: name a file, or add one"
            )
        files = {split: files[split] for split in ("train", "validation") if split in files}
        if len({FORMATS[file.suffix] for file in files.values()}) > 1:
            refuse(
                f"--dataset_name {path} mixes formats: {', '.join(file.name for file in files.values())}"
            )
    elif path.suffix in FORMATS or path.is_file():
        files = {"train": path}
        if path.suffix not in FORMATS:
            refuse(
                f"--dataset_name {path} is no {', '.join(FORMATS)} file: convert it, or rename it"
            )
    elif dataset_name.count("/") > 1 or dataset_name.startswith((".", "/", "~")):
        refuse(
            f"--dataset_name {dataset_name!r} is no file, no folder and no Hub id: check the path"
        )
    else:
        check_hub(f"--dataset_name {dataset_name}")
        return {"path": dataset_name}
    for file in files.values():
        if not file.is_file():
            refuse(f"--dataset_name {file} is not there: check the path")
        if file.stat().st_size == 0:
            refuse(f"--dataset_name {file} is empty: give a file with rows")
    arguments = {"path": FORMATS[files["train"].suffix]}
    arguments["data_files"] = {split: str(file) for split, file in files.items()}
    if (
        arguments["path"] == "csv"
    ):  # every cell as it stands in the file: pandas would read 01 as 1 and NA as nothing
        with next(iter(files.values())).open(
            encoding="utf-8-sig", errors="replace", newline=""
        ) as file:
            arguments |= {
                "converters": dict.fromkeys(next(csv.reader(file), []), str),
                "keep_default_na": False,
            }
    return arguments


def check_file(config, split, file):
    """Refuse a file that is no UTF-8 text or no JSON, has no rows, or fails `check_split`. Reads all of it."""
    broken = f"--dataset_name {file} cannot be read, mend it or convert it"
    columns, labels = or_refuse(broken, read_column, file, config.label_column)
    if not labels:
        refuse(f"--dataset_name {file} has no rows: give a file with rows")
    check_split(config, split, columns, {config.label_column: labels})


def read_column(file, column):
    """Return the names of all columns of a .csv, .json or .jsonl file, and the cells of one of them."""
    columns, cells = {}, []
    with file.open(encoding="utf-8-sig", newline="") as lines:
        if file.suffix == ".csv":
            csv.field_size_limit(sys.maxsize)
            rows = csv.reader(lines)
            header = next(rows)
            columns = dict.fromkeys(header)
            for number, row in enumerate(filter(None, rows), start=1):
                if len(row) > len(
                    header
                ):  # pandas would stop, or take the first column for row numbers
                    raise ValueError(
                        f"row {number} has {len(row)} cells for {len(header)} columns, quotes may lack"
                    )
                cells.append(dict(zip(header, row)).get(column))
            return columns, cells
        is_list = next(lines).lstrip().startswith("[")
        lines.seek(0)
        where = f"--dataset_name {file}: row {{}} is no JSON, mend it"
        numbered = enumerate(filter(str.strip, lines), start=1)
        rows = (
            json.load(lines)
            if is_list
            else (or_refuse(where.format(n), json.loads, line) for n, line in numbered)
        )
        for row in rows:
            columns |= dict.fromkeys(row)
            cells.append(row.get(column))
    return columns, cells


def check_hub(culprit):
    """Refuse a Hub id when the Hub cannot be reached: the libraries would try for half a minute, file by file."""
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return
    try:
        urllib.request.urlopen(
            os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=3
        ).close()
    except OSError as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, OSError) and not isinstance(
            reason, ssl.SSLError
        ):  # else the Hub did answer
            refuse(
                f"{culprit} is not here, and the Hub cannot be reached ({reason}): check the path or the network, or "
                "set HF_HUB_OFFLINE=1 to use what an earlier run has downloaded"
            )


def check_model(config, auto_config, auto_tokenizer, auto_model):
    """Refuse a folder or Hub id without a usable model of the script's kind, judged by its files and on no memory."""
    name = config.model_name_or_path
    culprit = f"--model_name_or_path {name}"
    folder = Path(name)
    if or_refuse(culprit, folder.is_dir):
        if not (folder / "config.json").is_file():
            refuse(
                f"{culprit} holds no config.json: give the folder of a model, as save_pretrained writes it"
            )
        check_weight_files(folder, culprit)
    elif folder.exists() or name.count("/") > 1 or name.startswith((".", "/", "~")):
        refuse(f"{culprit} is no folder and no Hub id: check the path")
    else:
        check_hub(culprit)
    model_config = or_refuse(
        f"{culprit} cannot be read, check the path", auto_config.from_pretrained, name
    )
    check_quantization(config, culprit, getattr(model_config, "quantization_config", None) or {})
    needs_encoder = "Seq2Seq" in auto_model.__name__
    if bool(model_config.is_encoder_decoder) != needs_encoder:
        kinds = ["a causal language model", "a sequence-to-sequence model"]
        refuse(
            f"{culprit} is not {kinds[needs_encoder]}, which this script trains: take another model or script"
        )
    tokenizer = or_refuse(
        f"{culprit} has no usable tokenizer, save one with it", auto_tokenizer.from_pretrained, name
    )
    if tokenizer.eos_token_id is None:
        refuse(
            f"{culprit} has a tokenizer without eos_token, so that no answer could end: set one and save it"
        )
    positions = getattr(model_config, "max_position_embeddings", None)
    if positions is not None and config.max_length > positions:
        refuse(
            f"--max_length {config.max_length} is beyond the model's {positions} positions: give {positions} or less"
        )
    with torch.device("meta"):  # shapes alone: no memory, no weights
        attention = config.attn_implementation
        described = f"{culprit} cannot be made by {auto_model.__name__} with --attn_implementation {attention}"
        skeleton = or_refuse(
            described, auto_model.from_config, model_config, attn_implementation=attention
        )
    tokens = (len(tokenizer) - 1, tokenizer.eos_token_id, tokenizer.pad_token_id or 0)
    if max(tokens) >= skeleton.get_input_embeddings().num_embeddings:
        refuse(
            f"{culprit} has {skeleton.get_input_embeddings().num_embeddings} embeddings, and its tokenizer uses token "
            f"{max(tokens)}: save the model after resize_token_embeddings, or take its own tokenizer"
        )
    if folder.is_dir() and not hasattr(model_config, "quantization_config"):
        check_weight_names(folder, culprit, skeleton)
    if launched_strategy().startswith("fsdp"):
        check_wrap_classes(culprit, skeleton)
    if (
        launched_strategy() == "fsdp1"
        and config.dtype == "float16"
        and skeleton._keep_in_fp32_modules
    ):
        refuse(
            f"{culprit} keeps weights in float32 beside --dtype float16, which fsdp1 cannot flatten: give bfloat16"
        )
    if hasattr(config, "target_modules") and config.target_modules != ["all-linear"]:
        check_target_modules(config.target_modules, skeleton)
    if getattr(config, "modules_to_save", None):
        check_modules_to_save(config, skeleton)


def check_weight_files(folder, culprit):
    """Refuse a model folder whose safetensors are missing or truncated, judged by their headers."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = or_refuse(
            f"{culprit}: {index.name}", lambda: json.loads(index.read_text())["weight_map"]
        )
        files = [folder / file for file in sorted(set(weight_map.values()))]
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.is_file():
            refuse(
                f"{culprit} holds no {file.name}: only safetensors is read, save the model again in that format"
            )
        with or_refuse(
            f"{culprit}: {file.name} is no whole safetensors file, save or download it anew",
            safe_open,
            file,
            framework="pt",
        ):
            pass


def check_weight_names(folder, culprit, skeleton):
    """Refuse weights that are none of this model's, or of other shapes, judged by the headers of the safetensors."""
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    prefix = f"{skeleton.base_model_prefix}."
    shapes |= {
        name.removeprefix(prefix): shape for name, shape in shapes.items()
    }  # as the bare base model is saved
    found = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                shape = tuple(file.get_slice(name).get_shape())
                if name in shapes and shape != shapes[name]:
                    refuse(
                        f"{culprit}: {path.name} holds {name} as {shape}, and config.json says {shapes[name]}"
                    )
                found += name in shapes
    if not found:
        refuse(
            f"{culprit} holds no weight of a {type(skeleton).__name__}, which config.json names: save them together"
        )


def check_target_modules(target_modules, skeleton):
    """Refuse a LoRA target that names no linear layer."""
    modules = dict(skeleton.named_modules())
    for target in target_modules:
        found = [
            module
            for name, module in modules.items()
            if name == target or name.endswith(f".{target}")
        ]
        if not found or not all(type(module).__name__ in LINEAR for module in found):
            leaves = {
                name.rpartition(".")[2]
                for name, module in modules.items()
                if type(module).__name__ in LINEAR
            }
            refuse(
                f"--target_modules {target} names no linear layer: the model has {', '.join(sorted(leaves))}"
            )


def check_modules_to_save(config, skeleton):
    """Refuse a layer to train whole that the model has not, that has no weight of its own, or that LoRA targets."""
    modules = dict(skeleton.named_modules(remove_duplicate=False))
    heads = (skeleton.get_input_embeddings(), skeleton.get_output_embeddings())
    ends = {name.rpartition(".")[2] for name, module in modules.items() if module in heads}
    for wanted in config.modules_to_save:
        found = [
            module
            for name, module in modules.items()
            if name == wanted or name.endswith(f".{wanted}")
        ]
        if not found or any(
            next(module.parameters(recurse=False), None) is None for module in found
        ):
            refuse(
                f"--modules_to_save {wanted} names no layer with weights: the model has {', '.join(sorted(ends))}"
            )
        if launched_strategy() == "fsdp2" and config.dtype != "float32" and wanted not in ends:
            refuse(
                f"--modules_to_save {wanted} would be trained in {config.dtype} beside LoRA in float32, which fsdp2 "
                f"cannot put into one unit: give --dtype float32, or only {' '.join(sorted(ends))}"
            )
        if wanted in config.target_modules:
            refuse(
                f"{wanted} is in --modules_to_save and in --target_modules: name it in one of them"
            )


def check_columns(dataset, config):
    """Refuse data without training rows, without the two columns, or with rows that have no label."""
    if "train" not in dataset:
        refuse(
            f"--dataset_name {config.dataset_name} has no train split, only {', '.join(dataset)}"
        )
    for split in [split for split in ("train", "validation") if split in dataset]:
        check_split(config, split, dataset[split].column_names, dataset[split])
        feature = dataset[split].features[config.text_column]
        if not hasattr(feature, "dtype"):
            refuse(
                f"--text_column {config.text_column!r} holds {feature} and no text in {split}: choose another column"
            )


def check_split(config, split, columns, rows):
    """Refuse a split without the two columns, with rows that have no label, or with one label alone to learn."""
    for flag in ("text_column", "label_column"):
        if (column := getattr(config, flag)) not in columns:
            refuse(
                f"--{flag} {column!r} is not in {split}: the columns are {', '.join(map(repr, columns))}"
            )
    labels = rows[config.label_column]
    for number, label in enumerate(labels, start=1):
        if label is None or not str(label).strip():
            refuse(
                f"row {number} of {split} has no label in column {config.label_column!r}: fill it, drop the row, or "
                "close a quote that is open"
            )
        if isinstance(label, list | dict):
            refuse(
                f"row {number} of {split} has a {type(label).__name__} as its label: give text or a number"
            )
    if split == "train" and len(set(map(str, labels))) < 2:
        refuse(
            f"column {config.label_column!r} holds one value in all rows: there is nothing to learn"
        )


def check_rows(dataset, config, num_processes):
    """Refuse fewer training rows than processes, and no rows to score on."""
    for split, least in (("train", num_processes), ("validation", 1)):
        if len(dataset[split]) < least:
            refuse(
                f"--dataset_name {config.dataset_name} leaves {len(dataset[split])} row(s) for {split}, and "
                f"{num_processes} process(es) need {least}: give more rows, or launch with fewer --num_processes"
            )


def check_targets(targets, tokenizer, head, tail, max_length, shared=True):
    """Refuse labels that the tokenizer cannot tell apart, and prompts without room for text.

    Args:
        targets: label -> its token ids, where `shared` without the end-of-sequence token.
        head, tail: token ids of the prompt before and after the row's text.
        max_length: of prompt, label and end-of-sequence token together, or, where not `shared`, of the prompt alone.

    Returns:
        label -> the text that its ids decode to, which is what a right answer looks like; and how many tokens a prompt
        may hold before its tail, so that the longest label still fits.
    """
    answers = {
        label: tokenizer.decode(ids, skip_special_tokens=True).strip()
        for label, ids in targets.items()
    }
    seen = {}
    for label, answer in answers.items():
        if not answer or seen.setdefault(answer, label) != label:
            refuse(
                f"the tokenizer reads label {label!r} back as {answer!r}, as it does another or nothing: rename it"
            )
    longest = max(map(len, targets.values())) + 1 if shared else 0
    room = max_length - len(tail) - longest
    if room <= len(head):
        refuse(
            f"--max_length {max_length} has no room for text beside {len(head) + len(tail)} tokens of prompt and "
            f"{longest} of label: give {max_length - room + len(head) + 1} or more"
        )
    return answers, room
