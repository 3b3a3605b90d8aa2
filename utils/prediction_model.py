"""Find and check the model to predict with, and what `generate` needs to know of it."""

import hashlib
import json
import os
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers import GenerationConfig, LogitsProcessor, TopPLogitsWarper
from transformers.utils.peft_utils import find_adapter_config_file

from utils.chat_templates import TEMPLATES, take_template
from utils.environment import launched_precision, launched_strategy, shards_parameters
from utils.errors import first_line, or_refuse, refuse, say
from utils.folders import lock_folder
from utils.launch_checks import check_launch
from utils.lora import adapter_rows
from utils.model_files import DTYPES, HALF, adapter_base, build_skeleton, check_code, check_layers
from utils.model_files import check_place, check_weight_names
from utils.prediction import check_free, metrics_file, unfinished_folder
from utils.content import content_of
from utils.settings import check_numbers, parse_arguments
from utils.vocabulary import turn_ends

STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp1", "fsdp2")
WEIGHTS = "adapter_model.safetensors"
# generation settings that are not about how the next token is chosen
KEPT = ("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id")
KEPT += ("forced_bos_token_id", "forced_eos_token_id")
# settings that decide what is predicted
IDENTIFYING = ("attn_implementation", "use_4bit_quantization", "tf32", "max_new_tokens")
IDENTIFYING += ("temperature", "perplexity")
SAMPLING = ("top_p", "seed")
UNSAID = ("max_length", "max_new_tokens", "transformers_version", "use_cache", "_from_model_config")


class Source(NamedTuple):
    """Where a model is, and what is known of it before its weights are read.

    Fields:
        name: --model_name_or_path, which holds the tokenizer.
        base: folder or Hub id of the full model.
        adapter: that of the adapter, or "".
        auto_model: the Auto class that loads the full model.
        is_seq2seq: whether it has an encoder and a decoder.
        dtype: name of the dtype of the loaded weights.
        positions: most tokens of a text that the model has positions for; None: no limit.
        num_rows: tokens that have a row in the embedding.
        resized: that number where the adapter has an embedding of its own; else 0.
        identity: what a run must have in common with the one that it resumes.
    """

    name: str
    base: str
    adapter: str
    auto_model: type
    is_seq2seq: bool
    dtype: str
    positions: int | None
    num_rows: int
    resized: int
    identity: dict


# Checks -------------------------------------------------------------------------------------------
def read_prediction_settings(Config):
    """Return the settings of the command line and the `Source`; stop with an error if one is wrong.

    All that can be known before a weight or a row is read is checked here.
    """
    config = parse_arguments(Config)
    if not config.model_name_or_path:
        refuse("--model_name_or_path is missing: name the folder of a model or an adapter")
    given = {name: value for name, value in vars(config).items() if value is not None}
    dtype = config.dtype if config.dtype != "auto" else "float32"
    check_numbers(SimpleNamespace(**given | {"dtype": dtype}))
    if not 0 <= config.temperature < float("inf"):
        refuse(f"--temperature is {config.temperature}: give 0 (greedy), or a number above 0")
    if not 0 < config.top_p <= 1:
        refuse(f"--top_p is {config.top_p}: give a number above 0 and at most 1")
    if config.top_p < 1 and not config.temperature:
        say(f"--top_p {config.top_p} is unused without --temperature: decoding is greedy.")
    if config.metrics and config.perplexity:
        refuse("--metrics scores predictions, and --perplexity makes none: give one of them")
    # DeepSpeed's own limits on the dtype hold for its engine, which only zero3 uses (check_dtype)
    check_launch(SimpleNamespace(**given | {"dtype": "float32"}), STRATEGIES, "frozen")
    check_files(config)
    return config, find_source(config)


def check_files(config):
    """Stop if the input cannot be read, or the output not be written."""
    for flag in ("input_file", "output_file"):
        if not getattr(config, flag):
            refuse(f"--{flag} is missing: name a .jsonl file")
    source, target = Path(config.input_file), Path(config.output_file)
    if not or_refuse(f"--input_file {source}", source.is_file):
        refuse(f"--input_file {source} is not a file: check the path")
    or_refuse(f"--input_file {source} cannot be read", lambda: source.open("rb").close())
    lock_folder("output_file", config.output_file)
    folder = unfinished_folder(config)
    for path in (target, metrics_file(config)):
        if path.is_dir():
            refuse(f"{path} is a folder: choose another --output_file")
        if path.exists() and path.samefile(source):
            refuse(f"{path} is the input: choose another --output_file")
    if folder.is_file():
        refuse(
            f"{folder}, which the run needs as a folder, is a file: choose another --output_file"
        )
    if not os.access(target.absolute().parent, os.W_OK):
        refuse(f"--output_file {target} cannot be written in {target.absolute().parent}")
    if not folder.exists():
        wanted = SimpleNamespace(target=target, metrics=metrics_file(config))
        wanted.overwrites = config.overwrite_output_file
        check_free(wanted)


def find_source(config):
    """Return the `Source` that --model_name_or_path names; stop if it cannot be loaded."""
    name = config.model_name_or_path
    adapter, base = find_adapter(config)
    culprit = f"--model_name_or_path {name}"
    if adapter:
        culprit += f": its base {base} (--base_model_name_or_path gives another place)"
    if not adapter and (Path(name) / "state.pt").is_file():
        refuse(
            f"{culprit} is a checkpoint of causal_lm_lora_resume.py, which does not name its "
            "model: resume that run to its end, and give its --output_dir"
        )
    check_place(base, culprit)
    check_code(base, culprit)
    model_config = or_refuse(f"{culprit} cannot be read", AutoConfig.from_pretrained, base)
    auto_model = AutoModelForCausalLM
    if model_config.is_encoder_decoder:
        auto_model = AutoModelForSeq2SeqLM
    saved = getattr(model_config, "quantization_config", None) or {}
    check_quantized(config, culprit, saved, adapter)
    dtype = find_dtype(config, model_config)
    view = SimpleNamespace(attn_implementation=config.attn_implementation, dtype=dtype)
    skeleton = build_skeleton(view, auto_model, model_config, culprit)
    if Path(base).is_dir() and not saved:
        check_weight_names(Path(base), culprit, skeleton)
    check_layers(view, culprit, skeleton)
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if positions and config.max_length and config.max_length > positions:
        refuse(
            f"--max_length {config.max_length} exceeds the model's {positions} positions: give "
            f"{positions} or less"
        )
    places = [base, *([adapter] if adapter else [])]
    commit = getattr(model_config, "_commit_hash", None)
    identity = {"model": [content_of(place) for place in places], "commit": commit, "dtype": dtype}
    known = skeleton.get_input_embeddings().num_embeddings
    resized = or_refuse(f"{culprit} cannot be read", adapter_rows, adapter, skeleton)
    rows, kind = (resized or known, resized), model_config.is_encoder_decoder
    return Source(name, base, adapter, auto_model, kind, dtype, positions, *rows, identity)


def find_adapter(config):
    """Return the adapter that --model_name_or_path names, or "", and the full model."""
    name, base = config.model_name_or_path, config.base_model_name_or_path
    culprit = f"--model_name_or_path {name}"
    is_adapter, named = adapter_base(name)
    if not Path(name).exists():  # on the Hub
        check_place(name, culprit)
        is_adapter = find_adapter_config_file(name) is not None
    if not is_adapter:
        if base:
            refuse(f"--base_model_name_or_path {base} needs an adapter: {culprit} holds none")
        return "", name
    adapter = or_refuse(f"{culprit} cannot be read", PeftConfig.from_pretrained, name)
    base = base or named or adapter.base_model_name_or_path
    if adapter.task_type not in ("CAUSAL_LM", "SEQ_2_SEQ_LM", None):
        refuse(
            f"{culprit} is an adapter for {adapter.task_type}, which does not write text: give one "
            "for CAUSAL_LM or SEQ_2_SEQ_LM"
        )
    if not base:
        refuse(
            f"{culprit} holds an adapter that does not name its base: give it as "
            "--base_model_name_or_path"
        )
    file = Path(name) / WEIGHTS
    if Path(name).is_dir() and not file.is_file():
        refuse(f"{culprit} holds no {WEIGHTS}: only safetensors are read, save the adapter so")
    if file.is_file():
        with or_refuse(f"{culprit}: {file.name} is damaged", safe_open, file, framework="pt"):
            pass
    if getattr(adapter, "modules_to_save", None):
        # FSDP2 ties weights again where one process reads them, and layers trained in full are not
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    return name, base


def check_quantized(config, culprit, saved, adapter):
    """Stop if quantized weights would have to be sharded; say if the training quantized them."""
    if saved and saved.get("quant_method") != "bitsandbytes":
        refuse(
            f"{culprit} is quantized by {saved.get('quant_method')}, not by bitsandbytes: take a "
            "copy that is not quantized"
        )
    if saved and config.use_4bit_quantization:
        refuse(f"{culprit} is quantized already: drop --use_4bit_quantization")
    if (saved or config.use_4bit_quantization) and shards_parameters():
        refuse(
            f"quantized weights are not sharded here, and {launched_strategy()} would: launch "
            "with configs/ddp.yaml, where each process holds a copy"
        )
    if adapter and was_quantized(adapter) and not (saved or config.use_4bit_quantization):
        say(
            f"{adapter} was trained on a base in 4 bits, which is loaded in full here: "
            "--use_4bit_quantization loads it as in training."
        )


def was_quantized(folder):
    """Return whether a run's files say that its base was quantized to 4 bits."""
    for name, part in (("metrics.json", "config"), ("state.json", "identity")):
        file = Path(folder) / name
        if file.is_file():
            content = or_refuse(f"{file} cannot be read", json.loads, file.read_text())
            settings = content.get(part, {})
            return bool(settings.get("use_4bit_quantization", "bnb_4bit_quant_storage" in settings))
    return False


def find_dtype(config, model_config):
    """Return the name of the dtype of the weights; stop if the strategy cannot have it.

    auto is the dtype of the mixed precision, or without one that of the saved weights.
    """
    precision, saved = HALF.get(launched_precision()), str(model_config.dtype).rpartition(".")[2]
    saved = saved if saved in DTYPES else "float32"
    dtype = (precision or saved) if config.dtype == "auto" else config.dtype
    if launched_strategy() == "zero3" and precision not in (None, dtype):
        refuse(
            f"--dtype {dtype} under zero3, which keeps the weights in the dtype of the mixed "
            f"precision: give {precision}, or launch with --mixed_precision no"
        )
    return dtype


def identify(config, source, index):
    """Return what a run must have in common with the one that it resumes, name -> value."""
    names = [*IDENTIFYING, *(SAMPLING if config.temperature else ())]
    return (
        source.identity
        | {name: getattr(config, name) for name in names}
        | {
            "input": index.digest,
            "tokens of the input": index.tokens,
            "mixed_precision": launched_precision(),
        }
    )


def check_loaded(source, report):
    """Stop if the files of the full model lack a weight.

    Args:
        report: what `from_pretrained` returns with `output_loading_info=True`.
    """
    if missing := sorted(report["missing_keys"]):
        refuse(f"{source.base} lacks {len(missing)} weights of the model, such as {missing[0]}")


def load_adapter(model, source):
    """Return the base model with its adapter; stop if they do not fit each other.

    peft only warns if the file lacks a tensor, and drops a LoRA matrix whose layer is not there.
    """
    # DeepSpeed's engine and the flat parameters of FSDP1 have one dtype
    options = {"autocast_adapter_dtype": launched_strategy() not in ("zero3", "fsdp1")}
    culprit = f"{source.adapter} does not fit {source.base}"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        load = PeftModel.from_pretrained
        model = or_refuse(culprit, load, model, source.adapter, **options)
    stored = {name for name in load_peft_weights(source.adapter, device="cpu") if "lora_" in name}
    known = get_peft_model_state_dict(model, save_embedding_layers=False) if stored else ()
    if dropped := sorted(stored - {*known}):
        refuse(
            f"{culprit}: the model has no {dropped[0]}, nor {len(dropped) - 1} more tensors: give "
            "the base that the adapter was trained on as --base_model_name_or_path"
        )
    return model


# The tokenizer and generation ---------------------------------------------------------------------
def load_tokenizer(config, source):
    """Return the tokenizer of the adapter's or model's folder, with the chat template asked for."""
    for place in (source.name, source.base):
        try:
            tokenizer = AutoTokenizer.from_pretrained(place)
            break
        except Exception as error:  # an adapter without a tokenizer, or a broken one
            reason = error
    else:
        refuse(f"{source.base} has no usable tokenizer, save one with it: {first_line(reason)}")
    choice = config.chat_template_format
    if choice in TEMPLATES:
        missing = {*TEMPLATES[choice].tokens} - {*tokenizer.get_vocab()}
        if missing:
            refuse(
                f"--chat_template_format {choice} needs the tokens {', '.join(sorted(missing))}, "
                "which the model was not trained with: give another template"
            )
        tokenizer.chat_template = TEMPLATES[choice].text
    elif choice != "none" or tokenizer.chat_template:
        or_refuse(f"--chat_template_format {choice}", take_template, tokenizer, choice)
    if tokenizer.eos_token_id is None:
        refuse(f"{place} has a tokenizer without eos_token, so no answer would end: set one")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # padding is masked
    return tokenizer


def generation_settings(source, tokenizer):
    """Return a GenerationConfig that decodes greedily, with the special tokens of the model.

    Prints which other settings of the folder are not used.
    """
    own, places = None, [source.name, source.base]
    for place in places:
        if Path(place, "generation_config.json").is_file() or not Path(place).exists():
            try:
                own = GenerationConfig.from_pretrained(place)
                break
            except OSError:  # a Hub id without generation settings
                continue
    if own is None:
        own = GenerationConfig.from_model_config(AutoConfig.from_pretrained(source.base))
    given = {n: v for n, v in own.to_diff_dict().items() if v is not None and v is not False}
    kept = {name: given[name] for name in KEPT if name in given}
    known = kept.get("eos_token_id", [])
    kept["eos_token_id"] = sorted(
        {*turn_ends(tokenizer), *(known if isinstance(known, list) else [known])}
    )
    kept["pad_token_id"] = tokenizer.pad_token_id
    defaults = GenerationConfig(do_sample=False, num_beams=1)
    unused = [f"{n} {v}" for n, v in given.items() if n not in {*KEPT, *UNSAID}]
    unused = [one for one in unused if one != "num_beams 1"]
    if unused:
        say(f"Unused of the model's generation settings: {', '.join(unused)}.")
    defaults.update(**kept)
    return defaults


class GumbelNoise(LogitsProcessor):
    """Turn greedy decoding into sampling, with random numbers of its own for each row and token.

    The largest of logits / temperature + Gumbel noise is a sample of the softmax (Gumbel 1954). The
    noise of a token depends on the seed, the row and the number of the token alone. So a row gets
    the same sample in any batch and on any number of processes.

    Args:
        seed: --seed.
        rows: a number for each row of the batch.
        temperature: above 0.
        top_p: keep the most probable tokens that together have this probability.
        device: where the logits are; generators of CPUs and GPUs draw different numbers.
    """

    def __init__(self, seed, rows, temperature, top_p, device):
        self.seed, self.rows, self.temperature, self.step = seed, rows, temperature, 0
        self.top_p = TopPLogitsWarper(top_p) if top_p < 1 else None
        self.generator = torch.Generator(device)

    def __call__(self, input_ids, scores):
        scores = scores.float() / self.temperature
        if self.top_p is not None:
            scores = self.top_p(input_ids, scores)
        noise = torch.empty_like(scores)
        for position, row in enumerate(self.rows):
            key = hashlib.sha256(f"{self.seed} {row} {self.step}".encode()).digest()
            self.generator.manual_seed(int.from_bytes(key[:8], "big") >> 1)
            noise[position].exponential_(generator=self.generator)
        self.step += 1
        return scores - noise.clamp_min(torch.finfo(noise.dtype).tiny).log()
