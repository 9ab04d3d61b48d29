"""Synthetic checkpoints of named sizes: random weights, made on the spot from a config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import dla_hooks

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
UNITS = ("component", "layer", "head")
POSITIONS = {
    "last": "the difference of two tokens' logits, at the last position",
    "all": "the same, at every position",
    "next": "the logit of the token that really comes next, at every position",
}
ANSWER, INCORRECT = 5, 7

FINER: dict[str, Callable[[], Any]] = {
    "source, 2 heads": lambda: dla_hooks.SourceTokens(heads=[(0, 1), (1, 0)]),
    "four units": lambda: ("component", "head", "neuron", "source"),
}
"""Units with options, by the name that a setting calls them."""


def unit_of(name: str) -> Any:
    """What ``unit=`` is given for the name in a setting."""
    return FINER[name]() if name in FINER else name


def _gpt2(width: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    sizes = {"n_embd": width, "n_layer": layers, "n_head": heads}
    return {"model_type": "gpt2", **sizes, **more}


def _llama(
    width: int, inner: int, layers: int, heads: int, kv_heads: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **{"vocab_size": 32000, "max_position_embeddings": 131072},
        **more,
    }


MODELS: dict[str, dict[str, Any]] = {
    "tiny-gpt2": _gpt2(32, 2, 4, vocab_size=97, n_positions=256),
    "tiny-llama": _llama(32, 48, 2, 4, 2, vocab_size=97),
    "gpt2-4x96": _gpt2(96, 4, 4),  # the demo model's shape: calls of a millisecond or two
    "gpt2-mini": _gpt2(512, 4, 8, vocab_size=8192),  # 17 million parameters
    "gpt2-small": _gpt2(768, 12, 12),  # 124 million parameters
    "gpt2-medium": _gpt2(1024, 24, 16),  # 355 million
    # 4 layers with 8 heads of 64, in groups of four as in Llama 3: 2 key-value heads.
    "long-llama": _llama(512, 1408, 4, 8, 2),
    "mixtral-6x768": {
        "model_type": "mixtral",
        **{"hidden_size": 768, "intermediate_size": 1024, "num_hidden_layers": 6},
        **{"num_attention_heads": 12, "num_key_value_heads": 4, "vocab_size": 32000},
        **{"num_local_experts": 8, "num_experts_per_tok": 2},
    },
    "llama-250m": _llama(1024, 2816, 16, 16, 4),  # 246 million, 1 GB in float32
    "llama-1b": _llama(2048, 5632, 22, 32, 4),  # 1.1 billion
    "llama-3-8b": _llama(4096, 14336, 32, 32, 8, vocab_size=128256, rope_theta=500000.0),
}


@dataclass(frozen=True)
class Setting:
    """One point of the grid that is measured.

    Attributes:
        model: a name in :data:`MODELS`.
        tokens: length of each prompt.
        batch: number of prompts.
        unit: the unit of the rows.
        pos: "last" and "all" attribute the difference of two tokens at the last position or at
            every one; "next" the token that comes next, at every position.
        dtype: a name in :data:`DTYPES`.
        device: as torch names it.
        chunk: tokens in a piece, for the contenders that run the prompt in pieces.
    """

    model: str = "gpt2-small"
    tokens: int = 512
    batch: int = 1
    unit: str = "head"
    pos: str = "all"
    dtype: str = "float32"
    device: str = "cpu"
    chunk: int | None = None

    def ids(self) -> Tensor:
        """Random token ids [batch, tokens], the same in every process."""
        generator = torch.Generator().manual_seed(1)
        size = (self.batch, self.tokens)
        vocabulary = MODELS[self.model].get("vocab_size", 50257)
        return torch.randint(vocabulary, size, generator=generator).to(self.device)

    def answers(self) -> tuple[Any, Any, Any]:
        """The answer, the incorrect answer, and ``pos``, as the attribution takes them."""
        if self.pos == "next":
            # After the last one comes the first again: the cost is the same as of any token.
            return self.ids().roll(-1, dims=1), None, None
        return ANSWER, INCORRECT, -1 if self.pos == "last" else None

    def named(self, length: bool = True) -> str:
        """Describe the setting for progress and titles; for a whole curve without the length."""
        words = {
            "last": "last position",
            "all": "all positions",
            "next": "next token at each position",
        }
        tokens = f", {self.tokens:,} tokens" if length else ""
        rows = f" x {self.batch}" if self.batch > 1 else ""
        where = "" if self.device == "cpu" else f" on {self.device}"
        pieces = f", chunks of {self.chunk:,}" if self.chunk else ""
        return (
            f"{self.model} {self.dtype}{where}{tokens}{rows}{pieces}, {self.unit}, "
            f"{words[self.pos]}"
        )


def longest_prompt(name: str) -> int:
    """The longest prompt of a named model: GPT-2's table of positions ends."""
    config = MODELS[name]
    return int(config.get("n_positions", config.get("max_position_embeddings", 1024)))


def make_model(name: str, dtype: str = "float32", device: str = "cpu") -> Any:
    """A model of a named size with random weights, in evaluation mode, made on its device.

    Biases and norms are not left at their zeros and ones, which would hide a wrong formula.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = AutoConfig.for_model(**MODELS[name])
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    model.config.architectures = [type(model).__name__]  # TransformerLens reads it
    return model.eval()
