"""DeepStack: features of an image are added to the stream behind several blocks."""

from dla_hooks.residual.architecture import Architecture, Heads, Write

_ATTENTION = Write("attn_out", "self_attn", heads=Heads("self_attn.o_proj"))

ARCHITECTURES = (
    Architecture(
        model_types=(
            "cohere_compass",
            "cosmos3_omni",
            "granite4_vision",
            "granite_docling",
            "qwen3_vl",
            "qwen3_vl_moe",
        ),
        layers="model.language_model.layers",
        final_norm="model.language_model.norm",
        writes=(_ATTENTION, Write("mlp_out", "mlp")),
        between="deepstack",
    ),
    Architecture(
        model_types=("qwen3_omni_moe_thinker",),
        layers="model.layers",
        final_norm="model.norm",
        writes=(_ATTENTION, Write("mlp_out", "mlp")),
        between="deepstack",
    ),
)
