"""What every kind of model has in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from dla_hooks.errors import TrainingModeError, UnsupportedModelError
from dla_hooks.inputs.prompts import Prompt, encode
from dla_hooks.modules.autocast import outside_autocast
from dla_hooks.modules.compiled import eagerly, is_compiled


@dataclass(frozen=True)
class Conventions:
    """What is done where a call leaves it open.

    Attributes:
        center_unembed: take the vocabulary's mean off every row of W_U.
        fold_value_biases: move each head's constant part to the remainder.
        prepend_bos: True for one BOS before a string, False for none, None for the backend's own
            custom.
    """

    center_unembed: bool = False
    fold_value_biases: bool = False
    prepend_bos: bool | None = None


class Backend:
    """How one kind of model is talked to.

    Args:
        model: the model, not checked yet.

    Attributes:
        model_type: the name that its declaration is found by.
        keeps_caches: whether its activations may come from a stored ``ActivationCache``.
        embedding_name: the path of the token embeddings, where a cache names them.
    """

    keeps_caches = False
    embedding_name = ""

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def root(self) -> Any:
        """The module that declared paths begin at: the model, or the one that it wraps."""
        return self.model

    @cached_property
    def compiled(self) -> bool:
        """Whether a part of the model is compiled, and has to be run eagerly to be seen."""
        return is_compiled(self.model)

    @property
    def model_type(self) -> str:
        """The name that a declaration is found by."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """The model's class and type, for messages and results."""
        return f"{type(self.root).__name__} ({self.model_type})"

    def check(self) -> None:
        """Refuse a model that is of this kind, but can tell nothing about itself as it stands."""

    def check_evaluation_mode(self) -> None:
        """Refuse a model any part of which is in training mode.

        Raises:
            TrainingModeError: naming the first such part.
        """
        for path, module in self.modules():
            if module.training:
                place = f" (in {path})" if path else ""
                raise TrainingModeError(
                    f"the model is in training mode{place}, where dropout changes every run; "
                    "call model.eval() first"
                )

    def modules(self) -> list[tuple[str, nn.Module]]:
        """Every module, with its path."""
        return list(self.model.named_modules())

    def embedding(self) -> nn.Module:
        """The module whose output are the token embeddings."""
        raise NotImplementedError

    def n_tokens(self) -> int:
        """How many tokens can be embedded."""
        raise NotImplementedError

    def unembed(self) -> nn.Module:
        """The unembedding, as a linear module."""
        raise NotImplementedError

    def number(self, field: str) -> Any:
        """A field of the model's config, or None."""
        raise NotImplementedError

    def linear(self, attention: nn.Module, seen: nn.Module) -> nn.Module:
        """What maps z to the stream: the module at whose input z is seen, or one beside it."""
        return seen

    def neurons(self, mlp: nn.Module) -> nn.Module:
        """What maps an MLP's hidden activations to the stream, where it cannot be found by a run.

        Only kinds whose activations have hook points of their own have this.
        """
        raise NotImplementedError

    def encode(self, text: str, tokenizer: Any, prepend_bos: bool | None) -> list[int]:
        """Token ids of a prompt.

        Args:
            text: the prompt.
            tokenizer: one that the caller gave, or the model's own.
            prepend_bos: True for exactly one BOS, False for none, None for the kind's custom.
        """
        return encode(text, tokenizer, prepend_bos)

    def named_weights(self) -> list[tuple[str, nn.Parameter]]:
        """Every parameter that is used, with its name."""
        return list(self.model.named_parameters())

    @contextmanager
    def without_user_hooks(self) -> Iterator[None]:
        """Past the user's hooks, where made-up activations would run into them; eagerly."""
        with eagerly(self.compiled):
            yield

    @outside_autocast
    def run_synthetic(self, prompt: Prompt, columns: Tensor | None) -> Tensor:
        """A made-up run, to find out about the model; see :meth:`forward`.

        It runs past a caller's autocast, since what is found out is kept for calls outside of it.
        """
        with self.without_user_hooks():
            return self.forward(prompt, columns)

    def forward(self, prompt: Prompt, columns: Tensor | None) -> Tensor:
        """The plain forward pass, run eagerly, with logits at a few columns only.

        Args:
            prompt: the batch.
            columns: columns of the prompt [n], or None for the last.

        Returns:
            Logits [batch, n, vocabulary].
        """
        with eagerly(self.compiled):
            return self.run(prompt, columns)

    def run(self, prompt: Prompt, columns: Tensor | None) -> Tensor:
        """:meth:`forward`, as this kind does it."""
        raise NotImplementedError

    def forward_chunk(
        self, prompt: Prompt, chunk: range, columns: Tensor | None, past: Any
    ) -> tuple[Tensor, Any]:
        """The forward pass of some columns, on top of what the model has read before them.

        Args:
            prompt: the whole batch.
            chunk: the columns to run.
            columns: some of these [n], or None for the last.
            past: what the chunk before returned, or None.

        Returns:
            Logits [batch, n, vocabulary], and what the next chunk is to be given.

        Raises:
            UnsupportedModelError: for a kind, or a model, that cannot be run so.
        """
        with eagerly(self.compiled):
            return self.run_chunk(prompt, chunk, columns, past)

    def run_chunk(
        self, prompt: Prompt, chunk: range, columns: Tensor | None, past: Any
    ) -> tuple[Tensor, Any]:
        """:meth:`forward_chunk`, as this kind does it."""
        raise UnsupportedModelError(
            "models of TransformerLens are run at once; the Hugging Face model itself can be passed"
        )
