"""Audio language models: a decoder alone, with sound among its tokens.

model = build("qwen2_audio")
model(**sounds("qwen2_audio", model))   # as the type's processor would give them
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import mapping_zoo as zoo
import torch
from mapping_configs import WIDTH
from mapping_zoo import CannotBuild
from media_zoo import AUDIO, TOP, asked, both_cases, build_class, noise, with_placeholders
from transformers.models.auto import modeling_auto

from doors import Case, Door

_NAMES: Mapping[str, str] = {
    **getattr(modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", {}),
    **modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    **modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
}
_ONLY = (
    "audioflamingo3",
    "fun_asr_nano",
    "gemma3n",
    "gemma4",
    "gemma4_unified",
    "glmasr",
    "granite_speech",
    "granite_speech_plus",
    "kyutai_speech_to_text",
    "moss_transcribe_diarize",
    "musicflamingo",
    "nemo_speechlm",
    "phi4_multimodal",
    "qwen2_5_omni_thinker",
    "qwen2_audio",
    "qwen3_asr",
    "qwen3_omni_moe_thinker",
    "vibevoice_asr",
    "voxtral",
    "voxtral_realtime",
)
CLASSES: Mapping[str, str] = {name: _NAMES[name] for name in _ONLY if name in _NAMES}
MODEL_TYPES: tuple[str, ...] = tuple(sorted(CLASSES))

_AUDIO: Mapping[str, Any] = {
    "num_mel_bins": 8,
    "d_model": 24,
    "hidden_size": 24,
    "hidden_dim": 24,
    "intermediate_size": 40,
    "encoder_layers": 2,
    "num_layers": 2,
    "num_hidden_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 40,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_heads": 2,
    "head_dim": 12,
    "dim_head": 12,
    "input_dim": 8,
    "feature_size": 8,
    "output_dim": WIDTH,
    "max_source_positions": 20,
    "context_size": 8,
    "n_window": 10,
}

_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_GRANITE = {
    "window_size": 4,
    "downsample_rate": 2,
    "projector_config": {"encoder_hidden_size": 24},
}
_CONVOLUTIONS = {
    "num_filters": 4,
    "hidden_size": 8,
    "downsampling_ratios": [2, 2],
    "depths": [1, 1, 1],
}
OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "fun_asr_nano": {"adaptor_config": {"hidden_size": WIDTH, "intermediate_size": 8}},
    "gemma4": {"audio_config": {"output_proj_dims": WIDTH}},
    "kyutai_speech_to_text": {
        "num_codebooks": 3,
        "codebook_vocab_size": 6,
        "audio_bos_token_id": 5,
        "pad_token_id": 2,
        "audio_pad_token_id": 3,
        "codec_config": {
            "num_filters": 4,
            "upsampling_ratios": [2, 2],
            "codebook_size": 4,
            "codebook_dim": 8,
            "num_quantizers": 3,
            "vector_quantization_hidden_dimension": 8,
            "upsample_groups": 24,
        },
    },
    "nemo_speechlm": {
        "audio_config": {
            "asr_config": {"subsampling_factor": 4},
            "diarization_config": {
                "audio_config": {"subsampling_factor": 4},
                "head_config": {
                    "hidden_size": 8,
                    "num_speakers": 3,
                    "audio_hidden_size": 24,
                    "subsampling_factor": 4,
                },
                "streaming_config": {"num_speakers": 3, "subsampling_factor": 4},
            },
        },
        "word_timestamp_config": {"vocab_size": 9, "blank_token_id": 8},
    },
    "phi4_multimodal": {
        "audio_config": {
            "audio_token_id": AUDIO,
            "ext_pw_out_channel": 24,
            "depthwise_separable_out_channel": 24,
            "nemo_conv_channels": 24,
        },
    },
    "granite_speech": _GRANITE,
    "granite_speech_plus": _GRANITE,
    "qwen2_5_omni_thinker": {"text_config": {"rope_parameters": _MROPE}},
    "vibevoice_asr": {
        "acoustic_tokenizer_encoder_config": _CONVOLUTIONS,
        "semantic_tokenizer_encoder_config": _CONVOLUTIONS,
    },
}


def build(
    model_type: str, seed: int = 0, dtype: torch.dtype = torch.float64, attn: str | None = None
) -> Any:
    """A tiny model of this type, every parameter drawn anew from `seed`; or CannotBuild."""
    sizes = (TOP, _AUDIO, OVERRIDES)
    return build_class(model_type, CLASSES[model_type], sizes, seed, dtype, attn)


def text(model_type: str, model: Any, seed: int = 0) -> dict[str, Any]:
    """Token ids alone."""
    ids = zoo.example_ids_any(model, seed=seed)
    if model.config.model_type == "kyutai_speech_to_text":  # a token of each codebook at each
        generator = torch.Generator().manual_seed(seed)
        n = model.config.num_codebooks
        sounds = torch.randint(
            model.config.codebook_vocab_size, (*ids.shape, n), generator=generator
        )
        return {"input_ids": torch.cat((ids[..., None], sounds), dim=-1)}
    return {"input_ids": ids}


def sounds(model_type: str, model: Any, seed: int = 0) -> dict[str, Any]:
    """Two prompts with a sound each, as the type's processor gives them; or CannotBuild."""
    generator = torch.Generator().manual_seed(100 + seed)
    given = FORMS.get(model_type, _mel)(model, generator)
    n_features = given.pop("n_features", None)
    arguments = inspect.signature(type(model).forward).parameters
    if not given.keys() <= arguments.keys():
        raise CannotBuild(f"{model_type}: its forward takes other arguments")
    if n_features is None:
        n_features = asked(model, given, AUDIO)
    ids = with_placeholders(zoo.example_ids_any(model, seed=seed), n_features, AUDIO)
    if model_type == "qwen2_audio":
        given["attention_mask"] = torch.ones_like(ids)
    return {"input_ids": ids, **given}


def _mel(model: Any, generator: torch.Generator) -> dict[str, Any]:
    """Mel features [sound, channel, frame], with a mask where the forward takes one."""
    found: dict[str, Any] = {"input_features": noise(generator, 2, 8, 40)}
    for name in ("feature_attention_mask", "input_features_mask"):
        if name in inspect.signature(type(model).forward).parameters:
            found[name] = torch.ones(2, 40, dtype=torch.long)
    return found


def _frames(mask: str = "input_features_mask", channels: int = 8) -> Any:
    """Features [sound, frame, channel]."""

    def form(model: Any, generator: torch.Generator) -> dict[str, Any]:
        return {
            "input_features": noise(generator, 2, 40, channels),
            mask: torch.ones(2, 40, dtype=torch.bool),
        }

    return form


def _granite(model: Any, generator: torch.Generator) -> dict[str, Any]:
    """Forty frames: ten windows of four, of two features each."""
    return {
        "input_features": noise(generator, 2, 40, 8),
        "input_features_mask": torch.ones(2, 20, dtype=torch.bool),
        "n_features": 20,
    }


def _phi4(model: Any, generator: torch.Generator) -> dict[str, Any]:
    return {
        "audio_input_features": noise(generator, 2, 40, 80),
        "audio_embed_sizes": torch.tensor([5, 5]),
        "n_features": 5,
        "audio_attention_mask": torch.ones(2, 40, dtype=torch.bool),
    }


def _ten(model: Any, generator: torch.Generator) -> dict[str, Any]:
    """Forty frames, halved twice."""
    return {**_mel(model, generator), "n_features": 10}


FORMS: Mapping[str, Any] = {
    "qwen2_5_omni_thinker": _ten,
    "qwen2_audio": _ten,
    "fun_asr_nano": _frames(channels=56),
    "gemma4": _frames(),
    "gemma4_unified": _frames(),
    "granite_speech": _granite,
    "granite_speech_plus": _granite,
    "nemo_speechlm": _frames(),
    "phi4_multimodal": _phi4,
}


def _cases(
    model_type: str, seed: int = 0, attn: str | None = None, **changes: Any
) -> tuple[Case, ...]:
    """Text alone, and with sounds, as far as the type takes them."""
    model = build(model_type, seed, attn=attn, **changes)
    return both_cases(
        model,
        ("text alone", lambda: text(model_type, model, seed)),
        ("with sounds", lambda: sounds(model_type, model, seed)),
    )


DOORS = (
    Door(
        name="audio-text",
        title="Audio-text",
        about="Audio language models: decoders with sounds among their tokens, with text alone and "
        "with features as their processor gives them.",
        model_types=MODEL_TYPES,
        cases=_cases,
        rank=3,
        in_ci=4,
    ),
)
