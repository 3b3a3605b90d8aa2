"""Bad settings and bad input end in one line, `error: ` with the culprit and the remedy, before a model is loaded.

The tables call the scripts' own `main` in this process, in the environment that the launcher gives to its processes,
up to where the model would be loaded. A sample goes through the launcher itself.
"""

import contextlib
import http.server
import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import datasets
import pytest
import torch
from accelerate.commands import launch as accelerate_launch
from accelerate.utils import launch as launchers
from conftest import ROOT, write_csv
from guides import GUIDES
from models import make_data, make_model, make_rows
from processes import plant, running
from torch.distributed import TCPStore
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from utils import checks

SCRIPTS = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


BITSANDBYTES = {"quant_method": "bitsandbytes"}
QUANTIZED = {  # folder -> quantization_config
    "in_8bit": BITSANDBYTES | {"load_in_8bit": True},
    "in_4bit": BITSANDBYTES | {"load_in_4bit": True},  # stored as uint8, as by default
    "in_4bit_float": BITSANDBYTES | {"load_in_4bit": True, "bnb_4bit_quant_storage": "float32"},
    "in_gptq": {"quant_method": "gptq", "bits": 4},
}


class Accepted(Exception):
    """Raised where the model would be loaded: every check has passed."""


# What the cases name, relative to the working directory -------------------------------------------
@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with models, data, launch configs and output folders, good ones and bad ones."""
    place = tmp_path_factory.mktemp("place")
    make_model(place / "llama", "llama")
    make_model(place / "t5", "t5")
    for name in ("no_config", "broken_config", "no_weights", "truncated", "no_tokenizer", "no_eos"):
        shutil.copytree(place / "llama", place / name)
    (place / "no_config/config.json").unlink()
    (place / "broken_config/config.json").write_text("{")
    (place / "no_weights/model.safetensors").rename(place / "no_weights/pytorch_model.bin")
    whole = (place / "llama/model.safetensors").read_bytes()
    (place / "truncated/model.safetensors").write_bytes(whole[:-100])
    for name in ("no_tokenizer", "no_eos"):
        (place / name / "tokenizer_config.json").unlink()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(place / "llama/tokenizer.json"))
    tokenizer.save_pretrained(place / "no_eos")
    (place / "no_tokenizer/tokenizer.json").unlink()
    shutil.copytree(place / "llama", place / "shard_missing")
    (place / "shard_missing/model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(place / "llama").save_pretrained(
        place / "shard_missing", max_shard_size="50KB"
    )
    sorted((place / "shard_missing").glob("model-*.safetensors"))[1].unlink()

    for name in ("other_weights", "other_shapes", "added_pad", "added_token"):
        shutil.copytree(place / "llama", place / name)
    tokenizer = AutoTokenizer.from_pretrained(place / "llama")
    tokenizer.add_tokens(["<sigh>"])
    tokenizer.save_pretrained(place / "added_token")
    shutil.copy(place / "t5/model.safetensors", place / "other_weights")
    config = json.loads((place / "llama/config.json").read_text())
    (place / "other_shapes/config.json").write_text(json.dumps(config | {"intermediate_size": 24}))
    for (
        name,
        quantization,
    ) in QUANTIZED.items():  # what config.json says is all that a refusal needs
        shutil.copytree(place / "llama", place / name)
        (place / name / "config.json").write_text(
            json.dumps(config | {"quantization_config": quantization})
        )
    tokenizer = AutoTokenizer.from_pretrained(place / "llama")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(place / "added_pad")

    data = make_data(place / "data", train=20, validation=5)
    rows = make_rows(20, seed=3)
    text, label = rows[0]
    write_csv(data / "good.csv", rows)
    write_csv(data / "seldom.csv", [*rows, (text, "a label that occurs once")])
    for count in (2, 77):
        labels = [f"label of kind {number % count}" for number in range(2 * count)]
        write_csv(
            data / f"{count}_labels.csv",
            [(f"text, {number} 🙂", label) for number, label in enumerate(labels)],
        )
    write_csv(data / "no_label.csv", [*rows[:6], (text, " "), *rows])
    write_csv(data / "one_label.csv", [(text, label) for text, _ in rows])
    write_csv(data / "two_rows.csv", rows[:2])
    write_csv(data / "one_text.csv", [(text, label) for _, label in rows])
    write_csv(data / "header.csv", [])
    write_csv(data / "ragged.csv", [*rows, (text, label, "one cell too many"), *rows])
    write_csv(
        data / "emoji.csv", [(text, "🙂🙁"[number % 2]) for number, (text, _) in enumerate(rows)]
    )
    write_csv(
        data / "spaces.csv",
        [(text, ("yes", "yes ")[number % 2]) for number, (text, _) in enumerate(rows)],
    )
    (data / "empty.csv").touch()
    (data / "rows.parquet").touch()
    (data / "latin1.csv").write_bytes("Tweet text,Label\ncafé,yes\nthé,no\n".encode("latin-1"))
    lines = [json.dumps({"Tweet text": text, "Label": label}) for text, label in rows]
    (data / "good.jsonl").write_text("\n".join(lines))
    (data / "good.json").write_text(f"[{', '.join(lines)}]")
    (data / "null.jsonl").write_text(
        "\n".join([*lines[:3], '{"Tweet text": "text", "Label": null}', *lines])
    )
    for column in ("Tweet text", "Label"):
        lists = [json.dumps(json.loads(line) | {column: [line[-9:], "and"]}) for line in lines]
        (data / f"list_{column.split()[-1].lower()}.jsonl").write_text("\n".join(lists))
    (data / "broken.json").write_text(f"[{', '.join(lines)},")
    (data / "broken.jsonl").write_text("\n".join([*lines[:3], '{"Tweet text": "te', *lines]))
    for folder, files in {
        "only_test": ["test.csv"],
        "mixed": ["train.csv", "validation.jsonl"],
        "twice": ["train.csv", "train.jsonl"],
    }.items():
        (data / folder).mkdir()
        for file in files:
            shutil.copy(data / f"good{Path(file).suffix}", data / folder / file)

    (place / "data.v2").mkdir()
    shutil.copy(data / "good.jsonl", place / "data.v2" / "train.jsonl")
    (place / "a_file").touch()
    for folder in ("empty", "foreign", "earlier", "corrupt"):
        (place / folder).mkdir()
    (place / "foreign/thesis.txt").touch()
    (place / "earlier/metrics.json").write_text('{"saved": {}}')
    (place / "corrupt/metrics.json").write_text('{"accuracy": 0.5}')  # of something else

    zero3 = (ROOT / "configs/zero3.yaml").read_text()
    (place / "use_cpu.yaml").write_text(zero3.replace("use_cpu: false", "use_cpu: true"))
    base = {"compute_environment": "LOCAL_MACHINE", "num_processes": 2, "use_cpu": False}
    for name, old, new in (
        ("orig_params", "fsdp_use_orig_params: false", "fsdp_use_orig_params: true"),
        ("no_orig_params", "fsdp_use_orig_params: false", ""),
        ("hybrid", "FULL_SHARD", "HYBRID_SHARD"),
        ("no_shard", "FULL_SHARD", "NO_SHARD"),
        (
            "wrap_class",
            "TRANSFORMER_BASED_WRAP",
            "TRANSFORMER_BASED_WRAP\n  fsdp_transformer_layer_cls_to_wrap: NoLayer",
        ),
    ):
        text = (ROOT / "configs/fsdp1.yaml").read_text()
        assert old in text
        (place / f"{name}.yaml").write_text(re.sub(f"{old}.*", new, text))
    (place / "no_wrap.yaml").write_text(
        (ROOT / "configs/fsdp2.yaml").read_text().replace("TRANSFORMER_BASED_WRAP", "NO_WRAP")
    )
    for name, zero in {
        "stage2": {"stage": 2},
        "stage3": {"stage": 3},
        "fp16": {"stage": 3},
    }.items():
        deepspeed = {"zero_optimization": zero, "fp16": {"enabled": name == "fp16"}}
        (place / f"{name}.json").write_text(
            json.dumps(deepspeed | {"train_micro_batch_size_per_gpu": "auto"})
        )
        launch = {
            "distributed_type": "DEEPSPEED",
            "deepspeed_config": {"deepspeed_config_file": f"{name}.json"},
        }
        (place / f"{name}.yaml").write_text(json.dumps(base | launch))
    return place


# How a case runs ----------------------------------------------------------------------------------
def launcher_variables(config, flags, monkeypatch):
    """Return the variables that `accelerate launch` gives to the first of its processes."""
    variables = {}

    def several(args, prepare):
        environment = prepare(args)
        variables.update(environment if isinstance(environment, dict) else environment[1])
        variables.update(
            dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(args.num_processes)), RANK="0"
        )

    def single(args):
        variables.update(launchers.prepare_simple_launcher_cmd_env(args)[1])

    prepare = {"deepspeed_launcher": launchers.prepare_deepspeed_cmd_env}
    prepare["multi_gpu_launcher"] = launchers.prepare_multi_gpu_env
    for name, function in prepare.items():
        monkeypatch.setattr(accelerate_launch, name, partial(several, prepare=function))
    monkeypatch.setattr(accelerate_launch, "simple_launcher", single)
    words = ["--config_file", config, "--main_process_port", "0", *flags, "script.py"]
    accelerate_launch.launch_command(accelerate_launch.launch_command_parser().parse_args(words))
    return variables


@pytest.fixture
def run(place, monkeypatch):
    """Run a script's main up to where it would load the model: run(script, config, arguments, flags of accelerate).

    The config is a strategy or a .yaml; without one the script is started with python alone.
    """
    monkeypatch.chdir(place)
    for library in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{library}.HF_HUB_OFFLINE", True)
    for name in [
        name for name in os.environ if name.startswith(("ACCELERATE_", "RANK", "WORLD_SIZE", "HF_"))
    ]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(place / "extensions"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", place / "cache")
    datasets.disable_progress_bars()  # as start_accelerator does

    def run(script, config, arguments, flags=()):
        if config:
            config = (
                config if config.endswith(".yaml") else str(ROOT / "configs" / f"{config}.yaml")
            )
            for name, value in launcher_variables(config, flags, monkeypatch).items():
                monkeypatch.setenv(name, value)
        spec = importlib.util.spec_from_file_location(script, ROOT / "examples" / f"{script}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, script, module)
        spec.loader.exec_module(module)
        processes = int(os.environ.get("WORLD_SIZE", 1))
        accelerator = SimpleNamespace(
            num_processes=processes,
            process_index=0,
            mixed_precision="no",
            local_main_process_first=contextlib.nullcontext,
            deepspeed_plugin=SimpleNamespace(deepspeed_config={"zero_optimization": {}}),
        )
        monkeypatch.setattr(module, "start_accelerator", lambda **kwargs: accelerator)
        monkeypatch.setattr(module, "MemoryTracker", Mock(side_effect=Accepted))
        monkeypatch.setattr(
            checks, "launch_config", lambda: Path(config).read_text() if config else ""
        )
        monkeypatch.setattr(sys, "argv", [f"examples/{script}.py", *map(str, arguments)])
        module.main()

    return run


GOOD = "--model_name_or_path llama --dataset_name data/good.csv --output_dir new "


def refusal(run, capfd, *case):
    """Return the one line that a refused case prints."""
    with pytest.raises(SystemExit) as exit:
        run(*case)
    output, errors = capfd.readouterr()
    assert (exit.value.code, output) == (1, "")
    assert errors.startswith("error: ") and errors.count("\n") == 1
    return errors


# What is refused ----------------------------------------------------------------------------------

ARGUMENTS = [  # flags; what the line must say, culprit first
    ("--learning_rat 0.1", "--learning_rat 0.1 is no flag", "--help"),
    ("stray", "stray is no flag", "--help"),
    ("--lora_r eight", "--lora_r", "invalid int value: 'eight'", "--help"),
    ("--lora_r", "--lora_r", "expected one argument", "--help"),
    (
        "--gradient_accumulation_steps 1.5",
        "--gradient_accumulation_steps",
        "invalid int value: '1.5'",
    ),
    ("--gradient_checkpointing maybe", "--gradient_checkpointing", "got maybe", "true/false"),
    ("--per_device_train_batch_size 0", "--per_device_train_batch_size is 0", "above 0"),
    ("--per_device_eval_batch_size -1", "--per_device_eval_batch_size is -1", "above 0"),
    ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps is 0", "above 0"),
    ("--max_length 0", "--max_length is 0", "above 0"),
    ("--num_train_epochs -1", "--num_train_epochs is -1", "above 0"),
    ("--num_train_epochs inf", "--num_train_epochs is inf", "above 0"),
    ("--learning_rate 0", "--learning_rate is 0", "above 0"),
    ("--learning_rate nan", "--learning_rate is nan", "above 0"),
    ("--max_steps 0", "--max_steps is 0", "or -1"),
    ("--warmup_ratio 1", "--warmup_ratio is 1", "below 1"),
    ("--weight_decay -0.1", "--weight_decay is -0.1", "from 0"),
    ("--max_grad_norm -1", "--max_grad_norm is -1", "from 0"),
    ("--seed -1", "--seed is -1", "from 0"),
    ("--seed 4294967296", "--seed is 4294967296", "below 4294967296"),
    ("--lora_r 0", "--lora_r is 0", "above 0"),
    ("--lora_alpha -8", "--lora_alpha is -8", "above 0"),
    ("--lora_dropout 1.0", "--lora_dropout is 1.0", "below 1"),
    ("--lr_scheduler_type cosin", "--lr_scheduler_type is 'cosin'", "cosine, linear"),
    ("--dtype fp32", "--dtype is 'fp32'", "float32, bfloat16"),
    ("--prompt_template 'Label :'", "--prompt_template is 'Label :'", "must hold {text} once"),
    ("--text_column Label", "--text_column and --label_column are both 'Label'"),
    ("--text_column tweet", "--text_column 'tweet'", "the columns are 'Tweet text', 'Label'"),
    ("--label_column label", "--label_column 'label'", "the columns are 'Tweet text', 'Label'"),
    ("--dataset_name data/nothing.csv", "data/nothing.csv is not there", "check the path"),
    ("--dataset_name /data/nothing", "/data/nothing' is no file", "check the path"),
    ("--dataset_name nobody/nothing", "--dataset_name", "nobody/nothing", "Offline"),
    ("--dataset_name data/empty.csv", "data/empty.csv is empty", "give a file with rows"),
    ("--dataset_name data/header.csv", "data/header.csv has no rows", "give a file with rows"),
    (
        "--dataset_name data/no_label.csv",
        "row 7 of train has no label in column 'Label'",
        "fill it",
    ),
    ("--dataset_name data/null.jsonl", "row 4 of train has no label in column 'Label'", "fill it"),
    ("--dataset_name data/one_label.csv", "column 'Label' holds one value", "nothing to learn"),
    ("--dataset_name data/spaces.csv", "reads label 'yes", "as it does another", "rename it"),
    (
        "--dataset_name data/two_rows.csv",
        "data/two_rows.csv leaves 1 row(s) for train",
        "give more rows",
    ),
    (
        "--dataset_name data/one_text.csv",
        "data/one_text.csv leaves 0 row(s) for train",
        "give more rows",
    ),
    ("--dataset_name data/broken.json", "data/broken.json cannot be read", "mend it"),
    ("--dataset_name data/broken.jsonl", "data/broken.jsonl: row 4 is no JSON", "mend it"),
    (
        "--dataset_name data/ragged.csv",
        "data/ragged.csv cannot be read",
        "row 21 has 3 cells for 2 columns",
        "quotes",
    ),
    ("--dataset_name data/latin1.csv", "data/latin1.csv cannot be read", "convert it", "utf-8"),
    (
        "--dataset_name data/rows.parquet",
        "data/rows.parquet is no .csv, .json, .jsonl",
        "convert it",
    ),
    (
        "--dataset_name data/only_test",
        "data/only_test holds no train.csv",
        "name a file, or add one",
    ),
    ("--dataset_name data/mixed", "data/mixed mixes formats", "train.csv, validation.jsonl"),
    ("--model_name_or_path data", "data holds no config.json", "give the folder of a model"),
    ("--model_name_or_path a_file", "a_file is no folder", "check the path"),
    ("--model_name_or_path ./nothing", "./nothing is no folder", "check the path"),
    ("--model_name_or_path nobody/nothing", "nobody/nothing cannot be read", "check the path"),
    (
        "--model_name_or_path broken_config",
        "broken_config cannot be read",
        "config.json' is not a valid JSON",
    ),
    (
        "--model_name_or_path no_config",
        "no_config holds no config.json",
        "give the folder of a model",
    ),
    (
        "--model_name_or_path no_weights",
        "no_weights holds no model.safetensors",
        "save the model again",
    ),
    (
        "--model_name_or_path truncated",
        "model.safetensors is no whole safetensors file",
        "save or download",
    ),
    ("--model_name_or_path shard_missing", "holds no model-00002-of-", "save the model again"),
    (
        "--model_name_or_path no_tokenizer",
        "no_tokenizer has no usable tokenizer",
        "save one with it",
    ),
    ("--model_name_or_path no_eos", "no_eos has a tokenizer without eos_token", "set one"),
    (
        "--model_name_or_path t5",
        "t5 is not a causal language model",
        "take another model or script",
    ),
    ("--max_length 513", "--max_length 513", "512 positions", "give 512 or less"),
    ("--max_length 9", "--max_length 9 has no room for text", "or more"),
    (
        "--target_modules q_proj query",
        "--target_modules query names no linear layer",
        "q_proj, up_proj",
    ),
    (
        "--target_modules input_layernorm",
        "--target_modules input_layernorm names no linear layer",
        "q_proj",
    ),
    ("--target_modules self_attn", "--target_modules self_attn names no linear layer", "q_proj"),
    ("--attn_implementation flash", "--attn_implementation flash", "cannot be made"),
    (
        "--target_modules embed_tokens",
        "--target_modules embed_tokens names no linear layer",
        "q_proj",
    ),
    ("--model_name_or_path other_weights", "no weight of a LlamaForCausalLM", "save them together"),
    ("--model_name_or_path other_shapes", "model.safetensors holds", "and config.json says"),
    ("--model_name_or_path added_pad", "its tokenizer uses token", "resize_token_embeddings"),
    ("--model_name_or_path added_token", "its tokenizer uses token", "resize_token_embeddings"),
    (f"--model_name_or_path {300 * 'm'}", "File name too long"),
    (f"--dataset_name {300 * 'd'}", "File name too long"),
    ("--dataset_name data/twice", "train.csv and train.jsonl", "keep one of them"),
    (
        "--dataset_name data/list_text.jsonl",
        "--text_column 'Tweet text' holds List",
        "choose another column",
    ),
    ("--dataset_name data/list_label.jsonl", "row 1 of train has a list as its label", "give text"),
    (f"--output_dir {300 * 'o'}", "File name too long"),
    (f"--output_dir {252 * 'o'}", "File name too long", "choose another"),
    ("--hub_model_id 'bad id/with space/x'", "--hub_model_id", "Repo id"),
    ("--output_dir earlier", "--output_dir earlier exists", "add --overwrite_output_dir"),
    ("--output_dir a_file", "--output_dir a_file is a file", "choose another"),
    ("--output_dir a_file/under", "--output_dir a_file/under cannot be made", "choose another"),
    ("--output_dir /proc/new", "--output_dir /proc/new cannot be made", "choose another"),
    (
        "--output_dir corrupt --overwrite_output_dir",
        "--output_dir corrupt holds no metrics.json",
        "choose another",
    ),
    (
        "--output_dir foreign --overwrite_output_dir",
        "--output_dir foreign holds no metrics.json",
        "choose another",
    ),
]


@pytest.mark.parametrize(
    "words, fragments", [(case[0], case[1:]) for case in ARGUMENTS], ids=[c[0] for c in ARGUMENTS]
)
def test_bad_arguments_are_refused(run, capfd, words, fragments):
    line = refusal(run, capfd, "causal_lm_lora", "ddp", shlex.split(GOOD + words))
    assert [part for part in fragments if part not in line] == [], line


def test_a_sequence_to_sequence_script_refuses_a_causal_model_and_labels_it_cannot_tell_apart(
    run, capfd
):
    line = refusal(run, capfd, "seq2seq_lora", "ddp", shlex.split(GOOD))
    assert "llama is not a sequence-to-sequence model, which this script trains" in line
    words = "--model_name_or_path t5 --dataset_name data/emoji.csv"  # its tokenizer reads either emoji as unknown
    line = refusal(run, capfd, "seq2seq_lora", "ddp", shlex.split(GOOD + words))
    assert "the tokenizer reads label '" in line and "rename it" in line


OFFLOAD = "causal_lm_lora_zero3_offload"
MODEL, STORAGE = "--model_name_or_path", "--bnb_4bit_quant_storage"
LAUNCHES = [  # script, config, flags of accelerate, flags of the script; what the line must say
    (OFFLOAD, "zero2", "", "", "runs with zero3, and was launched with zero2", "--config_file"),
    (OFFLOAD, "ddp", "", "", "runs with zero3, and was launched with ddp", "--config_file"),
    (OFFLOAD, "single", "", "", "runs with zero3, and was launched with single", "--config_file"),
    (
        OFFLOAD,
        None,
        "",
        "",
        "runs with zero3, and was launched with single",
        "`accelerate launch --config_file",
    ),
    (
        OFFLOAD,
        "stage2.yaml",
        "",
        "",
        "runs with zero3, and was launched with zero2",
        "--config_file",
    ),
    (
        "causal_lm_full",
        "zero3",
        "",
        "",
        "runs with single, ddp, zero1, zero2, and was launched with zero3",
    ),
    (
        "causal_lm_lora",
        "fsdp2",
        "",
        "",
        "runs with single, ddp, zero1, zero2, and was launched with fsdp2",
    ),
    (OFFLOAD, "fsdp1", "", "", "runs with zero3, and was launched with fsdp1", "--config_file"),
    (
        "causal_lm_lora_fsdp1",
        "zero3",
        "",
        "",
        "runs with fsdp1, and was launched with zero3",
        "--config_file",
    ),
    (
        "causal_lm_lora_fsdp1",
        "fsdp2",
        "",
        "",
        "runs with fsdp1, and was launched with fsdp2",
        "--config_file",
    ),
    (
        "causal_lm_lora_fsdp2",
        "fsdp1",
        "",
        "",
        "runs with fsdp2, and was launched with fsdp1",
        "--config_file",
    ),
    (
        "causal_lm_lora_fsdp1",
        "orig_params.yaml",
        "",
        "",
        "fsdp_use_orig_params is true",
        "set it to false",
    ),
    (
        "causal_lm_lora_fsdp1",
        "no_orig_params.yaml",
        "",
        "",
        "fsdp_use_orig_params is true",
        "set it to false",
    ),
    (
        "causal_lm_lora_fsdp1",
        "wrap_class.yaml",
        "",
        "",
        "llama has no NoLayer",
        "LlamaDecoderLayer",
    ),
    (
        "causal_lm_lora_fsdp2",
        "no_wrap.yaml",
        "",
        "",
        "policy NO_WRAP does not gather layer by layer",
        "TRANSFORMER_BASED_WRAP",
    ),
    (
        "causal_lm_lora_fsdp1",
        "hybrid.yaml",
        "",
        "",
        "fsdp_sharding_strategy HYBRID_SHARD",
        "configs/fsdp2_hybrid.yaml",
    ),
    (
        "causal_lm_lora_fsdp1",
        "no_shard.yaml",
        "",
        "",
        "fsdp_sharding_strategy NO_SHARD",
        "set FULL_SHARD",
    ),
    (
        "seq2seq_lora_fsdp1",
        "fsdp1",
        "",
        f"{MODEL} t5 --dtype float16",
        "in float32 beside --dtype float16",
        "bfloat16",
    ),
    (
        "causal_lm_lora_fsdp2",
        "fsdp2",
        "",
        "--dtype bfloat16 --modules_to_save input_layernorm",
        "--modules_to_save input_layernorm",
        "give --dtype float32",
        "embed_tokens lm_head",
    ),
    (
        "causal_lm_lora_fsdp1",
        "fsdp1",
        "--num_processes 1",
        "",
        "one process shards nothing",
        "--num_processes",
    ),
    (
        "causal_lm_lora_fsdp2",
        "fsdp2",
        "--num_processes 1",
        "",
        "one process shards nothing",
        "--num_processes",
    ),
    (
        "causal_lm_lora_fsdp1",
        "fsdp1",
        "--mixed_precision fp16",
        "",
        "fp16 needs a GPU",
        "--mixed_precision bf16",
    ),
    (
        "causal_lm_qlora",
        "zero3_qlora",
        "",
        "",
        "runs with single, ddp, zero1, zero2, and was launched with zero3",
    ),
    (
        "causal_lm_qlora_zero3",
        "zero2",
        "",
        "",
        "runs with zero3, and was launched with zero2",
        "--config_file",
    ),
    (
        "causal_lm_qlora_fsdp1",
        "fsdp2_qlora",
        "",
        "",
        "runs with fsdp1, and was launched with fsdp2",
        "--config_file",
    ),
    (
        "causal_lm_qlora_fsdp2",
        "fsdp2_qlora",
        "--num_processes 1",
        "",
        "one process shards nothing",
        "--num_processes",
    ),
    (
        "causal_lm_qlora_fsdp1",
        "fsdp1_qlora",
        "",
        f"{STORAGE} bfloat16",
        STORAGE,
        "--dtype float32",
        "make them the same",
    ),
    (
        "causal_lm_qlora_fsdp1",
        "fsdp1_qlora",
        "",
        "--dtype bfloat16 " + STORAGE + " float32",
        "make them the same",
    ),
    (
        "causal_lm_qlora_fsdp2",
        "fsdp2_qlora",
        "",
        f"{STORAGE} uint8",
        STORAGE,
        "fsdp2 shards",
        "make them the same",
    ),
    (
        "causal_lm_qlora",
        "ddp",
        "",
        f"{STORAGE} int4",
        f"{STORAGE} is 'int4'",
        "choose one of uint8, float32",
    ),
    (
        "causal_lm_qlora",
        "ddp",
        "",
        "--optim adamw",
        "--optim is 'adamw'",
        "choose one of adamw_torch, adamw_8bit",
    ),
    (
        "causal_lm_qlora",
        "zero2_offload",
        "",
        "--optim adamw_8bit",
        "cannot be offloaded",
        "give --optim adamw_torch",
    ),
    (
        "causal_lm_qlora_fsdp1",
        "fsdp1_qlora",
        "",
        "--optim paged_adamw_8bit",
        "only one slice",
        "give adamw_torch",
    ),
    (
        "causal_lm_qlora_fsdp2",
        "fsdp2_qlora",
        "",
        "--optim adamw_8bit",
        "DTensors of fsdp2",
        "give adamw_torch",
    ),
    (
        "causal_lm_qlora",
        "zero2",
        "--mixed_precision bf16",
        "",
        "would cast and so destroy",
        "--dtype bfloat16",
    ),
    (
        "causal_lm_qlora_zero3",
        "zero3_qlora",
        "--mixed_precision bf16",
        "",
        "would cast",
        "--dtype bfloat16",
    ),
    (
        "causal_lm_qlora_fsdp1",
        "fsdp1_qlora",
        "--mixed_precision bf16",
        "",
        "would cast",
        "--dtype bfloat16",
    ),
    (
        "causal_lm_qlora_fsdp2",
        "fsdp2_qlora",
        "--mixed_precision bf16",
        "",
        "would cast",
        "--dtype bfloat16",
    ),
    (
        OFFLOAD,
        "zero3",
        "",
        f"{MODEL} in_8bit",
        "8-bit weights",
        "whatever zero3",
        "causal_lm_qlora_zero3.py",
    ),
    (
        "causal_lm_lora_fsdp2",
        "fsdp2",
        "",
        f"{MODEL} in_8bit",
        "8-bit weights",
        "causal_lm_qlora_fsdp2.py",
    ),
    (
        "causal_lm_qlora",
        "ddp",
        "",
        f"{MODEL} in_8bit",
        "8-bit weights already",
        "causal_lm_lora.py",
    ),
    (
        "causal_lm_full",
        "ddp",
        "",
        f"{MODEL} in_8bit",
        "quantized weights, which cannot be trained",
        "with LoRA",
    ),
    (OFFLOAD, "zero3", "", f"{MODEL} in_4bit", "4-bit weights", "take causal_lm_qlora_zero3.py"),
    (
        "causal_lm_lora_fsdp1",
        "fsdp1",
        "",
        f"{MODEL} in_4bit_float",
        "4-bit weights",
        "take causal_lm_qlora_fsdp1.py",
    ),
    (
        "causal_lm_qlora_fsdp1",
        "fsdp1_qlora",
        "",
        f"{MODEL} in_4bit",
        "in_4bit: its",
        "is uint8",
        "make them the same",
    ),
    ("causal_lm_lora", "ddp", "", f"{MODEL} in_gptq", "quantized by gptq", "take the original"),
    (
        "causal_lm_lora",
        "ddp",
        "--dynamo_backend inductor",
        "",
        "--dynamo_backend INDUCTOR",
        "drop it",
    ),
    (OFFLOAD, "use_cpu.yaml", "", "", "use_cpu: true", "set it to false"),
    (
        "causal_lm_lora",
        "ddp",
        "--mixed_precision fp16",
        "",
        "fp16 needs a GPU",
        "--mixed_precision bf16",
    ),
    (OFFLOAD, "zero3", "--mixed_precision fp16", "", "fp16 needs a GPU", "--mixed_precision bf16"),
    (OFFLOAD, "fp16.yaml", "", "", "fp16 needs a GPU", "--mixed_precision bf16"),
    (
        "causal_lm_full",
        "ddp",
        "",
        "--dtype bfloat16",
        "--dtype bfloat16",
        "launch with --mixed_precision",
    ),
    (
        OFFLOAD,
        "zero3",
        "",
        "--dtype bfloat16",
        "--dtype bfloat16 under DeepSpeed",
        "--mixed_precision`: bf16",
    ),
]


@pytest.mark.parametrize(
    "script, config, flags, words, fragments", [(*case[:4], case[4:]) for case in LAUNCHES]
)
def test_launches_that_do_not_fit_are_refused(run, capfd, script, config, flags, words, fragments):
    if "fp16" in f"{config} {flags}" and torch.cuda.is_available():
        pytest.skip("fp16 is for a GPU")
    line = refusal(run, capfd, script, config, shlex.split(GOOD + words), flags.split())
    assert [part for part in fragments if part not in line] == [], line


@pytest.mark.parametrize(
    "script, config, model",
    [
        ("causal_lm_lora", "ddp", "in_8bit"),
        ("causal_lm_lora", "zero2", "in_4bit"),
        ("causal_lm_qlora_zero3", "zero3_qlora", "in_4bit"),
        ("causal_lm_qlora_fsdp2", "fsdp2_qlora", "in_4bit_float"),
    ],
)
def test_quantized_checkpoints_are_accepted_where_they_can_be_trained_beside(
    run, script, config, model
):
    with pytest.raises(Accepted):
        run(script, config, shlex.split(f"{GOOD} {MODEL} {model}"))


def test_without_bitsandbytes_a_script_that_needs_it_says_so(run, capfd, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    line = refusal(run, capfd, "causal_lm_qlora", "ddp", shlex.split(GOOD))
    assert "bitsandbytes, which is not installed: pip install bitsandbytes" in line
    with pytest.raises(Accepted):
        run("causal_lm_lora", "ddp", shlex.split(GOOD))


def test_a_lock_that_a_killed_compilation_left_is_refused_and_one_held_open_is_not(
    run, capfd, place
):
    lock = place / "extensions/cpu_adam/lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w"), pytest.raises(Accepted):
        run(OFFLOAD, "zero3_offload", shlex.split(GOOD))
    line = refusal(run, capfd, OFFLOAD, "zero3_offload", shlex.split(GOOD))
    assert str(lock) in line and "delete that file" in line
    lock.unlink()


@pytest.mark.parametrize("flag", ["--model_name_or_path", "--dataset_name"])
def test_a_hub_that_does_not_answer_is_refused_at_once(run, capfd, monkeypatch, flag):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    line = refusal(
        run, capfd, "causal_lm_lora", "ddp", shlex.split(f"{GOOD} {flag} nobody/nothing")
    )
    assert (
        f"{flag} nobody/nothing is not here, and the Hub cannot be reached" in line
        and "HF_HUB_OFFLINE=1" in line
    )


@pytest.mark.parametrize(
    "scheme", ["http", "https"]
)  # the server speaks no TLS: a certificate is not our concern
def test_a_hub_that_answers_whatever_it_says_is_not_refused(monkeypatch, scheme):
    server = http.server.HTTPServer(
        ("127.0.0.1", 0), http.server.BaseHTTPRequestHandler
    )  # 501 to all
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", f"{scheme}://127.0.0.1:{server.server_port}")
    checks.check_hub("nobody/nothing")
    server.shutdown()


@pytest.fixture
def refuse_as(monkeypatch, capfd):
    """Return a function that calls `refuse` with RANK set and returns what it prints."""

    def refuse_as(rank):
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(SystemExit) as ended:
            checks.refuse("what is wrong: what to do")
        assert ended.value.code == 1
        return capfd.readouterr().err

    return refuse_as


LINE = "error: what is wrong: what to do\n"


def test_the_process_that_comes_first_refuses_for_all(monkeypatch, refuse_as):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torch's launcher
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    assert [refuse_as(rank) for rank in (1, 0, 2)] == [LINE, "", ""]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert [refuse_as(rank) for rank in (0, 1)] == [LINE, ""]


def test_without_a_store_the_others_leave_the_first_process_time(monkeypatch, capfd, refuse_as):
    waits = []
    monkeypatch.setattr(checks.time, "sleep", lambda s: waits.append((s, capfd.readouterr().err)))
    assert (refuse_as(0), waits) == (LINE, [])
    assert (refuse_as(1), waits) == (LINE, [(60, "")])


# What is accepted ---------------------------------------------------------------------------------
@pytest.mark.parametrize("script", SCRIPTS)
def test_defaults_of_every_script_are_accepted_with_its_own_config(
    run, monkeypatch, tmp_path, script
):
    config = re.search(
        r"--config_file configs/(\w+)\.yaml", (ROOT / "examples" / f"{script}.py").read_text()
    )[1]
    monkeypatch.chdir(ROOT)
    with pytest.raises(Accepted):
        checkpoints = (
            ["--checkpoint_dir", tmp_path / "checkpoints"] if script.endswith("_resume") else []
        )
        run(script, config, ["--output_dir", tmp_path / "new", *checkpoints])


@pytest.mark.parametrize("guide", GUIDES)
def test_launch_configs_of_the_guides_are_accepted(run, place, guide):
    script, flags, config = GUIDES[guide]
    (place / f"{guide}.yaml").write_text(json.dumps(config))
    model = ["--model_name_or_path", "t5"] if script.startswith("seq2seq") else []
    with pytest.raises(Accepted):
        run(script, f"{guide}.yaml", [*shlex.split(GOOD), *flags, *model])


ACCEPTED = [
    "--max_grad_norm 0",
    "--warmup_ratio 0 --weight_decay 0 --max_steps 1",
    "--output_dir earlier --overwrite_output_dir",
    "--output_dir empty --overwrite_output_dir",
    "--output_dir several/new/folders",
    "--dataset_name data",
    "--dataset_name data.v2",
    "--dataset_name data/good.json",
    "--dataset_name data/good.jsonl",
    "--dataset_name data/2_labels.csv",
    "--dataset_name data/77_labels.csv",
    "--dataset_name data/seldom.csv",
    "--target_modules q_proj lm_head model.layers.1.mlp.up_proj",
    "--dtype bfloat16",
    "--attn_implementation eager",
]


@pytest.mark.parametrize("words", ACCEPTED)
def test_good_arguments_are_accepted(run, words):
    with pytest.raises(Accepted):
        run("causal_lm_lora", "ddp", shlex.split(GOOD + words))


@pytest.mark.parametrize(
    "script, config, flags, words",
    [
        ("causal_lm_lora", None, "", ""),
        ("causal_lm_lora", "single", "", ""),
        ("causal_lm_lora", "zero1", "", ""),
        ("causal_lm_lora", "zero2_offload", "", ""),
        ("causal_lm_full", "ddp", "--mixed_precision bf16", ""),
        ("causal_lm_full_zero3", "zero3", "--mixed_precision bf16", "--dtype bfloat16"),
        ("causal_lm_full_zero3", "stage3.yaml", "", ""),
    ],
)
def test_launches_that_fit_are_accepted(run, script, config, flags, words):
    with pytest.raises(Accepted):
        run(script, config, shlex.split(GOOD + words), flags.split())


# The real launcher --------------------------------------------------------------------------------
ZERO3 = (OFFLOAD, "zero3_offload")
LAUNCHED = [  # whether the launch is a real one, script, config, flags; what the one line must say
    (True, *ZERO3, "--learning_rat 0.1", "--learning_rat 0.1 is no flag"),
    (False, *ZERO3, "--lora_r 0", "--lora_r is 0"),
    (True, *ZERO3, "--dataset_name data/nothing.csv", "data/nothing.csv is not there"),
    (False, *ZERO3, "--label_column label", "the columns are 'Tweet text', 'Label'"),
    (True, *ZERO3, f"{MODEL} nobody/nothing", "the Hub cannot be reached"),
    (True, OFFLOAD, "use_cpu.yaml", "", "use_cpu: true"),
    (False, OFFLOAD, "ddp", "", "was launched with ddp"),
    (False, "causal_lm_lora", "ddp", f"{MODEL} data", "data holds no config.json"),
]
LAUNCHED_IDS = ["-".join(map(str, case[1:])) for case in LAUNCHED]


@pytest.mark.parametrize("real, script, config, words, fragment", LAUNCHED, ids=LAUNCHED_IDS)
def test_a_launch_of_two_processes_ends_with_one_line(
    launch,
    place,
    tmp_path,
    real,
    script,
    config,
    words,
    fragment,
):
    arguments = [*shlex.split(GOOD + words), "--output_dir", tmp_path / "new"]
    no_network = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    config = place / config if config.endswith(".yaml") else config
    variables = no_network if real else {}
    options = {"processes": 2, "code": None, "cwd": place, "real": real, **variables}
    done = launch(script, config, *arguments, **options)
    assert done.returncode != 0
    (line,) = re.findall("^error: .*", done.stdout, re.MULTILINE)
    assert fragment in line
    assert "Traceback" not in done.stdout.partition("torch/distributed/elastic")[0], done.stdout
    assert running(tmp_path) == {}
    assert list(tmp_path.iterdir()) == []


# Process 0 is late, and process 1 takes long to end after it has refused.
LATE = """
import atexit, os, time
time.sleep({seconds} if os.environ["RANK"] == "0" else 0)
atexit.register(time.sleep, 2 * {seconds})
"""


@pytest.mark.parametrize("seconds", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_the_line_is_printed_once_though_a_process_is_late(launch, place, tmp_path, seconds):
    late = LATE.format(seconds=seconds)
    copy = plant(tmp_path, "causal_lm_lora", ("\nimport math\n", f"\nimport math\n{late}"))
    done = launch(copy, "ddp", *shlex.split(GOOD), "--lora_r", 0, processes=2, code=None, cwd=place)
    assert done.returncode == 1
    line = "error: --lora_r is 0: give a number above 0"
    assert re.findall("^error: .*", done.stdout, re.MULTILINE) == [line]
