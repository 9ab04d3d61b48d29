"""GPT-NeoX and Pythia."""

from dla_hooks.architecture import Architecture, Heads, Write

ARCHITECTURES = (
    Architecture(
        model_types=("gpt_neox",),
        layers="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
        writes=(
            Write("attn_out", "attention", heads=Heads("attention.dense")),
            Write("mlp_out", "mlp"),
        ),
    ),
)
