"""The contractions: from what a hook sees to scalars, in place, a tile of positions at a time.

Letters in names give the axes:

    B batch, S column of the prompt, N selected site (a row and column), T tile of sites,
    M d_model, H head, D d_head, I = H * D, K distinct target (an answer, or answer - incorrect).

Nothing of size N x M is built beyond one tile, whatever the dtype of the activations and however
many targets there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from einops import einsum, rearrange
from torch import Tensor

from dla_hooks.sites import Sites

_TILE_ELEMENTS = 2**18
"""Entries of an activation held at once in the accumulation dtype (1 MiB in float32)."""


def project(x: Tensor, sites: Sites, d_KM: Tensor, out_N: Tensor) -> None:
    """out[n] = x[site n] . d[target of n].

    Args:
        x: activations as the hook sees them; see :meth:`Sites.take`.
        sites: where to read, and which target each site has.
        d_KM: directions [n_targets, d_model], in the accumulation dtype.
        out_N: one scalar per site, written in place.
    """
    d_KM = d_KM.to(x.device)
    for tile, x_TM in _tiles(x, sites, d_KM):
        if len(d_KM) == 1:
            out_N[tile] = einsum(x_TM, d_KM[0], "t m, m -> t")
        else:
            d_TM = d_KM[sites.target_on(x.device)[tile]]
            out_N[tile] = einsum(x_TM, d_TM, "t m, t m -> t")


def project_heads(
    z: Tensor,
    sites: Sites,
    d_KM: Tensor,
    fold: Callable[[Tensor], Tensor],
    out_HN: Tensor,
    constant_I: Tensor | None = None,
) -> None:
    """out[h, n] = (z_h[site n] - constant_h) . u_h[target of n], with u = ``fold(d)``.

    The direction is folded through the output projection first (u_h = W_O[h] d), so that no
    head's write to the stream is ever built.

    Args:
        z: the output projection's input [batch, pos, head * d_head].
        sites: where to read, and which target each site has.
        d_KM: directions at the projection's output.
        fold: pulls directions [n, d_model] back through the projection, to [n, head * d_head].
        out_HN: one scalar per head and site, written in place.
        constant_I: what to take off every z first [head * d_head].
    """
    n_heads = len(out_HN)
    d_KM = d_KM.to(z.device)
    shared = len(d_KM) <= max(1, len(sites) // 2)  # otherwise most sites have a target of their own
    if shared:
        u_KHD = rearrange(fold(d_KM), "k (h d) -> k h d", h=n_heads)
    for tile, z_TI in _tiles(z, sites, d_KM):
        if constant_I is not None:
            z_TI = z_TI - constant_I
        z_THD = rearrange(z_TI, "t (h d) -> t h d", h=n_heads)
        if len(d_KM) == 1:
            out_HN[:, tile] = einsum(z_THD, u_KHD[0], "t h d, h d -> h t")
            continue
        target_T = sites.target_on(z.device)[tile]
        if shared:
            u_THD = u_KHD[target_T]
        else:
            u_THD = rearrange(fold(d_KM[target_T]), "t (h d) -> t h d", h=n_heads)
        out_HN[:, tile] = einsum(z_THD, u_THD, "t h d, t h d -> h t")


def over_tiles(
    x: Tensor, y: Tensor, sites: Sites, like: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Pairs of tiles of two activations of the same shape, in the dtype of ``like``."""
    for (tile, x_TM), (_, y_TM) in zip(_tiles(x, sites, like), _tiles(y, sites, like), strict=True):
        yield tile, x_TM, y_TM


def _tiles(x: Tensor, sites: Sites, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    size = max(1, _TILE_ELEMENTS // x.shape[-1])
    for start in range(0, len(sites), size):
        tile = slice(start, min(start + size, len(sites)))
        yield tile, sites.take(x, tile).to(like.dtype)
