"""Launch configs of PEFT's guides to DeepSpeed and FSDP, with all settings of the guides' files."""

COMMON = {
    "compute_environment": "LOCAL_MACHINE",
    "downcast_bf16": "no",
    "machine_rank": 0,
    "use_cpu": False,
    "main_training_function": "main",
    "num_machines": 1,
    "rdzv_backend": "static",
    "same_network": True,
}
TPU = {"debug": False, "tpu_env": [], "tpu_use_cluster": False, "tpu_use_sudo": False}
ZERO3 = {
    "offload_optimizer_device": "none",
    "offload_param_device": "none",
    "zero3_init_flag": True,
    "zero3_save_16bit_model": True,
    "zero_stage": 3,
}
FSDP = {
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_backward_prefetch": "BACKWARD_PRE",
    "fsdp_cpu_ram_efficient_loading": True,
    "fsdp_forward_prefetch": False,
    "fsdp_offload_params": False,
    "fsdp_sharding_strategy": "FULL_SHARD",
    "fsdp_state_dict_type": "SHARDED_STATE_DICT",
    "fsdp_sync_module_states": True,
    "fsdp_use_orig_params": False,
}
OFFLOADING_FSDP = FSDP | {"fsdp_offload_params": True}
STANDARD = ZERO3 | {"deepspeed_multinode_launcher": "standard"}
ACCUMULATING = STANDARD | {"gradient_accumulation_steps": 4}
OFFLOADING = ZERO3 | {
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
    "offload_optimizer_device": "cpu",
    "offload_param_device": "cpu",
}


def deepspeed(processes, mixed_precision, config):
    """Return a launch config for DeepSpeed."""
    settings = COMMON | {"distributed_type": "DEEPSPEED", "deepspeed_config": config}
    return settings | {"mixed_precision": mixed_precision, "num_processes": processes}


def fsdp(processes, mixed_precision, config):
    """Return a launch config for FSDP."""
    settings = COMMON | {"distributed_type": "FSDP", "fsdp_config": config}
    return settings | {"mixed_precision": mixed_precision, "num_processes": processes}


NO_OTHERS = {"dynamo_backend": "NO", "fsdp_config": {}, "megatron_lm_config": {}}
BFLOAT16 = ("--dtype", "bfloat16")
GUIDES = {  # name -> (script, its flags, launch config)
    "lora_zero3": ("causal_lm_lora_zero3_offload", (), TPU | deepspeed(8, "bf16", ACCUMULATING)),
    "qlora_zero3": ("causal_lm_qlora_zero3", BFLOAT16, TPU | deepspeed(2, "bf16", STANDARD)),
    "seq2seq_zero3_offload": (
        "seq2seq_lora_zero3_offload",
        (),
        NO_OTHERS | deepspeed(1, "no", OFFLOADING),
    ),
    "lora_fsdp": ("causal_lm_lora_fsdp1", (), TPU | fsdp(8, "bf16", FSDP)),
    "qlora_fsdp": ("causal_lm_qlora_fsdp1", BFLOAT16, TPU | fsdp(2, "no", OFFLOADING_FSDP)),
}
