"""Train a small model and save it as the libraries save checkpoints, with the weights beside it.

Run `accelerate launch --config_file CONFIG tests/checkpoint_driver.py MODEL OUTPUT METHOD`, where
METHOD is full, lora, or frozen (in full but for the embedding). It writes into the folder OUTPUT:

    state                   what `accelerator.save_state` writes (FSDP1's one file: the model)
    trainer                 what transformers' Trainer writes of a model that FSDP shards
    engine, engine_trained  DeepSpeed's `save_checkpoint`, the second without frozen parameters
    gathered.safetensors    the trained parameters, gathered, in float32
    adapter                 adapter_config.json (lora)
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate.utils import DistributedType, save_fsdp_model
from accelerate.utils.constants import FSDP_MODEL_NAME
from peft import LoraConfig, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from safetensors.torch import save_file
from torch.distributed.fsdp import FullStateDictConfig, StateDictType
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from transformers import AutoModelForCausalLM

from utils.checkpoint import gather_trained
from utils.launch import configure_deepspeed, start_accelerator
from utils.saving import plain_name

SETTINGS = SimpleNamespace(gradient_accumulation_steps=1, max_grad_norm=1.0)


def build(folder, method):
    """Return the model: with LoRA, trained in full, or in full but for its frozen embedding."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if method == "lora":
        lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", use_dora=True)
        return get_peft_model(model, lora)
    model.get_input_embeddings().requires_grad_(method == "full")
    return model


def save_fsdp1(accelerator, model, folder):
    """Write the model's file of FULL_STATE_DICT, as accelerate does.

    accelerate also moves the weights to the CPU, which raises where they are.
    """
    config = FullStateDictConfig(rank0_only=True)
    with FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT, config):
        weights = model.state_dict()
    if accelerator.is_main_process:
        folder.mkdir()
        torch.save(weights, folder / f"{FSDP_MODEL_NAME}.bin")


def main(folder, output, method):
    accelerator = start_accelerator()
    torch.manual_seed(0)
    output, is_deepspeed = Path(output), accelerator.deepspeed_plugin is not None
    model = build(folder, method)
    if method == "lora" and accelerator.is_main_process:
        model.peft_config["default"].save_pretrained(output / "adapter")
    batch = {"train_micro_batch_size_per_gpu": 1} if is_deepspeed else {}
    configure_deepspeed(accelerator, SETTINGS, model, **batch)
    is_fsdp = accelerator.distributed_type == DistributedType.FSDP
    plugin = accelerator.state.fsdp_plugin if is_fsdp else None
    if plugin is not None and plugin.fsdp_version == 1:
        if method == "lora":
            plugin.auto_wrap_policy = fsdp_auto_wrap_policy(model)
        model = accelerator.prepare(model)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = accelerator.prepare(torch.optim.AdamW(trained, lr=1e-2))
    else:
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained, lr=1e-2))
    for step in range(2):
        ids = torch.randint(4, 40, (1, 16), generator=torch.Generator().manual_seed(step))
        loss = model(input_ids=ids, labels=ids)["loss"]
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    weights = gather_trained(accelerator, model)
    if accelerator.is_main_process:
        tensors = {plain_name(name): value for name, value in weights.items()}
        save_file(tensors, output / "gathered.safetensors")
    is_fsdp1 = plugin is not None and plugin.fsdp_version == 1
    if is_fsdp1 and plugin.state_dict_type == StateDictType.FULL_STATE_DICT:
        save_fsdp1(accelerator, model, output / "state")
    else:
        accelerator.save_state(output / "state")
    if plugin is not None and plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT:
        save_fsdp_model(plugin, accelerator, model, output / "trainer", adapter_only=True)
    if is_deepspeed:
        model.save_checkpoint(output / "engine")
        model.save_checkpoint(output / "engine_trained", exclude_frozen_parameters=True)
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
