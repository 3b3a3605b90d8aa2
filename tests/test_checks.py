"""Bad settings and bad input stop a run with one `error:` line before a model is loaded.

The line names the culprit and the remedy. For the cases of the tables, the tests call a script's
`main` in this process, with the environment variables that the launcher sets, up to the point where
the model would be loaded. A sample of cases runs through the real launcher.
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
import yaml
from accelerate.commands import launch as accelerate_launch
from accelerate.utils import launch as launchers
from conftest import ROOT, write_csv
from guides import GUIDES
from models import make_data, make_model, make_rows
from processes import plant, running
from torch.distributed import TCPStore
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from utils import deepspeed_checks, errors, model_files

SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
SCRIPTS = [path.stem for path in SCRIPTS if "backward(" in path.read_text()]  # that train
FULL, FULL_ZERO3 = "causal_lm_full", "causal_lm_full_zero3"
LORA, OFFLOAD = "causal_lm_lora", "causal_lm_lora_zero3_offload"
LORA_FSDP1, LORA_FSDP2 = "causal_lm_lora_fsdp1", "causal_lm_lora_fsdp2"
QLORA, QLORA_ZERO3 = "causal_lm_qlora", "causal_lm_qlora_zero3"
QLORA_FSDP1, QLORA_FSDP2 = "causal_lm_qlora_fsdp1", "causal_lm_qlora_fsdp2"
SEQ2SEQ, SEQ2SEQ_FSDP1 = "seq2seq_lora", "seq2seq_lora_fsdp1"
WRAP, SHARDING = "TRANSFORMER_BASED_WRAP", "fsdp_sharding_strategy"
BITSANDBYTES = {"quant_method": "bitsandbytes"}
QUANTIZED = {  # folder -> quantization_config
    "in_8bit": BITSANDBYTES | {"load_in_8bit": True},
    "in_4bit": BITSANDBYTES | {"load_in_4bit": True},  # stored as uint8, the default
    "in_4bit_float": BITSANDBYTES | {"load_in_4bit": True, "bnb_4bit_quant_storage": "float32"},
    "in_gptq": {"quant_method": "gptq", "bits": 4},
}


class Accepted(Exception):
    """Raised instead of loading the model: every check has passed."""


# The files of the cases, relative to the working directory ----------------------------------------
@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with valid and invalid models, data, launch configs and output folders."""
    place = tmp_path_factory.mktemp("place")
    make_model(place / "llama", "llama")
    make_model(place / "t5", "t5")
    for name in ("no_config", "broken_config", "no_weights", "truncated", "no_tokenizer", "no_eos"):
        shutil.copytree(place / "llama", place / name)
    (place / "no_config/config.json").unlink()
    (place / "broken_config/config.json").write_text("{")
    (place / "no_weights/model.safetensors").rename(place / "no_weights/pytorch_model.bin")
    shutil.copytree(place / "llama", place / "config_only", ignore=lambda *_: ["model.safetensors"])
    whole = (place / "llama/model.safetensors").read_bytes()
    (place / "truncated/model.safetensors").write_bytes(whole[:-100])
    for name in ("no_tokenizer", "no_eos"):
        (place / name / "tokenizer_config.json").unlink()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(place / "llama/tokenizer.json"))
    tokenizer.save_pretrained(place / "no_eos")
    (place / "no_tokenizer/tokenizer.json").unlink()
    shutil.copytree(place / "llama", place / "shard_missing")
    (place / "shard_missing/model.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(place / "llama")
    model.save_pretrained(place / "shard_missing", max_shard_size="50KB")
    sorted((place / "shard_missing").glob("model-*.safetensors"))[1].unlink()

    for name in ("other_weights", "other_shapes", "added_pad", "added_token"):
        shutil.copytree(place / "llama", place / name)
    tokenizer = AutoTokenizer.from_pretrained(place / "llama")
    tokenizer.add_tokens(["<sigh>"])
    tokenizer.save_pretrained(place / "added_token")
    shutil.copy(place / "t5/model.safetensors", place / "other_weights")
    config = json.loads((place / "llama/config.json").read_text())
    (place / "other_shapes/config.json").write_text(json.dumps(config | {"intermediate_size": 24}))
    for name, quantization in QUANTIZED.items():  # the checks read config.json, not the weights
        shutil.copytree(place / "llama", place / name)
        quantized = config | {"quantization_config": quantization}
        (place / name / "config.json").write_text(json.dumps(quantized))
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
        labelled = [(f"text, {number} 🙂", label) for number, label in enumerate(labels)]
        write_csv(data / f"{count}_labels.csv", labelled)
    write_csv(data / "no_label.csv", [*rows[:6], (text, " "), *rows])
    write_csv(data / "one_label.csv", [(text, label) for text, _ in rows])
    write_csv(data / "two_rows.csv", rows[:2])
    write_csv(data / "one_text.csv", [(text, label) for _, label in rows])
    write_csv(data / "header.csv", [])
    write_csv(data / "ragged.csv", [*rows, (text, label, "one cell too many"), *rows])
    for name, labels in (("emoji", "🙂🙁"), ("spaces", ("yes", "yes "))):
        labelled = [(text, labels[number % 2]) for number, (text, _) in enumerate(rows)]
        write_csv(data / f"{name}.csv", labelled)
    (data / "empty.csv").touch()
    (data / "rows.parquet").touch()
    (data / "latin1.csv").write_bytes("Tweet text,Label\ncafé,yes\nthé,no\n".encode("latin-1"))
    lines = [json.dumps({"Tweet text": text, "Label": label}) for text, label in rows]
    (data / "good.jsonl").write_text("\n".join(lines))
    (data / "good.json").write_text(f"[{', '.join(lines)}]")
    null = '{"Tweet text": "text", "Label": null}'
    (data / "null.jsonl").write_text("\n".join([*lines[:3], null, *lines]))
    for column in ("Tweet text", "Label"):
        lists = [json.dumps(json.loads(line) | {column: [line[-9:], "and"]}) for line in lines]
        (data / f"list_{column.split()[-1].lower()}.jsonl").write_text("\n".join(lists))
    (data / "broken.json").write_text(f"[{', '.join(lines)},")
    (data / "broken.jsonl").write_text("\n".join([*lines[:3], '{"Tweet text": "te', *lines]))
    folders = {"only_test": ["test.csv"], "mixed": ["train.csv", "validation.jsonl"]}
    folders |= {"twice": ["train.csv", "train.jsonl"]}
    for folder, files in folders.items():
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
    (place / "corrupt/metrics.json").write_text('{"accuracy": 0.5}')  # not written by a script

    zero3 = (ROOT / "configs/zero3.yaml").read_text()
    (place / "use_cpu.yaml").write_text(zero3.replace("use_cpu: false", "use_cpu: true"))
    base = {"compute_environment": "LOCAL_MACHINE", "num_processes": 2, "use_cpu": False}
    for name, old, new in (
        ("orig_params", "fsdp_use_orig_params: false", "fsdp_use_orig_params: true"),
        ("no_orig_params", "fsdp_use_orig_params: false", ""),
        ("hybrid", "FULL_SHARD", "HYBRID_SHARD"),
        ("no_shard", "FULL_SHARD", "NO_SHARD"),
        ("wrap_class", WRAP, f"{WRAP}\n  fsdp_transformer_layer_cls_to_wrap: NoLayer"),
    ):
        text = (ROOT / "configs/fsdp1.yaml").read_text()
        assert old in text
        (place / f"{name}.yaml").write_text(re.sub(f"{old}.*", new, text))
    no_wrap = (ROOT / "configs/fsdp2.yaml").read_text().replace(WRAP, "NO_WRAP")
    (place / "no_wrap.yaml").write_text(no_wrap)
    for name, stage in {"stage2": 2, "stage3": 3, "fp16": 3}.items():
        deepspeed = {"zero_optimization": {"stage": stage}, "fp16": {"enabled": name == "fp16"}}
        deepspeed |= {"train_micro_batch_size_per_gpu": "auto"}
        (place / f"{name}.json").write_text(json.dumps(deepspeed))
        launch = {"distributed_type": "DEEPSPEED"}
        launch |= {"deepspeed_config": {"deepspeed_config_file": f"{name}.json"}}
        (place / f"{name}.yaml").write_text(json.dumps(base | launch))
    return place


# How a case runs ----------------------------------------------------------------------------------
def launcher_variables(config, flags, monkeypatch):
    """Return the environment variables that `accelerate launch` sets for its first process."""
    variables = {}

    def several(args, prepare):
        environment = prepare(args)
        variables.update(environment if isinstance(environment, dict) else environment[1])
        processes = str(args.num_processes)
        variables.update(WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes, RANK="0", LOCAL_RANK="0")
        variables.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", TORCHELASTIC_RUN_ID="1")

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
    """Return a function that runs a script's `main` up to where it would load the model.

    In `run(script, config, arguments, flags)` the config is the name of a strategy, the path of a
    .yaml file, or None for a start with `python`; `flags` are flags of accelerate.
    """
    monkeypatch.chdir(place)
    for library in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{library}.HF_HUB_OFFLINE", True)
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "RANK", "WORLD_SIZE", "HF_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(place / "extensions"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", place / "cache")
    datasets.disable_progress_bars()  # as start_accelerator does

    def run(script, config, arguments, flags=()):
        if config:
            is_path = config.endswith(".yaml")
            config = config if is_path else str(ROOT / "configs" / f"{config}.yaml")
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
            print=print,
            mixed_precision="no",
            local_main_process_first=contextlib.nullcontext,
            deepspeed_plugin=SimpleNamespace(deepspeed_config={"zero_optimization": {}}),
        )
        start = "start_accelerator"
        monkeypatch.setattr(module.launch, start, lambda *args, **kwargs: accelerator)
        monkeypatch.setattr(module.memory, "MemoryTracker", Mock(side_effect=Accepted))
        content = yaml.safe_load(Path(config).read_text()) if config else {}
        monkeypatch.setattr(deepspeed_checks, "launch_config", lambda: content)
        monkeypatch.setattr(sys, "argv", [f"examples/{script}.py", *map(str, arguments)])
        module.main()

    return run


GOOD = "--model_name_or_path llama --dataset_name data/good.csv --output_dir new "


def refusal(run, capfd, *case):
    """Run a case that must be refused and return the only line that it prints."""
    with pytest.raises(SystemExit) as exit:
        run(*case)
    output, errors = capfd.readouterr()
    assert (exit.value.code, output) == (1, "")
    assert errors.startswith("error: ") and errors.count("\n") == 1
    return errors


# What is refused ----------------------------------------------------------------------------------
MODEL, DATA = "--model_name_or_path", "--dataset_name data"
OUTPUT, OVERWRITE = "--output_dir", "--overwrite_output_dir"
ACCUMULATION, TARGETS = "--gradient_accumulation_steps", "--target_modules"
ARGUMENTS = [  # (flags, expected parts of the line: the culprit, then the remedy)
    ("--learning_rat 0.1", "--learning_rat 0.1 is not a flag", "--help"),
    ("stray", "stray is not a flag", "--help"),
    ("--lora_r eight", "--lora_r", "invalid int value: 'eight'", "--help"),
    ("--lora_r", "--lora_r", "expected one argument", "--help"),
    (f"{ACCUMULATION} 1.5", ACCUMULATION, "invalid int value: '1.5'"),
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
    ("--weight_decay -0.1", "--weight_decay is -0.1", "at least 0"),
    ("--max_grad_norm -1", "--max_grad_norm is -1", "at least 0"),
    ("--seed -1", "--seed is -1", "at least 0"),
    ("--seed 4294967296", "--seed is 4294967296", "below 4294967296"),
    ("--lora_r 0", "--lora_r is 0", "above 0"),
    ("--lora_alpha -8", "--lora_alpha is -8", "above 0"),
    ("--lora_dropout 1.0", "--lora_dropout is 1.0", "below 1"),
    ("--lr_scheduler_type cosin", "--lr_scheduler_type is 'cosin'", "cosine, linear"),
    ("--dtype fp32", "--dtype is 'fp32'", "float32, bfloat16"),
    ("--prompt_template 'Label :'", "--prompt_template 'Label :'", "must have one {text}"),
    ("--text_column Label", "--text_column and --label_column are both 'Label'"),
    ("--text_column tweet", "--text_column 'tweet'", "the columns are 'Tweet text', 'Label'"),
    ("--label_column label", "--label_column 'label'", "the columns are 'Tweet text', 'Label'"),
    (f"{DATA}/nothing.csv", "data/nothing.csv does not exist", "check the path"),
    ("--dataset_name /data/nothing", "/data/nothing' is not a file, folder", "check the path"),
    ("--dataset_name nobody/nothing", "--dataset_name", "nobody/nothing", "Offline"),
    (f"{DATA}/empty.csv", "data/empty.csv is empty", "give a file with rows"),
    (f"{DATA}/header.csv", "data/header.csv has no rows", "give a file with rows"),
    (f"{DATA}/no_label.csv", "row 7 of train has no label in column 'Label'", "fill it"),
    (f"{DATA}/null.jsonl", "row 4 of train has no label in column 'Label'", "fill it"),
    (
        f"{DATA}/one_text.csv",
        "rows of --dataset_name data/one_text.csv are equal",
        "give rows that",
    ),
    (f"{DATA}/broken.json", "data/broken.json cannot be read", "fix or convert it"),
    (f"{DATA}/broken.jsonl", "data/broken.jsonl cannot be read", "row 4 is not JSON"),
    (
        f"{DATA}/ragged.csv",
        "data/ragged.csv cannot be read",
        "row 21 has 3 cells for 2 columns",
        "a quote may be missing",
    ),
    (f"{DATA}/latin1.csv", "data/latin1.csv cannot be read", "convert it", "utf-8"),
    (f"{DATA}/rows.parquet", "data/rows.parquet is not a .csv, .json, .jsonl", "convert or"),
    (f"{DATA}/only_test", "data/only_test holds no train.csv", "name a file, or add one"),
    (f"{MODEL} data", "data holds no config.json", "give the folder of a model"),
    (f"{MODEL} a_file", "a_file is neither a folder", "check the path"),
    (f"{MODEL} ./nothing", "./nothing is neither a folder", "check the path"),
    (f"{MODEL} nobody/nothing", "nobody/nothing cannot be read", "check the path"),
    (f"{MODEL} broken_config", "broken_config: config.json is not valid JSON", "save the model"),
    (f"{MODEL} no_config", "no_config holds no config.json", "give the folder of a model"),
    (f"{MODEL} no_weights", "no_weights holds no model.safetensors", "save the model again"),
    (
        f"{MODEL} config_only",
        "config_only holds config.json but no weights",
        "give a model",
        "'A new model'",
    ),
    (f"{MODEL} truncated", "model.safetensors is damaged or truncated", "download it again"),
    (f"{MODEL} shard_missing", "holds no model-00002-of-", "save the model again"),
    (f"{MODEL} no_tokenizer", "no_tokenizer has no usable tokenizer", "save one with it"),
    (f"{MODEL} no_eos", "no_eos has a tokenizer without eos_token", "set one"),
    (f"{MODEL} t5", "t5 is not a causal language model", "take another model or script"),
    ("--max_length 513", "--max_length 513", "512 positions", "give 512 or less"),
    ("--max_length 9", "--max_length 9 has no room for text", "or more"),
    (f"{TARGETS} q_proj query", f"{TARGETS} query names no linear layer", "q_proj, up_proj"),
    (f"{TARGETS} input_layernorm", f"{TARGETS} input_layernorm names no linear layer", "q_proj"),
    (f"{TARGETS} self_attn", f"{TARGETS} self_attn names no linear layer", "q_proj"),
    ("--attn_implementation flash", "has no attention flash", "give --attn_implementation sdpa"),
    (f"{TARGETS} embed_tokens", f"{TARGETS} embed_tokens names no linear layer", "q_proj"),
    (f"{MODEL} other_weights", "no weight of a LlamaForCausalLM", "save them together"),
    (f"{MODEL} other_shapes", "model.safetensors holds", "and config.json says"),
    (f"{MODEL} added_pad", "the tokenizer's pad_token '[PAD]'", "resize_token_embeddings"),
    (f"{MODEL} {300 * 'm'}", "File name too long"),
    (f"--dataset_name {300 * 'd'}", "File name too long"),
    (f"{DATA}/twice", "train.csv and train.jsonl", "keep one of them"),
    (f"{DATA}/list_text.jsonl", "--text_column 'Tweet text' holds List", "choose another column"),
    (f"{DATA}/list_label.jsonl", "--label_column 'Label' holds List", "choose another column"),
    (f"--output_dir {300 * 'o'}", "File name too long"),
    (f"--output_dir {252 * 'o'}", "File name too long", "choose another"),
    ("--hub_model_id 'bad id/with space/x'", "--hub_model_id", "Repo id"),
    ("--output_dir earlier", "--output_dir earlier exists", "add --overwrite_output_dir"),
    ("--output_dir a_file", "--output_dir a_file is a file", "choose another"),
    ("--output_dir a_file/under", "--output_dir a_file/under cannot be created", "choose another"),
    ("--output_dir /proc/new", "--output_dir /proc/new cannot be created", "choose another"),
    (f"{OUTPUT} corrupt {OVERWRITE}", f"{OUTPUT} corrupt holds no metrics.json", "choose another"),
    (f"{OUTPUT} foreign {OVERWRITE}", f"{OUTPUT} foreign holds no metrics.json", "choose another"),
]


@pytest.mark.parametrize(
    "words, fragments", [(case[0], case[1:]) for case in ARGUMENTS], ids=[c[0] for c in ARGUMENTS]
)
def test_bad_arguments_are_refused(run, capfd, words, fragments):
    line = refusal(run, capfd, LORA, "ddp", shlex.split(GOOD + words))
    assert [part for part in fragments if part not in line] == [], line


def test_a_sequence_to_sequence_script_refuses_a_causal_model_and_labels_it_cannot_tell_apart(
    run, capfd
):
    line = refusal(run, capfd, SEQ2SEQ, "ddp", shlex.split(GOOD))
    assert "llama is not a sequence-to-sequence model, which this script trains" in line
    words = f"{MODEL} t5 {DATA}/emoji.csv"  # the tokenizer maps both emojis to <unk>
    line = refusal(run, capfd, SEQ2SEQ, "ddp", shlex.split(GOOD + words))
    assert "becomes empty text after tokenizing" in line
    assert "rename" in line


T5, IN_8BIT, IN_4BIT = f"{MODEL} t5", f"{MODEL} in_8bit", f"{MODEL} in_4bit"
ADAM_8BIT, NORM = "--optim adamw_8bit", "--modules_to_save input_layernorm"
STORAGE = "--bnb_4bit_quant_storage"
FP16, BF16 = "--mixed_precision fp16", "--mixed_precision bf16"
FLOAT16, BFLOAT16 = "--dtype float16", "--dtype bfloat16"
REPLICATED = "single, ddp, zero1, zero2"
ONE_PROCESS = ("--num_processes 1", "", "one process shards nothing", "--num_processes")
NEEDS_GPU = ("fp16 needs a GPU", BF16)
SAME = "make them the same"


def mismatch(script, launch):
    """Return the message for a script that was launched with a strategy it does not support."""
    return f"runs with {script}, and was launched with {launch}"


# (script, config, flags of accelerate, flags of the script, expected parts of the line)
LAUNCHES = [
    (OFFLOAD, "zero2", "", "", mismatch("zero3", "zero2"), "--config_file"),
    (OFFLOAD, "ddp", "", "", mismatch("zero3", "ddp"), "--config_file"),
    (OFFLOAD, "single", "", "", mismatch("zero3", "single"), "--config_file"),
    (OFFLOAD, None, "", "", mismatch("zero3", "single"), "`accelerate launch --config_file"),
    (OFFLOAD, "stage2.yaml", "", "", mismatch("zero3", "zero2"), "--config_file"),
    (FULL, "zero3", "", "", mismatch(REPLICATED, "zero3")),
    (LORA, "fsdp2", "", "", mismatch(REPLICATED, "fsdp2")),
    (OFFLOAD, "fsdp1", "", "", mismatch("zero3", "fsdp1"), "--config_file"),
    (LORA_FSDP1, "zero3", "", "", mismatch("fsdp1", "zero3"), "--config_file"),
    (LORA_FSDP1, "fsdp2", "", "", mismatch("fsdp1", "fsdp2"), "--config_file"),
    (LORA_FSDP2, "fsdp1", "", "", mismatch("fsdp2", "fsdp1"), "--config_file"),
    (LORA_FSDP1, "orig_params.yaml", "", "", "fsdp_use_orig_params is true", "set it to false"),
    (LORA_FSDP1, "no_orig_params.yaml", "", "", "fsdp_use_orig_params is true", "set it to false"),
    (LORA_FSDP1, "wrap_class.yaml", "", "", "llama has no NoLayer", "LlamaDecoderLayer"),
    (LORA_FSDP2, "no_wrap.yaml", "", "", "policy NO_WRAP does not gather layer by layer", WRAP),
    (LORA_FSDP1, "hybrid.yaml", "", "", f"{SHARDING} HYBRID_SHARD", "configs/fsdp2_hybrid.yaml"),
    (LORA_FSDP1, "no_shard.yaml", "", "", f"{SHARDING} NO_SHARD", "set FULL_SHARD"),
    (SEQ2SEQ_FSDP1, "fsdp1", "", f"{T5} {FLOAT16}", f"in float32 beside {FLOAT16}", "bfloat16"),
    (
        LORA_FSDP2,
        "fsdp2",
        "",
        f"{BFLOAT16} {NORM}",
        NORM,
        "give --dtype float32",
        "embed_tokens lm_head",
    ),
    (LORA_FSDP1, "fsdp1", *ONE_PROCESS),
    (LORA_FSDP2, "fsdp2", *ONE_PROCESS),
    (LORA_FSDP1, "fsdp1", FP16, "", *NEEDS_GPU),
    (QLORA, "zero3_qlora", "", "", mismatch(REPLICATED, "zero3")),
    (QLORA_ZERO3, "zero2", "", "", mismatch("zero3", "zero2"), "--config_file"),
    (QLORA_FSDP1, "fsdp2_qlora", "", "", mismatch("fsdp1", "fsdp2"), "--config_file"),
    (QLORA_FSDP2, "fsdp2_qlora", *ONE_PROCESS),
    (QLORA_FSDP1, "fsdp1_qlora", "", f"{STORAGE} bfloat16", STORAGE, "--dtype float32", SAME),
    (QLORA_FSDP1, "fsdp1_qlora", "", f"{BFLOAT16} {STORAGE} float32", SAME),
    (QLORA_FSDP2, "fsdp2_qlora", "", f"{STORAGE} uint8", STORAGE, "fsdp2 shards both", SAME),
    (QLORA, "ddp", "", f"{STORAGE} int4", f"{STORAGE} is 'int4'", "choose one of uint8, float32"),
    (
        QLORA,
        "ddp",
        "",
        "--optim adamw",
        "--optim is 'adamw'",
        "choose one of adamw_torch, adamw_8bit",
    ),
    (QLORA, "zero2_offload", "", ADAM_8BIT, "cannot be offloaded", "give --optim adamw_torch"),
    (QLORA_FSDP2, "fsdp2_qlora", "", ADAM_8BIT, "DTensors of fsdp2", "give adamw_torch"),
    (QLORA, "zero2", BF16, "", "would cast and so destroy", BFLOAT16),
    (QLORA_ZERO3, "zero3_qlora", BF16, "", "would cast", BFLOAT16),
    (QLORA_FSDP1, "fsdp1_qlora", BF16, "", "would cast", BFLOAT16),
    (QLORA_FSDP2, "fsdp2_qlora", BF16, "", "would cast", BFLOAT16),
    (OFFLOAD, "zero3", "", IN_8BIT, "8-bit weights", "whatever zero3", f"{QLORA_ZERO3}.py"),
    (LORA_FSDP2, "fsdp2", "", IN_8BIT, "8-bit weights", f"{QLORA_FSDP2}.py"),
    (QLORA, "ddp", "", IN_8BIT, "8-bit weights already", f"{LORA}.py"),
    (FULL, "ddp", "", IN_8BIT, "quantized weights, which cannot be trained", "with LoRA"),
    (OFFLOAD, "zero3", "", IN_4BIT, "4-bit weights", f"take {QLORA_ZERO3}.py"),
    (LORA_FSDP1, "fsdp1", "", f"{MODEL} in_4bit_float", "4-bit weights", f"take {QLORA_FSDP1}.py"),
    (QLORA_FSDP1, "fsdp1_qlora", "", IN_4BIT, "in_4bit: its", "is uint8", SAME),
    (LORA, "ddp", "", f"{MODEL} in_gptq", "quantized by gptq", "take the original"),
    (LORA, "ddp", "--dynamo_backend inductor", "", "--dynamo_backend INDUCTOR", "drop the flag"),
    (LORA, "ddp", FP16, "", *NEEDS_GPU),
    (OFFLOAD, "zero3", FP16, "", *NEEDS_GPU),
    (OFFLOAD, "fp16.yaml", "", "", *NEEDS_GPU),
    (FULL, "ddp", "", BFLOAT16, BFLOAT16, "launch with --mixed_precision"),
    (OFFLOAD, "zero3", "", BFLOAT16, f"{BFLOAT16} under DeepSpeed", "--mixed_precision`, bf16"),
]


@pytest.mark.parametrize(
    "script, config, flags, words, fragments", [(*case[:4], case[4:]) for case in LAUNCHES]
)
def test_launches_that_do_not_fit_are_refused(run, capfd, script, config, flags, words, fragments):
    if "fp16" in f"{config} {flags}" and torch.cuda.is_available():
        pytest.skip("fp16 is for a GPU")
    line = refusal(run, capfd, script, config, shlex.split(GOOD + words), flags.split())
    assert [part for part in fragments if part not in line] == [], line


QUANTIZED_RUNS = [
    (LORA, "ddp", "in_8bit"),
    (LORA, "zero2", "in_4bit"),
    (QLORA_ZERO3, "zero3_qlora", "in_4bit"),
    (QLORA_FSDP2, "fsdp2_qlora", "in_4bit_float"),
]


@pytest.mark.parametrize("script, config, model", QUANTIZED_RUNS)
def test_quantized_checkpoints_are_accepted_where_adapters_can_be_trained(
    run, script, config, model
):
    with pytest.raises(Accepted):
        run(script, config, shlex.split(f"{GOOD} {MODEL} {model}"))


def test_without_bitsandbytes_a_script_that_needs_it_says_so(run, capfd, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    line = refusal(run, capfd, QLORA, "ddp", shlex.split(GOOD))
    assert "bitsandbytes, which is not installed: pip install bitsandbytes" in line
    with pytest.raises(Accepted):
        run(LORA, "ddp", shlex.split(GOOD))


@pytest.mark.cases
def test_a_lock_that_a_killed_compilation_left_is_deleted_and_one_held_open_is_not(
    run, capfd, place
):
    lock = place / "extensions/cpu_adam/lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w"), pytest.raises(Accepted):
        run(OFFLOAD, "zero3_offload", shlex.split(GOOD))
    assert lock.exists() and "Deleted" not in capfd.readouterr().out
    with pytest.raises(Accepted):
        run(OFFLOAD, "zero3_offload", shlex.split(GOOD))
    told = f"Deleted {lock}, which a killed compilation had left."
    assert told in capfd.readouterr().out and not lock.exists()


@pytest.mark.parametrize("flag", [MODEL, "--dataset_name"])
def test_a_hub_that_does_not_answer_is_refused_at_once(run, capfd, monkeypatch, flag):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # no server listens there
    line = refusal(run, capfd, LORA, "ddp", shlex.split(f"{GOOD} {flag} nobody/nothing"))
    assert f"{flag} nobody/nothing does not exist here, and the Hub cannot be reached" in line
    assert "HF_HUB_OFFLINE=1" in line


# the server does not speak TLS: with https the handshake fails, which counts as an answer
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_hub_that_answers_with_an_error_is_not_refused(monkeypatch, scheme):
    handler = http.server.BaseHTTPRequestHandler  # answers every request with 501
    server = http.server.HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", f"{scheme}://127.0.0.1:{server.server_port}")
    model_files.check_hub("nobody/nothing")
    server.shutdown()


@pytest.fixture
def refuse_as(monkeypatch, capfd):
    """Return a function that calls `refuse` as the process of a rank and returns what it prints."""

    def refuse_as(rank):
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(SystemExit) as ended:
            errors.refuse("what is wrong: what to do")
        assert ended.value.code == 1
        return capfd.readouterr().err

    return refuse_as


LINE = "error: what is wrong: what to do\n"


def test_only_the_first_process_to_refuse_prints_the_line(monkeypatch, refuse_as):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # like the launcher's
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    assert [refuse_as(rank) for rank in (1, 0, 2)] == [LINE, "", ""]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert [refuse_as(rank) for rank in (0, 1)] == [LINE, ""]


def test_without_a_store_the_other_processes_wait_for_rank_0(monkeypatch, capfd, refuse_as):
    waits = []
    monkeypatch.setattr(errors.time, "sleep", lambda s: waits.append((s, capfd.readouterr().err)))
    assert (refuse_as(0), waits) == (LINE, [])
    assert (refuse_as(1), waits) == (LINE, [(60, "")])


# What is accepted ---------------------------------------------------------------------------------
@pytest.mark.parametrize("script", SCRIPTS)
def test_defaults_of_every_script_are_accepted_with_its_own_config(
    run, monkeypatch, tmp_path, script
):
    text = (ROOT / "examples" / f"{script}.py").read_text()
    config = re.search(r"--config_file configs/(\w+)\.yaml", text)[1]
    arguments = ["--output_dir", tmp_path / "new"]
    if script.endswith("_resume"):
        arguments += ["--checkpoint_dir", tmp_path / "checkpoints"]
    monkeypatch.chdir(ROOT)
    with pytest.raises(Accepted):
        run(script, config, arguments)


@pytest.mark.parametrize("guide", GUIDES)
def test_launch_configs_of_the_guides_are_accepted(run, place, guide):
    script, flags, config = GUIDES[guide]
    (place / f"{guide}.yaml").write_text(json.dumps(config))
    model = [MODEL, "t5"] if script.startswith("seq2seq") else []
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
    "--dataset_name data/one_label.csv",
    "--dataset_name data/spaces.csv",
    "--dataset_name data/two_rows.csv",
    "--lr_scheduler_type constant",
    "--lr_scheduler_type polynomial",
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
        run(LORA, "ddp", shlex.split(GOOD + words))


@pytest.mark.cases
@pytest.mark.parametrize(
    "script, words, cut",
    [(LORA, "", 0), (LORA, "", 1), (SEQ2SEQ, f"{MODEL} t5", 1)],
    ids=["all texts fit", "causal", "seq2seq"],
)
def test_truncated_texts_are_counted(run, place, capfd, script, words, cut):
    rows = [("short", "yes"), ("a long text " * 99, "no"), ("brief", "yes"), ("curt", "no")]
    write_csv(place / "data/long.csv", [row for row in rows if cut or len(row[0]) < 99])
    with pytest.raises(Accepted):
        run(script, "single", shlex.split(f"{GOOD} --dataset_name data/long.csv {words}"))
    told = "1 of 4 texts are truncated: see --max_length." if cut else ""
    printed = capfd.readouterr().out
    assert told in printed and ("truncated" in printed) == bool(cut)


ACCEPTED_LAUNCHES = [
    (LORA, None, "", ""),
    (LORA, "single", "", ""),
    (LORA, "zero1", "", ""),
    (LORA, "zero2_offload", "", ""),
    (FULL, "ddp", BF16, ""),
    (FULL_ZERO3, "zero3", BF16, BFLOAT16),
    (FULL_ZERO3, "stage3.yaml", "", ""),
    (OFFLOAD, "use_cpu.yaml", "", ""),  # on a machine without GPUs
]


@pytest.mark.parametrize("script, config, flags, words", ACCEPTED_LAUNCHES)
def test_launches_that_fit_are_accepted(run, script, config, flags, words):
    with pytest.raises(Accepted):
        run(script, config, shlex.split(GOOD + words), flags.split())


# The real launcher --------------------------------------------------------------------------------
ZERO3 = (OFFLOAD, "zero3_offload")
LAUNCHED = [  # (whether the launch is a real one, script, config, flags, expected part of the line)
    (False, LORA, "ddp", "--learning_rat 0.1", "--learning_rat 0.1 is not a flag"),
    pytest.param(
        True,
        LORA,
        "ddp",
        "--learning_rat 0.1",
        "--learning_rat 0.1 is not a flag",
        marks=pytest.mark.slow,
    ),
    (False, *ZERO3, "--lora_r 0", "--lora_r is 0"),
    (False, *ZERO3, "--dataset_name data/nothing.csv", "data/nothing.csv does not exist"),
    (False, *ZERO3, "--label_column label", "the columns are 'Tweet text', 'Label'"),
    pytest.param(
        True,
        LORA,
        "ddp",
        f"{MODEL} nobody/nothing",
        "the Hub cannot be reached",
        marks=pytest.mark.slow,
    ),
    (False, OFFLOAD, "ddp", "", "was launched with ddp"),
    (False, LORA, "ddp", f"{MODEL} data", "data holds no config.json"),
]
LAUNCHED_IDS = ["-".join(map(str, getattr(case, "values", case))) for case in LAUNCHED]


@pytest.mark.parametrize("real, script, config, words, fragment", LAUNCHED, ids=LAUNCHED_IDS)
def test_a_launch_of_two_processes_ends_with_one_line(
    launch, place, tmp_path, real, script, config, words, fragment
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
    # the launcher may have killed the process that holds the lock
    assert [file for file in tmp_path.iterdir() if file.name != ".new.lock"] == []


# Process 0 starts late, and process 1 takes long to exit after it has refused.
LATE = """
import atexit, os, time
time.sleep({seconds} if os.environ["RANK"] == "0" else 0)
atexit.register(time.sleep, 2 * {seconds})
"""


@pytest.mark.parametrize("seconds", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_the_line_is_printed_once_though_a_process_is_late(launch, place, tmp_path, seconds):
    late = LATE.format(seconds=seconds)
    copy = plant(tmp_path, LORA, ("\nimport sys\n", f"\nimport sys\n{late}"))
    done = launch(copy, "ddp", *shlex.split(GOOD), "--lora_r", 0, processes=2, code=None, cwd=place)
    assert done.returncode == 1
    line = "error: --lora_r is 0: give a number above 0"
    assert re.findall("^error: .*", done.stdout, re.MULTILINE) == [line]
