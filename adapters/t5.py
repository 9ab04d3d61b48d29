"""T5's shape: blocks of two or three layers, each with the norm ahead of it, under ``decoder``."""

from dla_hooks.residual.architecture import Architecture, Heads, Write

_SELF = "layer.0.SelfAttention"
_CROSS = "layer.1.EncDecAttention"


def _decoder(*model_types: str, mlp: str) -> Architecture:
    return Architecture(
        model_types=model_types,
        layers="decoder.block",
        final_norm="decoder.final_layer_norm",
        writes=(
            Write("attn_out", _SELF, heads=Heads(f"{_SELF}.o", "num_heads")),
            Write("cross_attn_out", _CROSS, heads=Heads(f"{_CROSS}.o", "num_heads", cross=True)),
            Write("mlp_out", f"layer.2.{mlp}"),
        ),
    )


ARCHITECTURES = (
    _decoder("longt5", "mt5", "pop2piano", "t5", "umt5", mlp="DenseReluDense"),
    _decoder("switch_transformers", mlp="mlp"),
)
