"""What the caller's hooks change of what the decoder and the whole model return.

A decoder returns the final norm's output, and a causal LM its logits. Each is looked at ahead of
the hooks and behind them; of each look one number per entry and readout is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dla_hooks.errors import HookError
from dla_hooks.inputs.entries import Entries
from dla_hooks.modules.hooks import Call, Place, Tap
from dla_hooks.modules.outputs import tensor_in
from dla_hooks.modules.user_hooks import FINAL_HOOK, LOGIT_HOOK, has_callers
from dla_hooks.modules.weights import whole_activation
from dla_hooks.projection.kernels import project
from dla_hooks.projection.ledger import FixedRows
from dla_hooks.projection.logit_hooks import pick_logits
from dla_hooks.projection.readout import Readout
from dla_hooks.projection.tiles import View


@dataclass(frozen=True)
class Outputs:
    """The modules whose output holds what comes behind the last stream.

    Attributes:
        decoders: those that return the final norm's output.
        models: those that return logits which add up, as capped ones do not.
    """

    decoders: Sequence[nn.Module] = ()
    models: Sequence[nn.Module] = ()

    def hooked(self) -> Outputs:
        """Those with hooks of the caller's on their output."""
        found = (
            [one for one in modules if has_callers(one._forward_hooks)]
            for modules in (self.decoders, self.models)
        )
        return Outputs(*found)

    def __len__(self) -> int:
        return len(self.decoders) + len(self.models)


class OutputHooks:
    """Records what hooks change there.

    Args:
        outputs: modules with hooks of the caller's.
        readouts: the readings.
        entries: what is read.
        dtype: of the numbers.
    """

    def __init__(
        self, outputs: Outputs, readouts: Sequence[Readout], entries: Entries, dtype: torch.dtype
    ) -> None:
        self._outputs, self._readouts, self._entries = outputs, readouts, entries
        # For each module and each readout, ahead of the hooks and then behind them.
        self._rows = FixedRows(2 * len(outputs) * len(readouts), len(entries), dtype)
        behind = [one.behind for one in readouts] if outputs.decoders else []
        self._behind = [None if make is None else make() for make in behind]

    def taps(self, view: View) -> list[Tap]:
        """Two taps for each module."""
        n, taps = len(self._readouts), list[Tap]()
        modules = [*self._outputs.decoders, *self._outputs.models]
        for number, module in enumerate(modules):
            look = self._see_norm if number < len(self._outputs.decoders) else self._see_logits
            place = Place(module, f"the output of {type(module).__name__}")
            for which, at in enumerate((place.ahead, place)):
                first = (2 * number + which) * n
                look_there = look(view, slice(first, first + n))
                taps.append(Tap(at, look_there, optional=True))  # OPT goes past its own decoder
        return taps

    def finish(self, device: torch.device) -> dict[str, Tensor]:
        """What hooks add [readouts, N], by the label of its row; nothing where they add nothing."""
        n = len(self._readouts)
        looks = self._rows.gathered(device).unflatten(0, (len(self._outputs), 2, n))
        added, n_decoders = looks[:, 1] - looks[:, 0], len(self._outputs.decoders)
        found = {FINAL_HOOK: added[:n_decoders].sum(0), LOGIT_HOOK: added[n_decoders:].sum(0)}
        return {label: one for label, one in found.items() if bool(one.any())}

    def _see_norm(self, view: View, rows: slice) -> Callable[[Call], None]:
        def see(call: Call) -> None:
            x = _tensor(call, "last_hidden_state")
            for directions, row in zip(self._behind, range(rows.start, rows.stop), strict=True):
                if directions is not None:
                    project(x, view, directions, self._rows.row(row, x.device))

        return see

    def _see_logits(self, view: View, rows: slice) -> Callable[[Call], None]:
        def see(call: Call) -> None:
            logits = _tensor(call, "logits")
            out_RN = self._rows.on(logits.device)[rows]
            where = "the whole model"
            pick_logits(logits, view, self._entries, self._readouts, out_RN, where)

        return see


def _tensor(call: Call, name: str) -> Tensor:
    found = tensor_in(call.output, (name,))
    if found is None:
        raise HookError(
            f"with your hooks on it a module returns a {type(call.output).__name__} without "
            f"{name}; take off a hook that returns something else than the output it was given"
        )
    return whole_activation(found)
