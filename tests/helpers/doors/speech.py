"""Speech encoder-decoders: `AutoModelForSpeechSeq2Seq`. The encoder hears, the decoder writes.

The mapping's other types have a decoder alone, with sound among its tokens; they are behind the
door of audio language models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from mapping_configs import HEADS, LAYERS, VOCAB, WIDTH
from transformers import (
    AutoModelForSpeechSeq2Seq,
    SpeechEncoderDecoderConfig,
    SpeechEncoderDecoderModel,
)

from doors import Case, Door
from doors.seq2seq import START, TARGET, build, of_parts, run, tokens

MEL = 8
"""Bands of sound in a frame."""

_SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "max_position_embeddings": 64,
}
_PARAKEET = {
    **_SIZES,
    "model_type": "parakeet_encoder",
    "num_mel_bins": MEL,
    "subsampling_conv_channels": 8,
    "conv_kernel_size": 3,
    "dropout": 0.0,
    "layerdrop": 0.0,
}
_WAV2VEC = {
    **_SIZES,
    "model_type": "wav2vec2",
    "conv_dim": [8, 8],
    "conv_stride": [5, 2],
    "conv_kernel": [10, 3],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False,
}
_GPT2 = {
    "model_type": "gpt2",
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": 64,
    "vocab_size": VOCAB,
    "is_decoder": True,
    "add_cross_attention": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_SEAMLESS = {
    "feature_projection_input_dim": MEL,
    "speech_encoder_layers": 2,
    "speech_encoder_attention_heads": HEADS,
    "speech_encoder_intermediate_size": 48,
    "adaptor_kernel_size": 3,
    "adaptor_stride": 2,
    "conv_depthwise_kernel_size": 3,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
CHANGES: Mapping[str, Mapping[str, Any]] = {
    "canary": {
        "encoder_config": _PARAKEET,
        "decoder_config": {**_SIZES, "vocab_size": VOCAB, "head_dim": 8,
                           "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": START},
    },
    "cohere_asr": {"encoder_config": _PARAKEET, "head_dim": 8},
    "dia": {
        "encoder_config": {**_SIZES, "vocab_size": VOCAB, "head_dim": 8},
        "decoder_config": {**_SIZES, "vocab_size": VOCAB, "head_dim": 8, "num_channels": 3,
                           "cross_num_attention_heads": HEADS, "cross_head_dim": 8,
                           "cross_num_key_value_heads": HEADS, "cross_hidden_size": WIDTH,
                           "pad_token_id": START, "bos_token_id": 0, "eos_token_id": 1},
        "delay_pattern": [0, 1, 2],
    },
    "moonshine": {
        f"{part}_num_{what}": n
        for part in ("encoder", "decoder")
        for what, n in (("hidden_layers", LAYERS), ("attention_heads", HEADS),
                        ("key_value_heads", HEADS))
    },
    "moonshine_streaming": {
        "encoder_config": {**_SIZES, "hidden_size": 24, "head_dim": 8,
                           "sliding_windows": [[4, 1]] * LAYERS},
        "head_dim": 8,
    },
    "pop2piano": {"d_kv": 6, "d_ff": 40},
    "seamless_m4t": _SEAMLESS,
    "seamless_m4t_v2": {k: v for k, v in _SEAMLESS.items() if not k.startswith("num_conv")},
    "speech_to_text": {"input_feat_per_channel": MEL, "conv_channels": 8},
    "speecht5": {"conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3],
                 "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
                 "apply_spec_augment": False},
    "whisper": {"num_mel_bins": MEL, "max_source_positions": 16},
}  # fmt: skip
MODEL_TYPES = tuple(sorted((*CHANGES, "speech-encoder-decoder")))

_WAVES = {"moonshine": 2000, "moonshine_streaming": 1600, "speecht5": 400,
          "speech-encoder-decoder": 400}  # fmt: skip
"""Types whose encoders hear waves, and samples of them that make a few frames."""


def build_speech(model_type: str, seed: int = 0, attn: str | None = None, **changes: Any) -> Any:
    """A tiny speech encoder-decoder, every parameter drawn from `seed`."""
    if model_type == "speech-encoder-decoder":
        kinds = SpeechEncoderDecoderConfig, SpeechEncoderDecoderModel
        return of_parts({"encoder": _WAV2VEC, "decoder": _GPT2}, *kinds, seed, attn)
    changes = {**CHANGES[model_type], **changes}
    # Its config lacks a field that its attention reads.
    also = {"num_key_value_heads": HEADS} if model_type == "moonshine_streaming" else None
    return build(model_type, seed, attn, AutoModelForSpeechSeq2Seq, also, **changes)


def heard(model_type: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """What the encoder hears, as the type's processor would give it."""
    generator = torch.Generator().manual_seed(seed + 50)

    def sound(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    if model_type == "dia":
        return {"input_ids": tokens(9, seed=seed)}
    if model_type == "pop2piano":
        return {"input_features": sound(2, 9, WIDTH)}
    if model_type in _WAVES:
        return {"input_values": sound(2, _WAVES[model_type])}
    if model_type == "whisper":
        return {"input_features": sound(2, MEL, 32)}
    return {"input_features": sound(2, 32, MEL)}


def _cases(model_type: str, seed: int = 0, attn: str | None = None, **changes: Any) -> Any:
    model = build_speech(model_type, seed, attn, **changes)
    ids = tokens(TARGET, seed=1 + seed)
    if model_type == "dia":
        ids = ids[..., None].expand(-1, -1, 3)
    given = {**heard(model_type, seed), "decoder_input_ids": ids}
    return (Case(model, given, run(model, given)),)


DOORS = (
    Door(
        name="speech",
        title="Speech",
        about="Every encoder-decoder that transformers maps to speech. Attributed is the decoder's "
        "stream, at the tokens that it has written; what the encoder heard is given.",
        model_types=MODEL_TYPES,
        cases=_cases,
        rank=3,
    ),
)
