"""Granite: both writes are scaled on their way into the stream, and the logits divided."""

from dla_hooks.architecture import Architecture, Heads, Write

ARCHITECTURES = (
    Architecture(
        model_types=("granite",),
        layers="model.layers",
        final_norm="model.norm",
        writes=(
            Write(
                "attn_out",
                "self_attn",
                scale="residual_multiplier",
                heads=Heads("self_attn.o_proj"),
            ),
            Write("mlp_out", "mlp", scale="residual_multiplier"),
        ),
        logit_divisor="logits_scaling",
    ),
)
