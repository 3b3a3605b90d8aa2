"""chat_sft stops with one line where it cannot work, loads no model and writes nothing."""

import json
import re
import shlex
import shutil
from pathlib import Path

import datasets
import pytest
from conftest import ROOT
from models import make_model
from single import run_single
from transformers import AutoTokenizer

PAIR = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
WORKING = TEMPLATE + "{% if add_generation_prompt %}assistant: {% endif %}"


def said(*roles):
    return [{"role": role, "content": "x"} for role in roles]


def with_third(messages):
    """Return the lines of a file whose third row alone is the given one."""
    return "".join(json.dumps({"messages": one}) + "\n" for one in (PAIR, PAIR, messages, PAIR))


FILES = {
    "chat/train.jsonl": with_third(PAIR),
    "chat/test.jsonl": with_third(PAIR),
    "chat.jsonl": with_third(PAIR),
    "other.jsonl": with_third(said("user", "assistant")),
    "texts.jsonl": '{"text": "some words of a text"}\n' * 4,
    "long.jsonl": with_third(PAIR).replace("a question", "long " * 300),
    "empty.jsonl": "",
    "blank.jsonl": "\n \n",
    "broken.jsonl": with_third(PAIR) + '{"messages": [\n' + with_third(PAIR),
    "list.json": f'[{{"messages": {json.dumps(PAIR)}}},',
    "rows.txt": "text",
    "rows.parquet": "no parquet",
    "header.csv": "prompt,completion\n",
    "ragged.csv": "prompt,completion\na,b\na,b,c\n",
    "columns.jsonl": '{"ask": "x", "say": "y"}\n',
    "number.jsonl": '{"question": "x", "answer": 5.5}\n',
    "first.jsonl": json.dumps({"messages": said("user")}),
    "no_list.jsonl": with_third("a question"),
    "no_message.jsonl": with_third(["a question"]),
    "raises.jinja": "{{ raise_exception('not a word') }}",
    "syntax.jinja": "{% for m in messages %}{{ m.content }}",
    "rewrites.jinja": WORKING.replace(
        "{{ m.content }}", "{{ loop.length }}{{ m.content | upper }}"
    ),
    "working.jinja": WORKING,
    "template.txt": WORKING,
    "a_file": "",
    "foreign/thesis.txt": "",
    "config/train.jsonl": with_third(PAIR),
    "config/test.jsonl": with_third([PAIR[0], PAIR[1] | {"content": 1.5}]),
}
TOO_LONG = 300 * "o"


@pytest.fixture(scope="module")
def made(tmp_path_factory, forks):
    """A folder with good and bad models, data and runs; exit codes and outputs of ACCEPTED."""
    place = tmp_path_factory.mktemp("place")
    for name, text in FILES.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(text)
    (place / "binary.jinja").write_bytes(b"\xff\xfe")
    (place / "latin.jsonl").write_bytes('{"text": "café"}\n'.encode("latin-1"))
    datasets.disable_progress_bars()
    parts = {
        "train": datasets.Dataset.from_list([{"messages": PAIR}] * 3),
        "test": datasets.Dataset.from_list([{"text": "other columns"}] * 3),
    }
    datasets.DatasetDict(parts).save_to_disk(place / "unlike")

    make_model(place / "llama", "llama")
    make_model(place / "t5", "t5")
    for name in (
        "no_weights",
        "no_config",
        "broken_config",
        "truncated",
        "no_tokenizer",
        "no_eos",
        "in_gptq",
    ):
        shutil.copytree(place / "llama", place / name)
    (place / "no_weights/model.safetensors").rename(place / "no_weights/pytorch_model.bin")
    (place / "no_config/config.json").unlink()
    (place / "broken_config/config.json").write_text("{")
    whole = (place / "llama/model.safetensors").read_bytes()
    (place / "truncated/model.safetensors").write_bytes(whole[:-100])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (place / "no_tokenizer" / name).unlink()
    tokenizer = AutoTokenizer.from_pretrained(place / "llama")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(place / "no_eos")
    config = json.loads((place / "llama/config.json").read_text())
    (place / "in_gptq/config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq"}})
    )

    accepted = [f"{words} --output_dir {{p}}/accepted/{n}" for n, words in enumerate(ACCEPTED)]
    commands = [["chat_sft", *words_of(place, GOOD + words)] for words in (RUN, *accepted)]
    (code, output), *accepted = run_single(forks, place, *commands, side_by_side=2)
    assert code == 0, output
    for name in ("changed", "missing", "pickle", "no_state", "empty_state", "list_state"):
        shutil.copytree(place / "run/checkpoint-1", place / name / "checkpoint-1")
    weights = place / "changed/checkpoint-1/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x07")
    (place / "missing/checkpoint-1/process-00000-of-00001.safetensors").unlink()
    (place / "pickle/checkpoint-1/optimizer.bin").write_bytes(
        b"cos\nsystem\n(S'touch planted'\ntR."
    )
    for name, text in {"no_state": "{", "empty_state": '{"files": {}}', "list_state": "[]"}.items():
        (place / f"{name}/checkpoint-1/state.json").write_text(text)
    shutil.copytree(place / "run", place / "run2")
    return place, accepted


@pytest.fixture(scope="module")
def place(made):
    return made[0]


def words_of(place, words):
    no = "--save_strategy no --eval_strategy no"
    return shlex.split(words.replace("{p}", str(place)).replace("{s}", no))


GOOD = "--model_name_or_path {p}/llama --dataset_name {p}/chat --max_steps 2 --num_samples 0 "
GOOD += "--per_device_train_batch_size 1 "
RUN = "--output_dir {p}/run --save_strategy steps --save_steps 1 --use_peft_lora"
ACCEPTED = [
    "",
    "--eval_strategy no",
    "--dataset_name {p}/chat.jsonl",
    "--dataset_name {p}/texts.jsonl --save_strategy no",
    "--chat_template_format {p}/working.jinja --report_to none",
    "--resume_from_checkpoint True",
    "--resume_from_checkpoint False --overwrite_output_dir",
    "--streaming --save_strategy steps --eval_strategy no --dataloader_num_workers 1 "
    "--save_total_limit 0",
]
RESUME = "--use_peft_lora --save_strategy steps --save_steps 1 --resume_from_checkpoint "
CASES = [  # flags; what the line must say, culprit first
    # flags that are none, and values that are none of theirs
    ("--learning_rat 0.1", "--learning_rat 0.1 is not a flag", "--help"),
    ("stray", "stray is not a flag"),
    ("--lora_r eight", "--lora_r", "invalid int value: 'eight'"),
    ("--learning_rate fast", "--learning_rate", "invalid float value: 'fast'"),
    ("--packing perhaps", "--packing", "perhaps"),
    ("--max_length", "--max_length", "expected one argument"),
    ("--dtype half", "--dtype is 'half'", "float32, bfloat16"),
    ("--train_on user", "--train_on is 'user'", "assistant, all"),
    ("--long_documents keep", "--long_documents is 'keep'", "truncate, drop"),
    ("--logging_strategy always", "--logging_strategy is 'always'", "no, steps, epoch"),
    ("--eval_strategy never", "--eval_strategy is 'never'", "no, steps, epoch"),
    ("--save_strategy best", "--save_strategy is 'best'", "no, steps, epoch"),
    ("--hub_strategy once", "--hub_strategy is 'once'", "every_save"),
    ("--log_level loud", "--log_level is 'loud'", "debug, info"),
    ("--bnb_4bit_quant_type int4", "--bnb_4bit_quant_type is 'int4'", "nf4, fp4"),
    ("--bnb_4bit_compute_dtype int8", "--bnb_4bit_compute_dtype is 'int8'", "float32"),
    ("--lr_scheduler_type step", "--lr_scheduler_type is 'step'", "cosine, linear"),
    ("--optim sgd", "--optim is 'sgd'", "adamw_torch"),
    ("--attn_implementation flash", "has no attention flash", "give --attn_implementation sdpa"),
    # numbers out of range
    ("--learning_rate 0", "--learning_rate is 0", "above 0"),
    ("--learning_rate nan", "--learning_rate is nan", "above 0"),
    ("--max_steps 0", "--max_steps is 0", "or -1"),
    ("--max_steps -5", "--max_steps is -5", "or -1"),
    ("--max_steps -1 --num_train_epochs 0", "--num_train_epochs is 0", "above 0"),
    ("--max_length 0", "--max_length is 0", "above 0"),
    ("--per_device_train_batch_size -1", "--per_device_train_batch_size is -1", "above 0"),
    ("--per_device_eval_batch_size 0", "--per_device_eval_batch_size is 0", "above 0"),
    ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps is 0", "above 0"),
    ("--weight_decay -0.1", "--weight_decay is -0.1", "at least 0"),
    ("--max_grad_norm -1", "--max_grad_norm is -1", "at least 0"),
    ("--seed -1", "--seed is -1", "at least 0"),
    ("--warmup_ratio 1", "--warmup_ratio is 1", "below 1"),
    ("--use_peft_lora --lora_dropout 1", "--lora_dropout is 1", "below 1"),
    ("--use_peft_lora --lora_r 0", "--lora_r is 0", "above 0"),
    ("--use_peft_lora --lora_alpha -8", "--lora_alpha is -8", "above 0"),
    ("--logging_steps 0", "--logging_steps is 0", "above 0"),
    ("--eval_strategy steps --eval_steps 0", "--eval_steps is 0", "above 0"),
    ("--save_steps -1", "--save_steps is -1", "above 0"),
    ("--save_total_limit -1", "--save_total_limit is -1", "at least 0"),
    ("--num_samples -1", "--num_samples is -1", "at least 0"),
    ("--dataloader_num_workers -1", "--dataloader_num_workers is -1", "at least 0"),
    ("--max_new_tokens 0", "--max_new_tokens is 0", "above 0"),
    # flags that contradict each other
    (
        "--use_peft_lora --use_4bit_quantization --use_8bit_quantization",
        "--use_4bit",
        "contradict each other",
    ),
    ("--use_4bit_quantization", "quantized weights cannot be trained", "add --use_peft_lora"),
    ("--use_8bit_quantization", "quantized weights cannot be trained", "add --use_peft_lora"),
    (
        f"{RESUME} True --overwrite_output_dir",
        "--resume_from_checkpoint",
        "--overwrite_output_dir",
        "one of them",
    ),
    ("--streaming --max_steps -1", "--streaming has no length", "give --max_steps"),
    ("--hub_model_id me/model", "--hub_model_id", "add --push_to_hub"),
    ("--push_to_hub --hub_model_id 'bad id/x'", "--hub_model_id", "Repo id"),
    (
        "--push_to_hub --hub_model_id ../x --output_dir {p}/run --overwrite_output_dir",
        "--hub_model_id",
        "Repo id",
    ),
    ("--report_to nothing", "--report_to nothing", "not a tracker"),
    ("--report_to none,nothing", "--report_to", "not a tracker"),
    ("--report_to aim", "--report_to aim", "not installed"),
    ("--report_to ,", "--report_to"),
    # models
    ("--model_name_or_path {p}/nothing", "nothing is neither a folder", "check the path"),
    ("--model_name_or_path {p}/a_file", "a_file is neither a folder", "check the path"),
    ("--model_name_or_path nobody/nothing", "nobody/nothing cannot be read", "check the path"),
    ("--model_name_or_path {p}/no_config", "no_config holds no config.json"),
    ("--model_name_or_path {p}/broken_config", "broken_config", "JSON"),
    (
        "--model_name_or_path {p}/no_weights",
        "no_weights holds no model.safetensors",
        "save the model again",
    ),
    ("--model_name_or_path {p}/truncated", "model.safetensors is damaged or truncated"),
    (
        "--model_name_or_path {p}/no_tokenizer",
        "no_tokenizer has no usable tokenizer",
        "save one with it",
    ),
    (  # a chat would be ended by the token of chatml
        "--model_name_or_path {p}/no_eos --dataset_name {p}/texts.jsonl",
        "no_eos has a tokenizer without eos_token",
        "set one",
    ),
    ("--model_name_or_path {p}/t5", "t5 is not a causal language model"),
    ("--model_name_or_path {p}/in_gptq", "in_gptq is quantized by gptq"),
    (
        "--use_peft_lora --lora_target_modules q_proj,query",
        "target_modules query names no linear layer",
        "q_proj",
    ),
    (
        "--use_peft_lora --lora_target_modules norm",
        "target_modules norm names no linear layer",
        "q_proj",
    ),
    ("--use_peft_lora --lora_target_modules ''", "--target_modules is empty", "all-linear"),
    # data
    ("--dataset_name ''", "--dataset_name is empty"),
    ("--dataset_name {p}/nothing.jsonl", "nothing.jsonl is not there", "check the path"),
    ("--dataset_name {p}/nothing", "nothing is not there", "check the path"),
    ("--dataset_name nobody/nothing", "nobody/nothing cannot be read"),
    (f"--dataset_name {TOO_LONG}", "cannot be read"),
    (
        "--dataset_name {p}/rows.txt",
        "rows.txt is not a .json, .jsonl, .ndjson, .csv, .tsv, .parquet, .arrow file",
        "convert it",
    ),
    ("--dataset_name {p}/empty.jsonl", "empty.jsonl is empty", "with rows"),
    ("--dataset_name {p}/blank.jsonl", "blank.jsonl has no rows"),
    ("--dataset_name {p}/header.csv", "header.csv has no rows"),
    ("--dataset_name {p}/foreign", "foreign cannot be read"),
    ("--dataset_name {p}/broken.jsonl", "broken.jsonl, line 5 is not a JSON object", "fix it"),
    (
        "--dataset_name {p}/broken.jsonl --streaming {s}",
        "row 5 of the stream is not a JSON object",
        "fix it",
    ),
    ("--dataset_name {p}/list.json", "list.json cannot be read"),
    ("--dataset_name {p}/latin.jsonl", "latin.jsonl, line 1 is not UTF-8 text", "convert it"),
    ("--dataset_name {p}/rows.parquet", "rows.parquet cannot be read"),
    ("--dataset_name {p}/ragged.csv", "ragged.csv cannot be read", "line 3"),
    ("--dataset_name {p}/columns.jsonl", "the columns are ask, say", "--dataset_text_field"),
    (
        "--dataset_name {p}/columns.jsonl --dataset_text_field body",
        "the columns are ask, say",
        "it says body",
    ),
    ("--dataset_name {p}/number.jsonl", "row 1 of", "no text in answer, but float", "convert it"),
    (
        "--dataset_name {p}/first.jsonl --streaming {s}",
        "no row of the stream has a token to train on",
        "rows without a turn to learn",
    ),
    (
        "--dataset_name {p}/no_list.jsonl",
        "row 3 of the training split holds a str, not a list of messages",
    ),
    (
        "--dataset_name {p}/no_message.jsonl",
        "row 3 of the training split, message 1 is no",
        "fix it",
    ),
    ("--dataset_name {p}/config", "row 3 of the held-out split, message 2", "but float"),
    ("--dataset_name {p}/unlike", "no row of the held-out split", "an empty messages"),
    ("--splits dev", "--splits:", "no split dev, it has train"),
    ("--splits train,dev", "--splits:", "no split dev, it has train"),
    ("--splits train,test,dev", "--splits train,test,dev names 3 splits"),
    ("--splits train[:x]", "--splits train[:x]", "a slice is [a:b]"),
    ("--splits train[:2%] --streaming {s}", "--splits train[:2%]", "has no known length"),
    ("--splits train[:0]", "no rows"),
    ("--splits train[:3],train[4:]", "held-out split"),
    (
        "--dataset_name {p}/long.jsonl --max_length 200",
        "no row of the training split has a token to train on",
    ),
    (
        "--dataset_name {p}/long.jsonl --max_length 200 --streaming {s}",
        "no row of the stream has a token to train on",
    ),
    (
        "--max_length 5",
        "no row of the training split has a token to train on within --max_length 5",
    ),
    (
        "--max_length 20 --long_documents drop",
        "no row of the training split",
        "within --max_length 20",
    ),
    ("--max_length 1 --train_on all", "no row of the training split", "within --max_length 1"),
    # templates
    ("--chat_template_format alpaca", "--chat_template_format is 'alpaca'", "chatml, zephyr"),
    ("--chat_template_format {p}/nothing.jinja", "nothing.jinja cannot be read", "No such file"),
    ("--chat_template_format {p}/template.txt", "template.txt'", ".jinja file"),
    ("--chat_template_format {p}/binary.jinja", "binary.jinja cannot be read", "utf-8"),
    (
        "--chat_template_format {p}/raises.jinja",
        "row 1 of",
        "the chat template raises an error (not a word)",
    ),
    ("--chat_template_format {p}/syntax.jinja", "row 1 of", "the chat template raises an error"),
    (
        "--chat_template_format {p}/rewrites.jinja",
        "does not show where the assistant's turns begin",
        "--train_on all",
    ),
    # output folders
    (
        "--output_dir {p}/run",
        "run holds a run",
        "--resume_from_checkpoint True",
        "--overwrite_output_dir",
    ),
    (
        "--output_dir {p}/run --resume_from_checkpoint False",
        "run holds a run",
        "--overwrite_output_dir",
    ),
    ("--output_dir {p}/foreign", "foreign exists", "choose another"),
    (
        "--output_dir {p}/foreign --overwrite_output_dir",
        "foreign holds no metrics.json",
        "choose another",
    ),
    ("--output_dir {p}/a_file", "a_file is a file", "choose another"),
    ("--output_dir {p}/a_file/under", "a_file/under cannot be created", "choose another"),
    ("--output_dir /proc/new", "/proc/new cannot be created", "choose another"),
    (f"--output_dir {TOO_LONG}", "File name too long"),
    # checkpoints
    (RESUME + "{p}/run/checkpoint-9", "checkpoint-9 is not there"),
    (RESUME + "{p}/a_file", "a_file is not there"),
    (RESUME + "{p}/foreign", "foreign is not a checkpoint"),
    (RESUME + "{p}/run", "run is not a checkpoint"),
    (
        RESUME + "{p}/changed/checkpoint-1",
        "adapter_model.safetensors is missing or is not what was written",
    ),
    (RESUME + "{p}/missing/checkpoint-1", "process-00000-of-00001.safetensors is missing"),
    (RESUME + "{p}/pickle/checkpoint-1", "holds optimizer.bin, a pickle"),
    (RESUME + "{p}/no_state/checkpoint-1", "no_state/checkpoint-1 is not a checkpoint"),
    (RESUME + "{p}/empty_state/checkpoint-1", "empty_state/checkpoint-1 is not a checkpoint"),
    (RESUME + "{p}/list_state/checkpoint-1", "list_state/checkpoint-1 is not a checkpoint"),
    (
        RESUME + "True --output_dir {p}/run --learning_rate 0.5",
        "learning_rate 0.001 (now 0.5)",
        "the same",
    ),
    (
        RESUME + "True --output_dir {p}/run --lora_r 4 --seed 1",
        "lora_r 8 (now 4)",
        "seed 42 (now 1)",
    ),
    (RESUME + "True --output_dir {p}/run --max_steps 9", "max_steps 2 (now 9)"),
    (RESUME + "True --output_dir {p}/run --packing", "packing False (now True)"),
    (
        RESUME + "True --output_dir {p}/run --dataset_name {p}/other.jsonl",
        "was made with data 4 documents",
        "checksum",
    ),
    (RESUME + "{p}/run/checkpoint-1 --output_dir {p}/run2", "run2 holds a run", "choose another"),
    (RESUME[16:] + "True --output_dir {p}/run", "use_peft_lora True (now False)"),
    # precision: last, because the script sets environment variables, which outlive a run here
    ("--bf16 --fp16", "--bf16 and --fp16 contradict each other"),
    ("--fp16", "mixed precision fp16 needs a GPU", "bf16"),
]


def listing(folder):
    """Return path -> bytes and time of all files in a folder, without the caches of datasets."""
    files = [
        path for path in folder.rglob("*") if path.is_file() and not path.match("unlike/*/cache-*")
    ]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


@pytest.fixture(scope="module")
def refused(place, forks, tmp_path_factory):
    """Run all cases: number -> (output folder, exit code, output); the files before and after."""
    folder, before = tmp_path_factory.mktemp("refused"), listing(place)
    commands = [
        ["chat_sft", *words_of(place, f"{GOOD} --output_dir {folder}/{number} {case[0]}")]
        for number, case in enumerate(CASES)
    ]
    (tmp := folder / "runs").mkdir()
    done = run_single(forks, tmp, *commands, side_by_side=2)
    return {n: (folder / str(n), *one) for n, one in enumerate(done)}, before, listing(place)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case[0][:60] for case in CASES])
def test_one_line_says_what_is_wrong(refused, number):
    folder, code, output = refused[0][number]
    assert code == 1 and "Traceback" not in output, output
    [line] = re.findall("^error: .*", output, re.MULTILINE)
    assert [fragment for fragment in CASES[number][1:] if fragment not in line] == [], line
    assert output.rstrip().endswith(line.rstrip())
    assert not re.search(
        "^Failed to (load JSON|read)", output, re.MULTILINE
    )  # which datasets would log before
    assert "bytes of parameters" not in output  # of a model that was loaded
    assert not folder.exists()


def test_refusals_write_nothing(refused, place):
    _, before, after = refused
    assert before == after
    assert not (ROOT / "planted").exists() and not list(Path.cwd().glob("ooo*"))


def test_a_checkpoint_with_other_sequences_per_update_is_refused(launch, place, tmp_path):
    words = words_of(place, GOOD + RESUME + "True --output_dir {p}/run")
    before = listing(place)
    done = launch("chat_sft", "ddp", *words, processes=2, code=None)
    assert done.returncode != 0
    [line] = re.findall("^error: .*", done.stdout, re.MULTILINE)
    assert "sequences per update" in line and "on 2 processes make" in line
    assert listing(place) == before


@pytest.mark.parametrize("number", range(len(ACCEPTED)), ids=ACCEPTED)
def test_good_flags_are_accepted(made, number):
    place, outcomes = made
    code, output = outcomes[number]
    assert code == 0, output
    assert (place / f"accepted/{number}/metrics.json").is_file()
