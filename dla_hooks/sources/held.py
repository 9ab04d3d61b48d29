"""Generated tokens, shown from what was held of their steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dla_hooks.errors import HookError
from dla_hooks.inputs.prompts import Prompt, to_strings
from dla_hooks.modules.attention_interface import AttentionCall, AttentionTap
from dla_hooks.modules.hooks import Call, Place, Tap
from dla_hooks.projection.tiles import View
from dla_hooks.sources.base import Source
from dla_hooks.sources.hold import Column, Step, key_of


class Held(Source):
    """Some steps of a generation, as the last columns of the text so far.

    Args:
        prompt: the text, up to the last of these columns.
        steps: what was held of each.
        logits_at: columns whose logits were held, too.
        logits_BSV: these [batch, n_columns, vocabulary].
    """

    def __init__(
        self, prompt: Prompt, steps: Sequence[Step], logits_at: Tensor, logits_BSV: Tensor
    ) -> None:
        self.prompt, self._steps = prompt, steps
        self.logits_at, self._logits_BSV = logits_at, logits_BSV

    def show(
        self,
        view: View,
        taps: Callable[[View], list[Tap]],
        columns: Tensor | None,
        until: Place | None = None,
        before: Callable[[View], list[Tap]] | None = None,
    ) -> Tensor:
        """Show every tap what was held at its place.

        Raises:
            HookError: for a place that was not held: hooks were put on while the model generated.
        """
        width = self.prompt.shape[1]
        with torch.no_grad():
            for tap in taps(view.part(width - len(self._steps), width)):
                self._show(tap)
        return self._logits_BSV

    def texts(self, tokenizer: Any) -> list[list[str]]:
        """The tokens of every row, as text; padding left out."""
        rows = zip(self.prompt.input_ids, self.prompt.mask, strict=True)
        return [to_strings(row[real].tolist(), tokenizer) for row, real in rows]

    def _show(self, tap: Tap) -> None:
        key = key_of(tap)
        held = [step[key] for step in self._steps if key in step]
        if len(held) != len(self._steps):
            if tap.optional and not held:
                return
            raise HookError(
                f"{tap.place.name} was not seen at every new token: hooks were put on or taken off "
                "while the model generated"
            )
        first = held[0]
        tap.fired = tap.place.use.nth
        if isinstance(tap, AttentionTap) and isinstance(first, AttentionCall):
            tap.count_call(first)
            return
        columns = [one for one in held if isinstance(one, Column)]
        entered = _side_by_side([one.entered for one in columns])
        left = _side_by_side([one.left for one in columns])
        args = () if entered is None else (entered,)
        tap.count(Call(args, {}, left, before=tap.place.before))


def _side_by_side(columns: Sequence[Tensor | None]) -> Tensor | None:
    """Columns as one activation; None where they are no columns of one, as those of a mask."""
    known = [column for column in columns if column is not None]
    if len(known) < len(columns) or len({one.shape[2:] for one in known}) > 1:
        return None
    return known[0] if len(known) == 1 else torch.cat(known, 1)
