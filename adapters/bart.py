"""Decoders of BART's shape with a norm before each sublayer, with an encoder or without.

Without one, as causal language models, their cross-attention does not run.
"""

from dla_hooks.residual.architecture import Architecture, Heads, Write

_COUNT = "decoder_attention_heads"
_SELF = Write("attn_out", "self_attn", heads=Heads("self_attn.out_proj", _COUNT))
_WRITES = (
    _SELF,
    Write(
        "cross_attn_out",
        "encoder_attn",
        heads=Heads("encoder_attn.out_proj", _COUNT, cross=True),
    ),
    Write("mlp_out", "fc2"),
)
_OTHER_NAMES = (
    _SELF,
    Write(
        "cross_attn_out",
        "cross_attention",
        heads=Heads("cross_attention.out_proj", _COUNT, cross=True),
    ),
    Write("mlp_out", "ffn"),
)

ARCHITECTURES = (
    Architecture(
        model_types=("blenderbot", "pegasus", "pegasus_x"),
        layers="model.decoder.layers",
        final_norm="model.decoder.layer_norm",
        writes=_WRITES,
        positions="model.decoder.embed_positions",
        position_limit="max_position_embeddings",
    ),
    Architecture(
        model_types=("m2m_100",),  # sinusoids are added by a module; they go on for any length
        layers="model.decoder.layers",
        final_norm="model.decoder.layer_norm",
        writes=_WRITES,
        positions="model.decoder.embed_positions",
    ),
    Architecture(
        model_types=("nllb-moe",),
        layers="model.decoder.layers",
        final_norm="model.decoder.layer_norm",
        writes=_OTHER_NAMES,
        positions="model.decoder.embed_positions",
    ),
    Architecture(
        model_types=("speech_to_text", "whisper"),
        layers="model.decoder.layers",
        final_norm="model.decoder.layer_norm",
        writes=_WRITES,
        positions="model.decoder.embed_positions",
        position_limit="max_target_positions",
    ),
    Architecture(
        model_types=("seamless_m4t", "seamless_m4t_v2"),
        layers="text_decoder.layers",
        final_norm="text_decoder.layer_norm",
        writes=_OTHER_NAMES,
        positions="text_decoder.embed_positions",
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
        model_types=("mbart", "pp_formulanet"),  # positions are normed together with the tokens
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
        model_types=("kosmos-2",),  # a norm centres all its heads together, ahead of out_proj
        layers="text_model.model.layers",
        final_norm="text_model.model.layer_norm",
        writes=(Write("attn_out", "self_attn"), Write("mlp_out", "ffn")),
        positions="text_model.model.embed_positions",
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
