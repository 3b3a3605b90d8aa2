"""Fine-tune a chat model in production: LoRA, QLoRA or all weights; packing, resuming, sharding.

Base:    none
Changes: none
Run:     accelerate launch --config_file configs/ddp.yaml examples/chat_sft.py --use_peft_lora
Needs:   2 CPU processes with 710 MB each for the shipped model; not measured on GPUs
Expect:  held-out perplexity 832 -> 207 in 17 s with startup (2 cores of an AMD EPYC, 2026-11-21)
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import accelerate
import peft
import torch
import transformers
from transformers.hf_argparser import HfArg

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # finds utils/
from utils import chat, errors, launch, lora, memory, results, vocabulary


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
    """attention: documents (each on its own, without a mask: utils/packing.py), sdpa, eager, ..."""
    use_flash_attn: bool = False
    """use the kernels of flash-attn where this machine has them"""
    dataset_name: str = "assets/chat"
    """Hub id, folder or file (.json, .jsonl, .csv, .tsv, .parquet or .arrow, also compressed)"""
    dataset_config: str = ""
    """configuration of a data set that has several, such as main"""
    dataset_text_field: str = ""
    """column of plain text, for data without conversations; default: text"""
    splits: str = ""
    """training split and held-out split, such as train,test; empty: train, and the first of test,
    validation and eval that exists"""
    streaming: bool = False
    """read the data while training, for data larger than memory; needs max_steps, and
    eval_strategy and save_strategy steps or no"""
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
    """layers that get LoRA: comma-separated names, a regular expression, or all-linear"""
    lora_target_parameters: str = ""
    """comma-separated names of fused weights of experts that get LoRA, such as experts.down_proj;
    the value experts means all of them"""
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
    optim: str = HfArg(default="adamw_torch", help=f"optimizer: {', '.join(launch.OPTIMIZERS)}")
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
    splits = chat.data.load_splits(config)
    return chat.data.find_shape(config, splits)


def build_dataloaders(config, accelerator, tokenizer, rows, state, num_added):
    """Return the `Data` of a run.

    Args:
        state: that of the checkpoint to resume; for a new run its initial values.
        num_added: number of tokens that the chat template added to the tokenizer.
    """
    encoding, date = chat.data.prepare_encoding(
        config,
        tokenizer,
        rows,
        num_added,
        date=state["identity"].get("template_date"),
    )
    if config.streaming:
        train = chat.data.encode_stream(config, rows, encoding)
    else:
        train = chat.data.encode_documents(config, accelerator, rows, encoding)
    valid_batches, prompts = chat.data.encode_held_out(config, accelerator, rows, encoding)
    chat.data.show_example(tokenizer, train.examples[0])
    max_steps = config.max_steps
    if max_steps == -1:
        per_update = chat.resuming.per_update(config, accelerator.num_processes)
        max_steps = math.ceil(config.num_train_epochs * (train.count / per_update))
    return chat.data.Data(
        chat.data.load_batches(config, accelerator, train, start=state["sequences"]),
        train.count,
        max_steps,
        train.examples,
        train.facts,
        date,
        valid_batches,
        prompts,
    )


# 3. Model -----------------------------------------------------------------------------------------
# yours to change
def build_model(config, tokenizer, num_added):
    """Return the model: all weights trainable, or frozen with LoRA, and quantized if asked for."""
    options = {"device_map": launch.device_map()}
    if config.use_4bit_quantization or config.use_8bit_quantization:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=config.use_4bit_quantization,
            load_in_8bit=config.use_8bit_quantization,
            bnb_4bit_quant_type=config.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=config.use_nested_quant,
            bnb_4bit_compute_dtype=config.bnb_4bit_compute_dtype or config.dtype,
            # the strategies shard tensors of this dtype
            bnb_4bit_quant_storage=config.bnb_4bit_quant_storage_dtype or config.dtype,
        )
    if config.use_4bit_quantization and launch.shards_parameters():
        # on the CPU, so that no GPU has to hold the full model
        options["device_map"] = {"": "cpu"}
        # transformers refuses a device_map under ZeRO-3: hide ZeRO-3 from it
        transformers.integrations.deepspeed.unset_hf_deepspeed_config()
    model = launch.load_sharded(
        transformers.AutoModelForCausalLM,
        config.model_name_or_path,
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        use_safetensors=True,
        **options,
    )
    modules_to_save = vocabulary.resize(
        model,
        tokenizer,
        num_added,
        config.adapter_name_or_path,
    )
    vocabulary.set_ends(model, tokenizer)
    # with layerdrop, processes would skip different layers, and the run would hang
    model.get_decoder().layerdrop = 0.0
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable(
            {"use_reentrant": config.use_reentrant},
            every_n_layers=config.gradient_checkpointing_every_n_layers,
            offload=config.gradient_checkpointing_offload,
        )
        # a reentrant layer needs an input with a gradient
        model.enable_input_require_grads()
    # seed again: resizing may draw random numbers, and LoRA must not depend on them
    accelerate.utils.set_seed(config.seed)
    if config.use_peft_lora:
        model = add_lora(config, model, modules_to_save)
    if config.use_liger_kernel:
        chat.kernels.apply_liger(model, config.model_name_or_path)
    chat.token_loss.add_token_loss(model)
    return model


def add_lora(config, model, modules_to_save):
    """Return the model, frozen, with trainable LoRA layers: new ones, or those of an adapter."""
    # DeepSpeed's engine wants one dtype, and keeps float32 copies of the trainable weights itself
    is_engine = launch.launched_strategy().startswith("zero")
    if place := config.adapter_name_or_path:
        model = peft.PeftModel.from_pretrained(
            model,
            place,
            is_trainable=True,
            autocast_adapter_dtype=not is_engine,
        )
    else:
        targets = chat.settings.split_names(config.lora_target_modules)
        experts = chat.settings.split_names(config.lora_target_parameters)
        lora_config = peft.LoraConfig(
            task_type=peft.TaskType.CAUSAL_LM,
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=lora.lora_targets(model, targets),
            target_parameters=lora.expert_targets(model, experts) or None,
            modules_to_save=modules_to_save,
        )
        model = peft.get_peft_model(
            model,
            lora_config,
            autocast_adapter_dtype=not is_engine,
        )
    lora.say_experts(model)
    lora.settle_dtypes(model, getattr(torch, config.dtype), is_engine)
    if launch.launched_precision() != "no":
        for module in model.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                # leave casting to autocast: PEFT casts to the weight's dtype, which FSDP changes
                module.cast_input_dtype_enabled = False
    return model


def build_optimizer(config, model):
    """Return the optimizer of the trainable parameters."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return launch.adamw(config.optim)(
        trainable,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
    )


def prepare(config, accelerator, model):
    """Return the model and optimizer under the launched strategy."""
    strategy = launch.launched_strategy()
    if config.torch_compile:
        chat.kernels.compile_layers(accelerator, model)
    # sums in float32; in zero1 this may select BF16_Optimizer, whose state cannot be saved
    sums = {"data_types": {"grad_accum_dtype": "fp32"}} if strategy != "zero1" else {}
    launch.configure_deepspeed(
        accelerator,
        config,
        model,
        train_micro_batch_size_per_gpu=config.per_device_train_batch_size,
        communication_data_type="fp32",
        **sums,
    )
    if strategy == "zero3":
        lora.gather_blocks(model)
    if strategy == "fsdp1":
        if config.use_peft_lora:
            # a unit for each LoRA matrix
            policy = peft.utils.other.fsdp_auto_wrap_policy(model)
            accelerator.state.fsdp_plugin.auto_wrap_policy = policy
        # prepare the model first: the optimizer needs its flat parameters
        model = accelerator.prepare(model)
        optimizer = accelerator.prepare(build_optimizer(config, model))
        # FSDP moves only parameters
        launch.move_quant_states(model, accelerator.device)
        return model, optimizer
    if strategy == "fsdp2":
        for module in model.modules():
            if isinstance(module, peft.utils.ModulesToSaveWrapper):
                # drop PEFT's unused frozen copy: with it, a tied weight would be in two FSDP2 units
                module.original_module = torch.nn.Identity()
    model, optimizer = accelerator.prepare(model, build_optimizer(config, model))
    if strategy == "fsdp2":
        launch.move_quant_states(model, accelerator.device)
        # makes `generate` gather the root unit, as `forward` does
        torch.distributed.fsdp.register_fsdp_forward_method(model, "generate")
    return model, optimizer


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
    packed, alone, is_joined = chat.data.probe_loss(config, examples)
    with chat.kernels.uncompiled(config):
        reason = chat.token_loss.check_token_loss(accelerator, model, packed, alone)
        if not reason:
            return
        other = chat.token_loss.attention_that_works(accelerator, model, packed, alone)
    remedy = chat.settings.loss_remedy(other, is_joined)
    errors.fail_together(accelerator, f"{reason}: {remedy}")


def evaluate(accelerator, model, batches):
    """Return the scores on the held-out batches of all processes, by name."""
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    for batch in batches:
        batch = accelerate.utils.send_to_device(batch, accelerator.device)
        with torch.no_grad():
            outputs = model(**batch)
        labels = batch["labels"].ne(-100).sum()
        totals += torch.stack([outputs["loss"], outputs["correct"], labels])
    model.train()
    total, correct, labels = accelerator.reduce(totals).tolist()
    return {
        "eval_loss": total / labels,
        "perplexity": math.exp(min(total / labels, 700)),
        "token_accuracy": correct / labels,
    }


def show_answers(config, accelerator, model, tokenizer, prompts):
    """Print the model's greedy answers to prompts of token ids. Every process generates all."""
    if not prompts:
        return
    model.eval()
    unwrapped = accelerator.unwrap_model(model)
    own = unwrapped.generation_config
    # greedy: replace the model's own settings, from which generate would take all unset options
    unwrapped.generation_config = transformers.GenerationConfig(
        eos_token_id=own.eos_token_id,
        pad_token_id=own.eos_token_id[0],
    )
    with launch.generating(accelerator, model, config.layerwise_generation) as generator:
        for prompt in prompts:
            inputs = torch.tensor([prompt], device=accelerator.device)
            tokens = generator.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=config.max_new_tokens,
                # a process that is done still takes part in gathering
                synced_gpus=launch.shards_parameters(),
            )
            answer = tokenizer.decode(tokens[0, len(prompt) :], skip_special_tokens=True)
            end = tokenizer.decode(prompt)[-100:]
            accelerator.print(f"  {end!r} -> {answer.strip()!r}")
    # put the model's own settings back: they are saved with it
    unwrapped.generation_config = own
    if hasattr(unwrapped, "peft_config"):
        # PEFT's generate has copied the greedy one to its base
        unwrapped.get_base_model().generation_config = own
    model.train()


def log_evaluation(config, accelerator, model, tokenizer, data, log):
    """Log the scores on the held-out data, and print answers to its prompts."""
    with chat.kernels.uncompiled(config):
        log.write_scores(evaluate(accelerator, model, data.valid_batches))
        show_answers(config, accelerator, model, tokenizer, data.prompts)


def main():
    # 5. Setup -------------------------------------------------------------------------------------
    # leave, unless you know why
    config = chat.settings.read_chat_settings(Config, transformers.AutoModelForCausalLM)
    rows = read_rows(config)
    state = chat.resuming.find_run(config)
    tokenizer, num_added = chat.data.build_tokenizer(config, rows.is_chat)
    accelerator = launch.start_accelerator(
        config.gradient_accumulation_steps,
        tf32=config.tf32,
        deterministic=config.deterministic,
        **chat.run_log.tracker_options(config),
    )
    data = build_dataloaders(config, accelerator, tokenizer, rows, state, num_added)
    max_steps = data.max_steps
    state["identity"] = chat.resuming.check_resumed(config, accelerator, data, state)
    accelerate.utils.set_seed(config.seed)
    tracker = memory.MemoryTracker()
    with tracker.phase("load"), errors.explaining(*chat.settings.describe(config)):
        model = build_model(config, tokenizer, num_added)
        flop = chat.run_log.flop_per_token(model)
        files = chat.checkpoints.weight_files(accelerator, config, model, tokenizer, state)
        model, optimizer = prepare(config, accelerator, model)
        progress = results.Progress(accelerator, model, config, max_steps, data.num_sequences)
        chat.resuming.restore_progress(progress, state)
        scheduler = transformers.get_scheduler(
            config.lr_scheduler_type,
            optimizer,
            num_warmup_steps=int(config.warmup_ratio * max_steps),
            num_training_steps=max_steps,
        )
        # dropout differs between processes
        accelerate.utils.set_seed(config.seed, device_specific=True)
        if state["folder"]:
            chat.checkpoints.load(accelerator, state["folder"], optimizer)
            scheduler = chat.resuming.move_schedule(scheduler, state["step"])
            chat.resuming.say_resumed(state, max_steps)
        check_loss(config, accelerator, model, data.examples)
    if accelerator.is_main_process and not state["folder"]:
        chat.resuming.remove_earlier_run(config.output_dir)
    log = chat.run_log.RunLog(accelerator, config, progress, flop, state["seconds"])
    checkpoints = chat.checkpoints.Checkpoints(log, optimizer, files, state)

    # 6. Training loop -----------------------------------------------------------------------------
    # leave, unless you know why
    stop_signals, stopped_by = chat.signals.StopSignals(), []
    if data.valid_batches and not state["folder"]:
        log_evaluation(config, accelerator, model, tokenizer, data, log)
    with tracker.phase("train"):
        # from_pretrained returns the model in eval mode: dropout and checkpointing are off
        model.train()
        accumulated = config.gradient_accumulation_steps
        num_updates = max_steps - state["step"]
        reader = chat.signals.UpdateReader(data.train_loader, accumulated, num_updates)
        for _ in range(num_updates):
            log.begin_update()
            micro_batches = reader.take()
            targets = sum(count_targets(batch) for batch in micro_batches)
            inputs = sum(batch["input_ids"].numel() for batch in micro_batches)
            # label tokens and input tokens of this update, summed over all processes
            counts = torch.tensor([targets, inputs], device=accelerator.device)
            step_targets, step_inputs = accelerator.reduce(counts)
            step_loss = torch.zeros((), device=accelerator.device)
            for batch in accelerate.utils.send_to_device(micro_batches, accelerator.device):
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
            # why a process must stop: a signal, or data that cannot be read
            flags = stop_signals.flags(accelerator.device) | reader.flags(accelerator.device)
            step_loss, *received = accelerator.reduce(torch.stack([step_loss, *flags.values()]))
            progress.log(
                loss=step_loss,
                learning_rate=scheduler.get_last_lr()[0],
                grad_norm=grad_norm,
                target_tokens=step_targets,
                input_tokens=step_inputs,
                **dict(zip(flags, received, strict=True)),
            )
            stopped_by = [name for name in flags if progress.updates[-1].pop(name)]
            log.check_last_update(checkpoints.last)
            scheduler.step()
            log.end_update()
            if log.is_due():
                log.write_updates()
            if data.valid_batches and log.is_evaluation_due():
                log_evaluation(config, accelerator, model, tokenizer, data, log)
            if checkpoints.is_due():
                checkpoints.save(gather_weights(accelerator, model))
            if stopped_by:
                break
    if stopped_by and len(progress.updates) < max_steps:
        progress.close()
        if not checkpoints.has_last_update():
            checkpoints.save_before_stop(gather_weights(accelerator, model))
        chat.signals.say_stopped(stopped_by, len(progress.updates), max_steps)
    else:
        weights = gather_weights(accelerator, model)
        # of all updates, without evaluations and saves
        tracker.seconds["train"] = log.seconds
        metrics = progress.collect_metrics(tracker, *log.scores())
        metrics["evaluations"] = progress.evaluations
        if accelerator.is_main_process:
            # when the block ends, new_folder checks the files, and adds metrics, plots and README
            with files.new_folder(metrics, progress, with_log=False, overwrite=True) as folder:
                files.write(folder, weights)
            results.print_scores(metrics)
            results.print_saved(config, metrics)
            checkpoints.push_results()
    results.end_run(accelerator)
    checkpoints.finish_pushing()
    reader.check()  # stops with an error if data could not be read


# 7. Save ------------------------------------------------------------------------------------------
# leave, unless you know why
def gather_weights(accelerator, model):
    """Return the trained parameters by name, unsharded. Call it in every process: it gathers."""
    # a frozen base stays sharded
    return chat.checkpoints.gather_trained(accelerator, model)


if __name__ == "__main__":
    main()
