"""Config switches that change where and how a model writes to its residual stream.

By model type and name, what is changed: `mapping_zoo.build_any(model_type, **changed)` makes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mapping_configs import HEADS, LAYERS

_TIED, _UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
_BIAS = {"attention_bias": True}
_NO_CAPS = {"final_logit_softcapping": None, "attn_logit_softcapping": None}
_FULL = {"layer_types": ["full_attention"] * LAYERS, "num_hidden_layers": LAYERS}
_ATTENTION_FIRST = ["full_attention", "linear_attention", "full_attention"]
_DENSE = {**_FULL, "mlp_layer_types": ["dense"] * LAYERS}
_GEMMA4_MOE = {
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 24,
}
_FALCON_NEW = {"new_decoder_architecture": True, "num_kv_heads": 2, "multi_query": False}

BY_TYPE: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    # Biases, heads and tied readouts
    "llama": {
        "mqa": {"num_key_value_heads": 1},
        "mha-tied": {"num_key_value_heads": HEADS, **_TIED},
        "bias": {**_BIAS, "mlp_bias": True},
        "odd-heads": {"hidden_size": 30, "num_attention_heads": 3, "num_key_value_heads": 3},
        "odd-head-width": {"num_attention_heads": 2, "head_dim": 10},
        "single-head": {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 6},
    },
    "mistral": {"tied": {**_TIED, "sliding_window": None}},
    "qwen2": {"window": {"use_sliding_window": True, "max_window_layers": 1, **_TIED}},
    "qwen2_moe": {"no-bias-dense": {"qkv_bias": False, "mlp_only_layers": [0, 1, 2]}},
    "qwen3": {"bias-tied": {**_BIAS, **_TIED}},
    "qwen3_moe": {"all-experts": {"mlp_only_layers": [], "norm_topk_prob": True}},
    "seed_oss": {"out-bias": {"attention_out_bias": True, "mlp_bias": True}},
    "starcoder2": {"no-bias": {"use_bias": False, **_UNTIED}},
    "phimoe": {"biases": {**_BIAS, "lm_head_bias": True}},
    "jais2": {"no-bias": {"attention_bias": False, "mlp_bias": False}},
    "nemotron": {"bias": {**_BIAS, "mlp_bias": True}},
    "ernie4_5": {"bias": {"use_bias": True}},
    "ernie4_5_moe": {"bias-dense": {"use_bias": True, "moe_layer_start_index": LAYERS - 1}},
    "gpt_oss": {"mha-tied": {"num_key_value_heads": HEADS, **_TIED}},
    "glm": {"no-bias": {"attention_bias": False}},
    "glm4_moe": {"qk-norm": {"use_qk_norm": True, **_BIAS}},
    "hunyuan_v1_dense": {"bias": _BIAS},
    "deepseek_v2": {"no-query-rank": {"q_lora_rank": None}},
    "deepseek_v3": {
        "no-query-rank": {"q_lora_rank": None, **_BIAS},
        "all-dense": {"first_k_dense_replace": LAYERS},
    },
    # Parallel and sequential blocks
    "gpt_neox": {
        "sequential": {"use_parallel_residual": False},
        "no-bias-tied": {"attention_bias": False, **_TIED},
    },
    "stablelm": {
        "parallel": {"use_parallel_residual": True},
        "qk-norm": {"qk_layernorm": True, "use_qkv_bias": True},
        "parallel-qk-norm-tied": {"use_parallel_residual": True, "qk_layernorm": True, **_TIED},
    },
    "falcon": {
        "7b-bias-untied": {"bias": True, **_UNTIED},
        "new-two-norms": {**_FALCON_NEW, "num_ln_in_parallel_attn": 2},
        "new-one-norm": {**_FALCON_NEW, "num_ln_in_parallel_attn": 1, "bias": True},
        "sequential": {"parallel_attn": False, "multi_query": False, "bias": True},
        "sequential-alibi": {"parallel_attn": False, "multi_query": False, "alibi": True},
    },
    "phi": {"qk-norm": {"qk_layernorm": True}},
    "persimmon": {"no-qk-norm": {"qk_layernorm": False}},
    # Where norms stand, and whether they stand at all
    "opt": {
        "post-norm": {"do_layer_norm_before": False},
        "projected": {"word_embed_proj_dim": 20},
        "post-norm-projected": {"do_layer_norm_before": False, "word_embed_proj_dim": 20},
        "no-final-norm": {"_remove_final_layer_norm": True},
        "no-bias": {"enable_bias": False},
        "norms-without-weight": {"layer_norm_elementwise_affine": False},
    },
    "bloom": {
        "residual-after-norm": {"apply_residual_connection_post_layernorm": True},
        "untied": _UNTIED,
    },
    "hyperclovax": {
        "no-post-norm": {"use_post_norm": False},
        "bias-tied": {**_BIAS, "mlp_bias": True, **_TIED},
    },
    "lfm3": {
        "no-sandwich": {"use_sandwich_norm": False},
        "no-gate-bias": {"use_attention_gate": False, **_BIAS, "conv_bias": True},
    },
    "xmod": {"pre-norm": {"pre_norm": True}, "adapter-norm": {"adapter_layer_norm": True}},
    "trocr": {
        "sinusoidal": {"use_learned_position_embeddings": False, "layernorm_embedding": False}
    },
    "xlstm": {"bias": {"use_bias": True}},
    "modernbert-decoder": {
        "biases": {"norm_bias": True, **_BIAS, "mlp_bias": True, "decoder_bias": False}
    },
    "olmo_hybrid": {"attention-first": {"layer_types": _ATTENTION_FIRST}},
    # Multipliers, scales and caps
    "granite": {"bias-tied": {**_BIAS, "mlp_bias": True, **_TIED}},
    "granitemoe": {"bias-tied": {**_BIAS, **_TIED}},
    "granitemoeshared": {"no-shared-mlp": {"shared_intermediate_size": 0}},
    "granitemoe_swa": {"no-shared-mlp": {"shared_intermediate_size": 0}},
    "granitemoehybrid": {
        "no-experts": {"num_local_experts": 0, "mamba_proj_bias": True},
        "rope-attention": {**_FULL, "position_embedding_type": "rope"},
    },
    "afmoe": {"no-mup": {"mup_enabled": False, **_BIAS}},
    "cohere": {"qk-norm-untied": {"use_qk_norm": True, "logit_scale": 1.8, **_BIAS, **_UNTIED}},
    "cohere2": {"bias-untied": {**_BIAS, **_UNTIED, "logit_scale": 1.8}},
    "cohere2_moe": {
        "summed-experts": {"num_shared_experts": 2, "shared_expert_combination_strategy": "sum"},
        "layer-norm": {"rms_norm_eps": None},  # else it has root-mean-square norms
        "no-shared-expert": {"num_shared_experts": 0, "expert_selection_fn": "sigmoid"},
    },
    "falcon_h1": {
        "biases": {
            **_BIAS,
            "mlp_bias": True,
            "mamba_proj_bias": True,
            "projectors_bias": True,
            "mamba_rms_norm": True,
        }
    },
    "gemma": {"bias-untied": {**_BIAS, **_UNTIED}},
    "gemma2": {"no-caps": {**_NO_CAPS, **_BIAS}},
    "gemma3_text": {"no-cap-untied": {"final_logit_softcapping": None, **_BIAS, **_UNTIED}},
    "vaultgemma": {"no-caps": _NO_CAPS},
    "nanochat": {"no-cap": {"final_logit_softcapping": None, **_BIAS}},
    "beam": {"no-cap": {"final_logit_softcapping": None, **_BIAS}, "all-dense": _DENSE},
    "minicpm3": {"untied-bias": {**_UNTIED, **_BIAS, "mlp_bias": True}},
    "minimax": {
        "unit-factors": {
            f"{part}_{factor}_factor": 1
            for part in ("full_attn", "linear_attn", "mlp")
            for factor in ("alpha", "beta")
        }
    },
    "xglm": {"no-scale": {"scale_embedding": False}},
    "bart": {"no-scale": {"scale_embedding": False, **_UNTIED}},
    "mbart": {"no-scale": {"scale_embedding": False}},
    "inkling_text": {
        "all-dense": {"mlp_layer_types": ["dense"] * 4},
        "padded-head": {"unpadded_vocab_size": None},
    },
    # A block's own branches: experts, per-layer inputs, shared blocks
    "gemma4_text": {
        "experts": _GEMMA4_MOE,
        "no-layer-input": {"hidden_size_per_layer_input": 0, "final_logit_softcapping": None},
        "experts-no-layer-input": {**_GEMMA4_MOE, "hidden_size_per_layer_input": 0},
        "shared-keys": {"num_kv_shared_layers": 2, "use_double_wide_mlp": True},
        "keys-are-values": {"attention_k_eq_v": True, **_BIAS},
    },
    "doge": {
        "experts": {"is_moe": True},
        "bias-tied": {**_BIAS, "mlp_bias": True, **_TIED},
    },
    "zaya": {"head-bias": {"lm_head_bias": True, **_UNTIED}},
    "jamba": {"no-experts": {"num_experts": 1, "num_experts_per_tok": 1, "mamba_proj_bias": True}},
    "mamba": {"bias-untied": {"use_bias": True, **_UNTIED}},
    "mamba2": {"bias-tied": {"use_bias": True, **_TIED}},
    "bamba": {"bias": {**_BIAS, "mlp_bias": True, "mamba_proj_bias": True}},
    "nemotron_h": {"bias": {**_BIAS, "mlp_bias": True, "use_bias": True}},
    "zamba2": {
        "adapters": {
            "use_shared_attention_adapter": True,
            "adapter_rank": 4,
            "num_mem_blocks": 2,
            "use_mem_rope": True,
            "add_bias_linear": True,
        }
    },
    "recurrent_gemma": {"attention": {"block_types": ["attention"], **_BIAS}},
    "rwkv": {"no-rescale": {"rescale_every": 0}, "tied": _TIED},
    "gpt2": {
        "untied": _UNTIED,
        "inverse-layer-scale": {"scale_attn_by_inverse_layer_idx": True},
        "cross-attention": {"add_cross_attention": True},
    },
    "gpt_bigcode": {"multi-head": {"multi_query": False, **_UNTIED}},
    "bert": {"untied": _UNTIED},
    "olmo": {"clip": {"clip_qkv": 1.5, **_BIAS, **_TIED}},
    "dots3_note_text": {"indexed": {"layer_types": ["indexed_attention"] * 4}},
    "mllama": {"no-cross-layers": {"cross_attention_layers": []}},
    "hrm_text": {"one-cycle": {"H_cycles": 1, "L_cycles": 1}},
    "laguna": {"no-gate": {"gating": False, **_BIAS}},
    "musicgen": {"codebooks": {"num_codebooks": 2}},
}
