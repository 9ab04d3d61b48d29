"""Encoders with a norm before each sublayer and one at the end, which read in both directions.

Where the residual is added inside the output module, the write is the linear layer before it. Their
heads for masked tokens and whole texts have layers of their own, and are in `refused`.
"""

from dla_hooks.residual.architecture import Architecture, Heads, Write

_BERT_WRITES = (
    Write("attn_out", "attention.output.dense", heads=Heads("attention.output.dense")),
    Write("mlp_out", "output.dense"),
)
_LLAMA_WRITES = (
    Write("attn_out", "self_attn", heads=Heads("self_attn.o_proj")),
    Write("mlp_out", "mlp"),
)

ARCHITECTURES = (
    Architecture(
        model_types=("esm",),  # positions are rotary, or masked together with the tokens
        layers="esm.encoder.layer",
        final_norm="esm.encoder.emb_layer_norm_after",
        writes=_BERT_WRITES,
    ),
    Architecture(
        model_types=("esmc",),
        layers="esmc.layers",
        final_norm="esmc.norm",
        writes=_LLAMA_WRITES,
    ),
    Architecture(
        model_types=("eurobert", "openai_privacy_filter", "ultrabert"),
        layers="model.layers",
        final_norm="model.norm",
        writes=_LLAMA_WRITES,
    ),
    Architecture(
        model_types=("megatron-bert",),
        layers="bert.encoder.layer",
        final_norm="bert.encoder.ln",
        writes=_BERT_WRITES,
        positions="bert.embeddings.position_embeddings",
        position_limit="max_position_embeddings",
    ),
    Architecture(
        model_types=("roberta-prelayernorm",),  # positions are normed together with the tokens
        layers="roberta_prelayernorm.encoder.layer",
        final_norm="roberta_prelayernorm.LayerNorm",
        writes=_BERT_WRITES,
    ),
    Architecture(
        model_types=("xlm-roberta-xl",),
        layers="roberta.encoder.layer",
        final_norm="roberta.encoder.LayerNorm",
        writes=_BERT_WRITES,
        positions="roberta.embeddings.position_embeddings",
    ),
)
