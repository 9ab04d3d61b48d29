"""The GPT-2 shape: blocks in ``transformer.h`` and, in the older two, learned positions."""

from dla_hooks.architecture import Architecture, Heads, Write

ARCHITECTURES = (
    Architecture(
        model_types=("gpt2",),
        layers="transformer.h",
        final_norm="transformer.ln_f",
        writes=(
            Write("attn_out", "attn", heads=Heads("attn.c_proj")),
            Write("mlp_out", "mlp"),
        ),
        positions="transformer.wpe",
        position_limit="max_position_embeddings",
    ),
    Architecture(
        model_types=("gpt_neo",),
        layers="transformer.h",
        final_norm="transformer.ln_f",
        writes=(
            Write("attn_out", "attn", heads=Heads("attn.attention.out_proj")),
            Write("mlp_out", "mlp"),
        ),
        positions="transformer.wpe",
        position_limit="max_position_embeddings",
    ),
    Architecture(
        model_types=("gptj",),
        layers="transformer.h",
        final_norm="transformer.ln_f",
        writes=(
            Write("attn_out", "attn", heads=Heads("attn.out_proj")),
            Write("mlp_out", "mlp"),
        ),
        # Rotary, but from a table of sines that has no rows beyond this.
        position_limit="max_position_embeddings",
    ),
)
