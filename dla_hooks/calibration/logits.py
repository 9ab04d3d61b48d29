"""What the logits of a synthetic run tell: which tokens count, and how they were rounded."""

from __future__ import annotations

import torch
from torch import Tensor


def finest_that_holds(logits: Tensor) -> list[torch.dtype]:
    """A 16-bit dtype that holds all logits: they were made in it, and handed on in another."""
    finite = logits[torch.isfinite(logits)]
    halves = torch.bfloat16, torch.float16
    return [half for half in halves if torch.equal(finite.to(half).to(finite), finite)][:1]


def that_move(logits: Tensor) -> Tensor:
    """The tokens whose logits follow what enters the unembedding [vocabulary].

    Others are masked by the model itself, with -inf, with a large finite number, or with a bias of
    that size. Zero rows of the unembedding do not move either.

    Args:
        logits: of rows with nothing, some noise, and a thousand times as much [rows, vocabulary].
    """
    nothing, noise, _, most = logits[:4]
    ordinary: Tensor = torch.isfinite(logits[:2]).all(0)
    finite = ordinary & torch.isfinite(logits[2:4]).all(0)
    if not bool(finite.any()):  # the large rows overflow in 16 bits
        ordinary &= (noise - nothing).abs() > 1e-3 * nothing.abs()
        return ordinary
    moves: Tensor = finite & ((most - nothing).abs() > 1e-3 * nothing.abs())
    # Rows of a large bias: noise of an ordinary size is nothing beside it.
    apart = (nothing - nothing[finite].median()).abs()
    ordinary = moves & ((noise - nothing).abs() > 1e-3 * apart)
    return ordinary if bool(ordinary.any()) else moves


def masked_tokens(logits: Tensor) -> Tensor | None:
    """The tokens that the model itself masks with -inf, whatever it reads [n]; None for none.

    Args:
        logits: [rows, vocabulary].
    """
    masked = (logits == -torch.inf).all(0)
    return masked.nonzero()[:, 0] if bool(masked.any()) else None
