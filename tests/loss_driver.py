"""Train small models for a few updates as chat_sft does, on ragged documents; write the results.

`accelerate launch --config_file CONFIG tests/loss_driver.py FOLDER` reads the models FOLDER/llama
and FOLDER/qwen2 and writes FOLDER/STRATEGY.pt: case -> what `train` returns. PYTHONPATH names the
repository.
"""

import random
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate.utils import set_seed
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import AutoTokenizer

from examples import chat_sft
from utils.checkpoint import gather_trained
from utils.environment import launched_strategy
from utils.launch import start_accelerator
from utils.chat.token_loss import add_token_loss, check_token_loss
from utils.packing import join
from utils.saving import plain_name

LORA = {"use_peft_lora": True, "lora_target_modules": "q_proj,down_proj"}
CASES = {  # name -> model, new tokens, settings; the embedding of qwen2 is tied to its head
    "LoRA off the head": ("llama", 0, LORA | {"gradient_checkpointing": True}),
    "LoRA on the head": ("llama", 0, LORA | {"lora_target_modules": "q_proj,lm_head"}),
    "head trained whole": ("qwen2", 2, LORA),
    "all weights": ("llama", 0, {}),
    "all weights, tied": ("qwen2", 0, {}),
}
PROCESSES, UPDATES, ACCUMULATED = 2, 3, 2
CHUNK_BYTES = 4 * 400 * 7  # of 7 rows or so


def named(weights):
    """Return weights by their names without the wrappers of FSDP1."""
    return {plain_name(name): weight for name, weight in weights.items()}


def micro_batches(process):
    """Return a process's micro-batches; those of the second are small, one without labels."""
    draw, batches = random.Random(process), []
    for number in range(UPDATES * ACCUMULATED):
        is_mute, documents = (process, number) == (1, 2), []
        for _ in range(draw.randint(1, 3)):
            length = draw.randint(2, 15) if process else draw.randint(40, 70)
            ids = [draw.randrange(350) for _ in range(length)]
            labels = [-100 if is_mute or draw.random() < 0.3 else token for token in ids]
            documents.append({"input_ids": ids, "labels": labels})
        batches.append(join(documents))
    return batches


def train(accelerator, folder, case, whose, **options):
    """Return the losses, the trained weights before and after, and what the check said.

    Args:
        whose: the processes whose micro-batches this one computes, of each as many an update.
        options: for the model's forward.
    """
    model, added, settings = CASES[case]
    config = chat_sft.Config(
        model_name_or_path=str(folder / model),
        dtype="float32",
        learning_rate=1.0,
        gradient_accumulation_steps=accelerator.gradient_accumulation_steps,
        max_grad_norm=0.0,
        **settings,
    )
    tokenizer = AutoTokenizer.from_pretrained(config.model_name_or_path)
    tokenizer.add_tokens([f"<{number}>" for number in range(added)])
    if (
        accelerator.distributed_type == "FSDP"
    ):  # as before it learned the names of another model's layers
        plugin = accelerator.state.fsdp_plugin
        plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = (
            transformer_auto_wrap_policy,
            None,
        )
    set_seed(0)
    chunked = partial(add_token_loss, chunk_bytes=CHUNK_BYTES)
    sgd = partial(
        torch.optim.SGD, momentum=0.9
    )  # unlike AdamW's, its steps are as large as the gradients
    with (
        patch.object(chat_sft.chat.token_loss, "add_token_loss", chunked),
        patch.object(chat_sft.launch, "adamw", lambda name: sgd),
    ):
        model = chat_sft.build_model(config, tokenizer, added)
        for name, weight in model.named_parameters():
            if "lora_B" in name:  # 0 at first, which would leave lora_A without a gradient
                weight.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        model, optimizer = chat_sft.prepare(config, accelerator, model)
    pair = [
        {"input_ids": list(range(at, at + 9)), "labels": list(range(at, at + 9))}
        for at in (100, 200)
    ]
    reason = check_token_loss(
        accelerator, model, join(pair), [join([document]) for document in pair]
    )
    before = named(gather_trained(accelerator, model))
    batches, losses = [batch for part in zip(*map(micro_batches, whose)) for batch in part], []
    accumulated = accelerator.gradient_accumulation_steps
    for start in range(0, len(batches), accumulated):
        part = batches[start : start + accumulated]
        targets = accelerator.reduce(sum(batch["labels"].ne(-100).sum() for batch in part))
        step_loss = torch.zeros(())
        for batch in part:
            with accelerator.accumulate(model):
                loss = model(**batch, **options)["loss"] / targets
                step_loss += loss.detach()
                accelerator.backward(loss * accumulated * accelerator.num_processes)
                optimizer.step()
                optimizer.zero_grad()
        losses.append(accelerator.reduce(step_loss).item())
    after = named(gather_trained(accelerator, model))
    accelerator.free_memory()
    return losses, before, after, reason


def main():
    accelerator = start_accelerator(gradient_accumulation_steps=ACCUMULATED)
    folder, whose = Path(sys.argv[1]), [accelerator.process_index]
    found = {case: train(accelerator, folder, case, whose) for case in CASES}
    if accelerator.is_main_process:
        torch.save(found, folder / f"{launched_strategy()}.pt")
    accelerator.end_training()


if __name__ == "__main__":
    main()
