"""The launch configs of PEFT's guides to DeepSpeed and FSDP, every setting as users have it in their files."""

COMMON = {
    "compute_environment": "LOCAL_MACHINE",
    "downcast_bf16": "no",
    "machine_rank": 0,
    "use_cpu": False,
}
COMMON |= {
    "main_training_function": "main",
    "num_machines": 1,
    "rdzv_backend": "static",
    "same_network": True,
}
TPU = {"debug": False, "tpu_env": [], "tpu_use_cluster": False, "tpu_use_sudo": False}
ZERO3 = {"offload_optimizer_device": "none", "offload_param_device": "none"}
ZERO3 |= {"zero3_init_flag": True, "zero3_save_16bit_model": True, "zero_stage": 3}
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
GUIDES = {  # name -> (script, its flags, config)
    "lora_zero3": (
        "causal_lm_lora_zero3_offload",
        (),
        COMMON
        | TPU
        | {"distributed_type": "DEEPSPEED", "mixed_precision": "bf16", "num_processes": 8}
        | {
            "deepspeed_config": {
                "deepspeed_multinode_launcher": "standard",
                "gradient_accumulation_steps": 4,
            }
            | ZERO3
        },
    ),
    "qlora_zero3": (
        "causal_lm_qlora_zero3",
        ("--dtype", "bfloat16"),
        COMMON
        | TPU
        | {"distributed_type": "DEEPSPEED", "mixed_precision": "bf16", "num_processes": 2}
        | {"deepspeed_config": {"deepspeed_multinode_launcher": "standard"} | ZERO3},
    ),
    "seq2seq_zero3_offload": (
        "seq2seq_lora_zero3_offload",
        (),
        COMMON
        | {
            "distributed_type": "DEEPSPEED",
            "mixed_precision": "no",
            "num_processes": 1,
            "dynamo_backend": "NO",
        }
        | {"fsdp_config": {}, "megatron_lm_config": {}}
        | {
            "deepspeed_config": {"gradient_accumulation_steps": 1, "gradient_clipping": 1.0}
            | ZERO3
            | {"offload_optimizer_device": "cpu", "offload_param_device": "cpu"}
        },
    ),
    "lora_fsdp": (
        "causal_lm_lora_fsdp1",
        (),
        COMMON
        | TPU
        | {"distributed_type": "FSDP", "mixed_precision": "bf16", "num_processes": 8}
        | {"fsdp_config": FSDP},
    ),
    "qlora_fsdp": (
        "causal_lm_qlora_fsdp1",
        ("--dtype", "bfloat16"),
        COMMON
        | TPU
        | {"distributed_type": "FSDP", "mixed_precision": "no", "num_processes": 2}
        | {"fsdp_config": FSDP | {"fsdp_offload_params": True}},
    ),
}
