"""Encoder-decoders of text: `AutoModelForSeq2SeqLM`. What is attributed is the decoder's stream.

Of the mapping's types, those that are audio language models (a decoder alone, with sound among its
tokens) are behind a door of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from mapping_configs import LAYERS, VOCAB, WIDTH
from mapping_zoo import CannotBuild, build_any
from transformers import (
    AutoModelForSeq2SeqLM,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
from zoo import _randomise, _shaped

from doors import Case, Door

START = 2
SOURCE, TARGET = 9, 6
"""Positions of the encoder, and of the decoder."""

_AUDIO = {
    "audioflamingo3",
    "glmasr",
    "granite_speech",
    "granite_speech_plus",
    "moss_transcribe_diarize",
    "musicflamingo",
    "nemo_speechlm",
    "qwen2_audio",
    "qwen3_asr",
    "vibevoice_asr",
    "voxtral",
    "voxtral_realtime",
}
"""Types with a decoder alone."""

_FLOAT32 = {"fsmt"}
"""Types that do not run in float64."""

MODEL_TYPES: tuple[str, ...] = tuple(
    sorted(set(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES) - _AUDIO)
)

_T5 = {"d_kv": 6, "d_ff": 40}
_PART = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
}
_PARTS = {
    "encoder": {"model_type": "bert", **_PART},
    "decoder": {
        "model_type": "gpt2",
        "n_embd": WIDTH,
        "n_layer": LAYERS,
        "n_head": 4,
        "n_positions": 64,
        "vocab_size": VOCAB,
        "is_decoder": True,
        "add_cross_attention": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
}
CHANGES: Mapping[str, Mapping[str, Any]] = {
    "bigbird_pegasus": {"attention_type": "original_full"},
    "fsmt": {"src_vocab_size": VOCAB, "tgt_vocab_size": VOCAB, "langs": ["en", "de"]},
    "led": {"attention_window": 4, "max_encoder_position_embeddings": 64,
            "max_decoder_position_embeddings": 64},
    "longt5": {**_T5, "local_radius": 3},
    "mt5": _T5,
    "nllb-moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2, "expert_capacity": 64},
    "prophetnet": {"ngram": 2, "num_buckets": 8},
    "seamless_m4t": {},
    "switch_transformers": {**_T5, "num_sparse_decoder_layers": 1, "num_sparse_encoder_layers": 1,
                            "expert_capacity": 64},
    "t5": _T5,
    "umt5": _T5,
}  # fmt: skip
"""Fields of the configs that only these types have."""


def build(
    model_type: str, seed: int = 0, attn: str | None = None, auto: Any = AutoModelForSeq2SeqLM,
    also: Mapping[str, Any] | None = None, **changes: Any,
) -> PreTrainedModel:  # fmt: skip
    """A tiny encoder-decoder, every parameter and every bias of the logits drawn from `seed`."""
    also = {"decoder_start_token_id": START, "pad_token_id": START, **(also or {})}
    changes = {**CHANGES.get(model_type, {}), **changes}
    if model_type == "encoder-decoder":
        model = of_parts(_PARTS, EncoderDecoderConfig, EncoderDecoderModel, seed, attn)
    else:
        dtype = torch.float32 if model_type in _FLOAT32 else torch.float64
        model = build_any(
            model_type, seed, dtype, attn, auto=auto, decoder=False, also=also, **changes
        )
    bias = getattr(model, "final_logits_bias", None)
    if isinstance(bias, torch.Tensor):
        generator = torch.Generator().manual_seed(seed + 100)
        bias.copy_(torch.randn(bias.shape, generator=generator))
    return model


def of_parts(parts: Any, config: Any, kind: Any, seed: int, attn: str | None) -> Any:
    """An encoder and a decoder of two types, put together."""
    settings = {} if attn is None else {"attn_implementation": attn}
    try:
        made = config(**parts, decoder_start_token_id=START, pad_token_id=START)
        with torch.random.fork_rng(devices=[]):
            model = kind._from_config(made, dtype=torch.float64, **settings).eval()
    except Exception as error:
        raise CannotBuild(f"{type(error).__name__}: {error}") from error
    _randomise(model, torch.Generator().manual_seed(seed), _shaped)
    return model


def tokens(length: int, batch: int = 2, seed: int = 0) -> torch.Tensor:
    """Ordinary token ids [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCAB - 6, (batch, length), generator=generator)


def inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    """What an encoder and a decoder read."""
    return {
        "input_ids": tokens(SOURCE, seed=seed),
        "decoder_input_ids": tokens(TARGET, seed=1 + seed),
    }


def run(model: Any, given: Mapping[str, Any]) -> torch.Tensor:
    """The logits of a plain forward pass."""
    try:
        with torch.no_grad():
            return model(**given, use_cache=False).logits
    except Exception as error:  # of the code of many types, to be reported
        raise CannotBuild(f"its own run fails: {type(error).__name__}: {error}") from error


def _cases(model_type: str, seed: int = 0, attn: str | None = None, **changes: Any) -> Any:
    model = build(model_type, seed, attn, **changes)
    given = inputs(seed)
    return (Case(model, given, run(model, given)),)


DOORS = (
    Door(
        name="seq2seq",
        title="Sequence-to-sequence",
        about="Every encoder-decoder that transformers maps to sequence-to-sequence. Attributed is "
        "the decoder's stream; what the encoder puts out is given.",
        model_types=MODEL_TYPES,
        cases=_cases,
        rank=2,
    ),
)
