"""Blocks of several kinds in one model: attention, Mamba, linear attention, convolution.

The mixer of a block is its layer besides attention and the MLP. A block without a module lacks its
write.
"""

from dla_hooks.residual.architecture import Architecture, Heads, Write

_ATTENTION = Write("attn_out", "self_attn", heads=Heads("self_attn.o_proj"))
_MIXER = (Write("mixer_out", "mixer", heads=Heads("mixer.o_proj")),)

ARCHITECTURES = (
    Architecture(
        model_types=(
            "qwen3_next",
            "qwen3_5",
            "qwen3_5_moe",
            "qwen3_5_moe_text",
            "qwen3_5_text",
        ),
        layers="model.layers",
        final_norm="model.norm",
        writes=(_ATTENTION, Write("mixer_out", "linear_attn"), Write("mlp_out", "mlp")),
    ),
    Architecture(
        model_types=("bamba", "falcon_h1", "jamba"),
        layers="model.layers",
        final_norm="model.final_layernorm",
        writes=(_ATTENTION, Write("mixer_out", "mamba"), Write("mlp_out", "feed_forward")),
    ),
    Architecture(
        model_types=("granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared"),
        layers="model.layers",
        final_norm="model.norm",
        writes=(
            _ATTENTION,
            Write("mixer_out", "mamba"),
            Write("mlp_out", "block_sparse_moe"),
            Write("shared_mlp_out", "shared_mlp"),
        ),
    ),
    Architecture(
        model_types=("lfm2", "lfm2_moe"),
        layers="model.layers",
        final_norm="model.embedding_norm",
        writes=(
            Write("attn_out", "self_attn", heads=Heads("self_attn.out_proj")),
            Write("mixer_out", "conv"),
            Write("mlp_out", "feed_forward"),
        ),
    ),
    Architecture(
        model_types=("lfm3",),
        layers="model.layers",
        final_norm="model.embedding_norm",
        writes=(
            Write(
                "attn_out",
                "self_attn",
                post_norm="post_operator_norm",
                heads=Heads("self_attn.o_proj"),
            ),
            Write("mixer_out", "conv", post_norm="post_operator_norm"),
            Write("mlp_out", "feed_forward", post_norm="post_ffn_norm"),
        ),
    ),
    Architecture(
        model_types=("nemotron_h",),  # one mixer a block: Mamba, attention, MLP or experts
        layers="model.layers",
        final_norm="model.norm_f",
        writes=_MIXER,
    ),
    Architecture(
        model_types=("nemotron_h_omni",),
        layers="language_model.model.layers",
        final_norm="language_model.model.norm_f",
        writes=_MIXER,
    ),
    Architecture(
        model_types=("nemo_speechlm",),
        layers="model.language_model.layers",
        final_norm="model.language_model.norm_f",
        writes=_MIXER,
    ),
    Architecture(
        model_types=("olmo_hybrid",),  # only its full-attention blocks have post-norms
        layers="model.layers",
        final_norm="model.norm",
        writes=(
            Write(
                "attn_out",
                "self_attn",
                post_norm="post_attention_layernorm",
                heads=Heads("self_attn.o_proj"),
            ),
            Write("mixer_out", "linear_attn"),
            Write("mlp_out", "mlp", post_norm="post_feedforward_layernorm"),
        ),
    ),
    Architecture(
        model_types=("recurrent_gemma",),
        layers="model.layers",
        final_norm="model.final_norm",
        writes=(
            Write("mixer_out", "temporal_block", heads=Heads("temporal_block.o_proj")),
            Write("mlp_out", "mlp_block"),
        ),
    ),
    Architecture(
        # The shared transformer block is read by the Mamba layers only, and writes nothing itself.
        model_types=("zamba", "zamba2"),
        layers="model.layers",
        final_norm="model.final_layernorm",
        writes=(Write("mixer_out", ("mamba", "mamba_decoder.mamba")),),
    ),
    Architecture(
        model_types=("mamba", "falcon_mamba", "mamba2"),
        layers="backbone.layers",
        final_norm="backbone.norm_f",
        writes=(Write("mixer_out", "mixer"),),
    ),
    Architecture(
        model_types=("xlstm",),
        layers="backbone.blocks",
        final_norm="backbone.out_norm",
        writes=(Write("mixer_out", "mlstm_layer"), Write("mlp_out", "ffn")),
    ),
    Architecture(
        model_types=("rwkv",),
        layers="rwkv.blocks",
        final_norm="rwkv.ln_out",
        start="rwkv.blocks.0.pre_ln",  # block 0 norms the embeddings, and goes on from there
        writes=(Write("mixer_out", "attention"), Write("mlp_out", "feed_forward")),
    ),
    Architecture(
        model_types=("inkling_text",),  # a short convolution over positions follows each sublayer
        layers="model.layers",
        final_norm="model.norm",
        writes=(Write("attn_out", "attn_sconv"), Write("mlp_out", "mlp_sconv")),
    ),
    Architecture(
        model_types=("longcat_flash",),  # two attentions and two MLPs a block, and experts beside
        layers="model.layers",
        final_norm="model.norm",
        writes=(
            Write("attn_out", "self_attn.0", heads=Heads("self_attn.0.o_proj")),
            Write("mlp_out", "mlps.0"),
            Write("attn1_out", "self_attn.1", heads=Heads("self_attn.1.o_proj")),
            Write("mlp1_out", "mlps.1"),
            Write("moe_out", "mlp"),
        ),
    ),
)
