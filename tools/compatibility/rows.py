"""The rows and columns of the compatibility table: what is trained, and how it is launched.

This file needs no library but Python's own; the classes of peft, torch and bitsandbytes are named as text.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """What is trained, on what base, with which optimizer."""

    title: str
    config: str = "LoraConfig"  # of peft
    options: dict = field(default_factory=dict)
    learning_rate: float = 1e-2
    merges: bool = True  # whether peft can merge the adapter into the base
    base: str = "float32"  # or "8-bit", "4-bit"
    optimizer: str = "torch.optim.AdamW"
    optimizer_options: dict = field(default_factory=dict)
    checkpoint: bool = False  # whether accelerate.save_state is tried, too
    new_tokens: int = 0  # rows that the embedding gets before the adapter
    flags: tuple = ()  # of `accelerate launch`
    setting: str = ""  # of SETTINGS


LINEAR = {"target_modules": "all-linear"}
LORA = LINEAR | {"r": 8, "lora_alpha": 32, "lora_dropout": 0.0}
VIRTUAL = {"num_virtual_tokens": 8}
VERA = LINEAR | {
    "r": 16,
    "save_projection": False,
}  # the random matrices are drawn anew from their key
# name -> flags of `accelerate launch`: what a cell of FSDP1 is measured again with, where it failed
SETTINGS = {
    "original": ("--fsdp_use_orig_params", "true"),
    # a full state dict is copied to the CPU and freed where it was, which without a GPU is the same place
    "sharded": ("--fsdp_state_dict_type", "SHARDED_STATE_DICT"),
}
ROWS = {
    "lora": Row("LoRA on all linear layers", options=LORA, checkpoint=True, setting="sharded"),
    "rslora": Row(
        "LoRA scaled by the root of its rank, `use_rslora`",
        options=LORA | {"use_rslora": True, "lora_alpha": 12},
    ),
    "dora": Row("weight-decomposed LoRA, `use_dora`", options=LORA | {"use_dora": True}),
    "pissa": Row(
        "LoRA from the principal components, `init_lora_weights='pissa'`",
        options=LORA | {"init_lora_weights": "pissa"},
    ),
    "modules_to_save": Row(
        "LoRA and a head trained whole, `lm_head`", options=LORA | {"modules_to_save": ["lm_head"]}
    ),
    "new_tokens": Row(
        "LoRA, 8 new tokens, embedding and head trained whole",
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
        "p-tuning: a prompt made by an MLP",
        "PromptEncoderConfig",
        VIRTUAL | {"encoder_hidden_size": 64},
        merges=False,
    ),
    "vera": Row(
        "VeRA: scales beside shared random matrices",
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
        optimizer_options={
            "min_8bit_size": 256
        },  # its default would keep the small matrices of this model in 32 bits
    ),
    "adamw_paged": Row(
        "LoRA, bitsandbytes' `PagedAdamW32bit`",
        options=LORA,
        optimizer="bitsandbytes.optim.PagedAdamW32bit",
        checkpoint=True,
        setting="sharded",
    ),
    "torch_compile": Row(
        "LoRA, compiled: `accelerate launch --dynamo_backend inductor`",
        options=LORA,
        flags=(
            "--dynamo_backend",
            "inductor",
            "--dynamo_use_dynamic",
        ),  # batches of any length: one compilation
    ),
}
# column -> its launch config, flags of `accelerate launch`
COLUMNS = {
    "single": ("single", ()),
    "ddp": ("ddp", ()),
    "zero1": ("zero1", ()),
    "zero1_offload": ("zero1", ("--offload_optimizer_device", "cpu")),
    "zero2": ("zero2", ()),
    "zero2_offload": ("zero2_offload", ()),
    "zero3": ("zero3", ()),
    "zero3_offload": ("zero3_offload", ()),
    "fsdp1": ("fsdp1", ()),
    "fsdp2": ("fsdp2", ()),
}
CELLS = [f"{row}/{column}" for row in ROWS for column in COLUMNS]
SHARDED = (
    "zero3",
    "zero3_offload",
    "fsdp1",
    "fsdp2",
)  # columns in which a process holds a part of every parameter
