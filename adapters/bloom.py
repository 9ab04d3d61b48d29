"""BLOOM: ALiBi, a norm on the embeddings, and the residual added inside each sublayer.

The sublayer modules return the stream itself. So the declared write is the output of the linear
layer just before the addition.
"""

from dla_hooks.residual.architecture import Architecture, Heads, Write

ARCHITECTURES = (
    Architecture(
        model_types=("bloom",),
        layers="transformer.h",
        final_norm="transformer.ln_f",
        writes=(
            Write("attn_out", "self_attention.dense", heads=Heads("self_attention.dense")),
            Write("mlp_out", "mlp.dense_4h_to_h"),
        ),
    ),
)
