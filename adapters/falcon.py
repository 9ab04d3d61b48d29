"""Falcon, in its three layouts: sequential, parallel, and parallel with two norms."""

from dla_hooks.residual.architecture import Architecture, Heads, Write

ARCHITECTURES = (
    Architecture(
        model_types=("falcon",),
        layers="transformer.h",
        final_norm="transformer.ln_f",
        writes=(
            Write("attn_out", "self_attention", heads=Heads("self_attention.dense")),
            Write("mlp_out", "mlp"),
        ),
    ),
)
