"""The final norm: how parts of the last stream stand behind it."""

from __future__ import annotations

import torch
from torch import Tensor

from dla_hooks.modules.linear import matrix
from dla_hooks.modules.user_hooks import is_hooked
from dla_hooks.stacks.kept import Kept


class FinalNorm:
    """The last stream through the final norm, and what the caller's hooks write behind it."""

    def __init__(self, kept: Kept) -> None:
        place = kept.stream.final_norm
        self._kept, self._last = kept, kept.last_stream()
        self._scale = kept.scale(place.ahead)
        self._behind = kept.hook(place) if is_hooked(place) else None

    @property
    def is_hooked(self) -> bool:
        """Whether hooks of the caller's write to the norm's output."""
        return self._behind is not None

    @property
    def beta(self) -> Tensor:
        """The norm's bias [d_model]."""
        return self._kept.norm(self._scale).beta

    def read(self, x: Tensor, place: slice) -> Tensor:
        """Parts of the stream [..., entries, d_model], as they stand behind the norm."""
        scale_N = self._kept.flat(self._scale)[place].to(x)
        read: Tensor = self._kept.norm(self._scale).at_scale_one(x) / scale_N
        return read

    def size(self, x: Tensor) -> Tensor:
        """The size [...] of parts of the stream [..., d_model] as the unembedding reads them.

        It is the size at a scale of one: the scale is the same for all parts of an entry.
        """
        read = self._kept.norm(self._scale).at_scale_one(x)
        for module in self._kept.stream.after_norm:
            read = read.to(matrix(module).device) @ matrix(module).T.to(read)
        size: Tensor = torch.linalg.vector_norm(read, dim=-1)
        return size

    def behind(self, place: slice, like: Tensor) -> Tensor:
        """What hooks write behind the norm [entries, d_model]."""
        return self._kept.flat(self._behind)[place].to(like)

    def whole(self, place: slice) -> Tensor:
        """The last stream, read, with what hooks write behind it [entries, d_model]."""
        x = self._kept.flat(self._last)[place].to(self._kept.stream.work_dtype)
        read = self.read(x, place)
        return read + self.behind(place, read) if self.is_hooked else read
