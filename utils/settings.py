"""Read the command line, and stop with one sentence if a setting is invalid.

All of this happens before a model is loaded. A flag is checked if the Config has a field of its
name; the names are Hugging Face's. Data columns are checked in data.py, the launch config in
launch_checks.py.
"""

import ast
import inspect
import math
import os
import sys
import textwrap
from itertools import pairwise

from transformers import HfArgumentParser

from utils.activations import settle_checkpointing
from utils.environment import settle_environment
from utils.errors import or_refuse, refuse, say  # a lesson calls `settings.refuse`
from utils.folders import check_output, lock_folder
from utils.launch import OPTIMIZERS, quiet_libraries
from utils.launch_checks import check_launch
from utils.model_files import DTYPES, check_model

SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts")
SCHEDULES += ("polynomial", "inverse_sqrt")
POSITIVE = (
    "max_length",
    "max_target_length",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing_every_n_layers",
    "learning_rate",
    "num_train_epochs",
    "logging_steps",
    "eval_steps",
    "save_steps",
    "max_new_tokens",
    "lora_r",
    "lora_alpha",
)
SHARES = ("warmup_ratio", "lora_dropout")
NOT_NEGATIVE = (
    "weight_decay",
    "max_grad_norm",
    "save_total_limit",
    "num_samples",
    "dataloader_num_workers",
)
# endings of the names of flags that hold a path, in which ~ is the home folder
PATHS = ("_dir", "_path", "_file", "_folder", "_checkpoint", "dataset_name", "template_format")
CHOICES = {
    "lr_scheduler_type": SCHEDULES,
    "dtype": DTYPES,
    "eval_strategy": ("no", "epoch"),
    "optim": tuple(OPTIMIZERS),
}
# help texts of the flags that several scripts have in one meaning
HELP = {
    "model_name_or_path": "model folder or Hub id",
    "dtype": "dtype of the loaded weights",
    "attn_implementation": "attention backend: sdpa, eager, ...",
    "dataset_name": "data file, folder or Hub id",
    "per_device_train_batch_size": "rows per micro-batch and process",
    "per_device_eval_batch_size": "rows per eval batch and process",
    "gradient_accumulation_steps": "micro-batches per update",
    "learning_rate": "peak learning rate, after the warmup",
    "lr_scheduler_type": "schedule: cosine, linear, constant, ...",
    "warmup_ratio": "fraction of the updates used for warmup",
    "weight_decay": "weight decay of AdamW",
    "max_grad_norm": "clip gradients to this L2 norm; 0: no clipping",
    "num_train_epochs": "epochs, rounded up to full updates",
    "max_steps": "number of updates; -1: train for num_train_epochs",
    "eval_strategy": "epoch: also evaluate after each epoch",
    "gradient_checkpointing": "recompute activations to save memory",
    "tf32": "matrix products in TF32 on GPUs: faster, less exact",
    "layerwise_generation": "generate with one layer gathered at a time: less memory, slow",
    "optim": "adamw_torch, adamw_8bit, paged_adamw_8bit or paged_adamw_32bit",
    "bnb_4bit_quant_storage": "dtype of tensors that hold 4-bit weights; empty: that of --dtype",
    "lora_r": "rank of the LoRA matrices",
    "lora_alpha": "LoRA is scaled by lora_alpha / lora_r",
    "lora_dropout": "dropout probability on the input of LoRA layers",
    "target_modules": "layers that get LoRA, or all-linear",
    "modules_to_save": "layers to train in full",
    "save_steps": "updates between two checkpoints",
    "checkpoint_dir": "folder of the checkpoints",
    "resume_from_checkpoint": "checkpoint folder, or True for the newest",
    "seed": "seed of weights, dropout, row order and split",
    "output_dir": "folder for the results",
    "overwrite_output_dir": "replace an earlier run in output_dir",
    "hub_model_id": "Hub repository to push to; empty: no push",
}


def read_settings(Config, strategies, auto_model, base, optimizer_in_config=False):
    """Return the settings of the command line; stop with an error if they are invalid.

    Checks the numbers, the launch config, the output folder and the model's files. A ValueError
    that the Config raises in `__post_init__` is reported in the same way.

    Args:
        Config: a dataclass with the fields model_name_or_path, dtype, output_dir,
            overwrite_output_dir, hub_model_id and whatever else the script needs.
        strategies: those that the script can run under, out of "single", "ddp", "zero1", "zero2",
            "zero3", "fsdp1" and "fsdp2".
        auto_model: the Auto class of transformers that loads the model.
        base: how the model's own weights are used: "trained"; "frozen", with an adapter; "4bit",
            quantized and frozen; or "new", made from its config and trained.
        optimizer_in_config: True if the optimizer and the schedule come from DeepSpeed's config. If
            False, a config that names them is refused.
    """
    config = parse_arguments(Config)
    check_numbers(config)
    check_launch(config, strategies, base, optimizer_in_config)
    check_output(config)
    settle_checkpointing(config)
    if "checkpoint_dir" in vars(config):
        folder = lock_folder("checkpoint_dir", config.checkpoint_dir)
        or_refuse(f"--checkpoint_dir {folder}", folder.mkdir, exist_ok=True)
    check_model(config, auto_model, base)
    return config


def parse_arguments(Config):
    """Return an instance of the dataclass with the values of the command line."""
    settle_environment()
    quiet_libraries()
    parser = make_parser(Config)
    parser.error = lambda message: refuse(f"{message}: --help lists the flags")
    parser.allow_abbrev = False
    if {"-h", "--help"} & set(sys.argv) and int(os.environ.get("RANK", 0)) > 0:
        raise SystemExit(0)
    try:
        config, unknown = parser.parse_args_into_dataclasses(
            return_remaining_strings=True, look_for_args_file=False
        )
    except ValueError as error:  # of the Config's __post_init__
        refuse(str(error))
    if unknown:
        parser.error(f"{' '.join(unknown)} is not a flag of this script")
    for name, value in vars(config).items():
        if name.endswith(PATHS) and isinstance(value, str):
            setattr(config, name, os.path.expanduser(value))  # the shell leaves --flag=~/x as it is
    return config


def make_parser(Config):
    """Return a parser with a flag and a help text for each field of the dataclass.

    The text is the field's own: `metadata={"help": text}`, or the string on the lines below the
    field, which PEP 257 calls an attribute docstring. If the field has neither, the text is that
    of HELP, or else the name of the field.
    """
    parser, own = HfArgumentParser(Config), {}
    for part in reversed(Config.__mro__[:-1]):
        own |= attribute_docstrings(part)
    for action in parser._actions:
        name = action.dest
        if f"--no_{name}" in action.option_strings:  # made for a field that is True by default
            action.help = f"the same as --{name} False"
        action.help = action.help or own.get(name) or HELP.get(name) or name.replace("_", " ")
    return parser


def attribute_docstrings(part):
    """Return name -> the string below the field, for the fields of one class, ready for argparse.

    Empty if the source cannot be found, as in an interactive session or under a profiler.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(part)))
    except (OSError, TypeError, SyntaxError):
        return {}
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    pairs = [
        (field.target, text.value)
        for definition in classes
        for field, text in pairwise(definition.body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    ]
    return {
        field.id: " ".join(text.value.split()).replace("%", "%%")
        for field, text in pairs
        if isinstance(getattr(text, "value", None), str)
    }


def check_numbers(config):
    """Stop if a value is out of range."""
    values = vars(config)
    for name in POSITIVE:
        if name in values and not 0 < values[name] < math.inf:
            refuse(f"--{name} is {values[name]}: give a number above 0")
    for name in SHARES:
        if name in values and not 0 <= values[name] < 1:
            refuse(f"--{name} is {values[name]}: give a fraction of at least 0 and below 1")
    for name, limit in (*((name, math.inf) for name in NOT_NEGATIVE), ("seed", 2**32)):
        if name in values and not 0 <= values[name] < limit:
            refuse(f"--{name} is {values[name]}: give a number of at least 0 and below {limit}")
    for name, known in CHOICES.items():
        if name in values and values[name] not in known:
            refuse(f"--{name} is {values[name]!r}: choose one of {', '.join(known)}")
    if values.get("max_steps", -1) != -1 and config.max_steps < 1:
        refuse(
            f"--max_steps is {config.max_steps}: give the number of updates, or -1 to train for "
            "--num_train_epochs"
        )
    if values.get("lr_scheduler_type") == "constant" and config.warmup_ratio:
        say(
            f"--warmup_ratio {config.warmup_ratio} has no effect with --lr_scheduler_type "
            "constant: constant_with_warmup has a warmup."
        )
