"""Sources: the direct path of each head, or mixer, split over the tokens that it reads.

A head's z is a sum over the tokens that it reads, each with its attention weight and its value. So
is the head's part of the logit, with the attention pattern frozen. The weights of the selected
positions are computed from the queries and keys that the attention function gets.
"""

from __future__ import annotations

from collections.abc import Iterable

from dla_hooks.backends import Conventions
from dla_hooks.errors import InputError
from dla_hooks.inputs.options import some_layers, whole_number
from dla_hooks.modules.hooks import Place
from dla_hooks.residual.stream import Stream
from dla_hooks.results.rows import Words
from dla_hooks.units.base import Unit, UnitPlan
from dla_hooks.units.parts_plan import PartsPlan
from dla_hooks.units.source_layer import as_heads, hook_points
from dla_hooks.units.source_rows import SourcePlan


class SourceTokens(Unit):
    """``L3H5<7``: what head 5 of layer 3 took from the token at position 7.

    Positions are counted among the prompt's real tokens. At each position that is attributed, the
    ``top`` strongest rows are kept; ``rest`` is the sum of the others, and ``remainder`` what no
    head wrote. Beside each row stands its attention weight. The pattern is frozen: a row says what
    was read there, not why the head looked there. A token that a head does not read at all is no
    row. Value biases are part of what is read (``fold_value_biases`` does not apply).

    Mixers without attention (gated delta nets, Kimi's linear attention, Mamba, RWKV) have rows:
    ``L3<7`` is what layer 3's mixer took from position 7, ``L3.1<7`` where attention stands beside
    it in the layer, and ``L3H5<7`` where its heads are those of the unit ``head``. Gates, norms and
    all else that values are read by are frozen. A value is what the recurrence takes up: the short
    convolution that ends at that token, where there is one. The weight is what a value is
    multiplied by in the recurrence, the mean over channels; it may be negative. ``layers`` chooses
    mixers, and ``heads`` leaves them out.

    Left in the ``remainder`` are mixers whose recurrence is not known or not linear in its values
    (short convolutions, RecurrentGemma, xLSTM), those with hooks of the caller's inside, and all of
    them where a prompt runs in chunks or under autocast, or while a model generates. Models of
    transformers whose attention does not come by its registry of attention functions are refused.

    Args:
        heads: only these of attention: pairs (layer, head), or labels such as ``"L3H5"``. None is
            all.
        layers: only the heads and mixers of these layers, or of one. None is all.
        top: rows to keep at each position; None keeps all.
        sum: None; or "layer" for the sum over the heads of each layer, in rows ``L3<7``; or
            "heads" for the sum over all of them, in rows ``<7``. The weight beside such a row is
            the mean over its heads.

    Raises:
        InputError: for an option that cannot be used; for a layer or head that the model does not
            have, when the unit meets the model.

    >>> import dla_hooks
    >>> dla_hooks.SourceTokens(heads=["L0H1"], top=3)
    SourceTokens(heads=((0, 0, 1),), layers=None, top=3, sum=None)
    """

    words = Words(
        name="source",
        title="Sources",
        sentence="sources: what each attention head took from each token",
        index="head",
        remainder="remainder",
        remainder_is="what no head or mixer took from a token",
        sources=True,
        beside=("weight",),
    )
    by_column = True
    of_every_model = False
    kept_in = "attention adds up what a head reads before any module shows it; take out heads"

    def __init__(
        self,
        heads: Iterable[str | tuple[int, int]] | None = None,
        layers: int | Iterable[int] | None = None,
        top: int | None = 64,
        sum: str | None = None,
    ) -> None:
        self.heads = as_heads(heads)
        self.layers = None if layers is None else some_layers(layers)
        if sum not in (None, "layer", "heads"):
            raise InputError(f"sum must be None, 'layer' or 'heads'; got {sum!r}")
        self.top = None if top is None else whole_number(top, "top", least=1)
        self.sum = sum

    def places(self, stream: Stream) -> list[Place]:
        """Every z, the values and weights where the model shows them, and the post-norms."""
        sites = [write.heads for write in stream.writes if write.heads is not None]
        found = [
            place
            for site in sites
            for place in (*(hook_points(site) or ()), site.place, site.post_norm_place)
        ]
        return [*(place for place in found if place is not None), stream.last]

    def prepare(self, parts: PartsPlan, conventions: Conventions) -> UnitPlan:
        """Fold the directions through every output projection, and measure what stands before it.

        Raises:
            InputError: for a layer or head that is not there.
            UnsupportedModelError: where the tokens that heads read cannot be told apart.
        """
        return SourcePlan(self, parts, self.heads, self.layers, self.top, self.sum)
