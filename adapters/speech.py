"""Decoders of speech models in Llama's shape, with attention to an encoder."""

from dla_hooks.residual.architecture import Architecture, Heads, Write

_WRITES = (
    Write("attn_out", "self_attn", heads=Heads("self_attn.o_proj")),
    Write("cross_attn_out", "encoder_attn", heads=Heads("encoder_attn.o_proj", cross=True)),
    Write("mlp_out", "mlp"),
)

ARCHITECTURES = (
    Architecture(
        model_types=("canary", "cohere_asr", "moonshine", "moonshine_streaming"),
        layers="model.decoder.layers",
        final_norm="model.decoder.norm",
        writes=_WRITES,
    ),
)
