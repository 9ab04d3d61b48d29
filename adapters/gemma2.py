"""Gemma 2 and 3, OLMo 2: a norm stands between each sublayer's output and the stream."""

from dla_hooks.architecture import Architecture, Heads, Write

_WRITES = (
    Write(
        "attn_out",
        "self_attn",
        post_norm="post_attention_layernorm",
        heads=Heads("self_attn.o_proj"),
    ),
    Write("mlp_out", "mlp", post_norm="post_feedforward_layernorm"),
)

ARCHITECTURES = (
    Architecture(
        model_types=("gemma2", "gemma3_text"),
        layers="model.layers",
        final_norm="model.norm",
        writes=_WRITES,
        softcap="final_logit_softcapping",
    ),
    Architecture(
        model_types=("olmo2",),
        layers="model.layers",
        final_norm="model.norm",
        writes=_WRITES,
    ),
)
