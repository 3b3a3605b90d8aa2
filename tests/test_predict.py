"""examples/predict.py: a line for each line of the input, the same ones however it runs."""

import json
import math
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from models import make_model, make_rows, teach
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from conftest import ACCELERATE, ROOT
from processes import running
from safetensors.torch import load_file, save_file
from single import run_single
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from examples import predict
from utils import documents, prediction, prediction_model, prediction_rows
from utils import prediction_scores, prediction_sharding

TEMPLATE = (
    "{% for m in messages %}{{ 'Tweet text : ' if m['role'] == 'user' else ' ' }}{{ m['content'] }}"
    "{% if m['role'] == 'user' %} Label :{% else %}{{ eos_token }}{% endif %}{% endfor %}"
)
NEW = 8  # new tokens
FLAGS = ("--max_new_tokens", NEW, "--per_device_eval_batch_size", 3)
SAMPLED = ("--temperature", 0.9, "--top_p", 0.9, "--seed", 7)
EXPERTS = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "moe_intermediate_size": 8}
EXPERTS |= {"num_attention_heads": 1, "num_key_value_heads": 1, "num_experts": 2}


def write(path, rows):
    """Write rows of JSON, and texts as they are, one per line; return the path."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def make_input(count, seed=5):
    """Return rows of all kinds, of many lengths."""
    rows = []
    for number, (text, label) in enumerate(make_rows(count, seed)):
        chat = [{"role": "user", "content": text}, {"role": "assistant", "content": label}]
        rows.append(
            [
                {"id": number, "messages": chat},
                {"prompt": f"Tweet text : {text} Label :", "label": label, "id": number},
                {"text": text, "more": [number, 1.0]},
                {"conversations": chat[:1], "completion": label},
            ][number % 4]
        )
    return rows


def flags(model, source, target, *more):
    """Return the command line of a run."""
    names = ("--model_name_or_path", model, "--input_file", source, "--output_file", target)
    return ("predict", *names, *FLAGS, *more)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the models llama, adapter (of llama) and t5, and the inputs in and pairs."""
    folder = tmp_path_factory.mktemp("predict")
    teach(make_model(folder / "llama", "llama"), steps=6)
    make_model(folder / "t5", "t5")
    tokenizer = AutoTokenizer.from_pretrained(folder / "llama")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "llama")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder / "llama")
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(folder / "adapter")
    # an adapter with two new tokens, whose embedding and head are trained in full
    model = AutoModelForCausalLM.from_pretrained(folder / "llama")
    tokenizer.add_tokens(["<|new|>", "<|other|>"])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    lora.modules_to_save = ["embed_tokens", "lm_head"]
    grown = get_peft_model(model, lora)
    torch.nn.init.normal_(grown.get_input_embeddings().weight[-2:].detach())
    grown.save_pretrained(folder / "grown")
    tokenizer.save_pretrained(folder / "grown")
    # an adapter with a tensor that its base has no place for
    shutil.copytree(folder / "adapter", folder / "misfit")
    tensors = load_file(folder / "misfit/adapter_model.safetensors")
    copies = {name.replace("layers.1.", "layers.7."): one.clone() for name, one in tensors.items()}
    tensors |= copies
    save_file(tensors, folder / "misfit/adapter_model.safetensors")
    write(folder / "in.jsonl", make_input(22))
    rows = [
        row | {"prompt": f"<|new|> {row['prompt']}"} for row in make_input(22) if "prompt" in row
    ]
    write(folder / "new.jsonl", rows)
    pairs = [{"prompt": f"Tweet text : {a} Label :", "completion": b} for a, b in make_rows(11, 6)]
    write(folder / "pairs.jsonl", pairs)
    return folder


@pytest.fixture(scope="module")
def alone(forks, place):
    """Outputs of one process: name -> rows. `forks` runs all of them in one interpreter."""
    runs = {
        "adapter": ("adapter", "in"),
        "sampled": ("adapter", "in", *SAMPLED),
        "scored": ("adapter", "in", "--perplexity"),
        "t5": ("t5", "pairs", "--metrics", "exact_match,token_f1,rouge_l"),
        "t5_scored": ("t5", "pairs", "--perplexity"),
    }
    commands = [
        flags(place / model, place / f"{data}.jsonl", place / f"{name}.out.jsonl", *more)
        for name, (model, data, *more) in runs.items()
    ]
    for code, output in run_single(forks, place, *commands):
        assert code == 0, output
    return {name: read(place / f"{name}.out.jsonl") for name in runs}


@pytest.fixture(scope="module")
def grown_alone(forks, place):
    """The same with the model grown."""
    target = place / "grown.out.jsonl"
    [(code, output)] = run_single(forks, place, flags(place / "grown", place / "new.jsonl", target))
    assert code == 0, output
    return {"grown": read(target)}


# What it writes -----------------------------------------------------------------------------------
def prompt_of(row, tokenizer):
    """Return the token ids of a prompt, by the libraries alone."""
    if "prompt" in row:
        return tokenizer(row["prompt"])["input_ids"]
    messages = row.get("messages") or row["conversations"]
    text = tokenizer.apply_chat_template(messages[:1], tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_output_is_that_of_the_libraries(alone, place):
    tokenizer = AutoTokenizer.from_pretrained(place / "llama")
    model = AutoModelForCausalLM.from_pretrained(place / "llama")
    model = PeftModel.from_pretrained(model, place / "adapter")
    reasons = set()
    for row, found in zip(read(place / "in.jsonl"), alone["adapter"], strict=True):
        added = {key: value for key, value in found.items() if key not in row}
        assert found == row | added and list(found) == [*row, *added]
        if "text" in row:
            ids = [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]
            with torch.no_grad():
                loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
            assert added["tokens"] == len(ids) - 1
            assert added["loss"] == pytest.approx(loss, rel=1e-4)
            continue
        ids = torch.tensor([prompt_of(row, tokenizer)])
        options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        mask = torch.ones_like(ids)
        tokens = model.generate(input_ids=ids, attention_mask=mask, **options)[0, ids.shape[1] :]
        text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
        reason = "stop" if tokens[-1] == tokenizer.eos_token_id else "length"
        assert added == {"prediction": text, "finish_reason": reason}
        reasons.add(reason)
    assert reasons == {"stop", "length"}


def test_seq2seq_output_and_metrics(alone, place):
    tokenizer = AutoTokenizer.from_pretrained(place / "t5")
    model = AutoModelForSeq2SeqLM.from_pretrained(place / "t5")
    hits = 0
    for row, scored in zip(alone["t5"], alone["t5_scored"], strict=True):
        inputs = tokenizer(row["prompt"], return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        text = tokenizer.decode(tokens[0], skip_special_tokens=True).strip()
        assert row["prediction"] == text
        hits += text == row["completion"]
        labels = tokenizer(text_target=row["completion"], return_tensors="pt").input_ids
        with torch.no_grad():
            loss = model(**inputs, labels=labels).loss.item()
        assert scored["loss"] == pytest.approx(loss, rel=1e-4) and "prediction" not in scored
    content = json.loads((place / "t5.out.metrics.json").read_text())
    assert content["scores"]["exact_match"] == hits / len(alone["t5"])
    assert set(content["scores"]) == {"exact_match", "token_f1", "rouge_l"}


def test_given_answers_are_scored(alone, place):
    rows, content = alone["scored"], json.loads((place / "scored.out.metrics.json").read_text())
    tokens = sum(row["tokens"] for row in rows)
    loss = sum(row["loss"] * row["tokens"] for row in rows) / tokens
    assert content["scores"]["perplexity"] == pytest.approx(math.exp(loss))
    assert not any("prediction" in row for row in rows)
    tokenizer = AutoTokenizer.from_pretrained(place / "llama")
    for row in rows:  # label tokens of an answer: its own and the end
        answer = row.get("label") or row.get("completion") or row.get("text")
        answer = answer or row["messages"][1]["content"]
        ids = tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
        assert abs(row["tokens"] - len(ids) - 1) <= ("text" in row)


STRATEGIES = ("zero2", "zero3", "fsdp1", "fsdp2")
CASES = [("adapter", "ddp", 2, ()), ("sampled", "ddp", 3, ())]
CASES += [("sampled", strategy, 2, ()) for strategy in STRATEGIES]
CASES += [(name, "fsdp2", 3, ()) for name in ("adapter", "scored", "t5", "t5_scored")]
CASES += [("grown", name, 2, ()) for name in STRATEGIES[1:]]
CASES += [(name, "zero3", 2, ()) for name in ("scored", "t5")]
CASES += [("sampled", name, 2, ("--layerwise_generation",)) for name in STRATEGIES[1:]]
DATA = {"grown": "new", "t5": "pairs", "t5_scored": "pairs"}
MORE = {"sampled": SAMPLED, "scored": ("--perplexity",), "t5_scored": ("--perplexity",)}
QUICK = (("adapter", "ddp"), ("sampled", "fsdp2"))


@pytest.mark.parametrize(
    ("name", "config", "processes", "more"),
    [
        pytest.param(*case, marks=[] if case[:2] in QUICK and not case[3] else pytest.mark.slow)
        for case in CASES
    ],
)
def test_output_is_the_same_on_any_processes(
    request, launch, place, tmp_path, name, config, processes, more
):
    alone = request.getfixturevalue("grown_alone" if name == "grown" else "alone")
    model = place / {"sampled": "adapter", "scored": "adapter"}.get(name, name.split("_")[0])
    data = place / f"{DATA.get(name, 'in')}.jsonl"
    command = flags(model, data, tmp_path / "out.jsonl", *MORE.get(name, ()), *more)
    done = launch(command[0], config, *command[1:], processes=processes)
    for found, wanted in zip(read(tmp_path / "out.jsonl"), alone[name], strict=True):
        if "loss" in wanted:
            assert found.pop("loss") == pytest.approx(wanted["loss"], rel=1e-5)
        assert found == {key: value for key, value in wanted.items() if key != "loss"}
    assert f"on {processes} processes" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.metrics.json"]


@pytest.mark.slow
@pytest.mark.parametrize("config", STRATEGIES[1:])
def test_sharded_in_bfloat16(launch, place, tmp_path, config):
    command = flags(place / "adapter", place / "in.jsonl", tmp_path / "out.jsonl")
    launch(command[0], config, *command[1:], "--dtype", "bfloat16", processes=2)
    rows = read(tmp_path / "out.jsonl")
    assert len(rows) == 22 and all({"loss", "prediction"} & set(row) for row in rows)
    command = [*command, "--overwrite_output_file"]
    launch(command[0], config, *command[1:], processes=2, flags=("--mixed_precision", "bf16"))
    assert len(read(tmp_path / "out.jsonl")) == 22


def test_an_answer_ends_at_its_first_end_token(place):
    def write_on(input_ids, **settings):
        answers = [[one, 7, two, 2, one], [one, two, two, one, two]]
        return torch.cat([input_ids, torch.tensor(answers)], dim=1)

    tokenizer = AutoTokenizer.from_pretrained(place / "llama")
    tokenizer.pad_token = tokenizer.eos_token
    one, two = tokenizer("parcel train", add_special_tokens=False).input_ids[:2]
    model = SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=False), generate=write_on)
    model.generation_config = SimpleNamespace(eos_token_id=[2, 7])
    config = SimpleNamespace(temperature=0.0, max_new_tokens=5)
    examples = [SimpleNamespace(input_ids=ids) for ids in ([5], [5, 6, 7])]
    accelerator = SimpleNamespace(device="cpu")
    found = predict.generate(config, accelerator, model, tokenizer, examples, [1, 2])
    texts = [tokenizer.decode(ids).strip() for ids in ([one], [one, two, two, one, two])]
    assert found == [answer(texts[0]), answer(texts[1], "length")] and texts[0] and texts[1]


# Sampling -----------------------------------------------------------------------------------------
def test_gumbel_noise_samples_the_softmax():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -9.0]).expand(4000, 5)
    sampler = prediction_model.GumbelNoise(3, range(4000), 0.7, 1.0, "cpu")
    shares = sampler(None, logits).argmax(-1).bincount(minlength=5) / 4000
    wanted = (logits[0] / 0.7).softmax(-1)
    assert (shares - wanted).abs().max() < 0.03
    sampler = prediction_model.GumbelNoise(3, range(4000), 0.7, 0.8, "cpu")
    drawn = sampler(None, logits).argmax(-1).bincount(minlength=5) / 4000
    assert drawn[2:].sum() == 0 and abs(drawn[0] - wanted[0] / wanted[:2].sum()) < 0.03


def test_gumbel_noise_depends_on_seed_row_and_step_alone():
    logits = torch.zeros(3, 50)
    draw = [prediction_model.GumbelNoise(1, [7, 8, 9], 1.0, 1.0, "cpu") for _ in range(2)]
    first, again = draw[0](None, logits), draw[0](None, logits)
    assert torch.equal(draw[1](None, logits), first) and not torch.equal(first, again)
    alone = prediction_model.GumbelNoise(1, [9], 1.0, 1.0, "cpu")(None, logits[:1])
    assert torch.equal(alone[0], first[2])
    assert not torch.equal(
        alone, prediction_model.GumbelNoise(2, [9], 1.0, 1.0, "cpu")(None, logits[:1])
    )


# Scores -------------------------------------------------------------------------------------------
@dataclass
class Scored:
    """The settings that `Scores` reads."""

    metrics: str = ""
    output_file: str = "out.jsonl"


def scores_of(entries, **given):
    """Return the `Scores` of entries of an output, each with the text it is compared with."""
    scores = prediction_scores.Scores(Scored(**given), "assets/metrics")
    for entry, reference in entries:
        example = SimpleNamespace(reference=reference)
        scores.add(entry, lambda found=(1, example): found)
    return scores


def answer(text, reason="stop"):
    return {"prediction": text, "finish_reason": reason}


def test_every_line_of_the_output_is_counted(capsys):
    entries = [answer("a"), answer("b", "length"), answer("c")]
    entries += [{"loss": 2.0, "tokens": 1}, {"loss": 1.0, "tokens": 3}]
    entries += [{"line": 7, "error": "bad"}, {"line": 8, "error": "x"}]
    report = scores_of((entry, None) for entry in entries).report()
    counts = {"predicted": 3, "ended_by_length": 1, "scored": 2, "tokens": 4, "bad_lines": 2}
    assert report["counts"] == counts
    assert report["config"] == {"metrics": "", "output_file": "out.jsonl"}
    assert report["scores"] == {"loss": 1.25, "perplexity": pytest.approx(math.exp(1.25))}
    assert capsys.readouterr().out == (
        "written to out.jsonl: 3 predictions, 1 of them ended by --max_new_tokens; 2 scored rows "
        "with 4 label tokens; 2 bad lines\nloss: 1.2500\nperplexity: 3.4903\n"
    )


def test_a_loss_that_is_no_number_makes_the_mean_none():
    entries = [{"loss": 1.0, "tokens": 3}, {"loss": None, "tokens": 1}]
    scores = scores_of((entry, None) for entry in entries).compute()
    assert scores == {"loss": None, "perplexity": None}
    infinite = (math.nan, math.inf, -math.inf)
    assert [prediction_scores.finite(one) for one in infinite] == [None] * 3
    assert prediction_scores.finite(0.5) == 0.5


def test_predictions_are_compared_with_one_text_or_with_the_best_of_several():
    entries = [(answer("a"), "a"), (answer("b"), "c"), (answer("d"), ["c", "d"])]
    for rows, wanted in ((entries, 2 / 3), (entries[:2], 1 / 2)):
        assert scores_of(rows, metrics="exact_match").compute() == {"exact_match": wanted}
    assert scores_of(entries).compute() == {}


def test_a_metric_that_fails_leaves_the_output(capsys):
    scores = scores_of([(answer("a"), "a")], metrics="exact_match")
    scores.metrics = {"broken": (SimpleNamespace(compute=lambda predictions: {}), False)}
    with pytest.raises(SystemExit):
        scores.compute()
    assert "error: out.jsonl is complete, but --metrics broken failed: " in capsys.readouterr().err


# Loading ------------------------------------------------------------------------------------------
def test_weights_that_the_files_lack_are_named(capsys):
    source = SimpleNamespace(base="folder")
    prediction_model.check_loaded(source, {"missing_keys": set()})
    with pytest.raises(SystemExit):
        prediction_model.check_loaded(source, {"missing_keys": {"norm.weight", "head.weight"}})
    error = capsys.readouterr().err
    assert error == "error: folder lacks 2 weights of the model, such as head.weight\n"


# Sharding -----------------------------------------------------------------------------------------
def test_peft_keeps_no_frozen_copy(place):
    model = AutoModelForCausalLM.from_pretrained(place / "llama")
    model.resize_token_embeddings(len(AutoTokenizer.from_pretrained(place / "grown")))
    model = PeftModel.from_pretrained(model, place / "grown")
    ids = torch.tensor([[3, 4, 5]])
    before, size = model(input_ids=ids).logits, sum(p.numel() for p in model.parameters())
    prediction_sharding.drop_frozen_copies(model)
    # those of the embedding and of the head, which are of one size
    dropped = 2 * model.get_input_embeddings().weight.numel()
    assert sum(p.numel() for p in model.parameters()) == size - dropped
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_the_embedding_of_an_encoder_and_a_decoder_is_hidden(place, name):
    kind = AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
    model = kind.from_pretrained(place / name)
    both = model.get_input_embeddings(), model.get_output_embeddings()
    with prediction_sharding.hiding_embeddings(model):
        hidden = model.get_input_embeddings(), model.get_output_embeddings()
    assert hidden == ((None, None) if name == "t5" else both)
    assert (model.get_input_embeddings(), model.get_output_embeddings()) == both


def test_fsdp2_gets_no_copies_and_no_shared_embedding(place, monkeypatch):
    def shard(accelerator, model):
        copies = [one for one in model.modules() if isinstance(one, ModulesToSaveWrapper)]
        kinds = {type(one.original_module) for one in copies}
        seen.append((kinds, model.get_input_embeddings(), model.get_output_embeddings()))
        return model

    seen = []
    monkeypatch.setattr("accelerate.utils.fsdp2_prepare_model", shard)
    monkeypatch.setattr("utils.environment.launched_strategy", lambda: "fsdp2")
    lora = LoraConfig(target_modules=["q"], modules_to_save=["lm_head"])
    model = get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(place / "t5"), lora)
    assert predict.prepare(None, model) is model
    assert seen == [({torch.nn.Identity}, None, None)]
    assert None not in (model.get_input_embeddings(), model.get_output_embeddings())


def test_zero3_gathers_experts_with_all_of_their_block(monkeypatch):
    """Both the experts that a process may skip, and those whose LoRA matrices PEFT reads."""
    leaves = []
    monkeypatch.setattr(
        "deepspeed.utils.set_z3_leaf_modules", lambda model, kinds: leaves.append(kinds)
    )
    adapted = AutoConfig.for_model("qwen3_moe", **EXPERTS)
    lora = LoraConfig(target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    adapted = get_peft_model(AutoModelForCausalLM.from_config(adapted), lora)
    listed = torch.nn.Sequential(torch.nn.Module())
    listed[0].experts = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    accelerator = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3))
    for model in (listed, adapted):
        prediction_sharding.gather_experts(accelerator, model)
    names = [[kind.__name__ for kind in kinds] for kinds in leaves]
    assert names == [["Module"], ["Qwen3MoeSparseMoeBlock"]]


# Kills --------------------------------------------------------------------------------------------
# Starts the run again and again, each time in a fork; kills it when its files have so many bytes.
KILLS = """
import json, os, signal, sys, time
from pathlib import Path
from single import run_one

command, folder, steps = json.loads(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
def size():
    files = [file for file in folder.glob("*") if file.name != "run.json"]
    return sum(file.stat().st_size for file in files if file.exists())
killed = 0
for step in steps:
    begin = size() if folder.exists() else 0
    if (pid := os.fork()) == 0:
        os._exit(run_one(*command))
    while not os.waitpid(pid, os.WNOHANG)[0]:
        try:
            grown = size() - begin
        except FileNotFoundError:
            grown = 0
        if grown >= step:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            killed += 1
            if step % 2:  # as a loss of power may leave it
                for file in folder.glob("lines-*"):
                    file.open("ab").write(b'{"row": 1, "predic')
            break
        time.sleep(0.0005)
print("killed", killed, flush=True)
sys.exit(run_one(*command))
"""


def run_with_kills(forks, command, target, steps):
    """Kill a run after it wrote `steps` bytes, several times; return what was printed."""
    words = json.dumps([str(word) for word in command])
    folder = f"{target}.unfinished"
    path = f"{ROOT / 'tests'}:{ROOT}"
    done = forks.run("-c", KILLS, words, folder, json.dumps(steps), cwd=ROOT, PYTHONPATH=path)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_five_kills_lose_no_line_and_double_none(alone, forks, place, tmp_path):
    target = tmp_path / "out.jsonl"
    command = flags(place / "adapter", place / "in.jsonl", target, *SAMPLED)
    output = run_with_kills(forks, command, target, [0, 1, 200, 301, 100])
    assert "killed 5" in output and "Resumed: " in output
    assert read(target) == alone["sampled"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.metrics.json"]


@pytest.mark.slow
def test_twenty_kills_lose_no_line_and_double_none(forks, place, tmp_path):
    rows = [row | {"number": number} for number, row in enumerate(make_input(200) * 2)]
    source, outputs = write(tmp_path / "in.jsonl", rows), []
    for name in ("whole", "killed"):
        target = tmp_path / f"{name}.jsonl"
        command = flags(place / "llama", source, target, *SAMPLED)
        steps = [200 + 41 * number for number in range(20)] if name == "killed" else []
        assert f"killed {len(steps)}" in run_with_kills(forks, command, target, steps)
        outputs.append(target.read_bytes())
    assert outputs[0] == outputs[1]
    assert [row["number"] for row in map(json.loads, outputs[0].splitlines())] == list(range(400))


@pytest.mark.slow
def test_kill_of_a_launcher_then_another_number_of_processes(
    alone, environment, launch, place, tmp_path
):
    target = tmp_path / "out.jsonl"
    command = flags(place / "adapter", place / "in.jsonl", target, *SAMPLED)
    config = ("--config_file", ROOT / "configs/ddp.yaml")
    words = map(str, (*ACCELERATE, *config, ROOT / "examples/predict.py", *command[1:]))
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment)
    lines = tmp_path / "out.jsonl.unfinished"
    while process.poll() is None and not any(file.stat().st_size for file in lines.glob("lines-*")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    while running(target):  # Linux ends them after the launcher
        time.sleep(0.1)
    done = launch("predict", "ddp", *command[1:], processes=3)
    assert "Resumed: " in done.stdout
    assert read(target) == alone["sampled"]


CUT = """
import os, sys
from single import run_one
from utils import prediction
exec(sys.argv[1])
run_one(*sys.argv[2:])
"""


@pytest.mark.parametrize(
    "end",
    [
        "prediction.flush_folder",
        pytest.param("prediction.shutil.rmtree", marks=pytest.mark.slow),
    ],
)
def test_kill_around_the_renames(alone, forks, place, tmp_path, end):
    """The next start finds its own output, does not load the model, and completes the rest."""
    target = tmp_path / "out.jsonl"
    command = list(map(str, flags(place / "adapter", place / "in.jsonl", target)))
    path = f"{ROOT / 'tests'}:{ROOT}"
    cut = f"{end} = lambda folder: os._exit(9)"
    assert forks.run("-c", CUT, cut, *command, cwd=ROOT, PYTHONPATH=path).returncode == 9
    assert target.is_file() and (tmp_path / "out.jsonl.unfinished").is_dir()
    [(code, output)] = run_single(forks, tmp_path / "..", command)
    assert code == 0 and "Resumed: 22 of 22 rows were done." in output, output
    assert "Unused of the model" not in output and "Loading" not in output
    assert read(target) == alone["adapter"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.metrics.json"]


# Checkpoints --------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--use_peft_lora",)], ids=["full", "lora"])
def test_checkpoint_of_chat_sft(launch, place, tmp_path, more):
    rows = [{"messages": row["messages"]} for row in make_input(40) if "messages" in row]
    data = write(tmp_path / "data.jsonl", rows)
    trained = ("--model_name_or_path", place / "llama", "--dataset_name", data, *more)
    trained += ("--max_steps", 2, "--max_length", 64, "--num_samples", 0, "--eval_strategy", "no")
    launch("chat_sft", "ddp", *trained, "--output_dir", tmp_path / "run", processes=2)
    outputs = []
    for folder in (tmp_path / "run", tmp_path / "run/checkpoint-2"):
        target = tmp_path / f"{folder.name}.out.jsonl"
        launch("predict", "ddp", *flags(folder, place / "in.jsonl", target)[1:])
        outputs.append(read(target))
    assert outputs[0] == outputs[1] and len(outputs[0]) == 22


# Errors -------------------------------------------------------------------------------------------
def test_answers_are_encoded_as_for_training(place, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(place / "llama")
    config, source = Config(tmp_path, perplexity=True), {"positions": None, "num_rows": 1000}
    source = SimpleNamespace(is_seq2seq=False, **source)
    for number, row in enumerate(make_input(12)):
        if "conversations" in row:  # the answer is beside the chat, which chat_sft does not know
            continue
        found = prediction_rows.encode(config, source, tokenizer, row, "row")
        shape = [("messages",), ("prompt", "completion"), ("text",)][number % 4]
        row = {"completion": row.get("label")} | row
        [wanted] = documents.encode(row, 0, prediction_rows.ENCODING, tokenizer, shape, "rows")
        assert (found.input_ids, found.labels) == (wanted["input_ids"], wanted["labels"])


class Config(SimpleNamespace):
    """The settings that encoding and indexing read."""

    defaults = {
        "max_length": None,
        "max_new_tokens": NEW,
        "perplexity": False,
        "metrics": "",
        "reference_key": "",
        "skip_bad_lines": False,
        "per_device_eval_batch_size": 3,
    }

    def __init__(self, folder, **given):
        super().__init__(**self.defaults | given, input_file=str(folder / "rows.jsonl"))


def index_of(place, folder, lines, model="llama", num_rows=1000, **given):
    """Return the index of lines of text or bytes."""
    config = Config(folder, **given)
    tokenizer = AutoTokenizer.from_pretrained(place / model)
    kinds = {"is_seq2seq": model == "t5", "positions": 64, "num_rows": num_rows}
    lines = [line if isinstance(line, bytes) else line.encode() for line in lines]
    Path(config.input_file).write_bytes(b"\n".join(lines))
    encode = partial(prediction_rows.encode, config, SimpleNamespace(**kinds), tokenizer)
    return prediction.build_index(config, encode)


GOOD = json.dumps({"prompt": "the parcel"})
LONG = "parcel " * 90
BAD = {  # line -> words of the error, settings
    "{": ("is not JSON", {}),
    '{"prompt": "a': ("is not JSON (Unterminated string", {}),
    '["prompt"]': ("is a list, not a JSON object", {}),
    '{"prompt": "a", "prompt": "b"}': ("has the key 'prompt' twice", {}),
    '{"question": "a"}': ("has none of the keys messages, prompt and text", {}),
    '{"prompt": ""}': ("has an empty prompt", {}),
    '{"prompt": ["a"]}': ('is not {"role"', {}),
    '{"prompt": 1.5}': ("has no text in prompt, but float", {}),
    '{"messages": []}': ("has an empty messages", {}),
    '{"messages": [{"role": "assistant", "content": "a"}]}': ("no message before the answer", {}),
    '{"prompt": "a", "prediction": 1}': ("has the key 'prediction'", {}),
    '{"prompt": "\\ud800"}': ("half of a surrogate pair", {}),
    json.dumps({"prompt": LONG}): ("--max_new_tokens 8, which exceeds the model's positions", {}),
    json.dumps({"text": LONG[:300]}): ("exceeds --max_length, 20", {"max_length": 20}),
    '{"prompt": "a"}': ("has no text to compare with", {"perplexity": True}),
    '{"prompt": "b", "label": " "}': ("which --metrics needs", {"metrics": "rouge_l"}),
    '{"prompt": "c", "label": "d"}': ("no text to compare", {"metrics": "x", "reference_key": "y"}),
}


@pytest.mark.parametrize("line", BAD)
def test_bad_line_is_named_by_its_number(place, tmp_path, capsys, line):
    reason, given = BAD[line]
    good = json.dumps({"prompt": "the parcel", "label": "late", "y": "late"})
    with pytest.raises(SystemExit):
        index_of(place, tmp_path, [good, "", line, good, line], **given)
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'rows.jsonl'}, line 3") and reason in error
    assert error.count("\n") == 1 and "bad lines besides: 5 [" in error
    index = index_of(place, tmp_path, [good, "", line, good, line], skip_bad_lines=True, **given)
    assert list(index.lines) == [1, 3, 4, 5] and list(index.bad) == [1, 3]
    printed = capsys.readouterr().out
    assert "2 of 4 lines are skipped" in printed and "1 blank lines" in printed


def test_bytes_that_are_no_text_and_unknown_tokens(place, tmp_path, capsys):
    for line, reason in ((b'{"prompt": "\xff"}', "is not JSON"), (GOOD.encode(), "the token '")):
        with pytest.raises(SystemExit):
            index_of(place, tmp_path, ['{"prompt": "<s>"}', line, b""], num_rows=3)
        error = capsys.readouterr().err
        assert "rows.jsonl, line 2 " in error and reason in error


def test_the_flag_for_a_base_that_moved_is_named(place, tmp_path, capsys):
    shutil.copytree(place / "adapter", tmp_path / "adapter")
    file, moved = tmp_path / "adapter/adapter_config.json", str(tmp_path / "moved")
    settings = json.loads(file.read_text()) | {"base_model_name_or_path": moved}
    file.write_text(json.dumps(settings))
    config = SimpleNamespace(
        model_name_or_path=str(tmp_path / "adapter"),
        base_model_name_or_path="",
    )
    with pytest.raises(SystemExit):
        prediction_model.find_source(config)
    error = capsys.readouterr().err
    assert f"its base {moved} (--base_model_name_or_path gives another place) is neither" in error


def test_text_is_not_for_a_model_with_an_encoder(place, tmp_path, capsys):
    with pytest.raises(SystemExit):
        index_of(place, tmp_path, ['{"text": "a b"}'], model="t5")
    assert "the model has an encoder" in capsys.readouterr().err


def test_what_is_not_used_is_named(place, tmp_path, capsys):
    rows = [{"prompt": "the parcel", "text": "x"}, {"messages": [{"from": "human", "value": "a"}]}]
    index_of(place, tmp_path, map(json.dumps, rows))
    printed = capsys.readouterr().out
    assert "key text (1 rows)" in printed and "role human read as user" in printed


def test_a_line_that_became_bad_during_the_run_is_named(place, tmp_path, capsys):
    def encode(row, where):
        return prediction_rows.encode(config, source, tokenizer, row, where)

    index = index_of(place, tmp_path, [GOOD, GOOD])
    config, tokenizer = Config(tmp_path), AutoTokenizer.from_pretrained(place / "llama")
    source = SimpleNamespace(is_seq2seq=False, positions=64, num_rows=1000)
    number, example = prediction_rows.read_example(config, index, encode, 1)
    assert number == 2 and example.job == prediction.GENERATE
    (tmp_path / "rows.jsonl").write_text(f"{GOOD}\n{{{GOOD[1:-1]}]\n")
    with pytest.raises(SystemExit):
        prediction_rows.read_example(config, index, encode, 1)
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'rows.jsonl'}, line 2 is not JSON")


def test_batches_are_the_same_on_any_number_of_processes(place, tmp_path):
    rows = [json.dumps(row) for row in make_input(40)]
    index, done = index_of(place, tmp_path, rows), numpy.zeros(40, dtype=bool)
    whole = prediction.deal(index, done, 3, 0, 1, True)
    for count in (2, 3, 5):
        for in_step in (False, True):
            parts = [prediction.deal(index, done, 3, one, count, in_step) for one in range(count)]
            found = [[(job, *rows) for job, rows in part] for part in parts]
            if in_step:
                assert len({tuple(job for job, *_ in part) for part in found}) == 1
            flat = [one for part in found for one in part]
            assert set(flat) == {(job, *rows) for job, rows in whole}
            assert in_step or len(flat) == len(whole)
    done[whole[0][1]], done[whole[1][1][0]] = True, True
    rest = prediction.deal(index, done, 3, 0, 1, True)
    assert [list(rows) for _, rows in rest] == [list(rows) for _, rows in whole[1:]]


def test_incomplete_lines_are_cut(tmp_path):
    lines = ['{"row": 3, "x": 1}', '{"row": 0, "x": "é"}']
    whole = "".join(f"{line}\n" for line in lines).encode()
    for tail in (b"", b'{"row": 1', b"\0\0\0\n" + whole, b'{"row": 9}\n', b"[1]\n", b'{"row": 1}'):
        file = tmp_path / "lines-00000.jsonl"
        file.write_bytes(whole + tail)
        prediction.drop_incomplete_lines(file, 4)
        assert file.read_bytes() == whole


def test_refusals(forks, place, tmp_path):
    """Nothing is written, and what is there stays."""
    source, target = place / "in.jsonl", tmp_path / "out.jsonl"
    write(tmp_path / "bad.jsonl", ["{"])
    (tmp_path / "taken.jsonl").write_text("mine")
    (tmp_path / "foreign.jsonl.unfinished").mkdir()
    (tmp_path / "foreign.jsonl.unfinished" / "mine").touch()
    model = place / "llama"
    start = partial(flags, model, source, target)
    cases = {
        "taken.jsonl exists: choose another": flags(model, source, tmp_path / "taken.jsonl"),
        "foreign.jsonl.unfinished holds no unfinished run": flags(
            model, source, tmp_path / "foreign.jsonl"
        ),
        "is the input: choose another": flags(model, source, source, "--overwrite_output_file"),
        "bad.jsonl, line 1 is not JSON": flags(model, tmp_path / "bad.jsonl", target),
        "in2.jsonl is not a file: check the path": flags(model, place / "in2.jsonl", target),
        "is neither a folder nor a Hub id": flags("./none", source, target),
        "holds no config.json": flags(place, source, target),
        "--metrics none cannot be loaded": start("--metrics", "none"),
        "--temperature is -1.0: give 0": start("--temperature", -1),
        "--top_p is 0.0: give": start("--top_p", 0),
        "give one of them": start("--perplexity", "--metrics", "exact_match"),
        "--base_model_name_or_path x needs an adapter": start("--base_model_name_or_path", "x"),
        "exceeds the model's": start("--max_length", 10**6),
        "the model has no base_model.model.model.layers.7.": flags(
            place / "misfit", source, tmp_path / "misfit.jsonl"
        ),
    }
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for words, (code, output) in zip(cases, run_single(forks, place, *cases.values()), strict=True):
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        assert code == 1 and len(errors) == 1 and words in errors[0], f"{words}:\n{output}"
        assert "Traceback" not in output
    shutil.rmtree(tmp_path / "misfit.jsonl.unfinished")  # it had begun when its weights were read
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_lines_of_another_run_are_kept(tmp_path, capsys):
    config = SimpleNamespace(output_file=str(tmp_path / "out.jsonl"), overwrite_output_file=False)
    first = prediction.Output(config, 0)
    first.begin({"input": "a", "seed": 1}, 3, None)
    first.write({2: {"prediction": "x"}})
    same = prediction.Output(config, 0)
    same.begin({"seed": 1, "input": "a"}, 3, None)
    assert list(same.done) == [False, False, True]
    with pytest.raises(SystemExit):
        prediction.Output(config, 0).begin({"input": "b", "seed": 1}, 3, None)
    error = capsys.readouterr().err
    assert "an unfinished run with input 'a' (now 'b'): give the same to resume it" in error
    config.overwrite_output_file = True
    other = prediction.Output(config, 0)
    other.begin({"input": "a", "seed": 1}, 3, None)  # the flag does not drop the run's own lines
    assert other.done.any()
    other.begin({"input": "b", "seed": 1}, 3, None)
    assert not other.done.any() and not list(other.folder.glob("lines-*"))


@pytest.mark.slow
def test_another_run_is_not_resumed(alone, forks, place, tmp_path):
    """A change of model, input or settings is named; the flag drops the lines of the other run."""
    target, source = tmp_path / "out.jsonl", write(tmp_path / "in.jsonl", read(place / "in.jsonl"))
    command = list(map(str, flags(place / "llama", source, target)))
    cut = "prediction.write_lines = lambda *args: os._exit(9)"
    path = f"{ROOT / 'tests'}:{ROOT}"
    forks.run("-c", CUT, cut, *command, cwd=ROOT, PYTHONPATH=path)
    other = write(tmp_path / "other.jsonl", read(source)[:-1])
    changes = [
        (flags(place / "llama", source, target, "--temperature", 1), "temperature 0.0 (now 1.0)"),
        (flags(place / "adapter", source, target), "model ['"),
        (flags(place / "llama", other, target), "input '"),
        (command, "Resumed: 22 of 22"),
        (flags(place / "adapter", source, target, "--overwrite_output_file"), "written to"),
    ]
    runs = run_single(forks, place, *(one for one, _ in changes))
    for (code, output), (_, words) in zip(runs, changes, strict=True):
        assert words in output and code == ("now" in output or "unfinished run" in output), output
    assert read(target) == alone["adapter"]


# Memory -------------------------------------------------------------------------------------------
PEAK = """
import re, sys, threading, time
from pathlib import Path
from single import run_one

def held():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
begin, peak = held(), [0]
def watch():
    while True:
        peak[0] = max(peak[0], held())
        time.sleep(0.02)
threading.Thread(target=watch, daemon=True).start()
code = run_one(*sys.argv[1:])
print("grown by", round(peak[0] - begin, 1), "MB", flush=True)
sys.exit(code)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_input(forks, place, tmp_path):
    grown = {}
    for count in (1000, 100_000):
        words = "the parcel train phone bill order is late today please agent".split()
        texts = (
            " ".join(words[number % 7 : number % 7 + 2 + number % 3]) for number in range(count)
        )
        source = write(
            tmp_path / f"{count}.jsonl", ({"id": n, "text": t} for n, t in enumerate(texts))
        )
        command = flags(place / "llama", source, tmp_path / f"{count}.out.jsonl", "--perplexity")
        command += ("--per_device_eval_batch_size", 256)
        path = f"{ROOT / 'tests'}:{ROOT}"
        done = forks.run("-c", PEAK, *command, cwd=ROOT, PYTHONPATH=path, timeout=1800)
        assert done.returncode == 0, done.stdout
        grown[count] = float(done.stdout.rpartition("grown by ")[2].split()[0])
        ids = [row["id"] for row in map(json.loads, (tmp_path / f"{count}.out.jsonl").open())]
        assert ids == list(range(count))
    print(f"RssAnon grew by {grown} MB")
    assert grown[100_000] <= grown[1000] + 50 * 0.9, grown
