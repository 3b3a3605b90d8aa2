"""Predict with a trained model: JSONL in, JSONL out, in order, resumable, under any strategy.

Base:    none
Changes: no sections
Run:     accelerate launch --config_file configs/ddp.yaml examples/predict.py \
--model_name_or_path outputs/chat_sft --input_file IN.jsonl --output_file OUT.jsonl
Needs:   2 CPU processes with 578 MB each for the shipped model; not measured on GPUs
Expect:  20 answers to assets/chat in 102 s with startup (2 busy cores of an AMD EPYC, 2026-11-28)
"""

import math
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, send_to_device
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft.utils import ModulesToSaveWrapper
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import BitsAndBytesConfig, LogitsProcessorList

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # finds utils/
from utils.chat_templates import pin_date
from utils.conversations import DataError
from utils.environment import launched_strategy, shards_parameters
from utils.errors import fail, first_line, refuse, refusing, say
from utils.experts import allow_skipping
from utils.generation import generating
from utils.launch import device_map, start_accelerator
from utils.lora import gather_blocks
from utils.prediction import GENERATE, Output, build_index, deal, merge
from utils.prediction_model import GumbelNoise, generation_settings, identify, load_adapter
from utils.prediction_model import load_metrics, load_tokenizer, read_prediction_settings
from utils.prediction_rows import encode, read_example
from utils.results import end_run

METRICS = "assets/metrics"  # exact_match, token_f1 and rouge_l
COUNTS = ("predicted", "ended_by_length", "scored", "tokens", "bad_lines")


# Settings -----------------------------------------------------------------------------------------
@dataclass
class Config:
    """Model, data and decoding. The launch config sets processes, precision, sharding."""

    model_name_or_path: str = ""
    """folder of an adapter, a full model or a checkpoint of chat_sft; or Hub id"""
    base_model_name_or_path: str = ""
    """full model under an adapter; empty: the one that the adapter names"""
    input_file: str = ""
    """.jsonl file; each line has messages, a prompt or a text"""
    output_file: str = ""
    """.jsonl file to write: each line of the input with further keys"""
    overwrite_output_file: bool = False
    """replace an earlier output, and drop an unfinished run with other settings"""
    skip_bad_lines: bool = False
    """do not stop at a bad line, but write the reason into the output"""
    dtype: str = "auto"
    """dtype of the weights; auto: the mixed-precision dtype, or else that of the files"""
    attn_implementation: str = "sdpa"
    """attention backend: sdpa, eager, ..."""
    use_4bit_quantization: bool = False
    """load the full model in 4 bits (nf4); not with ZeRO-3 or FSDP"""
    tf32: bool = False
    """matrix products in TF32 on GPUs: faster, less exact"""
    layerwise_generation: bool = False
    """generate with one layer gathered at a time: less memory, slow"""
    chat_template_format: str = "none"
    """chat template: chatml, zephyr, a .jinja file, or the name of a template of the tokenizer;
    none: the tokenizer's only template, or the one called default"""
    max_length: int | None = None
    """maximum tokens of a prompt with its answer, or of a text; longer lines are bad; unset: as
    many as the model has positions"""
    max_new_tokens: int = 256
    """maximum tokens of an answer"""
    per_device_eval_batch_size: int = 8
    """rows per batch and process"""
    temperature: float = 0.0
    """0: greedy decoding; above 0: sample at this temperature"""
    top_p: float = 1.0
    """sample among the most probable tokens that together have this probability"""
    seed: int = 42
    """seed of the random numbers that sampling uses"""
    perplexity: bool = False
    """score the given answers instead of generating; texts are always scored"""
    metrics: str = ""
    """scores of the predictions, comma separated: exact_match, token_f1, rouge_l, the path of a
    script of the library evaluate, or a Hub name"""
    reference_key: str = ""
    """key of the wanted answer; empty: the chat's last message, completion or label"""


# Model --------------------------------------------------------------------------------------------
def build_model(config, source, tokenizer):
    """Return the full model, or the base with its adapter; stop if a weight is missing."""
    options = {"dtype": source.dtype, "attn_implementation": config.attn_implementation}
    options |= {"use_safetensors": True, "device_map": device_map()}
    if config.use_4bit_quantization:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=source.dtype,
        )
    model, report = source.auto_model.from_pretrained(
        source.base, output_loading_info=True, **options
    )
    if missing := sorted(report["missing_keys"]):
        refuse(f"{source.base} lacks {len(missing)} weights of the model, such as {missing[0]}")
    model.generation_config = generation_settings(source, tokenizer)
    if source.adapter:
        if source.resized:
            model.resize_token_embeddings(source.resized, mean_resizing=False)
        model = load_adapter(model, source)
    return model.eval().requires_grad_(False)


def set_engine_dtype(accelerator, source):
    """Let DeepSpeed's engine and zero.Init keep the dtype of the weights. Call before loading."""
    settings = accelerator.deepspeed_plugin.deepspeed_config
    for name, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        settings[name] = {"enabled": source.dtype == dtype}
    settings["train_micro_batch_size_per_gpu"] = 1  # DeepSpeed needs one, also without training
    accelerator.deepspeed_plugin.set_deepspeed_weakref()


def prepare(accelerator, model):
    """Return the model under the launched strategy: sharded, or a copy in each process.

    Prediction has no optimizer. Without one, accelerate's `prepare` works only under ZeRO-3 and
    FSDP1. Under FSDP2 its inner function `fsdp2_prepare_model` is called instead. Under ZeRO-1 and
    2 there is nothing to shard.
    """
    strategy = launched_strategy()
    if strategy == "zero3":
        allow_skipping(accelerator, model)
        gather_blocks(model)
    if strategy in ("zero3", "fsdp1"):
        return accelerator.prepare(model)
    if strategy == "fsdp2":
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper):
                # drop PEFT's unused frozen copy: with it, a tied weight would be in two FSDP2 units
                module.original_module = torch.nn.Identity()
        if model.config.is_encoder_decoder:
            # accelerate would put the shared embedding into two units, which FSDP2 does not accept
            model.get_input_embeddings = model.get_output_embeddings = lambda: None
        model = fsdp2_prepare_model(accelerator, model)
        for name in ("get_input_embeddings", "get_output_embeddings"):
            vars(model).pop(name, None)
        register_fsdp_forward_method(model, "generate")  # gathers the root unit, as forward does
        return model
    return model.to(accelerator.device)


# Prediction ---------------------------------------------------------------------------------------
def pad(sequences, value, side="right"):
    """Return lists of different lengths as one tensor, padded at a side."""
    tensors = [torch.tensor(sequence) for sequence in sequences]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


def generate(config, accelerator, model, tokenizer, examples, lines):
    """Return the new keys of each row: the prediction, and why it ended (stop or length).

    Args:
        lines: line number of each row; with the seed, it decides the row's random numbers.
    """
    is_seq2seq, prompts = model.config.is_encoder_decoder, [one.input_ids for one in examples]
    side = "right" if is_seq2seq else "left"
    inputs = {
        "input_ids": pad(prompts, tokenizer.pad_token_id, side),
        "attention_mask": pad([[1] * len(prompt) for prompt in prompts], 0, side),
    }
    processors = []
    if config.temperature:
        sampling = (config.seed, lines, config.temperature, config.top_p)
        processors = [GumbelNoise(*sampling, accelerator.device)]
    tokens = model.generate(
        **send_to_device(inputs, accelerator.device),
        max_new_tokens=config.max_new_tokens,
        logits_processor=LogitsProcessorList(processors),
        synced_gpus=shards_parameters(),  # a process that is done still takes part in gathering
    )
    begin = 1 if is_seq2seq else inputs["input_ids"].shape[1]
    ends, entries = {*model.generation_config.eos_token_id}, []
    for answer in tokens[:, begin:].tolist():
        end = next((place for place, token in enumerate(answer) if token in ends), None)
        text = tokenizer.decode(answer[:end], skip_special_tokens=True).strip()
        entries.append({"prediction": text, "finish_reason": "length" if end is None else "stop"})
    return entries


def score(accelerator, model, tokenizer, examples):
    """Return the new keys of each row: the mean loss of its label tokens, and their number."""
    inputs = [one.input_ids for one in examples]
    batch = {
        "input_ids": pad(inputs, tokenizer.pad_token_id),
        "attention_mask": pad([[1] * len(ids) for ids in inputs], 0),
        "labels": pad([one.labels for one in examples], -100),
    }
    batch = send_to_device(batch, accelerator.device)
    labels = batch["labels"]
    if model.config.is_encoder_decoder:
        logits = model(**batch, use_cache=False).logits
    else:  # each position predicts the next token
        labels, width = batch.pop("labels")[:, 1:], batch["input_ids"].shape[1]
        logits = model(**batch, use_cache=False).logits[:, -width:-1]
    losses = [
        cross_entropy(row.float(), wanted, ignore_index=-100, reduction="sum")
        for row, wanted in zip(logits, labels, strict=True)
    ]
    losses, counts = torch.stack(losses).tolist(), labels.ne(-100).sum(dim=1).tolist()
    losses = [loss / count if math.isfinite(loss) else None for loss, count in zip(losses, counts)]
    return [{"loss": loss, "tokens": count} for loss, count in zip(losses, counts, strict=True)]


class Scores:
    """The scores of a run: perplexity and metrics. Only the main process needs them."""

    def __init__(self, config, metrics):
        self.config, self.metrics = config, metrics
        self.counts, self.loss, self.pairs = Counter(), 0.0, []

    def add(self, entry, read):
        """Count a line of the output; `read` returns the line number and the `Example`."""
        if "prediction" in entry:
            self.counts.update(predicted=1, ended_by_length=entry["finish_reason"] == "length")
            if self.metrics:
                self.pairs.append((entry["prediction"], read()[1].reference))
        elif "loss" in entry:
            self.loss += math.nan if entry["loss"] is None else entry["loss"] * entry["tokens"]
            self.counts.update(scored=1, tokens=entry["tokens"])
        else:
            self.counts.update(bad_lines=1)

    def report(self):
        """Print the counts and scores, and return the content of the metrics file."""
        counts, scores = {name: self.counts[name] for name in COUNTS}, self.compute()
        print(
            "written to {}: {predicted} predictions, {ended_by_length} of them ended by "
            "--max_new_tokens; {scored} scored rows with {tokens} label tokens; {bad_lines} bad "
            "lines".format(self.config.output_file, **counts)
        )
        for name, value in scores.items():
            print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
        return {"config": asdict(self.config), "counts": counts, "scores": scores}

    def compute(self):
        """Return name -> score."""
        scores = {}
        if self.counts["tokens"]:
            loss = self.loss / self.counts["tokens"]
            scores["loss"] = loss if math.isfinite(loss) else None  # JSON has no NaN
            scores["perplexity"] = math.exp(min(loss, 700)) if math.isfinite(loss) else None
        predictions, references = [one for one, _ in self.pairs], [one for _, one in self.pairs]
        lists = [[one] if isinstance(one, str) else one for one in references]
        has_lists = any(isinstance(one, list) for one in references)
        for name, (metric, wants_lists) in self.metrics.items() if self.pairs else ():
            wanted = lists if has_lists or wants_lists else references  # all texts or all lists
            try:
                found = metric.compute(predictions=predictions, references=wanted)
            except Exception as error:  # a metric may raise anything
                output = self.config.output_file
                fail(f"{output} is complete, but --metrics {name} failed: {first_line(error)}")
            scores |= {key if key == name else f"{name}.{key}": one for key, one in found.items()}
        return scores


def predict(config, accelerator, model, tokenizer, read, batches, output):
    """Predict the rows of this process's batches, and write their lines after each batch."""
    bar = tqdm(batches, disable=not accelerator.is_main_process)
    # a sharded model is gathered once, if every process has memory for all of it
    gathered = generating(accelerator, model, config.layerwise_generation)
    with gathered as generator, torch.no_grad(), accelerator.autocast():
        for job, rows in bar:
            lines, examples = zip(*map(read, rows))
            if job == GENERATE:
                entries = generate(config, accelerator, generator, tokenizer, examples, lines)
            else:
                entries = score(accelerator, generator, tokenizer, examples)
            output.write(dict(zip(rows, entries, strict=True)))


def main():
    config, source = read_prediction_settings(Config)
    tokenizer = load_tokenizer(config, source)
    accelerator = start_accelerator(tf32=config.tf32)
    output = Output(config, accelerator.process_index)
    tokenizer, date = pin_date(tokenizer, output.state.get("date"))
    encode_row, metrics, shared = partial(encode, config, source, tokenizer), {}, [None, None]
    if accelerator.is_main_process:  # alone, so that the input is encoded once
        metrics = load_metrics(config.metrics, METRICS)
        index = build_index(config, encode_row)
        output.begin(identify(config, source, index), len(index.lines), date)
        shared = [index, output.done]
    index, done = broadcast_object_list(shared)
    output.join(done)
    if count := output.done.sum():
        say(f"Resumed: {count} of {len(index.lines)} rows were done.")
    place = (accelerator.process_index, accelerator.num_processes)
    size, in_step = config.per_device_eval_batch_size, shards_parameters()
    batches = deal(index, output.done, size, *place, in_step)
    read = partial(read_example, config, index, encode_row)
    if batches:
        if launched_strategy() == "zero3":
            set_engine_dtype(accelerator, source)
        model = prepare(accelerator, build_model(config, source, tokenizer))
        with refusing(DataError):  # if the input has changed since it was indexed
            predict(config, accelerator, model, tokenizer, read, batches, output)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        scores = Scores(config, metrics)
        output.publish(merge(config, index, output, read, scores), scores.report)
    end_run(accelerator)


if __name__ == "__main__":
    main()
