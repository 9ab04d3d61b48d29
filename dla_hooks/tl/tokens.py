"""The tokenizer methods of the TransformerLens-shaped face.

The tokenizer is read and never written to: padding, truncation and BOS are done here, so that one
without a pad token, or with its own padding side, works as it is and stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dla_hooks.errors import InputError, ShapeMismatchError, TokenError, TokenizerMissingError
from dla_hooks.inputs.answers import single_token
from dla_hooks.inputs.plain import check_text
from dla_hooks.tl.arguments import check_bos, check_flag, is_int, one_row, read_ids
from dla_hooks.tl.config import Config, prepends_bos


class TokenMethods:
    """Text to tokens and back, as TransformerLens does it.

    Attributes:
        tokenizer: the caller's, or None.
    """

    tokenizer: Any

    @property
    def cfg(self) -> Config:
        """The model's sizes and conventions."""
        raise NotImplementedError

    def to_tokens(
        self,
        input: str | list[str],
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> Tensor:
        """Text to token ids [batch, pos].

        Args:
            input: a string (a batch of one) or a list of strings, padded to one length.
            prepend_bos: one BOS first, or none; None takes ``cfg.default_prepend_bos``. A BOS
                that the text itself begins with is not counted. Without a BOS token EOS is used.
            padding_side: "left" or "right"; None takes the tokenizer's.
            move_to_device: put the result where the model's embedding is.
            truncate: cut to ``cfg.n_ctx`` tokens, on the tokenizer's truncation side; one of them
                is kept for a BOS, if the tokenizer has one, also where none is wanted.

        Raises:
            InputError: for an argument of another form.
            TokenError: when a BOS or padding is needed and the tokenizer has nothing for it.
            TokenizerMissingError: without a tokenizer.
        """
        check_flag(move_to_device, "move_to_device")
        rows = self._encode(input, prepend_bos, truncate)
        ids, _ = self._pad(rows, padding_side)
        return ids.to(self.cfg.device) if move_to_device else ids

    def to_string(self, tokens: Any) -> str | list[str]:
        """Token ids to text: a string for an id or a row of ids, a list of them for [batch, pos].

        Args:
            tokens: an int, a list, an array or a tensor.

        Raises:
            InputError: for what holds no ids.
            ShapeMismatchError: for more than two axes.
            TokenError: for an id outside the vocabulary.
        """
        tokenizer = self._needed("to_string")
        ids = self._ids(tokens, "tokens")
        if ids.ndim > 2:
            raise ShapeMismatchError(
                f"tokens must have shape [], [pos] or [batch, pos], got {list(ids.shape)}"
            )
        rows = ids if ids.ndim == 2 else ids.reshape(1, -1)
        texts = [_decode(tokenizer, row) for row in rows.tolist()]
        return texts if ids.ndim == 2 else texts[0]

    def to_str_tokens(
        self, input: Any, prepend_bos: bool | None = None, padding_side: str | None = None
    ) -> list[Any]:
        """Each token's text.

        Args:
            input: a string, or token ids [pos] or [1, pos] as a tensor, an array or a list of
                ints: a list of strings. A list of these: a list of such lists.
            prepend_bos: for strings; as in :meth:`to_tokens`.
            padding_side: taken for the reference's sake; each text is its own row.

        Raises:
            InputError: for anything else.
            ShapeMismatchError: for ids of several rows.
            TokenError: for an id outside the vocabulary.
        """
        tokenizer = self._needed("to_str_tokens")
        self._side(padding_side)
        check_bos(prepend_bos)
        if isinstance(input, list) and not all(is_int(item) for item in input):
            return [self.to_str_tokens(item, prepend_bos, padding_side) for item in input]
        if isinstance(input, str):
            (row,) = self._encode(input, prepend_bos, truncate=True)
        else:
            if not isinstance(input, list) and not hasattr(input, "ndim"):
                raise InputError(
                    "input must be a string, token ids [pos] or [1, pos], or a list of these; "
                    f"got {type(input).__name__}: {input!r:.80}"
                )
            row = one_row(self._ids(input, "input"), "input").tolist()
        return [_decode(tokenizer, [i]) for i in row]

    def to_single_token(self, string: str) -> int:
        """The id of a string that is one token.

        Raises:
            TokenError: for a string that is none or several. (A ValueError, where the reference
                raises AssertionError.)
            InputError: for what is no string.
        """
        if not isinstance(string, str):
            raise InputError(f"string must be a string, got {type(string).__name__}: {string!r}")
        return single_token(string, "string", self._needed("to_single_token"))

    def to_single_str_token(self, int_token: int) -> str:
        """The text of one token id.

        Raises:
            InputError: for what is no int. (AssertionError in the reference.)
            TokenError: for an id outside the vocabulary.
        """
        tokenizer = self._needed("to_single_str_token")
        if not is_int(int_token):
            raise InputError(
                f"int_token must be an int, got {type(int_token).__name__}: {int_token!r:.80}"
            )
        return _decode(tokenizer, self._ids(int_token, "int_token").reshape(-1).tolist())

    def get_token_position(
        self,
        single_token: str | int | Tensor,
        input: Any,
        mode: str = "first",
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
    ) -> int:
        """Find the position of a token in a prompt.

        Args:
            single_token: a string of one token, or an id.
            input: a string, or token ids [pos] or [1, pos].
            mode: "first" or "last", for a token that occurs several times.
            prepend_bos: for strings; as in :meth:`to_tokens`.
            padding_side: taken for the reference's sake; one prompt has no padding.

        Raises:
            TokenError: when the token does not occur. (AssertionError in the reference.)
            InputError: for an argument of another form.
            ShapeMismatchError: for ids of several rows. (AssertionError in the reference.)
        """
        if mode not in ("first", "last"):
            raise InputError(f"mode must be 'first' or 'last', got {mode!r}")
        self._side(padding_side)
        check_bos(prepend_bos)
        if isinstance(input, str):
            (row,) = self._encode(input, prepend_bos, truncate=True)
        else:
            row = one_row(self._ids(input, "input"), "input").tolist()
        if isinstance(single_token, str):
            token = self.to_single_token(single_token)
        else:
            ids = self._ids(single_token, "single_token")
            if ids.numel() != 1:
                raise InputError(f"single_token must be one token, got shape {list(ids.shape)}")
            token = int(ids)
        found = [position for position, i in enumerate(row) if i == token]
        if not found:
            name = repr(single_token) if isinstance(single_token, str) else f"id {token}"
            raise TokenError(
                f"the token {name} does not occur in the prompt, whose ids are {row[:20]}"
                + ("…" if len(row) > 20 else "")
            )
        return found[0] if mode == "first" else found[-1]

    def _encode(
        self, input: str | list[str], prepend_bos: bool | None, truncate: bool
    ) -> list[list[int]]:
        """The ids of each text, not padded."""
        tokenizer = self._needed("a string")
        check_bos(prepend_bos)
        check_flag(truncate, "truncate")
        texts = [input] if isinstance(input, str) else input
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
            raise InputError(
                "input must be a string or a non-empty list of strings, got "
                f"{type(input).__name__}: {input!r:.80}"
            )
        if prepend_bos is None:
            prepend_bos = self.cfg.default_prepend_bos
        does_itself = prepends_bos(tokenizer)
        first = [_bos(tokenizer)] if prepend_bos else []
        # A BOS has its place in the window also where none is wanted, as in the reference.
        has_bos = prepend_bos or getattr(tokenizer, "bos_token_id", None) is not None
        n_ctx = self.cfg.n_ctx if truncate else None
        room = None if n_ctx is None else n_ctx - (1 if has_bos else 0)
        rows = []
        for text in texts:
            check_text(text, "input")
            ids = list(tokenizer.encode(text))[1 if does_itself else 0 :]
            if room is not None and len(ids) > room:
                from_the_left = getattr(tokenizer, "truncation_side", "right") == "left"
                ids = ids[len(ids) - room :] if from_the_left else ids[:room]
            rows.append(first + ids)
        return rows

    def _pad(self, rows: list[list[int]], padding_side: str | None) -> tuple[Tensor, Tensor]:
        """Rows of ids as [batch, pos], and True at the real ones."""
        side = self._side(padding_side)
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long, device="cpu")
        mask = torch.zeros(len(rows), width, dtype=torch.bool, device="cpu")
        if any(len(row) < width for row in rows):
            ids.fill_(self._pad_id())
        for i, row in enumerate(rows):
            place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            ids[i, place] = torch.tensor(row, dtype=torch.long, device="cpu")
            mask[i, place] = True
        return ids, mask

    def _pad_id(self) -> int:
        for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
            token = getattr(self.tokenizer, name, None)
            if token is not None:
                return int(token)
        raise TokenError(
            "texts of different lengths need padding, but the tokenizer has no PAD, EOS or BOS "
            "token; tokenize them one at a time"
        )

    def _side(self, padding_side: str | None) -> str:
        if padding_side not in (None, "left", "right"):
            raise InputError(f"padding_side must be 'left', 'right' or None, got {padding_side!r}")
        return padding_side or getattr(self.tokenizer, "padding_side", None) or "right"

    def _needed(self, what: str) -> Any:
        if self.tokenizer is None:
            raise TokenizerMissingError(
                f"{what} needs a tokenizer: wrap(model, AutoTokenizer.from_pretrained(...))"
            )
        return self.tokenizer

    def _ids(self, value: Any, name: str, vocabulary: int | None = None) -> Tensor:
        """Ids of any shape, on the CPU, checked against what model or tokenizer knows."""
        if vocabulary is None:  # a tokenizer may know fewer tokens than the model, or more
            known = 0 if self.tokenizer is None else len(self.tokenizer)
            vocabulary = max(self.cfg.d_vocab, known)
        return read_ids(value, name, vocabulary)


def _bos(tokenizer: Any) -> int:
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(tokenizer, name, None)
        if token is not None:
            return int(token)
    raise TokenError("the tokenizer has neither BOS nor EOS to begin with; pass prepend_bos=False")


def _decode(tokenizer: Any, ids: list[int]) -> str:
    # Cleaning up spaces would make the text another one.
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
