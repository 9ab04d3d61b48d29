"""Masked language models: `AutoModelForMaskedLM`."""

from __future__ import annotations

from typing import Any

import torch
from mapping_zoo import example_ids_any
from transformers import AutoModelForMaskedLM
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from doors import Case, Door
from doors.classification import build, run


def _cases(
    model_type: str, seed: int = 0, attn: str | None = None, **changes: Any
) -> tuple[Case, ...]:
    model = build(AutoModelForMaskedLM, model_type, seed, attn, **changes)
    ids = example_ids_any(model)
    if not model.config.is_encoder_decoder:
        return (Case(model, ids, run(model, ids).logits),)
    asked = {"input_ids": ids, "decoder_input_ids": ids.flip(-1)}
    with torch.no_grad():
        return (Case(model, asked, model(**asked).logits),)


DOORS = (
    Door(
        name="masked",
        title="Masked language models",
        about="Every type that transformers maps to a masked language model, at every position.",
        model_types=tuple(sorted(MODEL_FOR_MASKED_LM_MAPPING_NAMES)),
        cases=_cases,
        rank=9,
    ),
)
