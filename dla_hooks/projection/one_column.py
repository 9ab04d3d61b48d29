"""The commonest contractions, for hooks to call at once: one column of every row, one target.

They give what :mod:`dla_hooks.projection.kernels` gives, in a few lines. Between a model's own
matrix products nothing of ours is left in the processor's caches, and each line and each function
costs several times what it costs elsewhere. An activation of another shape, dtype or device than
expected is left to the kernels. Each function looks for itself whether it is one: a call more in
every hook would cost more than these lines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dla_hooks.modules.norms import Norm, frozen_scale
from dla_hooks.projection.directions import Directions
from dla_hooks.projection.ledger import FixedRows
from dla_hooks.projection.tiles import View

AtOnce = Callable[[Any, Any], bool]
"""Reads what entered or left a module; False where that is not as expected, and nothing is read."""


def both(first: AtOnce | None, second: AtOnce | None) -> AtOnce | None:
    """Reads the same call twice; None where either is."""
    if first is None or second is None:
        return None
    return lambda into, out_of: first(into, out_of) and second(into, out_of)


class _Expected(NamedTuple):
    """What is read at one place, and what it is projected on.

    Attributes:
        d: the direction of the only target.
        shape: of the activation.
        dtype: of both.
        device: of both.
    """

    d: Tensor
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class OneColumn:
    """One column of every row of the batch, which all entries of a call are in.

    Args:
        column: its number.
        rows_columns: how many rows and columns activations have.
    """

    def __init__(self, column: int, rows_columns: tuple[int, int]) -> None:
        self._column, self._rows_columns = column, rows_columns
        self._known: dict[tuple[Directions, int], _Expected | None] = {}

    @classmethod
    def of(cls, view: View) -> OneColumn | None:
        """That column; None where entries are in several, or only some of them are in view."""
        if view.column is None or len(view) != len(view.entries):
            return None
        if view.one_column is None:
            view.one_column = cls(view.column, (view.n_prompts, len(view.columns)))
        found: OneColumn = view.one_column
        return found

    def project(
        self, directions: Directions, rows: FixedRows, number: int, *, entered: bool
    ) -> AtOnce | None:
        """:func:`dla_hooks.projection.kernels.project`.

        Args:
            directions: one per target.
            rows: a ledger.
            number: the row in it that is written.
            entered: whether what entered the module is projected; otherwise what left it.

        Returns:
            None where there are several targets, or the direction has not been made yet.
        """
        expected = self._expected(directions)
        if expected is None:
            return None
        d_M, shape, dtype, device = expected
        column, mv, out_N = self._column, torch.mv, rows.row(number, device)

        def look(into: Any, out_of: Any) -> bool:
            x = into if entered else out_of
            if type(x) is not Tensor or x.shape != shape:
                return False
            if x.dtype is not dtype or x.device != device:
                return False
            mv(x.select(1, column), d_M, out=out_N)  # with `out`, autocast leaves it alone
            return True

        return look

    def project_heads(
        self, folded: Directions, rows: FixedRows, numbers: slice, *, entered: bool
    ) -> AtOnce | None:
        """:func:`dla_hooks.projection.kernels.project_heads`.

        Args:
            folded: the directions pulled back through the output projection.
            rows: a ledger.
            numbers: the heads' rows in it, which are written.
            entered: as above.

        Returns:
            None as above.
        """
        n_heads = numbers.stop - numbers.start
        expected = self._expected(folded, n_heads)
        if expected is None:
            return None
        u_HDK, shape, dtype, device = expected
        column, cut, bmm = self._column, (shape[0], n_heads, -1), torch.bmm
        out_HN1 = rows.columns(device).narrow(0, numbers.start, n_heads)

        def look(into: Any, out_of: Any) -> bool:
            z = into if entered else out_of
            if type(z) is not Tensor or z.shape != shape:
                return False
            if z.dtype is not dtype or z.device != device:
                return False
            bmm(z.select(1, column).view(cut).transpose(0, 1), u_HDK, out=out_HN1)
            return True

        return look

    def scale(
        self, norm: Norm, directions: Directions, rows: FixedRows, misfits: list[Tensor]
    ) -> AtOnce | None:
        """:func:`dla_hooks.projection.kernels.frozen_scales`.

        Args:
            norm: its constants.
            directions: what its input is projected on.
            rows: a ledger, whose first row is written.
            misfits: the part of its output that the norm's form leaves unexplained is put here.

        Returns:
            None as above.
        """
        expected = self._expected(directions)
        if expected is None:
            return None
        _, shape, dtype, device = expected
        column, out_N = self._column, rows.row(0, device)

        def look(x: Any, y: Any) -> bool:
            for one in (x, y):
                if type(one) is not Tensor or one.shape != shape:
                    return False
                if one.dtype is not dtype or one.device != device:
                    return False
            scale_N, misfit = frozen_scale(norm, x.select(1, column), y.select(1, column))
            out_N.copy_(scale_N)
            misfits.append(misfit)
            return True

        return look

    def _expected(self, directions: Directions, n_heads: int = 0) -> _Expected | None:
        key = directions, n_heads
        if key not in self._known:
            d_M = directions.only_at_home()
            found: _Expected | None = None
            if d_M is not None:
                shape = torch.Size((*self._rows_columns, len(d_M)))
                d = d_M.view(n_heads, -1, 1) if n_heads else d_M
                found = _Expected(d, shape, d.dtype, d.device)
            self._known[key] = found
        return self._known[key]
