"""Fine-tune a chat model in production: LoRA, QLoRA or all weights; packing, resuming, sharding.

Base:    none
Changes: none
Run:     accelerate launch --config_file configs/ddp.yaml examples/chat_sft.py --use_peft_lora
Needs:   2 CPU processes with 710 MB each for the shipped model; not measured on GPUs
Expect:  held-out perplexity 832 -> 207 in 17 s with startup (2 cores of an AMD EPYC, 2026-11-21)
"""

import math
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from accelerate.utils import send_to_device, set_seed
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import fsdp_auto_wrap_policy
from safetensors import SafetensorError
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig
from transformers.hf_argparser import HfArg
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.integrations.liger import apply_liger_kernel
from transformers.optimization import get_scheduler

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # finds utils/
from utils.chat_settings import describe, loss_remedy, read_chat_settings, split_names
from utils.chat_templates import build_tokenizer, pin_date
from utils.checkpoint import CheckpointError, gather_trained, keep_newest, load_checkpoint
from utils.checkpoint import remove_checkpoints, save_checkpoint
from utils.conversations import DataError, holds_chats, shape_of
from utils.documents import Data, build_documents, build_held_out, preview, probe, read_stream
from utils.environment import launched_precision, launched_strategy, shards_parameters
from utils.errors import explaining, fail, fail_together, refusing, say
from utils.flops import flop_per_token
from utils.generation import generating
from utils.hub import push_checkpoint, start_pusher
from utils.launch import OPTIMIZERS, adamw, configure_deepspeed, device_map, load_sharded
from utils.launch import move_quant_states, start_accelerator, state_bytes
from utils.lora import expert_targets, gather_blocks, lora_targets, say_experts, settle_dtypes
from utils.loss import add_token_loss, attention_that_works, check_token_loss
from utils.memory import MemoryTracker
from utils.packing import build_loader, pack, shuffled_sequences, stream_sequences
from utils.results import Progress, WeightFiles, end_run, print_saved
from utils.results import print_scores
from utils.resuming import check_resumed, find_run, identify, remove_earlier_run, restore_progress
from utils.run_log import RunLog, is_due, tracker_options
from utils.signals import StopSignals, UpdateReader, say_stopped
from utils.splits import read_splits
from utils.vocabulary import check_end, embedding_rows, resize, set_ends


# 1. Settings --------------------------------------------------------------------------------------
# yours to change
@dataclass
class Config:
    """Model, data and hyperparameters. --bf16 and --fp16 override the launch config."""

    model_name_or_path: str = "assets/tiny-causal-lm"
    """model folder or Hub id, with safetensors"""
    dtype: str = "auto"
    """dtype of the loaded weights; auto: the mixed-precision dtype if the base is frozen, else
    float32"""
    attn_implementation: str = "documents"
    """attention backend: documents (utils/packing.py), sdpa, eager, ..."""
    use_flash_attn: bool = False
    """use the kernels of flash-attn where this machine has them"""
    dataset_name: str = "assets/chat"
    """Hub id, folder, or .json, .jsonl, .csv or .parquet file"""
    dataset_config: str = ""
    """configuration of a data set that has several, such as main"""
    dataset_text_field: str = ""
    """column of plain text, for data without conversations; default: text"""
    splits: str = ""
    """training split and held-out split, such as train,test; empty: train, and the first of test,
    validation and eval that exists"""
    streaming: bool = False
    """read the data while training, for data larger than memory; needs max_steps"""
    chat_template_format: str = "none"
    """chat template: chatml, zephyr, a .jinja file, or the name of a template of the tokenizer;
    none: the tokenizer's only template, or the one called default"""
    train_on: str = "assistant"
    """tokens with a loss: assistant (assistant turns, completions, answers) or all"""
    add_special_tokens: bool | None = None
    """add the special tokens of the tokenizer to a document; unset: yes, except for chats"""
    append_concat_token: bool | None = None
    """end a document with the eos token; unset: yes, except for chats"""
    max_length: int = HfArg(default=256, aliases=["--max_seq_len"])
    """maximum tokens of a document or packed sequence"""
    long_documents: str = "truncate"
    """truncate or drop documents longer than max_length"""
    packing: bool = False
    """put several documents into one sequence of up to max_length tokens"""
    shuffle: bool = True
    """read the documents in a new order in every epoch"""
    dataloader_num_workers: int = 0
    """worker processes that prepare batches in advance"""
    use_peft_lora: bool = False
    """train LoRA matrices instead of all weights"""
    lora_r: int = 8
    """rank of the LoRA matrices"""
    lora_alpha: int = 16
    """LoRA is scaled by lora_alpha / lora_r"""
    lora_dropout: float = 0.0
    """dropout probability on the input of the LoRA layers"""
    lora_target_modules: str = HfArg(default="all-linear", aliases=["--target_modules"])
    """layers that get LoRA: names, comma separated, a regular expression, or all-linear"""
    lora_target_parameters: str = ""
    """fused weights of routed experts that get LoRA, comma separated, such as experts.down_proj;
    experts: all of them"""
    adapter_name_or_path: str = ""
    """LoRA adapter to train further, folder or Hub id; empty: a new one"""
    use_4bit_quantization: bool = False
    """load the frozen base in 4 bits (QLoRA)"""
    use_8bit_quantization: bool = False
    """load the frozen base in 8 bits; not with ZeRO-3 or FSDP"""
    use_nested_quant: bool = False
    """quantize the scales of the 4-bit weights, too"""
    bnb_4bit_quant_type: str = "nf4"
    """data type of the 4-bit weights: nf4 or fp4"""
    bnb_4bit_compute_dtype: str = ""
    """dtype of computations with 4-bit weights; empty: the same as dtype"""
    bnb_4bit_quant_storage_dtype: str = HfArg(default="", aliases=["--bnb_4bit_quant_storage"])
    """dtype of the tensors that 4-bit weights are packed into; empty: the same as dtype"""
    bf16: bool = False
    """train in mixed precision bf16, whatever the launch config says"""
    fp16: bool = False
    """train in mixed precision fp16 on GPUs, whatever the launch config says"""
    tf32: bool = False
    """matrix products in TF32 on GPUs: faster, less exact"""
    torch_compile: bool = False
    """compile each decoder layer with torch.compile"""
    use_liger_kernel: bool | None = None
    """use Liger's RMSNorm, RoPE and SwiGLU; unset: on GPUs where Liger is installed"""
    deterministic: bool = False
    """bit-identical runs on GPUs, slower"""
    gradient_checkpointing: bool = False
    """recompute activations to save memory"""
    gradient_checkpointing_every_n_layers: int = 1
    """recompute every n-th layer; the other layers keep their activations"""
    gradient_checkpointing_offload: bool = False
    """keep the inputs of recomputed layers in CPU memory; needs a GPU"""
    use_reentrant: bool = False
    """use PyTorch's reentrant (older) activation checkpointing"""
    per_device_train_batch_size: int = 8
    """documents, or packed sequences, per micro-batch and process"""
    per_device_eval_batch_size: int = 8
    """documents, or packed sequences, per process in evaluation"""
    gradient_accumulation_steps: int = 1
    """micro-batches per update"""
    learning_rate: float = 1e-3
    """peak learning rate, after the warmup; large models need a lower one"""
    lr_scheduler_type: str = "cosine"
    """schedule of the learning rate: cosine, linear, constant or constant_with_warmup"""
    warmup_ratio: float = 0.0
    """fraction of the updates used for warmup, rounded down"""
    optim: str = HfArg(default="adamw_torch", help=f"optimizer: {', '.join(OPTIMIZERS)}")
    weight_decay: float = 0.0
    """weight decay of AdamW"""
    max_grad_norm: float = 1.0
    """clip gradients to this L2 norm; 0: no clipping"""
    num_train_epochs: float = 3.0
    """epochs, rounded up to full updates"""
    max_steps: int = -1
    """number of updates; -1: train for num_train_epochs"""
    seed: int = 42
    """seed of new weights, dropout and order of the documents"""
    logging_strategy: str = "steps"
    """when to log: steps (see logging_steps), epoch or no"""
    logging_steps: int = 5
    """updates between two lines of the log, with logging_strategy steps"""
    log_level: str = "warning"
    """log level of transformers: debug, info, warning, error or critical"""
    report_to: str = "none"
    """trackers of accelerate, comma separated: tensorboard, wandb, ...; or none"""
    eval_strategy: str = HfArg(default="epoch", aliases=["--evaluation_strategy"])
    """when to evaluate: epoch, steps (see eval_steps) or no"""
    eval_steps: int = 100
    """updates between two evaluations, with eval_strategy steps"""
    num_samples: int = 2
    """held-out prompts that the model answers at each evaluation"""
    max_new_tokens: int = 64
    """longest answer to a held-out prompt, in tokens"""
    layerwise_generation: bool = False
    """answer prompts with one layer gathered at a time, even if the full model fits; slow"""
    save_strategy: str = "epoch"
    """when to save a checkpoint: epoch, steps (see save_steps) or no"""
    save_steps: int = 100
    """updates between two checkpoints, with save_strategy steps"""
    save_total_limit: int = 0
    """number of newest checkpoints to keep; 0 keeps all"""
    resume_from_checkpoint: str = ""
    """checkpoint to resume from: its folder, or True for the newest one in output_dir"""
    output_dir: str = f"outputs/{Path(__file__).stem}"
    """folder for the results and checkpoints"""
    overwrite_output_dir: bool = False
    """replace an earlier run in output_dir"""
    push_to_hub: bool = False
    """push what is saved to the Hub, in the background"""
    hub_model_id: str = ""
    """Hub repository to push to; empty: the name of output_dir in your account"""
    hub_private_repo: bool = True
    """make a new Hub repository private"""
    hub_strategy: str = "every_save"
    """what to push to the Hub: end, every_save, checkpoint or all_checkpoints"""


# 2. Data ------------------------------------------------------------------------------------------
# yours to change
def read_rows(config):
    """Return the `Splits` of the data: the rows to train on and to evaluate on, and their form."""
    source = (config.dataset_name, config.dataset_config)
    with refusing(DataError):
        splits = read_splits(*source, config.splits, config.streaming)
        shape = shape_of(splits.train, config.dataset_text_field)
    if config.dataset_text_field and shape != (config.dataset_text_field,):
        say(
            f"--dataset_text_field {config.dataset_text_field} is unused: the data has "
            f"{' and '.join(shape)}."
        )
    return splits._replace(shape=shape, is_chat=holds_chats(splits.train, shape))


def build_dataloaders(config, accelerator, tokenizer, rows, state, num_added):
    """Return the `Data` of a run. `state` is that of the checkpoint to resume, or START."""
    train, valid, unread, shape, is_chat = rows
    date = state["identity"].get("template_date")
    pinned, date = pin_date(tokenizer, date) if is_chat else (tokenizer, None)
    ends_turns = is_chat and not config.append_concat_token
    check_end(config.model_name_or_path, tokenizer, ends_turns)
    num_rows = embedding_rows(config, tokenizer, num_added)
    encoding = {"tokenizer": pinned, "shape": shape, "num_rows": num_rows}
    limit, workers = config.max_length, config.dataloader_num_workers
    with refusing(DataError):
        if config.streaming:
            read = partial(read_stream, config, train, unread, **encoding)
            sequences = partial(stream_sequences, read, limit, config.packing)
            documents, examples = None, list(islice(read(0, is_strict=True), 2))
            num_sequences, facts = math.inf, ""
            if workers > 1:  # `datasets` would split the stream's files among the workers
                say(f"--dataloader_num_workers {workers}: a stream is read by one worker.")
                workers = 1
        else:
            name = "the training split"
            documents, facts = build_documents(config, accelerator, train, name, unread, **encoding)
            examples = list(islice(documents, 2))
            lengths = [len(ids) for ids in documents["input_ids"]]
            packed = pack(lengths, limit, config.packing)
            sequences = partial(shuffled_sequences, packed, config.seed, config.shuffle)
            num_sequences = len(packed)
        valid_batches, prompts = build_held_out(config, accelerator, valid, **encoding)
    if config.packing and not config.streaming:
        used = sum(lengths) / num_sequences / limit
        say(
            f"{len(lengths)} documents are packed into {num_sequences} sequences of {limit} "
            f"tokens, {used:.1%} used."
        )
    say("The first document, label tokens between \u00ab \u00bb:")
    say(preview(tokenizer, examples[0]))
    size, max_steps = config.per_device_train_batch_size, config.max_steps
    if max_steps == -1:
        per_update = size * config.gradient_accumulation_steps * accelerator.num_processes
        max_steps = math.ceil(config.num_train_epochs * (num_sequences / per_update))
    whose = (accelerator.process_index, accelerator.num_processes)
    loader = build_loader(sequences, documents, size, state["sequences"], *whose, workers)
    return Data(loader, num_sequences, max_steps, examples, facts, date, valid_batches, prompts)


# 3. Model -----------------------------------------------------------------------------------------
# yours to change
def build_model(config, tokenizer, num_added):
    """Return the model: all weights trainable, or frozen with LoRA, and quantized if asked for."""
    options = {"dtype": config.dtype, "attn_implementation": config.attn_implementation}
    options |= {"use_safetensors": True, "device_map": device_map()}
    if config.use_4bit_quantization or config.use_8bit_quantization:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=config.use_4bit_quantization,
            load_in_8bit=config.use_8bit_quantization,
            bnb_4bit_quant_type=config.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=config.use_nested_quant,
            bnb_4bit_compute_dtype=config.bnb_4bit_compute_dtype or config.dtype,
            # the strategies shard tensors of this dtype
            bnb_4bit_quant_storage=config.bnb_4bit_quant_storage_dtype or config.dtype,
        )
    if config.use_4bit_quantization and shards_parameters():
        options["device_map"] = {"": "cpu"}  # else every GPU quantizes the full model
        unset_hf_deepspeed_config()  # under ZeRO-3 transformers takes no device_map
    model = load_sharded(AutoModelForCausalLM, config.model_name_or_path, **options)
    modules_to_save = resize(model, tokenizer, num_added, config.adapter_name_or_path)
    set_ends(model, tokenizer)
    model.get_decoder().layerdrop = 0.0  # else processes skip different layers, and the run hangs
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable(
            {"use_reentrant": config.use_reentrant},
            every_n_layers=config.gradient_checkpointing_every_n_layers,
            offload=config.gradient_checkpointing_offload,
        )
        model.enable_input_require_grads()  # a reentrant layer needs an input with a gradient
    set_seed(config.seed)  # resizing may draw random numbers; LoRA must start the same
    if config.use_peft_lora:
        model = add_lora(config, model, modules_to_save)
    if config.use_liger_kernel:  # without Liger's loss: add_token_loss replaces the loss
        apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})
        if not any("forward" in vars(module) for module in model.modules()):
            say(f"Liger is unused: it has no kernels for {config.model_name_or_path}.")
    add_token_loss(model)
    return model


def add_lora(config, model, modules_to_save):
    """Return the model, frozen, with trainable LoRA layers: new ones, or those of an adapter."""
    # DeepSpeed's engine wants one dtype, and keeps float32 copies of the trainable weights itself
    is_engine = launched_strategy().startswith("zero")
    options = {"autocast_adapter_dtype": not is_engine}
    if place := config.adapter_name_or_path:
        model = PeftModel.from_pretrained(model, place, is_trainable=True, **options)
    else:
        parameters = expert_targets(model, split_names(config.lora_target_parameters))
        lora = LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=lora_targets(model, split_names(config.lora_target_modules)),
            target_parameters=parameters or None,
            modules_to_save=modules_to_save,
        )
        model = get_peft_model(model, lora, **options)
    say_experts(model)
    settle_dtypes(model, getattr(torch, config.dtype), is_engine)
    if launched_precision() != "no":
        for module in model.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                # leave casting to autocast: PEFT casts to the weight's dtype, which FSDP changes
                module.cast_input_dtype_enabled = False
    return model


def build_optimizer(config, model):
    """Return the optimizer of the trainable parameters."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    return adamw(config.optim)(trainable, **options)


def prepare(config, accelerator, model):
    """Return the model and optimizer under the launched strategy."""
    strategy = launched_strategy()
    if config.torch_compile:  # per layer: one compilation serves all, and parameter names stay
        layers = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]
        if not layers:
            fail_together(accelerator, "--torch_compile finds no decoder layers here: drop it")
        for layer in layers:
            layer.compile(dynamic=True)  # the rows differ in length
    deepspeed = {"train_micro_batch_size_per_gpu": config.per_device_train_batch_size}
    deepspeed["communication_data_type"] = "fp32"
    if strategy != "zero1":  # in zero1 this may select BF16_Optimizer, whose state cannot be saved
        deepspeed["data_types"] = {"grad_accum_dtype": "fp32"}
    configure_deepspeed(accelerator, config, model, **deepspeed)
    if strategy == "zero3":
        gather_blocks(model)
    if strategy == "fsdp1":  # prepare the model first: the optimizer needs its flat parameters
        if config.use_peft_lora:  # a unit for each LoRA matrix
            accelerator.state.fsdp_plugin.auto_wrap_policy = fsdp_auto_wrap_policy(model)
        model = accelerator.prepare(model)
        optimizer = accelerator.prepare(build_optimizer(config, model))
        move_quant_states(model, accelerator.device)  # FSDP moves only parameters
        return model, optimizer
    if strategy == "fsdp2":
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper):
                # drop PEFT's unused frozen copy: with it, a tied weight would be in two FSDP2 units
                module.original_module = torch.nn.Identity()
    model, optimizer = accelerator.prepare(model, build_optimizer(config, model))
    if strategy == "fsdp2":
        move_quant_states(model, accelerator.device)
        register_fsdp_forward_method(model, "generate")  # gathers the root unit, as forward does
    return model, optimizer


def uncompiled(config):
    """Return a context, for a few batches, in which compiled layers run uncompiled."""
    return torch.compiler.set_stance("force_eager") if config.torch_compile else nullcontext()


def compute_loss(model, batch):
    """Return the sum of the loss over the label tokens of a micro-batch, for `backward`."""
    return model(**batch)["loss"]


def count_targets(batch):
    """Return how many label tokens `compute_loss` sums over; the batch is still on the CPU."""
    return len(batch["label_positions"])


# 4. Evaluation ------------------------------------------------------------------------------------
# yours to change
def check_loss(config, accelerator, model, examples):
    """Stop if a document's loss depends on its neighbours, or differs from the model's own loss.

    Collective: every process calls it on the prepared model.
    """
    sizes = [config.per_device_train_batch_size]
    sizes += [config.per_device_eval_batch_size] if config.eval_strategy != "no" else []
    is_joined = config.packing or max(sizes) > 1
    packed, alone = probe(examples if is_joined else examples[:1])
    with uncompiled(config):
        reason = check_token_loss(accelerator, model, packed, alone)
        other = reason and attention_that_works(accelerator, model, packed, alone)
    if reason:
        fail_together(accelerator, f"{reason}: {loss_remedy(other, is_joined)}")


def evaluate(accelerator, model, batches):
    """Return the scores on the held-out batches of all processes, by name."""
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
    accuracy = correct / labels
    return {"eval_loss": loss / labels, "perplexity": perplexity, "token_accuracy": accuracy}


def show_answers(config, accelerator, model, tokenizer, prompts):
    """Print the model's greedy answers to prompts of token ids. Every process generates all."""
    if not prompts:
        return
    model.eval()
    unwrapped = accelerator.unwrap_model(model)
    own = unwrapped.generation_config
    ends = {"eos_token_id": own.eos_token_id, "pad_token_id": own.eos_token_id[0]}
    # greedy: replace the model's own settings, from which generate would take all unset options
    unwrapped.generation_config = GenerationConfig(**ends)
    with generating(accelerator, model, config.layerwise_generation) as generator:
        for prompt in prompts:
            inputs = torch.tensor([prompt], device=accelerator.device)
            tokens = generator.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=config.max_new_tokens,
                synced_gpus=shards_parameters(),
            )
            said = tokenizer.decode(tokens[0, len(prompt) :], skip_special_tokens=True).strip()
            accelerator.print(f"  {tokenizer.decode(prompt)[-100:]!r} -> {said!r}")
    unwrapped.generation_config = own  # it is saved with the model
    if hasattr(unwrapped, "peft_config"):  # PEFT's generate has copied the greedy one to its base
        unwrapped.get_base_model().generation_config = own
    model.train()


def log_evaluation(config, accelerator, model, tokenizer, data, log):
    """Log the scores on the held-out data, and print answers to its prompts."""
    with uncompiled(config):
        log.write_scores(evaluate(accelerator, model, data.valid_batches))
        show_answers(config, accelerator, model, tokenizer, data.prompts)


def main():
    # 5. Setup -------------------------------------------------------------------------------------
    # leave, unless you know why
    config = read_chat_settings(Config, AutoModelForCausalLM)
    rows = read_rows(config)
    resumed, start, state = find_run(config)
    tokenizer, num_added = build_tokenizer(config, rows.is_chat)
    accumulated = config.gradient_accumulation_steps
    options = {"tf32": config.tf32, "deterministic": config.deterministic}
    accelerator = start_accelerator(accumulated, **options, **tracker_options(config))
    data = build_dataloaders(config, accelerator, tokenizer, rows, state, num_added)
    max_steps, identity = data.max_steps, identify(config, accelerator, data)
    check_resumed(resumed, state, identity, max_steps)
    set_seed(config.seed)
    tracker = MemoryTracker()
    with tracker.phase("load"), explaining(*describe(config)):
        model = build_model(config, tokenizer, num_added)
        flop = flop_per_token(model)
        # disk space for a new checkpoint beside the last; a resumed run already has the last
        kept = 1 if config.save_strategy == "no" or resumed else 2
        files = WeightFiles(accelerator, config, model, tokenizer, kept, state_bytes(config.optim))
        model, optimizer = prepare(config, accelerator, model)
        progress = Progress(accelerator, model, config, max_steps, data.num_sequences)
        restore_progress(progress, state)
        warmup = int(config.warmup_ratio * max_steps)
        scheduler = get_scheduler(config.lr_scheduler_type, optimizer, warmup, max_steps)
        set_seed(config.seed, device_specific=True)  # dropout differs between processes
        if resumed:
            # before the first forward pass, after which some units stay gathered
            with refusing(CheckpointError):
                load_checkpoint(accelerator, resumed, optimizer)
            # the learning rate depends on the step alone, so a checkpoint need not hold it
            scheduler = LambdaLR(optimizer, scheduler.lr_lambdas, last_epoch=start - 1)
            say(f"Resumed from {resumed}, after update {start} of {max_steps}.")
        check_loss(config, accelerator, model, data.examples)
    if accelerator.is_main_process and not resumed:
        remove_earlier_run(config.output_dir)
    hub = start_pusher(config) if accelerator.is_main_process else None
    log = RunLog(accelerator, config, progress, flop, state["seconds"])

    # 6. Training loop -----------------------------------------------------------------------------
    # leave, unless you know why
    signals, stopped_by, saved, step = StopSignals(), [], resumed, start
    evaluate_now = partial(log_evaluation, config, accelerator, model, tokenizer, data, log)
    save_now = partial(save, config, accelerator, model, files, optimizer, log, identity)
    if data.valid_batches and not resumed:
        evaluate_now()
    with tracker.phase("train"):
        model.train()  # from_pretrained returns a model without dropout and checkpointing
        reader = UpdateReader(data.train_loader, accumulated, max_steps - start)
        for step in range(start + 1, max_steps + 1):
            begin = time.perf_counter()
            micro_batches = reader.take()
            targets = sum(count_targets(batch) for batch in micro_batches)
            inputs = sum(batch["input_ids"].numel() for batch in micro_batches)
            # label tokens and input tokens of this update, summed over all processes
            counts = torch.tensor([targets, inputs], device=accelerator.device)
            step_targets, step_inputs = accelerator.reduce(counts)
            step_loss = torch.zeros((), device=accelerator.device)
            for batch in send_to_device(micro_batches, accelerator.device):
                with accelerator.accumulate(model):
                    # a sum over this micro-batch: all label tokens of the update have equal weight
                    loss = compute_loss(model, batch) / step_targets
                    step_loss += loss.detach()
                    # undo two averages in advance: accelerate divides by the accumulation steps;
                    # DDP, ZeRO and FSDP divide by the number of processes
                    accelerator.backward(loss * accumulated * accelerator.num_processes)
                    if accelerator.sync_gradients:
                        max_norm = config.max_grad_norm or math.inf
                        grad_norm = accelerator.clip_grad_norm_(model.parameters(), max_norm)
                    optimizer.step()
                    optimizer.zero_grad()
            flags = signals.flags(accelerator.device) | reader.flags(accelerator.device)
            loss, *received = accelerator.reduce(torch.stack([step_loss, *flags.values()]))
            rate, received = scheduler.get_last_lr()[0], dict(zip(flags, received, strict=True))
            counts = {"target_tokens": step_targets, "input_tokens": step_inputs}
            progress.log(loss=loss, learning_rate=rate, grad_norm=grad_norm, **counts, **received)
            stopped_by = [name for name in flags if progress.updates[-1].pop(name)]
            log.check_last_update(saved)
            scheduler.step()
            log.add_seconds(time.perf_counter() - begin)
            if is_due(config.logging_strategy, config.logging_steps, progress):
                log.write_updates()
            if data.valid_batches and is_due(config.eval_strategy, config.eval_steps, progress):
                evaluate_now()
            is_kept = is_due(config.save_strategy, config.save_steps, progress)
            if is_kept or step == start + 1:  # the first save is a trial, to fail early
                folder = save_now(saved)
                saved = folder if is_kept else saved
                if accelerator.is_main_process:
                    keep_or_remove(config, hub, folder, is_kept)
            if stopped_by:
                break
    is_stopped = bool(stopped_by) and step < max_steps
    if is_stopped:
        progress.close()
        if not saved or saved.name != f"checkpoint-{step}":
            save_now(saved)
        say_stopped(stopped_by, step, max_steps)
    if not is_stopped:
        # only the trainable parameters are gathered, a frozen base stays sharded
        weights = gather_trained(accelerator, model)
        tracker.seconds["train"] = log.seconds  # of all updates, without evaluations and saves
        metrics = progress.collect_metrics(tracker, *log.scores())
        metrics["evaluations"] = progress.evaluations
        if accelerator.is_main_process:
            # when the block ends, new_folder checks the files and adds metrics and memory.png
            with files.new_folder(metrics, progress, with_log=False, overwrite=True) as folder:
                files.write(folder, weights)
            print_scores(metrics)
            print_saved(config, metrics)
            if hub:
                hub.push(config.output_dir, "End of training", ignore=("checkpoint-*", "runs"))
    end_run(accelerator)
    if hub:  # main process only; all collectives are done, so a long upload cannot time one out
        hub.finish()
    reader.check()  # stops with an error if data could not be read


# 7. Save ------------------------------------------------------------------------------------------
# leave, unless you know why
def save(config, accelerator, model, files, optimizer, log, identity, last_good):
    """Write a checkpoint of the last update and return its folder; stop if that fails."""
    progress, step = log.progress, len(log.progress.updates)
    state = {"updates": progress.updates, "evaluations": progress.evaluations}
    state |= {"seconds": log.seconds, "identity": identity}
    state |= {"sequences": step * identity["sequences_per_update"]}
    weights = gather_trained(accelerator, model)
    if not all(value.isfinite().all() for value in weights.values()):
        progress.close()
        fail(
            f"weights are NaN or infinite after update {step}: lower --learning_rate; the last "
            f"good checkpoint is {last_good or 'none'}"
        )
    write = partial(files.write, state_dict=weights)
    try:
        return save_checkpoint(accelerator, config.output_dir, step, optimizer, state, write)
    except (OSError, SafetensorError, CheckpointError) as error:
        progress.close()
        fail(
            f"no checkpoint of update {step} could be written ({error}); the last good one is "
            f"{last_good or 'none'}"
        )


def keep_or_remove(config, hub, folder, is_kept):
    """Push a checkpoint and remove the oldest ones; or remove it, if it was only a trial."""
    if is_kept:
        push_checkpoint(hub, config.hub_strategy, folder)
        keep_newest(config.output_dir, config.save_total_limit)
    else:
        remove_checkpoints([folder])


if __name__ == "__main__":
    main()
