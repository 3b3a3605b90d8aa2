"""Predict with a trained model: JSONL in, JSONL out, in order, resumable, under any strategy.

Base:    none
Changes: no sections
Run:     accelerate launch --config_file configs/ddp.yaml examples/predict.py \
--model_name_or_path outputs/chat_sft --input_file IN.jsonl --output_file OUT.jsonl
Needs:   2 CPU processes with 578 MB each for the shipped model; not measured on GPUs
Expect:  20 answers to assets/chat in 102 s with startup (2 busy cores of an AMD EPYC, 2026-11-28)
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import accelerate
import torch
import torch.distributed.fsdp
import transformers

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # finds utils/
from utils import chat_templates, environment, generation, launch, prediction, prediction_model
from utils import prediction_rows, prediction_scores, prediction_sharding, results

METRICS = "assets/metrics"  # exact_match, token_f1 and rouge_l


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
    quantization = {}
    if config.use_4bit_quantization:
        quantization["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=source.dtype,
        )
    model, report = source.auto_model.from_pretrained(
        source.base,
        dtype=source.dtype,
        attn_implementation=config.attn_implementation,
        use_safetensors=True,
        # the strategy decides where the weights go
        device_map=launch.device_map(),
        output_loading_info=True,
        **quantization,
    )
    prediction_model.check_loaded(source, report)
    model.generation_config = prediction_model.generation_settings(source, tokenizer)
    if source.adapter:
        if source.resized:
            model.resize_token_embeddings(source.resized, mean_resizing=False)
        model = prediction_model.load_adapter(model, source)
    return model.eval().requires_grad_(False)


def set_engine_dtype(accelerator, dtype):
    """Let DeepSpeed's engine and zero.Init keep the dtype of the weights. Call before loading."""
    settings = accelerator.deepspeed_plugin.deepspeed_config
    settings["bf16"] = {"enabled": dtype == "bfloat16"}
    settings["fp16"] = {"enabled": dtype == "float16"}
    # DeepSpeed needs a batch size, even without training
    settings["train_micro_batch_size_per_gpu"] = 1
    accelerator.deepspeed_plugin.set_deepspeed_weakref()


def prepare(accelerator, model):
    """Return the model under the launched strategy: sharded, or a copy in each process.

    Prediction has no optimizer. Without one, accelerate's `prepare` works only under ZeRO-3 and
    FSDP1. Under FSDP2 its inner function `fsdp2_prepare_model` is called instead. Under ZeRO-1 and
    2 there is nothing to shard.
    """
    strategy = environment.launched_strategy()
    if strategy == "zero3":
        prediction_sharding.gather_experts(accelerator, model)
    if strategy in ("zero3", "fsdp1"):
        return accelerator.prepare(model)
    if strategy == "fsdp2":
        prediction_sharding.drop_frozen_copies(model)
        with prediction_sharding.hiding_embeddings(model):
            model = accelerate.utils.fsdp2_prepare_model(accelerator, model)
        # makes `generate` gather the root unit, as `forward` does
        torch.distributed.fsdp.register_fsdp_forward_method(model, "generate")
        return model
    return model.to(accelerator.device)


# Prediction ---------------------------------------------------------------------------------------
def pad(sequences, value, side="right"):
    """Return lists of different lengths as one tensor, padded at a side."""
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(sequence) for sequence in sequences],
        batch_first=True,
        padding_value=value,
        padding_side=side,
    )


def collate(accelerator, tokenizer, examples, side="right"):
    """Return the tokens of the rows as a batch on the device, padded at a side."""
    rows = [example.input_ids for example in examples]
    masks = [[1] * len(row) for row in rows]
    batch = {
        "input_ids": pad(rows, tokenizer.pad_token_id, side),
        "attention_mask": pad(masks, 0, side),
    }
    return accelerate.utils.send_to_device(batch, accelerator.device)


def generate(config, accelerator, model, tokenizer, examples, lines):
    """Return the new keys of each row: the prediction, and why it ended (stop or length).

    Args:
        lines: line number of each row; with the seed, it decides the row's random numbers.
    """
    is_seq2seq = model.config.is_encoder_decoder
    # a causal model continues where the prompt ends
    side = "right" if is_seq2seq else "left"
    batch = collate(accelerator, tokenizer, examples, side)
    processors = transformers.LogitsProcessorList()
    if config.temperature:
        noise = prediction_model.GumbelNoise(
            config.seed,
            lines,
            config.temperature,
            config.top_p,
            accelerator.device,
        )
        processors.append(noise)
    tokens = model.generate(
        **batch,
        max_new_tokens=config.max_new_tokens,
        logits_processor=processors,
        # a process that is done still takes part in gathering
        synced_gpus=environment.shards_parameters(),
    )
    # before the answer: the decoder's start token, or the prompt
    begin = 1 if is_seq2seq else batch["input_ids"].shape[1]
    end_tokens = model.generation_config.eos_token_id
    entries = []
    for answer in tokens[:, begin:].tolist():
        ends = [place for place, token in enumerate(answer) if token in end_tokens]
        if ends:
            answer = answer[: ends[0]]
        text = tokenizer.decode(answer, skip_special_tokens=True)
        reason = "stop" if ends else "length"
        entries.append({"prediction": text.strip(), "finish_reason": reason})
    return entries


def score(accelerator, model, tokenizer, examples):
    """Return the new keys of each row: the mean loss of its label tokens, and their number."""
    batch = collate(accelerator, tokenizer, examples)
    labels = pad([example.labels for example in examples], -100)
    labels = labels.to(accelerator.device)
    if model.config.is_encoder_decoder:
        logits = model(**batch, labels=labels, use_cache=False).logits
    else:
        logits = model(**batch, use_cache=False).logits
        # each position predicts the next token; count from the end, because an adapter for
        # prompt tuning puts positions before the row
        width = labels.shape[1]
        logits = logits[:, -width:-1]
        labels = labels[:, 1:]
    losses = [
        torch.nn.functional.cross_entropy(
            row.float(),
            wanted,
            # no loss on the prompt or on padding
            ignore_index=-100,
            reduction="sum",
        )
        for row, wanted in zip(logits, labels, strict=True)
    ]
    losses = torch.stack(losses).tolist()
    counts = labels.ne(-100).sum(dim=1).tolist()
    return [
        {"loss": prediction_scores.finite(loss / count), "tokens": count}
        for loss, count in zip(losses, counts, strict=True)
    ]


def predict(config, accelerator, model, tokenizer, read, batches, output):
    """Predict the rows of this process's batches, and write their lines after each batch."""
    bar = accelerate.utils.tqdm(batches, disable=not accelerator.is_main_process)
    # a sharded model is gathered once, if every process has memory for all of it
    gathered = generation.generating(accelerator, model, config.layerwise_generation)
    with gathered as generator, torch.no_grad(), accelerator.autocast():
        for job, rows in bar:
            lines, examples = zip(*map(read, rows))
            if job == prediction.GENERATE:
                entries = generate(config, accelerator, generator, tokenizer, examples, lines)
            else:
                entries = score(accelerator, generator, tokenizer, examples)
            # on the disk before the next batch begins
            output.write(dict(zip(rows, entries, strict=True)))


def main():
    config, source = prediction_model.read_prediction_settings(Config)
    tokenizer = prediction_model.load_tokenizer(config, source)
    accelerator = launch.start_accelerator(tf32=config.tf32)
    output = prediction.Output(config, accelerator.process_index)
    # a resumed run puts the date of its first start into the chats
    tokenizer, date = chat_templates.pin_date(tokenizer, output.state.get("date"))

    def encode(row, where):
        return prediction_rows.encode(config, source, tokenizer, row, where)

    shared = [None, None]
    # the main process alone, so that the input is encoded once
    if accelerator.is_main_process:
        scores = prediction_scores.Scores(config, METRICS)
        index = prediction.build_index(config, encode)
        identity = prediction_model.identify(config, source, index)
        output.begin(identity, len(index.lines), date)
        shared = [index, output.done]
    index, done = accelerate.utils.broadcast_object_list(shared)
    output.join(done)

    def read(row):
        return prediction_rows.read_example(config, index, encode, row)

    batches = prediction.deal(
        index,
        output.done,
        config.per_device_eval_batch_size,
        accelerator.process_index,
        accelerator.num_processes,
        # processes that gather layers together need equally many batches
        in_step=environment.shards_parameters(),
    )
    if batches:
        if environment.launched_strategy() == "zero3":
            set_engine_dtype(accelerator, source.dtype)
        model = build_model(config, source, tokenizer)
        model = prepare(accelerator, model)
        predict(config, accelerator, model, tokenizer, read, batches, output)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        lines = prediction.merge(config, index, output, read, scores)
        output.publish(lines, scores.report)
    results.end_run(accelerator)


if __name__ == "__main__":
    main()
