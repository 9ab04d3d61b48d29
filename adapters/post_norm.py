"""A norm stands between each sublayer and the stream, as in Gemma 2 to 4, OLMo 2, GLM 4."""

from dla_hooks.residual.architecture import Architecture, Heads, Write

_HEADS = Heads("self_attn.o_proj")
_ATTENTION = Write("attn_out", "self_attn", post_norm="post_attention_layernorm", heads=_HEADS)
_MLP = Write("mlp_out", "mlp", post_norm="post_feedforward_layernorm")
# The write of the per-layer embedding of each token, in the small models.
_PER_LAYER = Write("ple_out", "per_layer_projection", post_norm="post_per_layer_input_norm")

ARCHITECTURES = (
    Architecture(
        model_types=("gemma2", "beam", "exaone4", "flex_olmo", "gemma3_text", "olmo2", "olmo3"),
        layers="model.layers",
        final_norm="model.norm",
        writes=(_ATTENTION, _MLP),
    ),
    Architecture(
        model_types=("gemma3",),
        layers="model.language_model.layers",
        final_norm="model.language_model.norm",
        writes=(_ATTENTION, _MLP),
    ),
    Architecture(
        model_types=("gemma4_text", "gemma4_unified_text"),
        layers="model.layers",
        final_norm="model.norm",
        writes=(_ATTENTION, _MLP, _PER_LAYER),
    ),
    Architecture(
        model_types=("gemma4", "gemma4_unified"),
        layers="model.language_model.layers",
        final_norm="model.language_model.norm",
        writes=(_ATTENTION, _MLP, _PER_LAYER),
    ),
    Architecture(
        model_types=("t5gemma", "t5gemma2"),  # the second's one attention reads the encoder, too
        layers="model.decoder.layers",
        final_norm="model.decoder.norm",
        writes=(
            Write("attn_out", "self_attn", post_norm="post_self_attn_layernorm", heads=_HEADS),
            Write(
                "cross_attn_out",
                "cross_attn",
                post_norm="post_cross_attn_layernorm",
                heads=Heads("cross_attn.o_proj", cross=True),
            ),
            _MLP,
        ),
    ),
    Architecture(
        model_types=("afmoe",),
        layers="model.layers",
        final_norm="model.norm",
        writes=(_ATTENTION, Write("mlp_out", "mlp", post_norm="post_mlp_layernorm")),
    ),
    Architecture(
        model_types=("glm4", "kolibri1"),
        layers="model.layers",
        final_norm="model.norm",
        writes=(
            Write("attn_out", "self_attn", post_norm="post_self_attn_layernorm", heads=_HEADS),
            Write("mlp_out", "mlp", post_norm="post_mlp_layernorm"),
        ),
    ),
    Architecture(
        model_types=("hyperclovax",),
        layers="model.layers",
        final_norm="model.norm",
        writes=(
            Write("attn_out", "self_attn", post_norm="post_norm1", heads=_HEADS),
            Write("mlp_out", "mlp", post_norm="post_norm2"),
        ),
    ),
)
