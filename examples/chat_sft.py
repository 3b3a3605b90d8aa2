"""Fine-tune a chat model in production: LoRA, QLoRA or all weights, packed, resumable, on any config there is.

Base:    none
Changes: none
Run:     accelerate launch --config_file configs/ddp.yaml examples/chat_sft.py --use_peft_lora
Needs:   2 CPU processes with 710 MB each for the shipped model; on GPUs not measured
Expect:  perplexity of held-out answers 832 -> 207 in 17 s, start included (2 cores of an AMD EPYC, 2026-11-21)
"""

import math
import os
import signal
import sys
import time
import zlib
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import groupby, islice
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from accelerate.utils import GradientAccumulationPlugin, send_to_device, set_seed
from peft import LoraConfig, TaskType, get_peft_model
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import fsdp_auto_wrap_policy
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.fsdp import register_fsdp_forward_method
from tqdm import tqdm
from transformers import AddedToken, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import BitsAndBytesConfig, GenerationConfig, HfArgumentParser
from transformers.hf_argparser import HfArg
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.integrations.liger import apply_liger_kernel
from transformers.optimization import get_scheduler
from transformers.utils import is_liger_kernel_available

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # holds utils/; one beside the script comes first
from utils.checkpoint import CheckpointError, check_same_run, checkpoints, find_checkpoint, gather_trained
from utils.checkpoint import load_checkpoint, read_state, remove_checkpoints, save_checkpoint
from utils.checks import check_chat_settings, launched_precision, launched_strategy, read_settings, refuse
from utils.checks import refusing, say
from utils.conversations import DataError, as_document, read_splits, shape_of
from utils.generation import generating
from utils.hub import HubPusher
from utils.launch import adamw, device_map, move_quant_states, shard_4bit_model, size_buckets
from utils.launch import start_accelerator, uses_gpu
from utils.loss import add_token_loss, check_token_loss
from utils.memory import MemoryTracker, fits_whole, plot_memory
from utils.packing import build_loader, join, pack, shuffled_places, split_evenly, stream_places
from utils.report import begin_log, earlier_files, check_adapter, check_model, check_sharding, collect_metrics, end_run
from utils.report import (
    fail,
    fail_together,
    full_shape,
    name_in_file,
    new_folder,
    note,
    print_saved,
    read_numbers,
    write_metrics,
)

# name -> the template, the tokens that it brings, the one of them that ends a turn (none: the tokenizer's)
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' + m['content'] }}<|im_end|>{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
    ),
    "zephyr": (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ '\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{{ '\n' }}{% endif %}",
        ("<|system|>", "<|user|>", "<|assistant|>"),
        None,
    ),
}
ROWS_PER_WORKER = 1000  # how many rows each tokenizing process gets at least
# dense bf16 FLOP per second of a GPU, from the makers' data sheets
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}


# 1. Settings --------------------------------------------------------------------------------------
@dataclass
class Config:  # what is trained; where it runs stands in the launch config, of which --bf16 and --fp16 alone win
    model_name_or_path: str = HfArg(default="assets/tiny-causal-lm", help="folder or Hub id, safetensors only")
    dtype: str = HfArg(default="auto", help="of the weights as loaded; auto: of bf16, fp16 where frozen, else float32")
    attn_implementation: str = HfArg(default="documents", help="documents (utils/packing.py), sdpa, eager, ...")
    use_flash_attn: bool = HfArg(default=False, help="flash-attn's kernels, if this machine has them")
    dataset_name: str = HfArg(default="assets/chat", help="Hub id, folder, .json, .jsonl, .csv or .parquet")
    dataset_text_field: str = HfArg(default="", help="column of plain text, in data without conversations")
    splits: str = HfArg(default="", help="train,test or others; empty: train and, where there is one, test")
    streaming: bool = HfArg(default=False, help="read while training, for data larger than memory; needs max_steps")
    chat_template_format: str = HfArg(default="none", help="chatml, zephyr, a .jinja file; none: the tokenizer's own")
    train_on: str = HfArg(default="assistant", help="assistant (of pairs: the completion) or all tokens")
    add_special_tokens: bool | None = HfArg(default=None, help="the tokenizer's, around; unset: not around chats")
    append_concat_token: bool | None = HfArg(default=None, help="end with the eos token; unset: all but chats do")
    max_length: int = HfArg(default=256, aliases=["--max_seq_len"], help="tokens of a document, and of a pack")
    long_documents: str = HfArg(default="truncate", help="truncate or drop those beyond max_length")
    packing: bool = HfArg(default=False, help="fill each place of a batch with documents up to max_length")
    shuffle: bool = HfArg(default=True, help="another order in every epoch")
    dataloader_num_workers: int = HfArg(default=0, help="processes that prepare batches ahead of the training")
    use_peft_lora: bool = HfArg(default=False, help="train LoRA matrices; else all weights")
    lora_r: int = HfArg(default=8, help="their rank")
    lora_alpha: int = HfArg(default=16, help="their product is scaled by lora_alpha / lora_r")
    lora_dropout: float = HfArg(default=0.0, help="share of its input that a LoRA layer does not see, 0 to below 1")
    lora_target_modules: str = HfArg(
        default="all-linear", aliases=["--target_modules"], help="comma separated, or all-linear"
    )
    use_4bit_quantization: bool = HfArg(default=False, help="a frozen base of 4-bit weights: QLoRA")
    use_8bit_quantization: bool = HfArg(default=False, help="of 8-bit weights, which no strategy shards")
    use_nested_quant: bool = HfArg(default=False, help="quantize the 4-bit weights' scales, too")
    bnb_4bit_quant_type: str = HfArg(default="nf4", help="nf4 or fp4")
    bnb_4bit_compute_dtype: str = HfArg(default="", help="of the arithmetic with 4-bit weights; empty: dtype's")
    bnb_4bit_quant_storage_dtype: str = HfArg(
        default="", aliases=["--bnb_4bit_quant_storage"], help="packs 4-bit weights"
    )
    bf16: bool = HfArg(default=False, help="mixed precision bf16, whatever the launch config says")
    fp16: bool = HfArg(default=False, help="mixed precision fp16, on GPUs")
    tf32: bool = HfArg(default=False, help="multiply float32 in TF32 on GPUs, less exactly")
    torch_compile: bool = HfArg(default=False, help="compile each decoder layer with torch.compile")
    use_liger_kernel: bool | None = HfArg(
        default=None, help="use Liger's RMSNorm, RoPE and SwiGLU; unset: if installed, on GPUs"
    )
    deterministic: bool = HfArg(default=False, help="bit-identical runs on GPUs, slower")
    gradient_checkpointing: bool = HfArg(default=False, help="recompute activations: less memory, more time")
    use_reentrant: bool = HfArg(default=False, help="its older implementation")
    per_device_train_batch_size: int = HfArg(default=8, help="documents (packing: packs) in a process's micro-batch")
    per_device_eval_batch_size: int = HfArg(default=8, help="the same, of the evaluation")
    gradient_accumulation_steps: int = HfArg(default=1, help="micro-batches of one process in an update")
    learning_rate: float = HfArg(default=1e-3, help="peak, after the warmup; larger models want a lower one")
    lr_scheduler_type: str = HfArg(default="cosine", help="cosine, linear, constant or constant_with_warmup")
    warmup_ratio: float = HfArg(default=0.0, help="share of the updates, rounded down, in which the rate rises")
    optim: str = HfArg(default="adamw_torch", help="adamw_torch, adamw_8bit, paged_adamw_32bit or paged_adamw_8bit")
    weight_decay: float = HfArg(default=0.0, help="AdamW's, per update and unit of learning rate")
    max_grad_norm: float = HfArg(default=1.0, help="L2 norm to which a larger gradient is cut; 0 never cuts")
    num_train_epochs: float = HfArg(default=3.0, help="passes over the data, rounded up to whole updates")
    max_steps: int = HfArg(default=-1, help="updates, in place of num_train_epochs; -1 leaves it to those")
    seed: int = HfArg(default=42, help="of new weights, dropout and the order of the documents")
    logging_strategy: str = HfArg(default="steps", help="steps, epoch or no")
    logging_steps: int = HfArg(default=5, help="updates between two lines of the log")
    log_level: str = HfArg(default="warning", help="of transformers: debug, info, warning, error or critical")
    report_to: str = HfArg(default="none", help="accelerate's trackers, comma separated: tensorboard, wandb, ...")
    eval_strategy: str = HfArg(default="epoch", aliases=["--evaluation_strategy"], help="epoch, steps or no")
    eval_steps: int = HfArg(default=100, help="updates between two evaluations of eval_strategy steps")
    num_samples: int = HfArg(default=2, help="held-out prompts that are answered at each evaluation")
    max_new_tokens: int = HfArg(default=64, help="tokens of such an answer")
    layerwise_generation: bool = HfArg(default=False, help="answer from a layer at a time, not the whole model; slow")
    save_strategy: str = HfArg(default="epoch", help="epoch, steps or no checkpoints")
    save_steps: int = HfArg(default=100, help="updates between two checkpoints of save_strategy steps")
    save_total_limit: int = HfArg(default=0, help="checkpoints that are kept, the newest; 0 keeps all")
    resume_from_checkpoint: str = HfArg(default="", help="True for the newest in output_dir, or a checkpoint's folder")
    output_dir: str = HfArg(default=f"outputs/{Path(__file__).stem}", help="new folder for all that the run leaves")
    overwrite_output_dir: bool = HfArg(default=False, help="replace what an earlier run left in output_dir")
    push_to_hub: bool = HfArg(default=False, help="push what is saved, in the background")
    hub_model_id: str = HfArg(default="", help="to this repository; empty: output_dir's name, under the own account")
    hub_private_repo: bool = HfArg(default=True, help="made private, if it is new")
    hub_strategy: str = HfArg(default="every_save", help="end, every_save, checkpoint or all_checkpoints")


def resolve(config):
    """Fill in the settings that depend on others and on the machine; say which of them cannot act here."""
    launched = launched_precision()
    precision = "bf16" if config.bf16 else "fp16" if config.fp16 else launched
    if precision != launched:
        say(f"--{precision} wins over mixed_precision {launched} of the launch config.")
        os.environ["ACCELERATE_MIXED_PRECISION"] = precision
        if launched_precision() != precision:
            refuse(f"--{precision} contradicts {launched_precision()} in the deepspeed_config_file: change that file")
    half = {"bf16": "bfloat16", "fp16": "float16"}.get(precision, "float32")
    if config.use_liger_kernel is None:
        config.use_liger_kernel = uses_gpu() and is_liger_kernel_available()
    elif config.use_liger_kernel and not (uses_gpu() and is_liger_kernel_available()):
        needs = "the package liger-kernel" if uses_gpu() else "a GPU"
        refuse(f"--use_liger_kernel needs {needs}, which is not here: drop the flag")
    if config.torch_compile and launched_strategy() in ("fsdp1", "zero3"):
        refuse(
            f"--torch_compile has no effect under {launched_strategy()}, whose hooks break the graphs: "
            "launch with configs/fsdp2.yaml, or drop the flag"
        )
    if config.dtype == "auto":
        config.dtype = half if config.use_peft_lora else "float32"
    if config.use_flash_attn and uses_gpu() and find_spec("flash_attn") and half != "float32":
        config.attn_implementation = "flash_attention_2"
    elif config.use_flash_attn:
        kernel = "torch's own for variable lengths" if uses_gpu() else "sdpa, document by document"
        say(f"--use_flash_attn needs a GPU, bf16 or fp16, and the package flash-attn: here attention is {kernel}.")


def identify(config, accelerator, facts):
    """Return what a run must share with the one whose checkpoint it goes on from, to go on as that would have."""
    free = ["output_dir", "resume_from_checkpoint", "overwrite_output_dir", "per_device_eval_batch_size", "report_to"]
    free += ["dataloader_num_workers", "num_samples", "max_new_tokens", "layerwise_generation"]
    free += [name for name in vars(config) if name.startswith(("log", "eval", "save", "push", "hub"))]
    if config.lr_scheduler_type.startswith("constant") and not config.warmup_ratio:
        free += ["max_steps", "num_train_epochs"]  # no rate depends on how many updates there are
    run = {name: value for name, value in vars(config).items() if name not in free}
    run |= {"strategy": launched_strategy(), "num_processes": accelerator.num_processes, "data": facts}
    return run | {"mixed_precision": launched_precision()}


# 2. Data ------------------------------------------------------------------------------------------
def build_tokenizer(config, is_chat):
    """Return the tokenizer with the chat template asked for, and how many tokens that brought."""
    tokenizer = AutoTokenizer.from_pretrained(config.model_name_or_path)
    if not tokenizer.is_fast:
        refuse(f"{config.model_name_or_path} has a slow tokenizer, without the places of its tokens in the text")
    choice = config.chat_template_format
    if is_chat and choice == "none" and not tokenizer.chat_template:
        choice = "chatml"
        say("The tokenizer has no chat template of its own, so that the conversations are written in chatml.")
    if not is_chat or choice == "none":
        if choice != "none":
            say(f"--chat_template_format {choice} is unused: the data holds texts and no conversations.")
        return tokenizer, 0
    if choice not in TEMPLATES:
        tokenizer.chat_template = Path(choice).read_text()
        return tokenizer, 0
    tokenizer.chat_template, tokens, end = TEMPLATES[choice]
    added = tokenizer.add_tokens([AddedToken(token, special=True) for token in tokens], special_tokens=True)
    tokenizer.eos_token = end or tokenizer.eos_token
    return tokenizer, added


def render(tokenizer, messages, first, where):
    """Return a conversation as the template writes it, and from where to where in it the assistant speaks."""

    def template(part, **options):
        try:
            return tokenizer.apply_chat_template(part, tokenize=False, **options)
        except Exception as error:  # a template raises what it likes
            raise DataError(f"{where}: the chat template refuses it ({error}): mend it, or take another") from error

    text, spans = template(messages), []
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and number >= first:
            begin = template(messages[:number], add_generation_prompt=True)
            end = template(messages[: number + 1]).rstrip()
            whole = text.startswith(end) and end.startswith(begin)  # no: it rewrites what came before, as Qwen3's does
            spans.append((len(begin), len(end)) if whole else None)
    return text, spans


def encode(row, index, config, tokenizer, shape, split):
    """Return a row's token ids, its labels (-100: no loss), and how many tokens it had before it was cut."""
    where = f"row {index + 1} of {split}"
    kind, *parts = as_document(row, shape, where)
    if kind == "chat":
        text, spans = render(tokenizer, *parts, where)
    else:
        text, spans = "".join(parts), [(len("".join(parts[:-1])), len("".join(parts)))]
    around = config.add_special_tokens if config.add_special_tokens is not None else kind != "chat"
    ends = config.append_concat_token if config.append_concat_token is not None else kind != "chat"
    tokens = tokenizer(text, add_special_tokens=around, return_offsets_mapping=True)
    ids = labels = tokens["input_ids"]
    if config.train_on == "assistant":
        if None in spans:
            raise DataError(
                f"{where}: the chat template does not show where the assistant's turns begin and end: give "
                "--chat_template_format chatml, or a template that does, or --train_on all"
            )
        # a token across the border counts, and so do blanks, to which some tokenizers give no width
        places = [(a, max(b, a + 1) * (b > 0)) for a, b in tokens["offset_mapping"]]
        trained = [any(a < end and b > begin for begin, end in spans) for a, b in places]
        labels = [token if is_trained else -100 for token, is_trained in zip(ids, trained)]
    if ends:
        end = tokenizer.eos_token_id
        size = len(ids) - (ids[-1:] == [end])  # some tokenizers have written it, without a place in the text
        ids, labels = [*ids[:size], end], [*labels[:size], end]
    return {"input_ids": ids[: config.max_length], "labels": labels[: config.max_length], "length": len(ids)}


def is_kept(document, config):
    """Return whether a document has a token to train on, and is short enough where long ones are dropped."""
    fits = document["length"] <= config.max_length or config.long_documents == "truncate"
    return fits and any(label != -100 for label in document["labels"][1:])


def build_documents(config, accelerator, rows, split, **encoding):
    """Return the encoded rows that can be trained on, and a line that counts them; say what became of the others."""
    # no more of the settings: by what is handed over, a later run finds what this one has encoded
    known = ("max_length", "train_on", "add_special_tokens", "append_concat_token")
    encoding |= {"config": SimpleNamespace(**{name: getattr(config, name) for name in known}), "split": split}
    options = {"with_indices": True, "remove_columns": rows.column_names, "fn_kwargs": encoding}
    workers = min(len(os.sched_getaffinity(0)), len(rows) // ROWS_PER_WORKER)
    if workers > 1:
        options["num_proc"] = workers
    with accelerator.local_main_process_first():  # the others of the machine read its cache
        encoded = rows.map(encode, **options)
    kept, tokens, trained, long, checksum = [], 0, 0, 0, 0
    for number, document in enumerate(encoded):
        long += document["length"] > config.max_length
        if is_kept(document, config):
            kept.append(number)
            tokens += len(document["input_ids"])
            trained += sum(label != -100 for label in document["labels"][1:])
            checksum = zlib.crc32(repr((document["input_ids"], document["labels"])).encode(), checksum)
    if not kept:
        raise DataError(f"no row of {split} has a token to train on within --max_length {config.max_length}: raise it")
    facts = f"{len(kept)} documents, {tokens:,} tokens, {trained:,} of them trained on, checksum {checksum:08x}"
    done = "cut" if config.long_documents == "truncate" else "dropped"
    say(f"{split}: {facts}; {long} beyond --max_length {done}, {len(encoded) - len(kept)} of {len(encoded)} left out.")
    return encoded.select(kept), facts


def read_stream(config, rows, epoch, **encoding):
    """Yield the encoded rows of a stream that can be trained on, in each epoch shuffled anew within a window."""
    rows = rows.shuffle(seed=config.seed + epoch, buffer_size=10_000) if config.shuffle else rows
    encoding |= {"config": config, "split": "the stream"}
    kept = filter(partial(is_kept, config=config), (encode(row, n, **encoding) for n, row in enumerate(rows)))
    if (first := next(kept, None)) is None:
        raise DataError(f"no row of the stream has a token to train on within --max_length {config.max_length}")
    yield first
    yield from kept


def build_batches(config, accelerator, documents, start):
    """Return a loader of the training's micro-batches from the `start`-th of a process on, and places per epoch."""
    limit, size = config.max_length, config.per_device_train_batch_size
    if config.streaming:
        endless, documents, per_epoch = partial(stream_places, documents, limit, config.packing), None, math.inf
    else:
        lengths = list(map(len, documents["input_ids"]))
        places = pack(lengths, limit, config.packing)
        endless, per_epoch = partial(shuffled_places, places, config.seed, config.shuffle), len(places)
        if config.packing:
            used = sum(lengths) / len(places) / limit
            say(f"{len(lengths)} documents are packed into {len(places)} places of {limit} tokens, {used:.1%} used.")
    workers = config.dataloader_num_workers
    if config.streaming and workers > 1:  # datasets would deal a stream's files out to them
        workers = 1
        say(f"--dataloader_num_workers {config.dataloader_num_workers}: a stream is read by one of them.")
    whose = (accelerator.process_index, accelerator.num_processes, workers)
    return build_loader(endless, documents, size, start, *whose), per_epoch


def build_held_out(config, accelerator, rows, encoding):
    """Return this process's batches of the held-out rows, and prompts of token ids to be answered."""
    if rows is None or config.eval_strategy == "no":
        if config.eval_strategy != "no":
            say("There are no held-out rows, so nothing is evaluated: name a second split in --splits.")
        return [], []
    documents, _ = build_documents(config, accelerator, rows, "the held-out split", **encoding)
    places = pack(list(map(len, documents["input_ids"])), config.max_length, config.packing)
    whose = (accelerator.process_index, accelerator.num_processes)
    batches = split_evenly(places, documents, config.per_device_eval_batch_size, *whose)
    prompts = []
    for document in islice(documents, config.num_samples):
        first = next(number for number, label in enumerate(document["labels"]) if label != -100)
        prompts.append(document["input_ids"][: first or 8])  # of a text, trained on whole, its beginning
    return batches, prompts


def preview(tokenizer, document):
    """Return a document as text, what is trained on between guillemets."""
    text, pairs = "", zip(document["input_ids"], document["labels"])
    for trained, part in groupby(pairs, key=lambda pair: pair[1] != -100):
        words = tokenizer.decode([token for token, _ in part])
        text += f"\u00ab{words}\u00bb" if trained else words
    return text


# 3. Model -----------------------------------------------------------------------------------------
def build_model(config, tokenizer, added):
    """Return the model, all of it trained, or frozen, in 4 or 8 bits if asked for, with LoRA layers to be trained."""
    options = {"dtype": config.dtype, "attn_implementation": config.attn_implementation, "use_safetensors": True}
    if config.use_4bit_quantization or config.use_8bit_quantization:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=config.use_4bit_quantization,
            load_in_8bit=config.use_8bit_quantization,
            bnb_4bit_quant_type=config.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=config.use_nested_quant,
            bnb_4bit_compute_dtype=config.bnb_4bit_compute_dtype or config.dtype,
            bnb_4bit_quant_storage=config.bnb_4bit_quant_storage_dtype or config.dtype,  # sharded as such numbers
        )
    options["device_map"] = device_map()
    if config.use_4bit_quantization and launched_strategy() in ("zero3", "fsdp1", "fsdp2"):
        options["device_map"] = {"": "cpu"}  # else transformers packs the full model on every GPU
        unset_hf_deepspeed_config()  # under ZeRO-3 transformers takes no device_map
    model = AutoModelForCausalLM.from_pretrained(config.model_name_or_path, **options)
    whole = []
    if added:  # rows of their own for the new tokens, which nothing has trained yet
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:  # some have rows to spare
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        heads = (model.get_input_embeddings(), model.get_output_embeddings())
        whole = [name.rpartition(".")[2] for name, module in model.named_modules() if module in heads]
        say(f"{added} new tokens: {', '.join(whole)} are trained and saved whole.")
    known = model.generation_config.eos_token_id or []  # one or several
    ends = {tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])}
    model.generation_config.eos_token_id = sorted(ends)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": config.use_reentrant})
        model.enable_input_require_grads()  # else a reentrant layer finds nothing to differentiate
    set_seed(config.seed)  # one start for all strategies, whatever the resizing drew
    if config.use_peft_lora:
        names = config.lora_target_modules
        lora = {"r": config.lora_r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
        lora |= {"target_modules": names if names == "all-linear" else names.split(","), "modules_to_save": whole}
        is_engine = launched_strategy().startswith("zero")  # keeps float32 values of its own, beside one dtype
        lora_config = LoraConfig(task_type=TaskType.CAUSAL_LM, **lora)
        model = get_peft_model(model, lora_config, autocast_adapter_dtype=not is_engine)
        for weight in (weight for weight in model.parameters() if weight.requires_grad):
            rounded = weight.data.to(getattr(torch, config.dtype))  # as that engine starts
            weight.data = rounded if is_engine else rounded.float()
        if launched_precision() != "no":  # autocast does it; PEFT would cast to a dtype that changes as FSDP gathers
            for layer in (layer for layer in model.modules() if hasattr(layer, "cast_input_dtype_enabled")):
                layer.cast_input_dtype_enabled = False
    if config.use_liger_kernel:  # not its loss: add_token_loss has one
        apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})
        if not any("forward" in vars(module) for module in model.modules()):
            say(f"Liger has no kernels for {config.model_name_or_path}: it is unused.")
    add_token_loss(model)
    return model


def prepare(config, accelerator, model):
    """Return the model and its optimizer under the launched strategy, and the whole shapes of what is trained."""
    kind = launched_strategy()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    shapes = {name: torch.empty(full_shape(weight), device="meta") for name, weight in trained.items()}
    options = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    size_buckets(accelerator, list(trained.values()))
    if config.torch_compile:  # layer by layer: all layers share one compilation, and names stay
        layers = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]
        if not layers:
            fail_together(accelerator, "--torch_compile finds no decoder layers here: drop it")
        for layer in layers:
            layer.compile(dynamic=True)  # rows differ in length
    if kind == "zero3" and config.use_4bit_quantization:
        shard_4bit_model(accelerator, model)  # else the engine moves all of it to every GPU
    if kind == "fsdp1":  # makes the parameters that an optimizer can step
        if config.use_peft_lora:
            accelerator.state.fsdp_plugin.auto_wrap_policy = fsdp_auto_wrap_policy(model)  # a unit per LoRA matrix
        model = accelerator.prepare(model)
        move_quant_states(model, accelerator.device)  # the scales are not parameters
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        return model, accelerator.prepare(adamw(config.optim)(trained, **options)), shapes
    if kind == "fsdp2":
        for wrapper in [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]:
            wrapper.original_module = torch.nn.Identity()  # unused, and where tied in two units, which FSDP2 refuses
    model, optimizer = accelerator.prepare(model, adamw(config.optim)(list(trained.values()), **options))
    if kind == "fsdp2":
        move_quant_states(model, accelerator.device)
        register_fsdp_forward_method(model, "generate")  # gathers what lies in no layer, as forward does
    return model, optimizer, shapes


def uncompiled(config):
    """Return a context in which compiled layers run uncompiled, for a few batches."""
    return torch.compiler.set_stance("force_eager") if config.torch_compile else nullcontext()


def flop_per_token(model):
    """Return the floating-point operations per input token, and those of the head per label token.

    Of a weight: 2 in the forward, 2 for the gradient of its input, 2 for its own gradient, unless
    it is frozen. The embedding is looked up. Not counted: attention scores, and what activation
    checkpointing computes again. `model` is not prepared yet.
    """
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    unused = [weight for wrapper in wrappers for weight in wrapper.original_module.parameters()]
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    ends = [getattr(end, "modules_to_save", {"default": end})["default"].weight for end in ends]
    seen, body = set(map(id, (*unused, *ends))), 0
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            if id(weight) not in seen:
                seen.add(id(weight))
                quantized = getattr(module, "quant_state", None)  # packed, but for the bias
                is_packed = quantized is not None and weight is module.weight
                shape = quantized.shape if is_packed else full_shape(weight)
                body += (6 if weight.requires_grad else 4) * math.prod(shape)
    return body, (6 if ends[1].requires_grad else 4) * math.prod(full_shape(ends[1]))


# 4. Evaluation ------------------------------------------------------------------------------------
def evaluate(accelerator, model, batches):
    """Return loss per label, perplexity and token accuracy, over all processes' batches."""
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    for batch in batches:
        with torch.no_grad():
            outputs = model(**send_to_device(batch, accelerator.device))
        labels = batch["labels"].ne(-100).sum().to(accelerator.device)
        totals += torch.stack([outputs["loss"], outputs["correct"], labels])
    model.train()
    loss, correct, labels = accelerator.reduce(totals).tolist()
    perplexity = math.exp(min(loss / labels, 700))
    return {"eval_loss": loss / labels, "perplexity": perplexity, "token_accuracy": correct / labels}


def answer(accelerator, model, tokenizer, prompts, max_new_tokens):
    """Print the model's greedy answers to prompts of token ids, which every process makes alike."""
    model.eval()
    ends = accelerator.unwrap_model(model).generation_config.eos_token_id
    with generating(accelerator, model) as generator:
        for prompt in prompts:
            inputs = torch.tensor([prompt], device=accelerator.device)
            options = {"max_new_tokens": max_new_tokens, "eos_token_id": ends, "pad_token_id": ends[0]}
            tokens = generator.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                generation_config=GenerationConfig(**options),  # greedy, whatever the checkpoint brings
                synced_gpus=not model.gather_for_generation,
            )
            said = tokenizer.decode(tokens[0, len(prompt) :], skip_special_tokens=True).strip()
            accelerator.print(f"  {tokenizer.decode(prompt)[-100:]!r} -> {said!r}")
    model.train()


def write_weights(folder, accelerator, model, tokenizer, state_dict):
    """Write the adapter, or the whole model, and the tokenizer, as peft and transformers load them."""
    unwrapped = accelerator.unwrap_model(model)
    tokenizer.save_pretrained(folder)
    if hasattr(unwrapped, "peft_config"):
        save_file(state_dict, folder / "adapter_model.safetensors", {"format": "pt"})
        unwrapped.peft_config["default"].save_pretrained(folder)
    else:
        unwrapped.save_pretrained(folder, state_dict=state_dict)


def push(hub, config, folder, step):
    """Have a checkpoint pushed as hub_strategy says: its weights alone, or with what a run goes on from."""
    if hub is None or config.hub_strategy == "end":
        return
    hub.push(folder, f"Update {step}", ignore=("process-*", "state.json"))
    if config.hub_strategy != "every_save":
        name = "last-checkpoint" if config.hub_strategy == "checkpoint" else folder.name
        hub.push(folder, f"Checkpoint of update {step}", path_in_repo=name)


def is_due(strategy, every, step, end, per_epoch):
    """Return whether something is due after update `step`: every so many, after each epoch, or for it is the last."""
    if strategy == "epoch":
        ends_epoch = math.floor(step / per_epoch + 1e-9) > math.floor((step - 1) / per_epoch + 1e-9)
        return ends_epoch or step == end
    return strategy == "steps" and (step % every == 0 or step == end)


def main():
    # 5. Setup -------------------------------------------------------------------------------------
    config = read_settings(HfArgumentParser(Config))
    resolve(config)
    check_chat_settings(config, (AutoConfig, AutoTokenizer, AutoModelForCausalLM), tuple(TEMPLATES))
    model_config = AutoConfig.from_pretrained(config.model_name_or_path).get_text_config()
    positions = getattr(model_config, "max_position_embeddings", math.inf)
    if config.max_length > positions:
        say(f"--max_length {config.max_length} is beyond the model's {positions} positions, at which documents end.")
        config.max_length = positions
    transformers.utils.logging.set_verbosity(transformers.utils.logging.log_levels[config.log_level])
    with refusing(DataError, CheckpointError):
        train_rows, test_rows = read_splits(config.dataset_name, config.splits, config.streaming)
        shape = shape_of(train_rows, config.dataset_text_field)
        kind = as_document(next(iter(train_rows)), shape, "row 1 of train")[0]
        if config.dataset_text_field and shape != (config.dataset_text_field,):
            say(f"--dataset_text_field {config.dataset_text_field} is unused: the data has {' and '.join(shape)}.")
        resumed = find_checkpoint(config.output_dir, config.resume_from_checkpoint)
        if config.resume_from_checkpoint.lower() == "true" and not resumed:
            say(f"{config.output_dir} holds no complete checkpoint: the run starts from the beginning.")
        state = {"step": 0, "updates": [], "evaluations": [], "seconds": 0.0, "identity": {}}
        if resumed:
            state = read_state(resumed, needed=tuple(state))
    tokenizer, added = build_tokenizer(config, kind == "chat")
    if added:  # weights that one process reads and then resizes would not reach the others
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    accumulation = GradientAccumulationPlugin(config.gradient_accumulation_steps, sync_with_dataloader=False)
    trackers = None if config.report_to == "none" else config.report_to.split(",")
    options = {"log_with": trackers, "project_dir": f"{config.output_dir}/runs"}
    options |= {"tf32": config.tf32, "deterministic": config.deterministic}
    accelerator = start_accelerator(gradient_accumulation_plugin=accumulation, **options)
    if accelerator.deepspeed_plugin is not None:  # DeepSpeed accumulates and clips by its own config
        accelerator.deepspeed_plugin.deepspeed_config.update(
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            gradient_clipping=config.max_grad_norm,
            train_micro_batch_size_per_gpu=config.per_device_train_batch_size,
            communication_data_type="fp32",
        )
        if launched_strategy() != "zero1":  # where it would start another engine, without checkpoints here
            accelerator.deepspeed_plugin.deepspeed_config["data_types"] = {"grad_accum_dtype": "fp32"}
    encoding, start = {"tokenizer": tokenizer, "shape": shape}, state["step"]
    with refusing(DataError, CheckpointError):
        if config.streaming:
            documents, facts = partial(read_stream, config, train_rows, **encoding), ""
            examples = list(islice(documents(0), 2))
        else:
            documents, facts = build_documents(config, accelerator, train_rows, "the training split", **encoding)
            examples = list(islice(documents, 2))
        evaluation, prompts = build_held_out(config, accelerator, test_rows, encoding)
        identity = identify(config, accelerator, facts)
        if resumed:
            check_same_run(resumed, state["identity"], identity)
    say(f"The first document, what is trained on between \u00ab \u00bb:\n{preview(tokenizer, examples[0])}")
    accumulated = config.gradient_accumulation_steps
    loader, per_epoch = build_batches(config, accelerator, documents, start * accumulated)
    per_epoch /= config.per_device_train_batch_size * accumulated * accelerator.num_processes  # from here in updates
    max_steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * per_epoch)
    if start > max_steps:
        refuse(f"{resumed} is of update {start}, and the run ends after {max_steps}: give more --max_steps")
    set_seed(config.seed)
    tracker = MemoryTracker()
    with tracker.phase("load"):
        model = build_model(config, tokenizer, added)
        body, head = flop_per_token(model)
        model, optimizer, shapes = prepare(config, accelerator, model)
        check_sharding(accelerator, model)
        is_whole = launched_strategy() not in ("zero3", "fsdp1", "fsdp2")
        gathers = is_whole or (not config.layerwise_generation and fits_whole(accelerator, model))
        model.gather_for_generation = gathers
        warmup = int(config.warmup_ratio * max_steps)
        scheduler = get_scheduler(config.lr_scheduler_type, optimizer, warmup, max_steps)
        set_seed(config.seed, device_specific=True)  # from here on every process drops out elements of its own
        if resumed:
            with refusing(CheckpointError):
                load_checkpoint(accelerator, resumed, optimizer)
            scheduler.last_epoch, scheduler._step_count = start - 1, start + 1  # as after so many updates
            scheduler.step()
            say(f"Going on from {resumed}, after update {start} of {max_steps}.")
        pair = [{name: document[name][:16] for name in ("input_ids", "labels")} for document in examples]
        for document in pair:
            document["labels"] = document["input_ids"]
        pair = pair if config.packing or config.per_device_train_batch_size > 1 else pair[:1]
        with uncompiled(config):
            alone = [join([document]) for document in pair]
            reason = check_token_loss(accelerator, model, join(pair), alone)
        if reason:
            fail_together(accelerator, reason)
    name = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else "cpu"
    peak = next((peak for known, peak in PEAKS.items() if known in name), 0) * accelerator.num_processes
    hub = None
    if accelerator.is_main_process:
        if not resumed:  # what --overwrite_output_dir replaces
            remove_checkpoints(checkpoints(config.output_dir))
            for name in (*earlier_files(Path(config.output_dir)), "metrics.json"):
                Path(config.output_dir, name).unlink(missing_ok=True)
        begin_log(config.output_dir, start)
        if config.push_to_hub:
            hub = HubPusher(config.hub_model_id or Path(config.output_dir).name, config.hub_private_repo)
    if trackers:
        accelerator.init_trackers("chat_sft", {name: str(value) for name, value in asdict(config).items()})

    # 6. Training loop -----------------------------------------------------------------------------
    signals, stopped, saved, step = [], False, resumed, start
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: signals.append(number))
    state["identity"], updates, logged = identity, state["updates"], start

    def evaluate_now():
        with uncompiled(config):
            measured = {"step": step, **evaluate(accelerator, model, evaluation)}
            state["evaluations"].append(measured)
            note(accelerator, config.output_dir, measured)
            answer(accelerator, model, tokenizer, prompts, config.max_new_tokens)

    def save_now():
        state_dict = gather_trained(accelerator, model, name_in_file)
        if not all(value.isfinite().all() for value in state_dict.values()):
            bar.close()
            fail(f"update {step} left values that are no numbers: lower --learning_rate; go on from {saved or 'none'}")
        write = partial(
            write_weights, accelerator=accelerator, model=model, tokenizer=tokenizer, state_dict=state_dict
        )
        try:
            return save_checkpoint(accelerator, config.output_dir, step, optimizer, state, write)
        except (OSError, SafetensorError, CheckpointError) as error:
            bar.close()
            fail(f"no checkpoint of update {step} could be written ({error}); the last good one is {saved or 'none'}")

    if evaluation and not resumed:
        evaluate_now()
    with tracker.phase("train"):
        batches, clock = iter(loader), []
        bar = tqdm(total=max_steps, initial=start, disable=not accelerator.is_main_process)
        while step < max_steps:
            begin = time.perf_counter()
            with refusing(DataError):  # of a stream, whose rows nobody has seen yet
                micro_batches = [next(batches) for _ in range(accumulated)]
            targets = sum(len(batch["label_positions"]) for batch in micro_batches)
            inputs = sum(batch["labels"].numel() for batch in micro_batches)
            counts = torch.tensor([targets, inputs], device=accelerator.device)
            counts = accelerator.reduce(counts)  # of all processes
            step_loss = torch.zeros((), device=accelerator.device)
            for batch in send_to_device(micro_batches, accelerator.device):
                with accelerator.accumulate(model):
                    loss = model(**batch)["loss"] / counts[0]  # every label token counts alike
                    step_loss += loss.detach()
                    # takes back the means to come: accelerate's over micro-batches, the strategy's over processes
                    accelerator.backward(loss * accumulated * accelerator.num_processes)
                    if accelerator.sync_gradients:
                        grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf)
                    optimizer.step()
                    optimizer.zero_grad()
            asked = torch.full((), float(len(signals)), device=accelerator.device)
            sums = accelerator.reduce(torch.stack([step_loss, asked]))
            # one read for all of them: each read makes the CPU wait for the GPU
            numbers = read_numbers(accelerator.device, sums, grad_norm, counts)
            step_loss, asked, norm, targets, inputs = numbers
            rate, step = scheduler.get_last_lr()[0], step + 1
            is_nan = math.isnan(norm) and launched_precision() != "fp16"  # its scaler skips NaN
            if not math.isfinite(step_loss) or step_loss == 0 or is_nan:
                told = f"the loss of update {step} is {step_loss}, and the norm of its gradient {norm}"
                remedy = f"lower --learning_rate, look at the data; the last good checkpoint is {saved or 'none'}"
                bar.close()
                fail_together(accelerator, f"{told}: {remedy}")
            scheduler.step()
            updates.append((step_loss, rate, norm, int(targets), int(inputs)))
            seconds = time.perf_counter() - begin
            state["seconds"] += seconds
            clock.append(seconds)
            bar.update()
            when = (step, max_steps, per_epoch)
            if is_due(config.logging_strategy, config.logging_steps, *when):
                part = updates[logged:]
                time_of_part = sum(clock[-len(part) :])
                speed = sum(update[4] for update in part) / time_of_part
                work = sum(head * update[3] + body * update[4] for update in part)
                values = {"loss": sum(update[0] * update[3] for update in part) / sum(update[3] for update in part)}
                values |= {"learning_rate": rate, "grad_norm": norm, "epoch": step / per_epoch}
                values["tokens_per_second"] = speed
                if peak:
                    values["flops_utilisation"] = work / time_of_part / peak
                values["seconds_left"] = (max_steps - step) * time_of_part / len(part)
                note(accelerator, config.output_dir, {"step": step, **values})
                logged = step
            if evaluation and is_due(config.eval_strategy, config.eval_steps, *when):
                evaluate_now()
            due = is_due(config.save_strategy, config.save_steps, *when)
            if due or step == start + 1:  # the first as a trial, too: what cannot be saved fails in the first minute
                folder = save_now()
                if accelerator.is_main_process and due:
                    push(hub, config, folder, step)
                    if config.save_total_limit:
                        remove_checkpoints(checkpoints(config.output_dir)[: -config.save_total_limit])
                elif accelerator.is_main_process:
                    remove_checkpoints([folder])
                saved = folder if due else saved
            if stopped := asked > 0 and step < max_steps:  # after all that is due
                break
        bar.close()
    if stopped:
        saved = saved if saved and saved.name == f"checkpoint-{step}" else save_now()
        say(f"Stopped by signal {signals} after update {step} of {max_steps}: --resume_from_checkpoint True goes on.")

    # 7. Save --------------------------------------------------------------------------------------
    if not stopped:
        scores = [measured["perplexity"] for measured in state["evaluations"]] or [None]
        score = (scores[0], scores[-1])
        state_dict = gather_trained(accelerator, model, name_in_file)
        metrics = collect_metrics(accelerator, model, config, tracker, score, updates, "perplexity")
        metrics |= {"evaluations": state["evaluations"], "train_seconds": state["seconds"]}
        metrics["tokens_per_second"] = metrics["input_tokens"] / state["seconds"]
        if accelerator.is_main_process:
            with new_folder(replace(config, overwrite_output_dir=True)) as folder:
                write_weights(folder, accelerator, model, tokenizer, state_dict)
                if config.use_peft_lora:
                    check_adapter(folder, shapes, metrics["learning_rates"])
                else:
                    check_model(folder, metrics["total_parameters"])
                plot_memory(metrics["memory"], folder / "memory.png")
                write_metrics(folder, metrics)
            print_saved(config, metrics)
            if hub:
                hub.push(config.output_dir, "End of training", ignore=("checkpoint-*", "runs"))
    end_run(accelerator)
    if hub:  # alone: a long upload must not run into a collective's time limit
        hub.finish()


if __name__ == "__main__":
    main()
