"""Tiny random models, one for each model type in the installed mlx-lm.

A configuration is small but keeps what makes its type special: dense and mixture-of-experts layers, sliding-window
and full attention, state-space and attention layers all occur where the type has them, and windows, attention chunks
and sparse top-k selections are shorter than the sequences of about 20 tokens that the tests use.
"""

import copy
import importlib
import pkgutil

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

import mlx_lm.models
from mlx_lm.models import rwkv7
from mlx_lm.utils import MODEL_REMAPPING, _get_classes

# A prime that is no other size here, so that an array over the vocabulary is known by its shape.
VOCAB = 101
WIDTH = 32
WINDOW = 8
MIXED = ["sliding_attention", "full_attention"]

# ModelArgs.from_dict drops the keys that a type does not know, so that one base serves them all.
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "tie_word_embeddings": False,
}
TIED = {"tie_word_embeddings": True}
SLIDING = {"sliding_window": WINDOW, "layer_types": MIXED}

# One dense layer, then one with experts, in the words of the many configurations.
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_top_k": 2,
    "moe_k": 2,
    "moe_intermediate_size": 24,
    "num_shared_experts": 1,
    "n_shared_experts": 1,
    "num_shared_expert": 1,
    "moe_num_shared_experts": 1,
    "shared_expert_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_start_index": 1,
    "mlp_only_layers": [0],
    "decoder_sparse_step": 1,
    "is_moe_layer": [False, True],
    "mlp_layer_types": ["dense", "sparse"],
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
}
# Two groups of two experts; each token takes one group.
GROUPED = {"n_group": 2, "topk_group": 1}

YARN = {
    "type": "yarn",
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
LAYER_ROPE = {
    "sliding_attention": {"rope_theta": 10000.0, "partial_rotary_factor": 1.0},
    "full_attention": {"rope_theta": 1000000.0, "partial_rotary_factor": 0.5},
}

# Multi-head latent attention.
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
}
# An indexer that keeps fewer keys than a sequence has.
INDEXER = {"index_head_dim": 8, "index_n_heads": 2, "index_topk": 8}

# Mamba 2 in the words of Granite and Falcon.
MAMBA2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_ssm": 32,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_n_groups": 1,
    "mamba_proj_bias": False,
    "mamba_conv_bias": True,
}
# A gated delta rule in the first layer, attention in the second.
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
    "full_attention_interval": 2,
    "partial_rotary_factor": 0.5,
}
# Attention in the second layer, short convolutions in the first.
SHORT_CONV = {
    "layer_types": ["conv", "full_attention"],
    "conv_bias": True,
    "conv_L_cache": 3,
    "block_dim": WIDTH,
    "block_ff_dim": 48,
    "block_multiple_of": 8,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": True,
}
# GPT-2's names, which several types kept.
GPT2 = {"n_ctx": 128, "n_positions": 128, "n_embd": WIDTH, "n_head": 4, "n_layer": 2, "n_inner": 48, "rotary_dim": 4}
# Multipliers other than one, so that leaving one out shows.
GRANITE = {"logits_scaling": 2.0, "attention_multiplier": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}
# Three layers, of which the last reuses the keys and values of the first.
SHARED_KV = {
    "num_hidden_layers": 3,
    "num_kv_shared_layers": 1,
    "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": VOCAB,
    "layer_types": [*MIXED, "sliding_attention"],
    "sliding_window": WINDOW,
}

DENSE = {
    "apertus": {"mlp_bias": True, "post_norm": True, "qk_norm": True},
    "cohere": {"logit_scale": 0.5, "use_qk_norm": True},
    "ernie4_5": TIED,
    "exaone": {**TIED, "num_layers": 2},
    "gemma": TIED,
    # The published cap of 30 would never bend logits as small as these.
    "gemma2": {**TIED, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 8.0},
    "glm": TIED,
    "glm4": {"partial_rotary_factor": 0.5},
    "gpt2": GPT2,
    "gpt_bigcode": {**GPT2, **TIED, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
    "gpt_neox": {"num_key_value_heads": 4, "rotary_emb_base": 10000, "rotary_pct": 0.5},
    "gptj": GPT2,
    "granite": {**GRANITE, **TIED},
    "helium": {},
    "hunyuan_v1_dense": {"rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}},
    "internlm2": {},
    "internlm3": {"qkv_bias": True},
    # Its feed-forward width is a multiple of 256 that would round to zero at a width of 32.
    "lille-130m": {**GPT2, "n_embd": 64, "n_kv_heads": 2, "block_size": 128},
    "mimo": {},
    "minicpm": {"dim_model_base": 16, "scale_depth": 1.4, "scale_emb": 3.0},
    "nanbeige": {"num_loops": 2},
    "nanochat": {"num_key_value_heads": 2},
    "nemotron": {"hidden_act": "relu2"},
    "olmo2": TIED,
    "openelm": {
        "model_dim": WIDTH,
        "num_transformer_layers": 2,
        "num_query_heads": [4, 8],
        "num_kv_heads": [2, 2],
        "ffn_multipliers": [1.0, 2.0],
        "ffn_dim_divisor": 8,
    },
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"partial_rotary_factor": 0.5},
    # It masks token ids up to 100351 whatever the size of its vocabulary.
    "phi3small": {
        "vocab_size": 100352,
        "dense_attention_every_n_layers": 2,
        "ff_intermediate_size": 48,
        "gegelu_limit": 20.0,
        "mup_width_multiplier": 2.0,
    },
    "plamo": {"n_shared_head": 2},
    "qwen": {"kv_channels": 8, "num_key_value_heads": 4},
    "qwen2": TIED,
    "qwen3": {},
    "seed_oss": TIED,
    "smollm3": {**TIED, "no_rope_layer_interval": 2},
    "stablelm": {"partial_rotary_factor": 0.5, "use_qkv_bias": True, "qk_layernorm": True},
    "starcoder2": {**TIED, "norm_epsilon": 1e-5},
    "talkie": {"num_key_value_heads": 4},
    "telechat3": {},
}

# Some layers see a window, or a chunk, of the last tokens only.
WINDOWED = {
    "cohere2": {"sliding_window": WINDOW, "sliding_window_pattern": 2, "logit_scale": 0.5},
    "exaone4": {"sliding_window": WINDOW, "sliding_window_pattern": "LG", "rope_scaling": None},
    "gemma3_text": {**TIED, "sliding_window": WINDOW, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8},
    "gemma3n": {
        **SHARED_KV,
        "rope_local_base_freq": 10000.0,
        "final_logit_softcapping": 2.0,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0],
        "altup_num_inputs": 2,
        "altup_coef_clip": 1.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 4,
    },
    "gemma4_text": {
        **SHARED_KV,
        **TIED,
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "final_logit_softcapping": 2.0,
        "rope_parameters": LAYER_ROPE,
    },
    "iquestloopcoder": {"loop_num": 2, "loop_window_size": WINDOW},
    "llama": {**TIED, **SLIDING},
    "llama4_text": {**TIED, "no_rope_layers": [1, 0], "use_qk_norm": True, "intermediate_size_mlp": 48},
    "ministral3": {**TIED, **SLIDING, "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1}},
    "muse_glimmer": {**SLIDING, "post_norm_eps": 1e-8, "final_logit_softcapping": 2.0, "output_multiplier": 0.7},
    "olmo3": SLIDING,
    "plamo3": {**TIED, "window_size": WINDOW, "sliding_window_pattern": 2},
    "spark2_5": {**TIED, **SLIDING, "rope_parameters": LAYER_ROPE},
}

SPARSE = {
    "Klear": EXPERTS,
    "afmoe": {**EXPERTS, **SLIDING},
    "bailing_moe": {**EXPERTS, "use_qk_norm": True, "moe_router_enable_expert_bias": True},
    "dbrx": {
        "d_model": WIDTH,
        "n_layers": 2,
        "n_heads": 4,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek": EXPERTS,
    "dots1": {**EXPERTS, **GROUPED},
    "ernie4_5_moe": {**EXPERTS, **TIED},
    "exaone_moe": {**EXPERTS, **GROUPED, **SLIDING},
    "glm4_moe": {**EXPERTS, **GROUPED, "use_qk_norm": True, "partial_rotary_factor": 0.5, "rope_scaling": None},
    "gpt_oss": {**EXPERTS, **SLIDING},
    "granitemoe": {**EXPERTS, **GRANITE, **TIED},
    # Cross-layer attention: the second layer reads the first layer's keys and values.
    "hunyuan": {
        **EXPERTS,
        "use_mixed_mlp_moe": True,
        "use_qk_norm": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
    },
    "laguna": {**EXPERTS, **SLIDING, "rope_parameters": LAYER_ROPE},
    "mellum": {**EXPERTS, **SLIDING, "rope_parameters": LAYER_ROPE},
    "mimo_v2_flash": {
        **EXPERTS,
        **GROUPED,
        "hybrid_layer_pattern": [1, 0],
        "moe_layer_freq": [0, 1],
        "sliding_window_size": WINDOW,
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "layernorm_epsilon": 1e-5,
        "swa_rope_theta": 1000.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 1,
        "swa_head_dim": 8,
        "v_head_dim": 4,
        "swa_v_head_dim": 4,
        "partial_rotary_factor": 0.5,
        "attention_value_scale": 0.7,
    },
    "minimax": {**EXPERTS, "rotary_dim": 4},
    "mixtral": EXPERTS,
    "olmoe": {**EXPERTS, **TIED},
    "phimoe": {
        **EXPERTS,
        "rope_scaling": {
            "type": "longrope",
            "long_factor": [1.0] * 4,
            "short_factor": [1.0] * 4,
            "long_mscale": 1.2,
            "short_mscale": 1.2,
            "original_max_position_embeddings": 64,
        },
    },
    "phixtral": {
        "num_vocab": VOCAB,
        "model_dim": WIDTH,
        "num_heads": 4,
        "num_layers": 2,
        "rotary_dim": 4,
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
    },
    "qwen2_moe": EXPERTS,
    "qwen3_moe": EXPERTS,
    "solar_open": {**EXPERTS, **GROUPED, "use_qk_norm": False, "partial_rotary_factor": 1.0, "rope_scaling": None},
    "step3p5": {
        **EXPERTS,
        **SLIDING,
        "num_attention_groups": 2,
        "attention_other_setting": {"num_attention_heads": 8, "num_attention_groups": 2},
        "partial_rotary_factors": [1.0, 0.5],
        "moe_layers_enum": "1",
        "share_expert_dim": 24,
    },
}

LATENTS = {
    "deepseek_v2": {**EXPERTS, **GROUPED, "topk_method": "group_limited_greedy", "rope_scaling": YARN},
    "deepseek_v3": {**EXPERTS, **GROUPED, "rope_scaling": YARN},
    "deepseek_v32": {**EXPERTS, **GROUPED, **INDEXER},
    "glm4_moe_lite": {**EXPERTS, "q_lora_rank": None},
    "glm_moe_dsa": {
        **EXPERTS,
        **INDEXER,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "longcat_flash": {
        **EXPERTS,
        "num_layers": 2,
        "attention_method": "MLA",
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 24,
        "zero_expert_num": 2,
        "zero_expert_type": "identity",
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    "minicpm3": {
        "dim_model_base": 16,
        "scale_depth": 1.4,
        "scale_emb": 3.0,
        "rope_scaling": {"original_max_position_embeddings": 64, "short_factor": [1.0] * 2, "long_factor": [1.0] * 2},
    },
    "mistral4": {**EXPERTS, **GROUPED, "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1}},
    "youtu_llm": TIED,
}
LATENTS["longcat_flash_ngram"] = {
    **LATENTS["longcat_flash"],
    "ngram_vocab_size_ratio": 2,
    "emb_neighbor_num": 3,
    "emb_split_num": 2,
}

# State-space models and linear attention, alone or in turn with attention.
RECURRENT = {
    "baichuan_m1": {"sliding_window": WINDOW, "sliding_window_layers": [0], "conv_window": 2},
    "bailing_hybrid": {**EXPERTS, **GROUPED, **LATENT, "layer_group_size": 2, "group_norm_size": 2},
    "bailing_moe_linear": {**EXPERTS, "layer_group_size": 2, "group_norm_size": 2, "use_qk_norm": True},
    "bailing_moe_v3": {
        **EXPERTS,
        **GROUPED,
        **LATENT,
        "model_type": "bailing_hybrid",
        "architectures": ["BailingMoeV3ForCausalLM"],
        "layer_group_size": 2,
    },
    "falcon_h1": {**MAMBA2, **TIED, "embedding_multiplier": 3.0, "lm_head_multiplier": 2.0},
    "gear": {
        **TIED,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "conv_mixer", "full_attention"],
        "sliding_window": WINDOW,
        "final_logit_softcapping": 2.0,
        "attn_logit_softcapping": 1.0,
    },
    "granitemoehybrid": {**EXPERTS, **GRANITE, **MAMBA2, **TIED, "layer_types": ["mamba", "attention"]},
    "jamba": {
        **EXPERTS,
        **TIED,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_conv": 4,
        "mamba_d_state": 8,
        "mamba_expand": 2,
    },
    "kimi_linear": {
        **EXPERTS,
        **LATENT,
        "linear_attn_config": {"num_heads": 4, "head_dim": 8, "kda_layers": [1], "short_conv_kernel_size": 4},
        "model_max_length": 128,
    },
    "lfm2": SHORT_CONV,
    "lfm2_moe": {**EXPERTS, **SHORT_CONV, "use_expert_bias": True},
    "mamba": {**TIED, "state_size": 8, "conv_kernel": 4, "use_conv_bias": True, "time_step_rank": "auto"},
    "mamba2": {
        "num_heads": 8,
        "intermediate_size": 64,
        "state_size": 16,
        "conv_kernel": 4,
        "n_groups": 2,
        "use_conv_bias": True,
        "time_step_limit": [0.01, 10.0],
        "time_step_rank": "auto",
    },
    "nemotron_h": {
        **EXPERTS,
        **GROUPED,
        "num_hidden_layers": 4,
        "hybrid_override_pattern": ["M", "*", "-", "E"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "mamba_proj_bias": False,
        "ssm_state_size": 16,
        "conv_kernel": 4,
        "n_groups": 2,
        "use_conv_bias": True,
    },
    "olmo_hybrid": {**DELTA, "layer_types": ["linear_attention", "full_attention"], "linear_allow_neg_eigval": True},
    "plamo2": {**TIED, "hidden_size_per_head": 8, "mamba_d_state": 8, "mamba_num_heads": 4},
    "qwen3_next": {**EXPERTS, **DELTA},
    "recurrent_gemma": {
        **TIED,
        "num_hidden_layers": 3,
        "block_types": ["recurrent", "recurrent", "attention"],
        "conv1d_width": 3,
        "attention_window_size": WINDOW,
        "logits_soft_cap": 2.0,
    },
    "rwkv7": {"a_low_rank_dim": 8, "v_low_rank_dim": 8, "gate_low_rank_dim": 8, "decay_low_rank_dim": 8},
}

# Loaded as mamba, which then normalizes its step, input and output projections.
RECURRENT["falcon_mamba"] = RECURRENT["mamba"]

OTHERS = {
    # The last two of four layers reuse the keys and values of the second.
    "afm7": {
        "hidden_dim": WIDTH,
        "num_layers": 4,
        "num_kv_reuse_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "hidden_dim_scale_factor": 1.5,
    },
    # Window, compressed keys with an indexer, and its candidate blocks, each narrower than a sequence.
    "deepseek_v41": {
        **EXPERTS,
        "num_hidden_layers": 4,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 4,
        "o_groups": 2,
        "o_lora_rank": 8,
        "sliding_window": WINDOW,
        "compress_ratios": [0, 2, 1, 1],
        "kv_source_layer_ids": [1, 2],
        "index_source_layer_ids": [1, 2, 3],
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_topk": 4,
        "candidate_source_layer_id": 2,
        "candidate_topk_blocks": 3,
        "candidate_block_size": 2,
        "hc_mult": 2,
        "hc_sinkhorn_iters": 4,
    },
    # A layer with attention and one with a linear map in its place, one feed-forward block left out.
    "nemotron-nas": {
        "num_hidden_layers": 3,
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 2.0}},
            {"attention": {"replace_with_linear": True}, "ffn": {"no_op": True}},
            {"attention": {"no_op": True}, "ffn": {"replace_with_linear": True}},
        ],
    },
}


def _wrapped(inner: str, config: dict, **changes) -> dict:
    """A configuration that nests the language model's under `text_config`."""
    return {"text_config": {**BASE, "model_type": inner, **config, **changes}, "vocab_size": VOCAB}


WRAPPERS = {
    "gemma3": _wrapped("gemma3_text", WINDOWED["gemma3_text"]),
    "gemma3n": _wrapped("gemma3n", WINDOWED.pop("gemma3n")),
    # The larger models: experts beside a dense layer, values equal to keys, no shared keys, no per-layer inputs.
    "gemma4": _wrapped(
        "gemma4_text",
        {**WINDOWED["gemma4_text"], **EXPERTS, **SLIDING},
        num_hidden_layers=2,
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=0,
        attention_k_eq_v=True,
        enable_moe_block=True,
        top_k_experts=2,
    ),
    "kimi_k25": _wrapped("kimi_k2", {**LATENT, **LATENTS["deepseek_v3"]}),
    "kimi_k3": _wrapped(
        "kimi_linear",
        {**EXPERTS, **LATENT},
        hidden_act="situ",
        activation_situ_beta=4.0,
        activation_situ_linear_beta=25.0,
        attn_res_block_size=2,
        routed_expert_hidden_size=16,
        latent_moe_use_norm=True,
        mla_use_output_gate=True,
        linear_attn_config={
            "kda_layers": [1],
            "full_attn_layers": [2],
            "num_heads": 4,
            "head_dim": 8,
            "short_conv_kernel_size": 4,
            "gate_lower_bound": -5.0,
            "use_full_rank_gate": True,
        },
    ),
    "kimi_vl": _wrapped("deepseek_v3", {**LATENT, **LATENTS["deepseek_v3"]}),
    "lfm2-vl": _wrapped("lfm2", SHORT_CONV),
    # Three layers in four attend within chunks; upstream reads the fourth layer's cache by its number.
    "llama4": _wrapped(
        "llama4",
        EXPERTS,
        num_experts_per_tok=1,
        num_hidden_layers=4,
        attention_chunk_size=WINDOW,
        interleave_moe_layer_step=2,
        intermediate_size_mlp=48,
        rope_scaling=None,
        use_qk_norm=True,
    ),
    # Blocks of four keys, of which each query keeps two.
    "minimax_m3_vl": _wrapped(
        "minimax_m3_vl",
        EXPERTS,
        dense_intermediate_size=48,
        rotary_dim=4,
        layer_types=["full_attention", "minimax_m3_sparse"],
        index_n_heads=2,
        index_head_dim=8,
        index_block_size=4,
        index_topk_blocks=2,
    ),
    "mistral3": _wrapped("mistral", {}),
    "pixtral": _wrapped("llama", {}),
    # The width is the smallest that its packed weights allow, and 512 the smallest rotation.
    "prism_hadamard_qwen35": {
        **_wrapped("qwen3_5_text", DELTA, hidden_size=128, intermediate_size=512, linear_value_head_dim=32),
        "schema_version": 1,
        "tensor_namespace": "mlx-lm-text",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        # A projection is packed in every layer that has it, as LoRA looks for names and not for places.
        "modules": [
            {"path": path, "block": block, "embedding": path.endswith("embed_tokens"), "dtype": "float16"}
            for path, block in [
                ("model.embed_tokens", 0),
                ("model.layers.0.linear_attn.out_proj", 0),
                ("model.layers.0.mlp.down_proj", 512),
                ("model.layers.1.mlp.down_proj", 512),
                ("lm_head", 0),
            ]
        ],
    },
    "qwen2_vl": _wrapped("qwen2", TIED),
    "qwen3_5": _wrapped("qwen3_5_text", {**DELTA, **TIED}),
    "qwen3_5_moe": _wrapped("qwen3_5_moe_text", {**EXPERTS, **DELTA}),
    "qwen3_vl": _wrapped("qwen3", TIED),
    "qwen3_vl_moe": _wrapped("qwen3_moe", EXPERTS),
}

# Model types that cannot be run here at all.
SKIPPED = {
    "bitnet": "its ternary linear layers run as Metal kernels only",
    "muse_spark": "its attention and routing run as Metal kernels only",
    "muse_spark_open": "its attention and routing run as Metal kernels only",
    "olmo": "its module ends the interpreter without ai2-olmo, and adds the string 'causal' to its scores with it",
}
if mlx_lm.__version__ == "0.32.0":
    SKIPPED["phi3small"] = "it writes outside its logits, which can end the interpreter"
# Model types that run, and that mlx-lm itself cannot train.
UNTRAINABLE = {
    "deepseek_v41": "its router asks for the gradient of expert numbers, which MLX refuses",
    "recurrent_gemma": "its model never runs the constructor of nn.Module, so that freeze() fails",
}
# Linear layers whose weights upstream reads without calling the layer, so that LoRA on them fails.
WITHOUT_LORA = {
    "gemma3n": ("altup.correction_coefs", "altup.prediction_coefs"),
    "kimi_k3": ("self_attention_res_proj", "mlp_res_proj"),
}
# Model types that run as rows of whole sequences, a prompt for each response, and why they cannot be packed.
_RECURRENT = "its recurrent layers carry a state from token to token"
_LATENT = "it adds scores of its own for positions, as a mask"
_CACHES = "it keeps several caches a layer"
UNPACKED = {
    "afm7": "its last layers read keys and values from another layer's cache",
    "baichuan_m1": "its attention carries a state from token to token",
    "bailing_hybrid": _LATENT,
    "bailing_moe_linear": _RECURRENT,
    "bailing_moe_v3": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v32": _CACHES,
    "gear": _RECURRENT,
    "gemma2": "it computes its soft-capped scores itself, and asks for a mask to compute with",
    "gemma3n": "its last layers read keys and values from another layer's cache",
    "gemma4_text": "its layers that reuse keys and values attend without a cache",
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _CACHES,
    "gpt_bigcode": "it takes a cache's offset for a number",
    "kimi_k25": _LATENT,
    "kimi_k3": _LATENT,
    "kimi_linear": _LATENT,
    "kimi_vl": _LATENT,
    "llama4": "its attention is cut into chunks, which its cache trims",
    "longcat_flash": _CACHES,
    "longcat_flash_ngram": _CACHES,
    "minimax_m3_vl": _CACHES,
    "mistral4": _LATENT,
    "phi3small": "its block-sparse layers add the mask's booleans to their scores, so that tokens see later ones",
    "plamo2": "it attends without mlx-lm's function, and its recurrent layers carry a state",
    "rwkv7": _RECURRENT,
}


def _modules() -> list[str]:
    """The names of all modules beside the models, helpers included."""
    return sorted(module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__))


def _architectures() -> dict[str, dict]:
    """Join the tables, and leave out what the installed release does not have."""
    tables = [(DENSE, {}), (WINDOWED, {}), (SPARSE, {}), (LATENTS, LATENT), (RECURRENT, {}), (OTHERS, {})]
    configs = {name: {**BASE, **shared, **changes} for table, shared in tables for name, changes in table.items()}
    configs = {name: {"model_type": name, **config} for name, config in {**configs, **WRAPPERS}.items()}
    usable = set(_modules()).difference(SKIPPED)
    return {name: configs[name] for name in sorted(configs) if MODEL_REMAPPING.get(name, name) in usable}


ARCHITECTURES = _architectures()


def installed_model_types() -> list[str]:
    """List the modules of the installed mlx-lm that offer a model; those in `SKIPPED` are not imported for that."""

    def is_model(name: str) -> bool:
        return name in SKIPPED or hasattr(importlib.import_module(f"mlx_lm.models.{name}"), "ModelArgs")

    return [name for name in _modules() if is_model(name)]


def _wkv7_loop(r, w, k, v, a, b, state):
    """What upstream's Metal kernel of RWKV-7 computes, by its loop: for narrow heads too, and with a gradient."""
    outputs = []
    for t in range(r.shape[1]):
        output, state = rwkv7._wkv7_step_ops(*(x[:, t] for x in (r, w, k, v, a, b)), state)
        outputs.append(output)
    return mx.stack(outputs, axis=1).astype(r.dtype), state


rwkv7.wkv7_kernel = _wkv7_loop


def make_model(model_type: str, seed: int = 0, **overrides) -> nn.Module:
    """Build a tiny float32 model with random weights.

    Args:
        model_type: A key of `ARCHITECTURES`.
        seed: Of the weights; the same seed gives the same weights.
        **overrides: Configuration keys to change, in the language model's part where it is nested.

    Returns:
        The model in evaluation mode with its weights computed, as `mlx_lm.utils.load` returns it.
    """
    config = copy.deepcopy(ARCHITECTURES[model_type])  # some ModelArgs write to the dictionary
    inner = config.get("text_config", config)
    inner.update(overrides)
    model_class, args_class = _get_classes(config)
    mx.random.seed(seed)
    model = model_class(args_class.from_dict(config))
    head = getattr(model, "language_model", model)
    if inner["tie_word_embeddings"] and "lm_head" in head:
        head.sanitize({})  # Gemma 3 and Recurrent Gemma drop their head when a checkpoint turns out to have none
    model.update(tree_map_with_path(_random_weight, model.parameters()))
    mx.eval(model.parameters())
    return model.eval()


def _random_weight(path: str, weight: mx.array) -> mx.array:
    """Turn an initial weight into float32, and draw one that upstream leaves at zero for a checkpoint to fill."""
    name = path.rpartition(".")[-1]
    if weight.dtype == mx.uint32:
        return mx.random.randint(-(2**31), 2**31 - 1, weight.shape).view(mx.uint32)  # packed 2-bit integers
    if name in ("scales", "biases"):  # of groups of 128 such integers, which are 1.5 in the mean
        step = (128 * weight.shape[-1]) ** -0.5
        return mx.full(weight.shape, step if name == "scales" else -1.5 * step)
    if name in ("quant_key_scale", "quant_value_scale"):
        return mx.array(1 / 64)  # steps of one would round every key and value to nothing
    if weight.ndim == 0 or weight.any():
        return weight.astype(mx.float32)
    return mx.random.normal(weight.shape) * (weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.1)
