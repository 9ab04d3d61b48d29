"""Gated cross-attention to images: blocks of their own, which run only where there is an image."""

from dla_hooks.residual.architecture import Architecture, Heads, Write

_WRITES = (
    Write("attn_out", "self_attn", heads=Heads("self_attn.o_proj")),
    Write("cross_attn_out", "cross_attn", heads=Heads("cross_attn.o_proj", cross=True)),
    Write("mlp_out", "mlp", where="self_attn"),
    # At positions that read no image the MLP of these blocks writes nothing.
    Write("mlp_out", "mlp", where="cross_attn", by_row="full_text_row_masked_out_mask"),
)

ARCHITECTURES = (
    Architecture(
        model_types=("mllama",),
        layers="model.language_model.layers",
        final_norm="model.language_model.norm",
        writes=_WRITES,
        reads="cross_attention_states",
    ),
    Architecture(
        model_types=("mllama_text_model",),
        layers="model.layers",
        final_norm="model.norm",
        writes=_WRITES,
        reads="cross_attention_states",
    ),
)
