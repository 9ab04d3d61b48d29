"""BLT: a decoder of bytes, to which cross-attention to the patches adds between its blocks."""

from dla_hooks.residual.architecture import Architecture, Heads, Write

ARCHITECTURES = (
    Architecture(
        model_types=("blt",),
        layers="model.local_decoder.layers",
        final_norm="model.local_decoder.norm",
        writes=(
            Write("attn_out", "self_attn", heads=Heads("self_attn.o_proj")),
            Write("mlp_out", "mlp"),
            # The module returns its input along with this. The one before block 0 is in `embed`.
            Write("cross_out", "o_proj", beside="model.local_decoder.cross_attn_layers"),
        ),
    ),
)
