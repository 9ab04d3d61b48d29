"""The text while it grows: a prompt, and the new tokens of each row."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dla_hooks.inputs.answers import Answers
from dla_hooks.inputs.positions import Selection
from dla_hooks.inputs.prompts import Prompt


class Text:
    """A prompt with what was generated after it.

    Args:
        prompt: the batch, padded on the left only.

    Attributes:
        prompt: the same.
        ended_B: the rows that have ended.
    """

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.ended_B = torch.zeros(len(prompt.mask), dtype=torch.bool, device="cpu")
        self._new: list[Tensor] = []
        self._against: list[Tensor] = []
        self._real: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._new)

    def add(self, ids_B: Tensor, against_B: Tensor | None) -> None:
        """Add a token to every row; in rows that have ended it is padding.

        Args:
            ids_B: the tokens, on the CPU.
            against_B: the tokens whose logits are subtracted, or None.
        """
        real_B = ~self.ended_B
        self._real.append(real_B)
        self._new.append(ids_B.masked_fill(~real_B, 0))
        if against_B is not None:
            self._against.append(against_B.masked_fill(~real_B, 0))

    @property
    def width(self) -> int:
        """Columns of the prompt."""
        return self.prompt.shape[1]

    @property
    def new_BS(self) -> Tensor:
        """The new tokens [batch, n]; 0 behind the end of a row."""
        return torch.stack(self._new, 1)

    @property
    def real_BS(self) -> Tensor:
        """Which of them come before the end of their row, or end it [batch, n]."""
        return torch.stack(self._real, 1)

    def whole(self, n: int) -> Prompt:
        """The text with its first ``n`` new tokens."""
        if not n:
            return self.prompt
        ids, mask = torch.stack(self._new[:n], 1), torch.stack(self._real[:n], 1)
        prompt = self.prompt
        longer = torch.cat((prompt.input_ids, ids), 1), torch.cat((prompt.mask, mask), 1)
        return replace(prompt, input_ids=longer[0], mask=longer[1])

    def places(self, steps: range, mask: Tensor, *, single: bool) -> Selection:
        """Where some new tokens are predicted: at the tokens before them.

        Args:
            steps: which new tokens.
            mask: True at the real tokens of the text that is shown [batch, pos].
            single: whether it is one position, without an axis of its own.
        """
        real = torch.stack([self._real[step] for step in steps], 1)
        rows = torch.arange(len(real), device="cpu")[:, None].expand_as(real)
        cols = torch.arange(steps.start, steps.stop, device="cpu") + (self.width - 1)
        cols = cols.expand_as(real)
        if single:
            return Selection(rows[:, 0], cols[:, 0], real[:, 0], mask)
        return Selection(rows, cols, real, mask)

    def answers(self, steps: range, *, single: bool) -> Answers:
        """Some new tokens as answers, and what they are held against."""
        kinds = [self._new, self._against] if self._against else [self._new]
        found = [torch.stack([kind[step] for step in steps], 1) for kind in kinds]
        found = [ids[:, 0] if single else ids for ids in found]
        return Answers(found[0], found[1] if len(found) > 1 else None)
