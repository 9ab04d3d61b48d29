"""What is measured: synthetic models of known sizes, and the calls that are held against them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

MODELS: dict[str, dict[str, Any]] = {
    "gpt2-small": {"model_type": "gpt2"},  # 124 million parameters: the defaults of its config
    "llama-250m": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    },
}

Call = Callable[[], Any]

CASES = {
    "component, last position": {"unit": "component"},
    "layer, last position": {"unit": "layer"},
    "head, last position": {"unit": "head"},
    "head, all positions": {"unit": "head", "pos": None},
    "head, all positions, next-token target": {"unit": "head", "pos": None, "next_token": True},
}


def make_model(name: str) -> Any:
    """A model of a named size with random weights, in evaluation mode."""
    logging.set_verbosity_error()
    torch.manual_seed(0)
    config = AutoConfig.for_model(**MODELS[name])
    return AutoModelForCausalLM.from_config(config).eval()


def make_calls(model: Any, n_tokens: int, case: str) -> tuple[Call, Call]:
    """The call that is measured, and the plain forward pass that it is held against."""
    from dla_hooks import direct_logit_attribution

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (1, n_tokens), generator=generator)
    options = dict(CASES[case])
    answer, incorrect = (ids.roll(-1), None) if options.pop("next_token", False) else (5, 7)

    def ours() -> Any:
        return direct_logit_attribution(model, ids, answer, incorrect, **options)

    def plain() -> Any:
        with torch.no_grad():
            return model(ids, use_cache=False, logits_to_keep=1)

    return ours, plain
