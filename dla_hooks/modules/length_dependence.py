"""Modules that compute otherwise for a long prompt than for a short one, whatever stands in it.

Two kinds are known. Some rotary positions change their frequencies for all tokens, once a prompt is
longer than the model was first trained for. Some sparse attention picks the best few tokens by an
index, and ties fall by where they stand. A row beside a longer one then has other logits than
alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

_LONGROPE = "longrope"
_PICKED = ("index_topk", "topk_blocks", "index_topk_blocks", "block_topk")
_IN_BLOCKS_OF = ("block_size", "compress_ratio")


@dataclass(frozen=True)
class Limits:
    """The lengths from which on a model computes otherwise.

    Attributes:
        rotary: each kind of rotary positions that depends on length, with its limit.
        picked: how many tokens sparse attention picks at least, or None.
    """

    rotary: tuple[tuple[str, int], ...]
    picked: int | None

    @classmethod
    def of(cls, model: nn.Module) -> Limits:
        """Those of a model."""
        return cls(tuple(dict.fromkeys(_rotary(model))), min(_picked(model), default=None))

    @property
    def longest_padded(self) -> int | None:
        """The longest prompt that runs with shorter ones beside it as alone; None for any."""
        limits = [limit for _, limit in self.rotary]
        return min(limits if self.picked is None else [*limits, self.picked], default=None)

    @property
    def grows(self) -> bool:
        """Whether a prompt leaves its length behind for shorter ones that run after it."""
        return any(kind != _LONGROPE for kind, _ in self.rotary)

    def rotary_beyond(self, width: int) -> str | None:
        """The kind of rotary positions that a prompt of this width would change, or None."""
        return next((kind for kind, limit in self.rotary if width > limit), None)

    def why_no_padding(self, width: int, shortest: int) -> str | None:
        """The reason why a row beside longer ones would have other logits than alone, or None.

        Args:
            width: columns of the batch.
            shortest: real tokens of its shortest row.
        """
        if shortest == width:
            return None
        for kind, limit in self.rotary:
            if width > limit and (kind != _LONGROPE or shortest <= limit):
                return (
                    f"its rotary positions ({kind}) depend on how long a prompt is, beyond {limit} "
                    "tokens"
                )
        if self.picked is not None and width > self.picked:
            return f"its attention picks {self.picked} tokens, and ties fall by where they stand"
        return None


def _rotary(model: nn.Module) -> Iterator[tuple[str, int]]:
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        config = getattr(module, "config", None)
        # The second is its name in transformers 4.
        settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
        named = kinds if isinstance(kinds, dict) else {None: kinds}
        for layer_type, kind in named.items():
            if not isinstance(kind, str) or not ("dynamic" in kind or kind == _LONGROPE):
                continue
            own = (settings if layer_type is None else (settings or {}).get(layer_type)) or {}
            limit: Any = (
                own.get("original_max_position_embeddings")
                or getattr(config, "original_max_position_embeddings", None)
                or getattr(module, "original_max_seq_len", 0)
            )
            yield kind, limit


def _picked(model: nn.Module) -> Iterator[int]:
    """How many tokens each module picks that picks some by an index."""
    for module in model.modules():
        for name in _PICKED:
            number = vars(module).get(name)
            if isinstance(number, int) and number > 0:
                sizes = [vars(module).get(size) for size in _IN_BLOCKS_OF if "block" in name]
                yield number * next((size for size in sizes if isinstance(size, int)), 1)
