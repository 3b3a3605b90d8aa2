"""Fine-tune a causal language model with QLoRA, its 4-bit weights sharded by FSDP2 and kept on the CPU.

Base:    causal_lm_qlora.py
Changes: 1. Settings, 3. Model, 4. Evaluation, 5. Setup, 7. Save
Run:     accelerate launch --config_file configs/fsdp2_qlora.yaml examples/causal_lm_qlora_fsdp2.py
Needs:   2 CPU processes with 693 MB each for the shipped model; on GPUs not measured
Expect:  accuracy 0.00 -> 0.99 in 32 s, start included (2 cores of an AMD EPYC, 2026-11-21)
"""

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import GradientAccumulationPlugin, set_seed
from datasets import Dataset, load_dataset
from peft import LoraConfig, TaskType, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.utils.data import DataLoader, RandomSampler
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import BitsAndBytesConfig, GenerationConfig, HfArgumentParser
from transformers.hf_argparser import HfArg
from transformers.optimization import get_scheduler

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # holds utils/; one beside the script comes first
from utils.checks import check_columns, check_rows, check_settings, check_targets, data_files, or_refuse, read_settings
from utils.launch import adamw, move_quant_states, start_accelerator
from utils.memory import MemoryTracker, fits_whole, plot_memory
from utils.report import check_adapter, check_sharding, collect_metrics, finish_run, new_folder
from utils.report import read_numbers, save_optimizer_once, write_metrics


# 1. Settings --------------------------------------------------------------------------------------
@dataclass
class Config:  # what is trained; where it runs (processes, precision, sharding, offload) stands in the launch config
    model_name_or_path: str = HfArg(default="assets/tiny-causal-lm", help="folder or Hub id, safetensors only")
    dtype: str = HfArg(default="float32", help="of all but the 4-bit weights, and of their arithmetic: float32, ...")
    bnb_4bit_quant_storage: str = HfArg(default="", help="dtype that packs the 4-bit weights; empty: that of dtype")
    attn_implementation: str = HfArg(default="sdpa", help="attention: eager, sdpa, flash_attention_2, ...")
    dataset_name: str = HfArg(default="assets/complaints", help="Hub id, folder, .csv, .json or .jsonl")
    text_column: str = HfArg(default="Tweet text", help="column that the model reads")
    label_column: str = HfArg(default="Label", help="column that the model learns to write")
    prompt_template: str = HfArg(default="Tweet text : {text} Label :", help="prompt, where {text} is the row's text")
    max_length: int = HfArg(default=128, help="tokens of prompt and label; a longer text is cut at its end")
    per_device_train_batch_size: int = HfArg(default=8, help="rows in a micro-batch of one process")
    per_device_eval_batch_size: int = HfArg(default=32, help="rows that one process generates for at once")
    gradient_accumulation_steps: int = HfArg(default=1, help="micro-batches of one process in an update")
    learning_rate: float = HfArg(default=1e-3, help="peak, after the warmup; larger models want a lower one")
    lr_scheduler_type: str = HfArg(default="cosine", help="after the warmup: cosine, linear or constant_with_warmup")
    warmup_ratio: float = HfArg(default=0.1, help="share of the updates, rounded down, in which the rate rises")
    optim: str = HfArg(default="adamw_torch", help="adamw_torch, adamw_8bit, paged_adamw_32bit or paged_adamw_8bit")
    weight_decay: float = HfArg(default=0.0, help="AdamW's, per update and unit of learning rate")
    max_grad_norm: float = HfArg(default=1.0, help="L2 norm to which a larger gradient is cut; 0 never cuts")
    num_train_epochs: float = HfArg(default=6.0, help="passes over the training rows, rounded up to whole updates")
    max_steps: int = HfArg(default=-1, help="updates, in place of num_train_epochs; -1 leaves it to those")
    gradient_checkpointing: bool = HfArg(default=False, help="recompute activations: less memory, more time")
    tf32: bool = HfArg(default=False, help="multiply float32 in TF32 on GPUs, less exactly")
    layerwise_generation: bool = HfArg(default=False, help="answer from a layer at a time, not the whole model; slow")
    lora_r: int = HfArg(default=8, help="rank of the two matrices that are learned beside each target layer")
    lora_alpha: int = HfArg(default=32, help="their product is scaled by lora_alpha / lora_r")
    lora_dropout: float = HfArg(default=0.0, help="share of its input that a LoRA layer does not see, 0 to below 1")
    target_modules: list[str] = HfArg(default_factory=lambda: ["all-linear"], help="names of layers, or all-linear")
    modules_to_save: list[str] = HfArg(default_factory=list, help="layers to train whole: lm_head, embed_tokens, ...")
    seed: int = HfArg(default=42, help="of new weights, dropout, the order of the rows and their split")
    output_dir: str = HfArg(default=f"outputs/{Path(__file__).stem}", help="new folder for all that the run leaves")
    overwrite_output_dir: bool = HfArg(default=False, help="replace what an earlier run left in output_dir")
    hub_model_id: str = HfArg(default="", help="push to this Hub repository, created private; empty: no push")


# 2. Data ------------------------------------------------------------------------------------------
def build_dataloaders(config, tokenizer, accelerator):
    """Return a loader of the training batches of all updates, and one of the held-out rows."""
    dataset = or_refuse(f"--dataset_name {config.dataset_name}", load_dataset, **data_files(config.dataset_name))
    check_columns(dataset, config)
    if "validation" not in dataset:
        train, valid = dataset["train"].train_test_split(test_size=0.2, seed=config.seed).values()
        held_out = set(valid[config.text_column])  # a text that occurs twice stays on one side
        dataset = {"train": train.filter(lambda row: row[config.text_column] not in held_out), "validation": valid}
    check_rows(dataset, config, accelerator.num_processes)
    head, tail = config.prompt_template.split("{text}")
    tail = tokenizer(tail, add_special_tokens=False).input_ids
    labels = {str(label) for split in ("train", "validation") for label in dataset[split][config.label_column]}
    targets = {label: tokenizer(f" {label}", add_special_tokens=False).input_ids for label in labels}
    answers, room = check_targets(targets, tokenizer, tokenizer(head).input_ids, tail, config.max_length)

    def encode(row):
        label = str(row[config.label_column])
        prompt = tokenizer(f"{head}{row[config.text_column] or ''}").input_ids[:room] + tail  # only the text gives way
        return {"prompt": prompt, "target": [*targets[label], tokenizer.eos_token_id], "label": answers[label]}

    def pad(rows, value, side):
        return torch.nn.utils.rnn.pad_sequence([torch.LongTensor(row) for row in rows], True, value, side)

    def inputs(rows, side):
        mask = [[1] * len(row) for row in rows]
        return {"input_ids": pad(rows, tokenizer.pad_token_id, side), "attention_mask": pad(mask, 0, side)}

    def collate_train(rows):
        rows = [(row["prompt"] + row["target"], [-100] * len(row["prompt"]) + row["target"]) for row in rows]
        sequences, labels = zip(*rows)  # -100: no loss on the prompt
        return inputs(sequences, "right") | {"labels": pad(labels, -100, "right")}

    def collate_valid(rows):  # padded on the left: the answer starts where the prompt ends
        return inputs([row["prompt"] for row in rows], "left")

    train, valid = (Dataset.from_list([encode(row) for row in dataset[split]]) for split in ("train", "validation"))
    per_update = config.per_device_train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    max_steps = max(config.max_steps, 0) or math.ceil(config.num_train_epochs * len(train) / per_update)
    generator = torch.Generator().manual_seed(config.seed)  # pass after pass in one order, on any number of processes
    sampler = RandomSampler(train, num_samples=max_steps * per_update, generator=generator)
    train_loader = DataLoader(train, config.per_device_train_batch_size, sampler=sampler, collate_fn=collate_train)
    return train_loader, DataLoader(valid, config.per_device_eval_batch_size, collate_fn=collate_valid)


# 3. Model -----------------------------------------------------------------------------------------
def build_model(config, tokenizer):
    """Return the pretrained model in 4 bits, frozen, with LoRA layers to be trained."""
    quantization = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    quantization["bnb_4bit_compute_dtype"] = config.dtype
    quantization["bnb_4bit_quant_storage"] = config.bnb_4bit_quant_storage or config.dtype  # sharded as such numbers
    options = {"dtype": config.dtype, "attn_implementation": config.attn_implementation, "use_safetensors": True}
    options["quantization_config"] = BitsAndBytesConfig(**quantization)
    options["device_map"] = {"": "cpu"}  # else transformers packs the full model on every GPU
    model = AutoModelForCausalLM.from_pretrained(config.model_name_or_path, **options)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = GenerationConfig(**ends)  # greedy, whatever beams or penalties the checkpoint brings
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable()  # non-reentrant
    targets = "all-linear" if config.target_modules == ["all-linear"] else config.target_modules
    lora = {"r": config.lora_r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
    lora |= {"target_modules": targets, "modules_to_save": config.modules_to_save or None}
    return get_peft_model(model, LoraConfig(task_type=TaskType.CAUSAL_LM, **lora))


# 4. Evaluation ------------------------------------------------------------------------------------
def evaluate(accelerator, model, tokenizer, valid_loader):
    """Return the share of held-out rows answered with exactly their label, the answers and the labels."""
    model.eval()
    labels, predictions = valid_loader.dataset["label"], []
    max_new_tokens = max(map(len, valid_loader.dataset["target"]))
    units, whole = [unit for unit in model.modules() if isinstance(unit, FSDPModule)], model.gather_for_generation
    freed = [unit for unit in units[1:] if list(unit.children()) or unit is model.get_input_embeddings()]
    for unit in freed:  # all but root, norm and head, which stay gathered anyhow
        unit.set_reshard_after_forward(not whole)
    for batch in valid_loader:
        tokens = model.generate(**batch, max_new_tokens=max_new_tokens, synced_gpus=not whole)
        answers = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        # without the rows that the loader repeats to give every process equally many batches
        predictions += accelerator.gather_for_metrics(list(map(str.strip, answers)), use_gather_object=True)
    for unit in freed:
        unit.set_reshard_after_forward(accelerator.state.fsdp_plugin.reshard_after_forward)
    for unit in units:
        unit.reshard()
    correct = sum(one == other for one, other in zip(predictions, labels, strict=True))
    return correct / len(labels), predictions, labels


def main():
    # 5. Setup -------------------------------------------------------------------------------------
    config = read_settings(HfArgumentParser(Config))
    check_settings(config, ("fsdp2",), (AutoConfig, AutoTokenizer, AutoModelForCausalLM))
    if config.modules_to_save:  # loaded by one process, tied weights would be lost beside layers trained whole
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    accumulation = GradientAccumulationPlugin(config.gradient_accumulation_steps, sync_with_dataloader=False)
    accelerator = start_accelerator(tf32=config.tf32, gradient_accumulation_plugin=accumulation)
    set_seed(config.seed)
    tokenizer = AutoTokenizer.from_pretrained(config.model_name_or_path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # always masked, so any token will do
    train_loader, valid_loader = build_dataloaders(config, tokenizer, accelerator)
    tracker = MemoryTracker()
    with tracker.phase("load"):
        model = build_model(config, tokenizer)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for wrapper in [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]:
            wrapper.original_module = torch.nn.Identity()  # unused, and where tied in two units, which FSDP2 refuses
        optimizer = adamw(config.optim)(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
        loaders = (train_loader, valid_loader)
        model, optimizer, train_loader, valid_loader = accelerator.prepare(model, optimizer, *loaders)
        register_fsdp_forward_method(model, "generate")  # gathers what lies in no layer, as forward does
        move_quant_states(model, accelerator.device)  # the scales are not parameters
        check_sharding(accelerator, model)
        save_optimizer_once(accelerator, model, optimizer)
        model.gather_for_generation = not config.layerwise_generation and fits_whole(accelerator, model)
    max_steps = len(train_loader) // config.gradient_accumulation_steps
    scheduler = get_scheduler(config.lr_scheduler_type, optimizer, int(config.warmup_ratio * max_steps), max_steps)

    # 6. Training loop -----------------------------------------------------------------------------
    before, _, _ = evaluate(accelerator, model, tokenizer, valid_loader)
    updates = []
    with tracker.phase("train"):
        model.train()
        batches = iter(train_loader)
        for _ in tqdm(range(max_steps), disable=not accelerator.is_main_process):
            micro_batches = [next(batches) for _ in range(config.gradient_accumulation_steps)]
            counts = [torch.stack([b["labels"].ne(-100).sum(), b["attention_mask"].sum()]) for b in micro_batches]
            step_tokens = accelerator.reduce(sum(counts))  # targets and inputs, of all processes
            step_loss = torch.zeros((), device=accelerator.device)
            for batch, count in zip(micro_batches, counts):
                with accelerator.accumulate(model):
                    # a mean over the micro-batch's own targets, weighted so that all targets of the update count alike
                    loss = model(**batch, use_cache=False).loss * count[0] / step_tokens[0]
                    step_loss += loss.detach()
                    # takes back the means to come: accelerate's over micro-batches, the strategy's over processes
                    accelerator.backward(loss * config.gradient_accumulation_steps * accelerator.num_processes)
                    if accelerator.sync_gradients:
                        grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf)
                    optimizer.step()
                    optimizer.zero_grad()
            values = (accelerator.reduce(step_loss), grad_norm, step_tokens)
            # one read for all of them: each read makes the CPU wait for the GPU
            step_loss, grad_norm, targets, inputs = read_numbers(accelerator.device, *values)
            rate = scheduler.get_last_lr()[0]
            updates.append((step_loss, rate, grad_norm, int(targets), int(inputs)))
            scheduler.step()
    with tracker.phase("eval"):
        after, predictions, labels = evaluate(accelerator, model, tokenizer, valid_loader)

    # 7. Save --------------------------------------------------------------------------------------
    unwrapped = accelerator.unwrap_model(model)
    trained = {name: parameter for name, parameter in unwrapped.named_parameters() if parameter.requires_grad}
    state_dict = {name: parameter.full_tensor().cpu() for name, parameter in trained.items()}  # no part of the base
    metrics = collect_metrics(accelerator, model, config, tracker, (before, after), updates)
    if accelerator.is_main_process:
        with new_folder(config) as folder:
            unwrapped.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)  # the adapter alone
            tokenizer.save_pretrained(folder)
            check_adapter(folder, trained, metrics["learning_rates"])
            plot_memory(metrics["memory"], folder / "memory.png")
            write_metrics(folder, metrics)
    finish_run(accelerator, config, metrics, predictions, labels)


if __name__ == "__main__":
    main()
