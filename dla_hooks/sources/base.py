"""Where activations come from: a run of the model, or a stored cache.

A source shows taps the activations of one prompt. Whatever it is, the same taps write the same
scalars.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dla_hooks.errors import CacheEntryError, InputError
from dla_hooks.inputs.prompts import Prompt, to_strings
from dla_hooks.modules.hooks import Place, Tap
from dla_hooks.projection.tiles import View
from dla_hooks.residual.stream import Stream


class Source:
    """Activations of one prompt.

    Attributes:
        prompt: the batch of tokens.
        batched: whether results have an axis for the batch.
        has_logits: whether the model's own logits come with the activations.
        of_a_run: whether activations are shown as they come in a run; those of a cache may have
            been changed, each by itself.
        logits_at: the only columns whose logits are there; None where any may be asked for.
    """

    prompt: Prompt
    batched: bool = True
    has_logits: bool = True
    of_a_run: bool = True
    logits_at: Tensor | None = None

    def on(self, stream: Stream) -> Source:
        """The same source, for a model that was measured anew."""
        return self

    def at_once(self) -> Source:
        """The same source, which shows the whole prompt together, and queries and keys with it.

        Raises:
            InputError: where it does not show these.
        """
        raise InputError(
            f"a {type(self).__name__} does not show queries and keys: let the model run "
            "(leave out cache=)"
        )

    def missing(self, place: Place) -> CacheEntryError | None:
        """Why the activation at a place cannot be shown; None where it can."""
        return None

    def show(
        self,
        view: View,
        taps: Callable[[View], list[Tap]],
        columns: Tensor | None,
        until: Place | None = None,
        before: Callable[[View], list[Tap]] | None = None,
    ) -> Tensor | None:
        """Show every tap its activation.

        Args:
            view: all entries that are read.
            taps: makes the taps for the entries that are shown together.
            columns: where the model's own logits are wanted, or None for nowhere.
            until: nothing from this input of a module on is wanted, or None for no end.
            before: makes the taps for a piece of the prompt without entries; None is none.

        Returns:
            Logits [batch, n_columns, vocabulary], or None where the source has none.
        """
        raise NotImplementedError(f"{type(self).__name__} must show activations")

    def dtype(self) -> torch.dtype:
        """The coarsest dtype of what it shows, where that may be another than the model's."""
        return torch.float64

    def own_scale(self, view: View) -> tuple[Tensor, Tensor] | None:
        """Compute the final norm's scale from the last stream, where both are merely stored.

        Args:
            view: the entries.

        Returns:
            The scale at each entry [N], and which part of it rounding may be [N]; None where the
            norm itself is seen at work, or the source has not both.
        """
        return None

    def texts(self, tokenizer: Any) -> list[list[str]]:
        """The tokens of every row, as text."""
        raise NotImplementedError(f"{type(self).__name__} must name its tokens")

    def encoder_texts(self, tokenizer: Any) -> list[list[str]]:
        """The tokens that an encoder read, of every row; empty where there are none."""
        encoder = self.prompt.encoder or {}
        ids, mask = encoder.get("input_ids"), self.prompt.encoder_mask
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            return []
        rows = (
            list(ids) if mask is None else [row[real] for row, real in zip(ids, mask, strict=True)]
        )
        return [to_strings(row.tolist(), tokenizer) for row in rows]
