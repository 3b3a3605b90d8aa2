"""The rows and columns of the compatibility table: what is trained, and how it is launched.

Classes of peft, torch and bitsandbytes are named as text: this file imports only the standard
library.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """What is trained, on what base, with which optimizer."""

    title: str
    config: str = "LoraConfig"  # class of peft
    options: dict = field(default_factory=dict)
    learning_rate: float = 1e-2
    merges: bool = True  # whether peft can merge this kind of adapter into the base
    base: str = "float32"  # or "8-bit", "4-bit"
    optimizer: str = "torch.optim.AdamW"
    optimizer_options: dict = field(default_factory=dict)
    checkpoint: bool = False  # whether accelerate.save_state is tested, too
    new_tokens: int = 0  # rows added to the embedding before the adapter
    flags: tuple = ()  # for `accelerate launch`
    setting: str = ""  # key of SETTINGS


LINEAR = {"target_modules": "all-linear"}
LORA = LINEAR | {"r": 8, "lora_alpha": 32, "lora_dropout": 0.0}
VIRTUAL = {"num_virtual_tokens": 8}
# the random matrices are not saved, but generated again from their seed
VERA = LINEAR | {"r": 16, "save_projection": False}
# name -> flags of `accelerate launch` with which a failed cell of FSDP1 is measured again
SETTINGS = {
    "original": ("--fsdp_use_orig_params", "true"),
    # FSDP1 moves a full state dict to the CPU and frees the original: on a CPU, the same memory
    "sharded": ("--fsdp_state_dict_type", "SHARDED_STATE_DICT"),
}
ROWS = {
    "lora": Row("LoRA on all linear layers", options=LORA, checkpoint=True, setting="sharded"),
    "rslora": Row(
        "LoRA scaled by the square root of its rank, `use_rslora`",
        options=LORA | {"use_rslora": True, "lora_alpha": 12},
    ),
    "dora": Row("weight-decomposed LoRA, `use_dora`", options=LORA | {"use_dora": True}),
    "pissa": Row(
        "LoRA initialised with the principal components, `init_lora_weights='pissa'`",
        options=LORA | {"init_lora_weights": "pissa"},
    ),
    "modules_to_save": Row(
        "LoRA and a fully trained head, `lm_head`", options=LORA | {"modules_to_save": ["lm_head"]}
    ),
    "new_tokens": Row(
        "LoRA, 8 new tokens, fully trained embedding and head",
        options=LORA | {"modules_to_save": ["embed_tokens", "lm_head"]},
        new_tokens=8,
    ),
    "trainable_tokens": Row(
        "LoRA and a few rows of the embedding, `trainable_token_indices`",
        options=LORA | {"trainable_token_indices": {"embed_tokens": [3, 4, 5, 6]}},
        setting="original",
    ),
    "ia3": Row(
        "IA3: learned scales",
        "IA3Config",
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        learning_rate=1e-1,
        setting="original",
    ),
    "prompt_tuning": Row(
        "prompt tuning", "PromptTuningConfig", VIRTUAL, learning_rate=1e-1, merges=False
    ),
    "prefix_tuning": Row(
        "prefix tuning", "PrefixTuningConfig", VIRTUAL, learning_rate=1e-1, merges=False
    ),
    "p_tuning": Row(
        "p-tuning: a prompt computed by an MLP",
        "PromptEncoderConfig",
        VIRTUAL | {"encoder_hidden_size": 64},
        merges=False,
    ),
    "vera": Row(
        "VeRA: trained scales for shared random matrices",
        "VeraConfig",
        VERA,
        learning_rate=1e-1,
        setting="original",
    ),
    "loha": Row(
        "LoHa: a Hadamard product of two LoRAs",
        "LoHaConfig",
        LINEAR | {"r": 4, "alpha": 8},
        setting="original",
    ),
    "oft": Row("OFT: orthogonal rotations", "OFTConfig", LINEAR | {"oft_block_size": 8, "r": 0}),
    "base_8bit": Row("LoRA on an 8-bit base", options=LORA, base="8-bit"),
    "base_4bit": Row(
        "LoRA on a 4-bit base: nf4, double quantization, float32 storage",
        options=LORA,
        base="4-bit",
    ),
    "adamw_8bit": Row(
        "LoRA, bitsandbytes' `AdamW8bit`",
        options=LORA,
        optimizer="bitsandbytes.optim.AdamW8bit",
        checkpoint=True,
        setting="sharded",
        # the default would keep the small matrices of this model in 32 bits
        optimizer_options={"min_8bit_size": 256},
    ),
    "adamw_paged": Row(
        "LoRA, bitsandbytes' `PagedAdamW32bit`",
        options=LORA,
        optimizer="bitsandbytes.optim.PagedAdamW32bit",
        checkpoint=True,
        setting="sharded",
    ),
    "torch_compile": Row(
        "LoRA with torch.compile, `accelerate launch --dynamo_backend inductor`",
        options=LORA,
        # dynamic: one compilation for batches of all lengths
        flags=("--dynamo_backend", "inductor", "--dynamo_use_dynamic"),
    ),
}
# column -> its launch config, and flags of `accelerate launch`
COLUMNS = {
    "single": ("single", ()),
    "ddp": ("ddp", ()),
    "zero1": ("zero1", ()),
    "zero1_offload": ("zero1", ("--offload_optimizer_device", "cpu")),
    "zero2": ("zero2", ()),
    "zero2_offload": ("zero2_offload", ()),
    "zero3": ("zero3", ()),
    "zero3_offload": ("zero3_offload", ()),
    "zero3_hpz": ("zero3_hpz", ()),
    "zero3_nvme": ("zero3_nvme", ()),
    "fsdp1": ("fsdp1", ()),
    "fsdp2": ("fsdp2", ()),
}
CELLS = [f"{row}/{column}" for row in ROWS for column in COLUMNS]
# columns in which a process holds a shard of every parameter
SHARDED = ("zero3", "zero3_offload", "zero3_hpz", "zero3_nvme", "fsdp1", "fsdp2")
# column -> number of processes, where that is not 2
PROCESSES = {"single": 1, "zero3_hpz": 4}
NVME = "zero3_nvme"  # the column that needs DeepSpeed's extension async_io
SLICE = 4096  # bytes from which on a slice is swapped in that column; DeepSpeed's limit is 1 MiB
