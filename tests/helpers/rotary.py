"""Models whose rotary positions depend on how long a prompt is."""

from __future__ import annotations

import transformers
from mapping_zoo import build_any
from transformers import PreTrainedModel

LIMIT = 20
"""Prompts of more tokens have other rotary positions."""


def length_dependent(kind: str, model_type: str = "llama") -> PreTrainedModel:
    """A tiny model with "dynamic" or "longrope" positions."""
    rope = {"rope_type": kind, "factor": 2.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
        rope |= {"original_max_position_embeddings": LIMIT}
    sizes = {"max_position_embeddings": LIMIT, "head_dim": 8}
    if int(transformers.__version__.split(".")[0]) >= 5:
        return build_any(model_type, rope_parameters={**rope, "rope_theta": 10000.0}, **sizes)
    model = build_any(model_type, rope_scaling=rope, **sizes)
    if kind == "longrope":
        model.config.original_max_position_embeddings = LIMIT
    return model
