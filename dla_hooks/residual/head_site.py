"""Where the heads of one write are read."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from dla_hooks.modules.hooks import ONLY_USE, Call, Place, Use


@dataclass(frozen=True)
class HeadSite:
    """The place where the heads of one write can be read, side by side.

    Attributes:
        proj: the module whose input is z: [batch, pos, n_heads * d_head], or with an axis for
            the heads.
        name: its path.
        linear: the map from z to the stream; mostly ``proj`` itself.
        attention: the module that holds the projection and reads the (normed) stream.
        n_heads: number of heads, as declared until it is measured; 0 where nothing says it.
        d_head: width of one head; 0 where it is not known before it is measured.
        post_norm: the norm between the projection and the stream, if any.
        post_norm_name: its path.
        use: the run of both modules, where blocks share them.
        cross: whether they read what an encoder put out.
    """

    proj: nn.Module
    name: str
    linear: nn.Module
    attention: nn.Module
    n_heads: int
    d_head: int
    post_norm: nn.Module | None = None
    post_norm_name: str = ""
    use: Use = ONLY_USE
    cross: bool = False

    @property
    def letter(self) -> str:
        """The letter of its heads' labels: ``L3H0``, or ``L3X0`` where they read an encoder."""
        return "X" if self.cross else "H"

    @property
    def kind(self) -> str:
        """The kind of its heads' rows."""
        return "cross_head" if self.cross else "head"

    @property
    def place(self) -> Place:
        """The place of z: the projection's input, or a hook point's output."""
        return Place(self.proj, self.name, self.use)

    @property
    def post_norm_place(self) -> Place | None:
        """The norm between the projection and the stream."""
        if self.post_norm is None:
            return None
        return Place(self.post_norm, self.post_norm_name, self.use)

    def z(self, call: Call) -> Tensor:
        """Read z from a call of ``proj``; at a hook point, after its hooks."""
        return self.flat(call.entered if self.linear is self.proj else call.left)

    def flat(self, z: Tensor) -> Tensor:
        """z with its heads side by side [..., n_heads * d_head]."""
        side_by_side = z.ndim < 4 or z.shape[-1] == self.n_heads * self.d_head
        return z if side_by_side else z.flatten(-2)
