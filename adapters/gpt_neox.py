"""GPT-NeoX and Pythia."""

from dla_hooks.residual.architecture import Architecture, Heads, Write

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
    Architecture(
        model_types=("gpt_neox_japanese",),  # the last block adds a bias that is no module's output
        layers="gpt_neox_japanese.layers",
        final_norm="gpt_neox_japanese.final_layer_norm",
        writes=(
            Write("attn_out", "attention", heads=Heads("attention.dense")),
            Write("mlp_out", "mlp"),
        ),
    ),
)
