"""OPT: learned positions; the feed-forward layers stand in the block itself."""

from dla_hooks.residual.architecture import Architecture, Heads, Write

ARCHITECTURES = (
    Architecture(
        model_types=("opt",),
        layers="model.decoder.layers",
        final_norm="model.decoder.final_layer_norm",
        writes=(
            Write("attn_out", "self_attn", heads=Heads("self_attn.out_proj")),
            Write("mlp_out", "fc2"),
        ),
        positions="model.decoder.embed_positions",
        position_limit="max_position_embeddings",
        after_norm=("model.decoder.project_out",),
    ),
)
