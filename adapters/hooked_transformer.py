"""TransformerLens' models: hook points of the same names on both kinds."""

from dla_hooks.residual.architecture import Architecture, Heads, Write

ARCHITECTURES = (
    Architecture(
        model_types=("HookedTransformer", "TransformerBridge"),
        layers="blocks",
        final_norm="ln_final",
        writes=(
            Write(
                "attn_out",
                "hook_attn_out",
                heads=Heads("attn.hook_z", count="n_heads", post_norm="ln1_post"),
            ),
            Write("mlp_out", "hook_mlp_out"),
        ),
        positions="hook_pos_embed",
        position_limit="n_ctx",
    ),
)
