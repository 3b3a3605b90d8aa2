"""Prepare a small model under the launched strategy and write facts about it to a JSON file.

Run `accelerate launch --config_file CONFIG tests/group_driver.py FILE`. The keys of the file are
`seconds` (list, the time-out of each process group), `trained` (number of trainable parameter
elements) and `bucket` (DeepSpeed's reduce_bucket_size in elements; only under DeepSpeed).
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.distributed import distributed_c10d
from transformers import LlamaConfig, LlamaForCausalLM

from utils.launch import configure_deepspeed, start_accelerator

SIZE = {"vocab_size": 40, "hidden_size": 8, "intermediate_size": 11, "num_hidden_layers": 1}
SETTINGS = SimpleNamespace(gradient_accumulation_steps=1, max_grad_norm=1.0)


def main():
    accelerator = start_accelerator()
    model = LlamaForCausalLM(LlamaConfig(**SIZE, num_attention_heads=2, num_key_value_heads=2))
    model.requires_grad_(False)
    trained = [model.model.norm.weight.requires_grad_(), model.lm_head.weight.requires_grad_()]
    facts = {"trained": sum(weight.numel() for weight in trained)}
    optimizer = torch.optim.AdamW(trained)
    configure_deepspeed(accelerator, SETTINGS, model)
    if accelerator.deepspeed_plugin is not None:
        accelerator.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
    if accelerator.distributed_type == "FSDP":
        model.requires_grad_()
    accelerator.prepare(model, optimizer)
    if accelerator.deepspeed_plugin is not None:
        zero = accelerator.deepspeed_engine_wrapped.engine.optimizer
        facts["bucket"] = zero.reduce_bucket_size
    groups = distributed_c10d._world.pg_map
    options = [group._get_backend(torch.device("cpu")).options for group in groups]
    facts["seconds"] = [option._timeout.total_seconds() for option in options]
    if accelerator.is_main_process:
        Path(sys.argv[1]).write_text(json.dumps(facts))
    accelerator.end_training()


if __name__ == "__main__":
    main()
