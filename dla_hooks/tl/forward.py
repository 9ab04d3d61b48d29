"""Running a wrapped model: logits and losses, as TransformerLens returns them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from dla_hooks.backends import backend_of
from dla_hooks.errors import InputError, TokenError
from dla_hooks.inputs.prompts import Prompt, encode, read_prompt
from dla_hooks.tl.arguments import check_bos, check_flag
from dla_hooks.tl.config import NO_SOFTCAP
from dla_hooks.tl.tokens import TokenMethods
from dla_hooks.tl.weights import Processing


class LogitsAndLoss(NamedTuple):
    """The result of ``return_type="both"``."""

    logits: Tensor
    loss: Tensor


class ForwardMethods(TokenMethods):
    """The model as a function.

    Attributes:
        model: the Hugging Face model.
        processing: what the weights show; it decides whether logits are centred.
    """

    model: Any
    processing: Processing

    def forward(
        self,
        input: Any,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        attention_mask: Any = None,
    ) -> Any:
        """Run the model.

        Args:
            input: a string, a list of strings, or token ids [pos] or [batch, pos].
            return_type: "logits" [batch, pos, d_vocab_out]; "loss", the mean cross-entropy of each
                next token; "both"; or None, to run only.
            loss_per_token: the loss [batch, pos - 1], not averaged.
            prepend_bos: for strings; as in :meth:`to_tokens`.
            padding_side: for strings; "left" also takes leading pad tokens among ids for padding.
                None is the tokenizer's. Padding on the right is neither masked nor left out of
                the loss, as in the reference, unless a mask is given.
            attention_mask: 1 at real tokens, for ids.

        Raises:
            InputError: for an argument of another form.
        """
        if return_type not in ("logits", "loss", "both", None):
            raise InputError(
                f"return_type must be 'logits', 'loss', 'both' or None, got {return_type!r}"
            )
        check_flag(loss_per_token, "loss_per_token")
        prompt = self._prompt(input, prepend_bos, padding_side, attention_mask)
        if return_type is None:
            backend_of(self.model).forward(prompt, None)
            return None
        if return_type != "logits" and prompt.shape[1] < 2:
            raise InputError("a loss needs at least two tokens: the last one has no next")
        logits = backend_of(self.model).forward(prompt, torch.arange(prompt.shape[1], device="cpu"))
        if self.processing.center_unembed and self.cfg.output_logits_soft_cap == NO_SOFTCAP:
            logits = logits - logits.mean(-1, keepdim=True)  # what W_U and b_U give
        if return_type == "logits":
            return logits
        loss = _loss(logits, prompt, loss_per_token)
        return loss if return_type == "loss" else LogitsAndLoss(logits, loss)

    __call__ = forward

    def _prompt(
        self, input: Any, prepend_bos: bool | None, padding_side: str | None, attention_mask: Any
    ) -> Prompt:
        side = self._side(padding_side)
        check_bos(prepend_bos)
        is_text = isinstance(input, list) and any(isinstance(text, str) for text in input)
        if isinstance(input, str) or is_text:
            if attention_mask is not None:
                raise InputError("attention_mask goes with token ids; strings are padded for you")
            ids, mask = self._pad(self._encode(input, prepend_bos, truncate=True), side)
            if not ids.numel():
                raise InputError("the prompt is empty; with prepend_bos=True it would be one BOS")
            return Prompt(ids, mask if side == "left" else torch.ones_like(mask))
        prompt = read_prompt(
            input,
            tokenizer=self.tokenizer,
            attention_mask=attention_mask,
            vocabulary=self.cfg.d_vocab,
            encode=lambda text: encode(text, self.tokenizer, None),
        )
        if prompt.extras:
            raise InputError(
                f"input holds {', '.join(prompt.extras)}; a wrapped model runs on ids and a mask "
                "[batch, pos]. Call the model inside it, .model, with further arguments"
            )
        if attention_mask is None and side == "left" and self.tokenizer is not None:
            return Prompt(prompt.input_ids, self._leading_pads_out(prompt.input_ids, prepend_bos))
        return prompt

    def _leading_pads_out(self, ids: Tensor, prepend_bos: bool | None) -> Tensor:
        """False at the pad tokens that rows of ids begin with; a BOS among them is kept."""
        try:
            pad = self._pad_id()
        except TokenError:  # nothing can have been padded with it
            return torch.ones_like(ids, dtype=torch.bool)
        mask = (ids != pad).cumsum(-1) > 0
        bos = getattr(self.tokenizer, "bos_token_id", None)
        if (self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos) and bos in (
            None,
            pad,
        ):
            mask[:, :-1] |= mask[:, 1:]  # the last of them is the BOS
        mask[~mask.any(-1)] = True  # nothing but the pad token: that is the prompt
        return mask


def _loss(logits: Tensor, prompt: Prompt, per_token: bool) -> Tensor:
    targets = prompt.input_ids[:, 1:].to(logits.device)
    losses = functional.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none")
    counted = (prompt.mask[:, :-1] & prompt.mask[:, 1:]).to(logits.device)
    losses = losses.masked_fill(~counted, 0)
    return losses if per_token else losses.sum() / counted.sum()
