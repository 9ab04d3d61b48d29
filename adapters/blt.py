"""BLT: a decoder of bytes. Cross-attention to the patches writes between its blocks."""

from dla_hooks.residual.architecture import Architecture, Heads, Write

ARCHITECTURES = (
    Architecture(
        model_types=("blt",),
        layers="model.local_decoder.layers",
        final_norm="model.local_decoder.norm",
        writes=(
            Write("attn_out", "self_attn", heads=Heads("self_attn.o_proj")),
            Write("mlp_out", "mlp"),
            # The module itself also returns its input. The write before block 0 is in `embed`.
            Write("cross_out", "o_proj", beside="model.local_decoder.cross_attn_layers"),
        ),
    ),
)
