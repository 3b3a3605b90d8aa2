"""Prepare a small model under the launched strategy and write what its process groups are.

`accelerate launch --config_file CONFIG tests/group_driver.py FILE` writes JSON: seconds (the
time-outs of all groups), trained (numbers), bucket (DeepSpeed's reduce_bucket_size).
"""

import json
import sys
from pathlib import Path

import torch
from torch.distributed import distributed_c10d
from transformers import LlamaConfig, LlamaForCausalLM

from utils.launch import size_buckets, start_accelerator

SIZE = {"vocab_size": 40, "hidden_size": 8, "intermediate_size": 11, "num_hidden_layers": 1}


def main():
    accelerator = start_accelerator()
    model = LlamaForCausalLM(LlamaConfig(**SIZE, num_attention_heads=2, num_key_value_heads=2))
    model.requires_grad_(False)
    trained = [model.model.norm.weight.requires_grad_(), model.lm_head.weight.requires_grad_()]
    facts = {"trained": sum(weight.numel() for weight in trained)}
    optimizer = torch.optim.AdamW(trained)
    size_buckets(accelerator, trained)
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
