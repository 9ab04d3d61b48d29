"""Decoders of BART's shape with a norm before each sublayer, used without an encoder."""

from dla_hooks.residual.architecture import Architecture, Heads, Write

_WRITES = (
    Write("attn_out", "self_attn", heads=Heads("self_attn.out_proj", "decoder_attention_heads")),
    Write("mlp_out", "fc2"),
)

ARCHITECTURES = (
    Architecture(
        model_types=("blenderbot", "pegasus"),
        layers="model.decoder.layers",
        final_norm="model.decoder.layer_norm",
        writes=_WRITES,
        positions="model.decoder.embed_positions",
        position_limit="max_position_embeddings",
    ),
    Architecture(
        model_types=("whisper",),
        layers="model.decoder.layers",
        final_norm="model.decoder.layer_norm",
        writes=_WRITES,
        positions="model.decoder.embed_positions",
        position_limit="max_target_positions",
    ),
    Architecture(
        model_types=("bigbird_pegasus",),
        layers="model.decoder.layers",
        final_norm="model.decoder.layernorm_embedding",
        writes=_WRITES,
        positions="model.decoder.embed_positions",
        position_limit="max_position_embeddings",
    ),
    Architecture(
        model_types=("biogpt",),
        layers="biogpt.layers",
        final_norm="biogpt.layer_norm",
        writes=(
            Write("attn_out", "self_attn", heads=Heads("self_attn.out_proj")),
            Write("mlp_out", "fc2"),
        ),
        positions="biogpt.embed_positions",
        position_limit="max_position_embeddings",
    ),
    Architecture(
        model_types=("mbart",),  # positions are normed together with the tokens
        layers="model.decoder.layers",
        final_norm="model.decoder.layer_norm",
        writes=_WRITES,
        position_limit="max_position_embeddings",
    ),
    Architecture(
        model_types=("xglm",),
        layers="model.layers",
        final_norm="model.layer_norm",
        writes=(
            Write("attn_out", "self_attn", heads=Heads("self_attn.out_proj", "attention_heads")),
            Write("mlp_out", "fc2"),
        ),
        positions="model.embed_positions",
    ),
    Architecture(
        model_types=("kosmos-2.5",),
        layers="text_model.model.layers",
        final_norm="text_model.model.layer_norm",
        writes=(
            Write("attn_out", "self_attn", heads=Heads("self_attn.out_proj", "attention_heads")),
            Write("mlp_out", "ffn"),
        ),
        positions="text_model.model.embed_positions",
    ),
)
