"""What the caller's hooks on the unembedding add to logits.

The model makes logits at a few columns only. With such hooks it must make them at all, since a hook
may name a position; of each look one number per entry and readout is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dla_hooks.errors import UnsupportedModelError
from dla_hooks.inputs.entries import Entries
from dla_hooks.modules.hooks import Call, Place, Tap
from dla_hooks.modules.user_hooks import has_callers, hooked_modules, silenced
from dla_hooks.modules.vjp import dtype_of
from dla_hooks.projection.ledger import FixedRows
from dla_hooks.projection.readout import Readout
from dla_hooks.projection.tiles import View

_AT_ONCE = 64
"""Entries whose logits are gathered at once."""


def hooks_logits(unembed: nn.Module) -> bool:
    """Tell whether the caller's hooks are on the unembedding."""
    return has_callers(unembed._forward_hooks) or has_callers(unembed._forward_pre_hooks)


class LogitHooks:
    """Records what hooks add to each readout at the unembedding.

    Args:
        unembed: the unembedding.
        readouts: the readings.
        entries: what is read.
        dtype: of the numbers.
    """

    def __init__(
        self, unembed: nn.Module, readouts: Sequence[Readout], entries: Entries, dtype: torch.dtype
    ) -> None:
        self._unembed, self._readouts, self._entries = unembed, readouts, entries
        n = len(readouts)
        # Of each readout without any hook, and then with all of them.
        self._rows = FixedRows(2 * n, len(entries), dtype)

    def taps(self, view: View) -> list[Tap]:
        """A look ahead of all hooks at the input, and one behind all at the output."""
        inputs = Place(self._unembed, "the unembedding", before=True)
        n = len(self._readouts)

        def see_input(call: Call) -> None:
            x = call.entered.to(dtype_of(self._unembed))  # a hook may be what casts it
            with silenced(hooked_modules(self._unembed.modules())), torch.no_grad():
                logits = self._unembed.forward(x)
            self._write(logits, view, slice(0, n))

        def see_output(call: Call) -> None:
            self._write(call.left, view, slice(n, 2 * n))

        return [Tap(inputs.ahead, see_input), Tap(inputs._replace(before=False), see_output)]

    def finish(self, device: torch.device) -> Tensor:
        """What hooks add [readouts, N]."""
        rows, n = self._rows.gathered(device), len(self._readouts)
        scales = rows.new_tensor([readout.scale() for readout in self._readouts])
        return (rows[n:] - rows[:n]) * scales[:, None]

    def _write(self, logits_BSV: Tensor, view: View, place: slice) -> None:
        out_RN = self._rows.on(logits_BSV.device)[place]
        pick_logits(logits_BSV, view, self._entries, self._readouts, out_RN, "the unembedding")


def pick_logits(
    logits_BSV: Tensor,
    view: View,
    entries: Entries,
    readouts: Sequence[Readout],
    out_RN: Tensor,
    where: str,
) -> None:
    """Read each readout out of logits, at the entries in view.

    Args:
        logits_BSV: for every position in view.
        view: what is looked at.
        entries: all that are read.
        readouts: the readings.
        out_RN: where they go.
        where: the logits come from, for the message of an error.

    Raises:
        UnsupportedModelError: when there are logits for some positions only.
    """
    inside, width = view.inside, len(view.columns)
    if logits_BSV.ndim != 3 or logits_BSV.shape[1] < width:
        raise UnsupportedModelError(
            f"with your hooks on {where} its output has the shape "
            f"{tuple(logits_BSV.shape)}, for a prompt of {width} positions; which of them it "
            "has cannot be told. Take off a hook that keeps some positions only"
        )
    logits_BSV = logits_BSV[:, -width:]  # the model may put positions before the prompt
    column = entries.cols[inside] - view.columns.start
    for some in torch.arange(len(inside), device="cpu").split(_AT_ONCE):
        here = inside[some]
        logits_EV = logits_BSV[entries.rows[here], column[some]]
        for readout, out_N in zip(readouts, out_RN, strict=True):
            if readout.of_logits is not None:
                found = readout.of_logits(logits_EV, entries.target[here])
                out_N[here.to(out_N.device)] = found.to(out_N)
