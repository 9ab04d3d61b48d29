"""Causal language models: `AutoModelForCausalLM`."""

from __future__ import annotations

from typing import Any

import torch
from mapping_zoo import MODEL_TYPES, build_any, example_ids_any

from doors import Case, Door


def _cases(
    model_type: str, seed: int = 0, attn: str | None = None, **changes: Any
) -> tuple[Case, ...]:
    model = build_any(model_type, seed, attn=attn, **changes)
    ids = example_ids_any(model)
    with torch.no_grad():
        return (Case(model, ids, model(ids, use_cache=False).logits),)


DOORS = (
    Door(
        name="causal",
        title="Causal language models",
        about="Every type that transformers maps to a causal language model.",
        model_types=MODEL_TYPES,
        cases=_cases,
        rank=0,
        in_ci=1,
    ),
)
