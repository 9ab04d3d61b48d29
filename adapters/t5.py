"""T5's shape: blocks of two or three layers, each with the norm ahead of it, under ``decoder``."""

from dla_hooks.residual.architecture import Architecture, Heads, Write

_SELF = Write(
    "attn_out", "layer.0.SelfAttention", heads=Heads("layer.0.SelfAttention.o", "num_heads")
)
_CROSS = Write(
    "cross_attn_out",
    "layer.1.EncDecAttention",
    heads=Heads("layer.1.EncDecAttention.o", "num_heads", cross=True),
)

ARCHITECTURES = (
    Architecture(
        model_types=("longt5", "mt5", "pop2piano", "t5", "umt5"),
        layers="decoder.block",
        final_norm="decoder.final_layer_norm",
        writes=(_SELF, _CROSS, Write("mlp_out", "layer.2.DenseReluDense")),
    ),
    Architecture(
        model_types=("switch_transformers",),
        layers="decoder.block",
        final_norm="decoder.final_layer_norm",
        writes=(_SELF, _CROSS, Write("mlp_out", "layer.2.mlp")),
    ),
    Architecture(
        model_types=("pix2struct",),
        layers="decoder.layer",
        final_norm="decoder.final_layer_norm",
        writes=(
            Write(
                "attn_out",
                "self_attention.attention",
                heads=Heads("self_attention.attention.output", "num_heads"),
            ),
            Write(
                "cross_attn_out",
                "encoder_decoder_attention.attention",
                heads=Heads("encoder_decoder_attention.attention.output", "num_heads", cross=True),
            ),
            Write("mlp_out", "mlp.DenseReluDense"),
        ),
    ),
)
