"""The GPT-2 shape: blocks in ``transformer.h`` and, in the older two, learned positions."""

from dla_hooks.residual.architecture import Architecture, Heads, Write

# Of a decoder in an EncoderDecoderModel.
_CROSS = Write("cross_attn_out", "crossattention", heads=Heads("crossattention.c_proj", cross=True))

ARCHITECTURES = (
    Architecture(
        model_types=("gpt2", "gpt_bigcode"),
        layers="transformer.h",
        final_norm="transformer.ln_f",
        writes=(
            Write("attn_out", "attn", heads=Heads("attn.c_proj")),
            _CROSS,
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
        model_types=("codegen", "gptj"),
        layers="transformer.h",
        final_norm="transformer.ln_f",
        writes=(
            Write("attn_out", "attn", heads=Heads("attn.out_proj")),
            Write("mlp_out", "mlp"),
        ),
        # Rotary, but from a table of sines that has no rows beyond this.
        position_limit="max_position_embeddings",
    ),
    Architecture(
        model_types=("ctrl",),  # sinusoids are added to the embeddings without a module
        layers="transformer.h",
        final_norm="transformer.layernorm",
        writes=(
            Write("attn_out", "multi_head_attention", heads=Heads("multi_head_attention.dense")),
            Write("mlp_out", "ffn"),
        ),
        position_limit="max_position_embeddings",
    ),
    Architecture(
        model_types=("mpt",),  # the residual is added inside the feed-forward module
        layers="transformer.blocks",
        final_norm="transformer.norm_f",
        writes=(
            Write("attn_out", "attn", heads=Heads("attn.out_proj")),
            Write("mlp_out", "ffn.down_proj"),
        ),
    ),
    Architecture(
        model_types=("dbrx",),
        layers="transformer.blocks",
        final_norm="transformer.norm_f",
        writes=(
            Write("attn_out", "norm_attn_norm.attn", heads=Heads("norm_attn_norm.attn.out_proj")),
            Write("mlp_out", "ffn"),
        ),
    ),
)
