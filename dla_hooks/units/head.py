"""Heads: each attention head's own direct path to the logit.

A head's write is z_h W_O[h]. It is never built: the direction is folded through W_O first, and
through the post-norm where the sublayer has one, with that norm's scale frozen at its actual
value. What no head wrote (embeddings, MLPs, output biases) is the ``remainder``.
"""

from __future__ import annotations

from typing import Any

from dla_hooks.backends import Conventions
from dla_hooks.errors import InputError
from dla_hooks.modules.hooks import Place
from dla_hooks.residual import architecture
from dla_hooks.residual.stream import Stream
from dla_hooks.results.rows import Words
from dla_hooks.units.base import Unit, UnitPlan
from dla_hooks.units.head_rows import HeadsPlan
from dla_hooks.units.parts_plan import PartsPlan


class Heads(Unit):
    """``L0H0``, ``L0H1``, …, ``remainder``: every attention head, and what no head wrote.

    Called with a projection, ``Heads("self_attn.o_proj", …)`` is the declaration of where an
    architecture keeps its heads (:class:`dla_hooks.Write` takes it).

    Args:
        fold_value_biases: move each head's constant part (its value bias) to the remainder, as
            TransformerLens does by default. None leaves it to the call, or to how the model was
            wrapped.

    >>> import dla_hooks
    >>> model, tokenizer = dla_hooks.demo.load()
    >>> result = dla_hooks.direct_logit_attribution(
    ...     model, "The keys near the cabinet", " are", unit=dla_hooks.Heads(),
    ...     tokenizer=tokenizer)
    >>> result.labels[0], result.labels[-1]
    ('L0H0', 'remainder')
    """

    words = Words(
        name="head",
        title="Heads",
        sentence="heads: what each attention head wrote",
        index="head",
        chart="heatmap",
        remainder="remainder",
        remainder_is="what no head wrote",
    )
    reads_parts = False
    by_column = True

    taken_out = ("head",)

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A unit; or, with a projection, the declaration of the same name."""
        if args or "proj" in kwargs:
            return architecture.Heads(*args, **kwargs)
        return super().__new__(cls)

    def __init__(self, *, fold_value_biases: bool | None = None) -> None:
        if fold_value_biases not in (True, False, None):
            raise InputError(
                "fold_value_biases must be True, False, or None for the call's own; "
                f"got {fold_value_biases!r}"
            )
        self.fold_value_biases = fold_value_biases

    @classmethod
    def of_layer(cls, layer: int) -> Heads:
        """All heads, with their value biases."""
        found: Heads = cls(fold_value_biases=False)
        return found

    def places(self, stream: Stream) -> list[Place]:
        """Every z, the post-norms behind them, and the last stream."""
        sites = [write.heads for write in stream.writes if write.heads is not None]
        found = [place for site in sites for place in (site.place, site.post_norm_place)]
        return [*(place for place in found if place is not None), stream.last]

    def prepare(self, parts: PartsPlan, conventions: Conventions) -> UnitPlan:
        """Fold the directions through every output projection.

        Raises:
            UnsupportedModelError: for a model without such heads, or whose projections cannot be
                read through.
        """
        fold = self.fold_value_biases
        if fold is None:
            fold = conventions.fold_value_biases
        return HeadsPlan(self, parts, fold)
