"""CPM-Ant: learned prompt positions precede the tokens, and are removed before the logits."""

from dla_hooks.residual.architecture import Architecture, Heads, Write

ARCHITECTURES = (
    Architecture(
        model_types=("cpmant",),
        layers="cpmant.encoder.layers",
        final_norm="cpmant.encoder.output_layernorm",
        writes=(
            Write(
                "attn_out",
                "self_att.self_attention",
                heads=Heads("self_att.self_attention.attention_out"),
            ),
            Write("mlp_out", "ffn.ffn"),
        ),
    ),
)
