"""The heads of one layer, with the directions that they are projected on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, lru_cache

from torch import Tensor, nn

from dla_hooks.calibration.norm_constants import norm_at
from dla_hooks.modules import norms
from dla_hooks.modules.hooks import Place, others_in
from dla_hooks.modules.linear import bias_of, check_readable, pull_back
from dla_hooks.modules.signature import has_own_forward
from dla_hooks.modules.user_hooks import is_hooked, is_wrapper
from dla_hooks.modules.weights import in_memory
from dla_hooks.projection.directions import Directions
from dla_hooks.residual.inside_attention import Inside, written_inside
from dla_hooks.residual.stream import WriteSite
from dla_hooks.results.rows import Row
from dla_hooks.units.parts_plan import PartsPlan


class HeadLayer:
    """The heads of one layer, with the directions that they are projected on.

    Args:
        parts: the parts of the stream.
        write: what the layer's attention writes.
        constant_I: what to take off every z [head * d_head], or None.
        rows: its heads' rows among the unit's.
        exact: whether what it writes is the sum of its heads and biases to the last digits.

    Attributes:
        is_whole: whether it is, with no norm behind them.
    """

    def __init__(
        self,
        parts: PartsPlan,
        write: WriteSite,
        constant_I: Tensor | None,
        rows: slice,
        exact: bool = False,
    ) -> None:
        assert write.heads is not None
        self._stream = stream = parts.stream
        self._write = write
        self.label, self.site, self.rows = write.label, write.heads, rows
        self.n_heads = write.heads.n_heads
        self.module = Place(write.module, write.name, write.use)
        self._wrapped = is_wrapper(write.module, stream.backend.root)
        self.constant_I = constant_I
        self.in_stream = self.at_output = parts.directions(write.label)
        self.post_norm: norms.Norm | None = None
        self.beta_M: Tensor | None = None
        place = self.site.post_norm_place
        self.is_whole = exact and place is None
        if place is not None:
            self.post_norm = norm = norm_at(stream, place)
            self.beta_M = norm.beta if bool(norm.beta.any()) else None
            self.at_output = self.in_stream.then(norm.pull_back)
        linear = self.site.linear
        check_readable(linear, self.site.name)
        self.bias_M = bias_of(linear)
        self.folded = self.at_output.then(lambda d_KM: pull_back(linear, d_KM))
        if in_memory(linear):
            # Fold before the run: between the model's own matrix products this is several times
            # slower (cold caches). An offloaded weight is at hand when the model has just read it.
            self.folded.prepare()

    @property
    def hook_name(self) -> str:
        """The end of the label of what hooks write behind its heads: ``L3hook``, ``L3Xhook``."""
        return "Xhook" if self.site.cross else "hook"

    @cached_property
    def _on_the_way(self) -> tuple[nn.Module, ...]:
        """Every module between z and the stream, and what else is in the attention."""
        ends = self.site.place, self.site.post_norm_place
        outside = [place.module for place in ends if place is not None]
        return (*self.module.module.modules(), self.site.proj, *outside)

    def is_untouched(self) -> bool:
        """Whether nobody has put anything in, on or around its attention."""
        return not self._wrapped and not any(
            others_in(one._forward_hooks)
            or others_in(one._forward_pre_hooks)
            or not has_own_forward(one)
            for one in self._on_the_way
        )

    def written_on_the_way(self) -> list[tuple[Inside, Directions]]:
        """Where the caller's hooks may write between z and the stream, and in what directions."""
        site, places = self.site, list[Place]()
        if site.linear is site.proj:
            places.append(site.place)
        if self.module.module is not site.proj:
            places.append(self.module)
        found = [(Inside(place), self.at_output) for place in places if is_hooked(place)]
        found += [(one, self.at_output) for one in written_inside(self._stream, self._write)]
        if site.post_norm_place is not None and is_hooked(site.post_norm_place):
            found.append((Inside(site.post_norm_place), self.in_stream))
        return found


def with_heads(writes: Iterable[WriteSite]) -> Iterator[tuple[int, WriteSite]]:
    """The writes of one block that have heads, each with its number among those of its kind."""
    count = Counter[bool]()
    for write in writes:
        if write.heads is not None:
            yield count[write.heads.cross], write
            count[write.heads.cross] += 1


def rows_of(write: WriteSite, sub: int) -> Sequence[Row]:
    """The heads of one attention: L0H0, L0H1, …; those that read an encoder are L0X0, L0X1, ….

    Args:
        write: what the attention writes.
        sub: which of several of its kind in the block; those of a second one are L0.1H0, ….
    """
    assert write.heads is not None
    return _rows(write.layer, sub, write.heads.letter, write.heads.kind, write.heads.n_heads)


@lru_cache(maxsize=1024)
def _rows(layer: int, sub: int, letter: str, kind: str, n: int) -> Sequence[Row]:
    start = f"L{layer}.{sub}" if sub else f"L{layer}"
    return tuple(Row(f"{start}{letter}{h}", kind, layer, sub, h) for h in range(n))
