"""Phi 1, 1.5 and 2: a parallel block with biases everywhere, the unembedding included."""

from dla_hooks.architecture import Architecture, Heads, Write

ARCHITECTURES = (
    Architecture(
        model_types=("phi",),
        layers="model.layers",
        final_norm="model.final_layernorm",
        writes=(
            Write("attn_out", "self_attn", heads=Heads("self_attn.dense")),
            Write("mlp_out", "mlp"),
        ),
    ),
)
