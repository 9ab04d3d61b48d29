"""The logits that the last stream should give, held against the model's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dla_hooks.errors import NonFiniteError
from dla_hooks.measure.one_prompt import columns_to_check
from dla_hooks.modules.autocast import outside_autocast
from dla_hooks.stacks.checks import failure
from dla_hooks.stacks.kept import Kept
from dla_hooks.targets.spread import spread_of
from dla_hooks.targets.token_sets import TokenSets
from dla_hooks.targets.tokens import read_out
from dla_hooks.tolerance import tolerance

_MOST_TOKENS = 64


class OwnLogits:
    """Some tokens' logits at a few of the selected positions, both ours and the model's.

    Args:
        kept: the plan of what to keep; the last stream is added to it.
        scale: the key of the final norm's scale.
        targets: the tokens.

    Attributes:
        columns: of the prompt, where the model's own logits are wanted; None where they are not.
    """

    columns: Tensor | None

    def __init__(self, kept: Kept, scale: Any, targets: TokenSets) -> None:
        self._kept, self._scale = kept, scale
        self._ids = targets.ids.unique()[:_MOST_TOKENS]
        self.columns = columns_of(kept)
        self._last = None if self.columns is None else kept.last_stream()

    @outside_autocast
    def hold(self, logits: Tensor) -> None:
        """Compare both, after the run.

        Args:
            logits: the model's [batch, n_columns, vocabulary].

        Raises:
            NonFiniteError: when a logit of the model is NaN or infinite.
            DecompositionError: when they differ by more than rounding.
        """
        if self.columns is None:
            return
        kept, stream = self._kept, self._kept.stream
        hit = kept.entries.cols[:, None] == self.columns[None, :]
        entries = hit.any(-1).nonzero()[:, 0]
        x, scale = (kept.flat(key) for key in (self._last, self._scale))
        x, scale = x[entries.to(x.device)], scale[entries.to(scale.device)]
        readout = read_out(stream, TokenSets.of(self._ids), center_unembed=False)
        own = x.to(readout.d_KM) @ readout.d_KM.T / scale.to(readout.d_KM) + readout.bias_K
        if stream.softcap is not None:
            own = stream.softcap * torch.tanh(own / stream.softcap)
        row = kept.entries.rows[entries].to(logits.device)
        rows = logits[row, hit[entries].long().argmax(-1).to(logits.device)]
        theirs = rows[:, self._ids.to(rows.device)].to(own)
        if not bool(torch.isfinite(theirs).all()):
            raise NonFiniteError("the model's own logit of a token is NaN or infinite")
        gap, spread = float((own - theirs).abs().max()), float(spread_of(rows[:, None]).mean())
        relative = tolerance(stream.coarsest_dtype, len(stream.writes))[1]
        # A logit itself is rounded to the model's dtype, and large ones coarsely.
        coarse = 2 * torch.finfo(stream.coarsest_dtype).eps * float(theirs.abs().max())
        if not gap <= relative * spread + coarse:
            raise failure(kept, "the last stream's logits", gap, spread, relative)


def columns_of(kept: Kept) -> Tensor | None:
    """The columns of the prompt where the model's own logits are wanted; None where they are not.

    A few of the selected ones; all of them where the caller may change what stands behind the
    last stream, at any position.
    """
    if not (kept.check and kept.live):
        return None
    if kept.changes_behind and len(kept.entries):
        every: Tensor = kept.entries.cols.unique()
        return every
    return columns_to_check(kept.entries, kept.inputs.source.prompt, kept.stream.vocabulary)
