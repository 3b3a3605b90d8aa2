"""The rows of the table: the architectures, and the settings that make a small model of each.

Everything that is not named here, such as dropout, tied embeddings or activation, has the default
of the architecture's config in transformers. This file imports only the standard library.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Architecture:
    """One row: what people call the models, and the config of a small one."""

    title: str
    model_type: str  # as AutoConfig.for_model takes it
    settings: dict = field(default_factory=dict)
    is_seq2seq: bool = False


SIZE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
HEAD = SIZE | {"head_dim": 8}
WINDOW = HEAD | {"sliding_window": 64}
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
FULL = {"num_key_value_heads": 4}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
# low-rank attention of DeepSeek; the first layer is dense, the second has experts
LATENT = SIZE | {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
    "mamba_expand": 2,
}
LINEAR_ATTENTION = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 512,
}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
T5_GEMMA = HEAD | {"sliding_window": 64, "query_pre_attn_scalar": 8}
PROPHETNET = {
    "hidden_size": 32,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 512,
}
CAUSAL = {
    "llama2": Architecture("Llama, Llama 2", "llama", SIZE | FULL),
    "llama3": Architecture("Llama 3", "llama", SIZE | {"rope_parameters": LLAMA3}),
    "llama4": Architecture(
        "Llama 4 (text)",
        "llama4_text",
        HEAD
        | LOCAL
        | {"intermediate_size_mlp": 64, "interleave_moe_layer_step": 2, "no_rope_layers": [1, 0]},
    ),
    "mistral": Architecture("Mistral", "mistral", WINDOW),
    "mixtral": Architecture("Mixtral", "mixtral", HEAD | LOCAL),
    "qwen2": Architecture("Qwen 2, Qwen 2.5", "qwen2", SIZE),
    "qwen3": Architecture("Qwen 3", "qwen3", HEAD),
    "qwen3_moe": Architecture("Qwen 3 MoE", "qwen3_moe", HEAD | ROUTED),
    "qwen3_next": Architecture(
        "Qwen 3 Next",
        "qwen3_next",
        HEAD | ROUTED | LINEAR_ATTENTION | {"shared_expert_intermediate_size": 16},
    ),
    "gemma": Architecture("Gemma", "gemma", HEAD),
    "gemma2": Architecture("Gemma 2", "gemma2", WINDOW | MIXED | {"query_pre_attn_scalar": 8}),
    "gemma3": Architecture(
        "Gemma 3 (text)", "gemma3_text", WINDOW | MIXED | {"query_pre_attn_scalar": 8}
    ),
    "gemma3_vision": Architecture(
        "Gemma 3 (vision and text)",
        "gemma3",
        {
            "text_config": WINDOW | MIXED | {"query_pre_attn_scalar": 8},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
        },
    ),
    "phi3": Architecture("Phi 3, Phi 4", "phi3", SIZE | {"sliding_window": 64}),
    "gpt2": Architecture("GPT-2", "gpt2", GPT),
    "gptj": Architecture("GPT-J", "gptj", GPT | {"rotary_dim": 4}),
    "gpt_neox": Architecture("GPT-NeoX, Pythia", "gpt_neox", SIZE),
    "gpt_oss": Architecture("gpt-oss", "gpt_oss", WINDOW | LOCAL),
    "opt": Architecture("OPT", "opt", SIZE | {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "bloom": Architecture("Bloom", "bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": Architecture("Falcon 7B", "falcon", SIZE),
    "falcon_h1": Architecture("Falcon-H1", "falcon_h1", HEAD | MAMBA | {"mamba_d_ssm": 64}),
    "deepseek_v2": Architecture("DeepSeek V2", "deepseek_v2", LATENT),
    "deepseek_v3": Architecture(
        "DeepSeek V3, R1", "deepseek_v3", LATENT | {"n_group": 2, "topk_group": 1}
    ),
    "glm4": Architecture("GLM-4", "glm4", HEAD),
    "granite": Architecture("Granite 3", "granite", SIZE),
    "cohere": Architecture("Command R (Cohere)", "cohere", SIZE),
    "cohere2": Architecture(
        "Command R7B (Cohere 2)", "cohere2", SIZE | MIXED | {"sliding_window": 64}
    ),
    "olmo": Architecture("OLMo", "olmo", SIZE),
    "olmo2": Architecture("OLMo 2", "olmo2", SIZE),
    "smollm3": Architecture("SmolLM3", "smollm3", SIZE | {"no_rope_layers": [1, 0]}),
    "stablelm": Architecture("StableLM 2", "stablelm", SIZE),
    "starcoder2": Architecture("StarCoder2", "starcoder2", SIZE | {"sliding_window": 64}),
    "mamba2": Architecture(
        "Mamba 2",
        "mamba2",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_heads": 4,
            "head_dim": 16,
            "state_size": 16,
            "n_groups": 2,
            "chunk_size": 16,
        },
    ),
    "lfm2": Architecture(
        "LFM2",
        "lfm2",
        SIZE | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    "exaone4": Architecture("EXAONE 4", "exaone4", WINDOW | MIXED),
    "ernie4_5": Architecture("ERNIE 4.5", "ernie4_5", HEAD),
}
SEQ2SEQ = {
    "t5": Architecture("T5", "t5", T5, True),
    "mt5": Architecture("mT5", "mt5", T5, True),
    "t5gemma": Architecture("T5Gemma", "t5gemma", {"encoder": T5_GEMMA, "decoder": T5_GEMMA}, True),
    "longt5": Architecture("LongT5", "longt5", T5 | {"local_radius": 31}, True),
    "switch": Architecture(
        "Switch Transformers",
        "switch_transformers",
        T5
        | {
            "num_decoder_layers": 2,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "num_experts": 4,
        },
        True,
    ),
    "bart": Architecture("BART", "bart", BART, True),
    "mbart": Architecture("mBART", "mbart", BART, True),
    "pegasus": Architecture("Pegasus", "pegasus", BART, True),
    "marian": Architecture(
        "Marian (Opus-MT)", "marian", BART | {"decoder_start_token_id": 0}, True
    ),
    "m2m_100": Architecture("M2M100, NLLB", "m2m_100", BART, True),
    "led": Architecture(
        "LED",
        "led",
        {name: value for name, value in BART.items() if name != "max_position_embeddings"}
        | {
            "attention_window": 16,
            "max_encoder_position_embeddings": 512,
            "max_decoder_position_embeddings": 512,
        },
        True,
    ),
    "prophetnet": Architecture("ProphetNet", "prophetnet", PROPHETNET, True),
    "blenderbot": Architecture("Blenderbot", "blenderbot", BART, True),
    "fsmt": Architecture("FSMT (WMT19)", "fsmt", BART, True),
}
ARCHITECTURES = CAUSAL | SEQ2SEQ
