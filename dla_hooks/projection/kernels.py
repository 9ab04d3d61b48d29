"""The contractions: from an activation to scalars, in place, a tile of positions at a time.

Letters in names give the axes:

    B batch, S column of the prompt, N selected entry (a row and column), T tile of entries,
    M d_model, H head, D d_head, I = H * D, K distinct target (an answer, or answer - incorrect),
    C row of scalars.

Nothing of size N x M is built beyond one tile, whatever the dtype of the activations and however
many targets there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from einops import reduce
from torch import Tensor

from dla_hooks.modules.norms import Norm, frozen_scale
from dla_hooks.projection.directions import Directions
from dla_hooks.projection.ledger import TopRows
from dla_hooks.projection.tiles import Tile, View

_ROOM = 4
"""Of a norm's scale: so many tensors like a tile are there at once."""


def project(x: Tensor, view: View, directions: Directions, out_N: Tensor) -> None:
    """out[n] = x[entry n] . d[target of n].

    Args:
        x: activations as the hook sees them; see :meth:`View.take`.
        view: where to read, and which target each entry has.
        directions: one per target [d_model].
        out_N: one scalar per entry, written in place.
    """
    d_M = directions.only(x.device)
    for x_TM, tile in tiles(x, view, directions.dtype):
        if d_M is None:
            d_KM = tile.spread(directions.at(tile, x.device))
            out_N[tile.index] = torch.linalg.vecdot(x_TM, d_KM)
        elif tile.is_all:  # at once to where it belongs
            torch.mv(x_TM, d_M, out=out_N)
        else:
            out_N[tile.index] = torch.mv(x_TM, d_M)


def project_squares(x: Tensor, view: View, directions: Directions, out_N: Tensor) -> None:
    """out[n] = the sum of (x[entry n] * d[target of n])^2 over channels; see :func:`project`."""
    for x_TM, tile in tiles(x, view, directions.dtype):
        d_KM = tile.spread(directions.at(tile, x.device))
        out_N[tile.index] = (x_TM * d_KM).square_().sum(-1)


def project_heads(
    z: Tensor,
    view: View,
    folded: Directions,
    out_HN: Tensor,
    constant_I: Tensor | None = None,
    of_constant_N: Tensor | None = None,
) -> None:
    """out[h, n] = (z_h[entry n] - constant_h) . u_h[target of n].

    Args:
        z: the output projection's input [batch, pos, head * d_head].
        view: where to read, and which target each entry has.
        folded: u, the directions pulled back through the output projection [head * d_head]
            (u_h = W_O[h] d), so that no head's write to the stream is ever built.
        out_HN: one scalar per head and entry, written in place.
        constant_I: a vector subtracted from every z first [head * d_head].
        of_constant_N: the subtracted part of all heads together, added to in place.
    """
    n_heads = len(out_HN)
    u_HDK = folded.only_by_head(n_heads, z.device)
    for z_TI, tile in tiles(z, view, folded.dtype):
        if constant_I is not None and of_constant_N is not None:
            z_TI = z_TI - constant_I
            of_constant_N[tile.index] += tile.spread(folded.at(tile, z.device) @ constant_I)
        if u_HDK is None:
            products_TI = z_TI * tile.spread(folded.at(tile, z.device))
            out_HN[:, tile.index] = reduce(products_TI, "t (h d) -> h t", "sum", h=n_heads)
            continue
        z_HTD = z_TI.view(tile.size, n_heads, -1).transpose(0, 1)
        if tile.is_all:  # at once to where it belongs
            torch.bmm(z_HTD, u_HDK, out=out_HN.unsqueeze(-1))
        else:
            out_HN[:, tile.index] = torch.bmm(z_HTD, u_HDK)[..., 0]


def project_neurons(
    read: Callable[[slice | None], Tensor],
    view: View,
    folded: Directions,
    ledger: TopRows,
    rows: range,
    out_N: Tensor,
    scale_N: Tensor | None = None,
) -> None:
    """Rank a_i[entry n] * u_i[target of n] / scale[n] for every neuron i.

    Args:
        read: the activations that enter the last map, at some of the entries in view [n, d_mlp].
        view: which target each entry has.
        folded: u, the directions pulled back through that map.
        ledger: takes the values.
        rows: the numbers of these neurons in the ledger.
        out_N: their sum at each entry, written in place.
        scale_N: of the norm behind the map.
    """
    width, device = len(rows), out_N.device
    for tile in view.tiles(width, device):
        u_KI = tile.spread(folded.at(tile, device))
        values_TI = read(tile.place).to(folded.dtype) * u_KI
        if scale_N is not None:
            values_TI /= scale_N[tile.index, None]
        out_N[tile.index] = ledger.add(values_TI.T, rows, tile)


def frozen_scales(norm: Norm, x: Tensor, y: Tensor, view: View, out_N: Tensor) -> list[Tensor]:
    """Compute the scale that a norm divided by at each entry; see :func:`frozen_scale`.

    Args:
        norm: its constants.
        x: the norm's input, as the hook sees it.
        y: the norm's output.
        view: where to read.
        out_N: one scale per entry, written in place.

    Returns:
        The part of the output that the norm's form leaves unexplained, for each tile.
    """
    misfits = []
    pairs = zip(*(tiles(each, view, out_N.dtype, _ROOM) for each in (x, y)), strict=True)
    for (x_TM, tile), (y_TM, _) in pairs:
        out_N[tile.index], misfit = frozen_scale(norm, x_TM, y_TM)
        misfits.append(misfit)
    return misfits


def tiles(
    x: Tensor, view: View, dtype: torch.dtype, room: int = 1
) -> Iterator[tuple[Tensor, Tile]]:
    """Yield an activation at the entries in view by tiles [T, d], in the accumulation dtype.

    Args:
        x: the activation, as the hook sees it.
        view: where to read.
        dtype: of what is yielded.
        room: how many times smaller tiles are to be: what is made of them takes so much more.
    """
    for tile in view.tiles(room * x.shape[-1], x.device):
        x_TM = view.take(x, tile.place)
        yield (x_TM if x_TM.dtype == dtype else x_TM.to(dtype)), tile
