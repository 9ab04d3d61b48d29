"""The parts that all backends share, and the methods that each one has of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from dla_hooks.backends.wrapped import Conventions
from dla_hooks.errors import InputError, TrainingModeError, UnsupportedModelError
from dla_hooks.inputs.prompts import Prompt, encode
from dla_hooks.modules.autocast import outside_autocast
from dla_hooks.modules.compiled import eagerly
from dla_hooks.modules.faults import synthetic_run
from dla_hooks.modules.past_wrappers import BLOCKS, past_wrappers
from dla_hooks.modules.user_hooks import needed_hooks, silenced
from dla_hooks.modules.version import State, is_training, modules_of, state_of


class Backend:
    """The way in which the models of one library are looked at and run.

    Args:
        model: the model, not checked yet.
        conventions: of the wrapper around it.
        tokenizer: of the wrapper around it, or None.

    Attributes:
        model: the model.
        conventions: the values of keywords that a call leaves out.
        serves: classes whose models it runs, and their descendants, by library and name.
        advice: a sentence for refusals, about another way to pass the model; or nothing.
        under_autocast: whether it runs under a caller's autocast only, as of several dtypes.
        past: which wrappers of the caller's made-up runs go past.
        wrappers: these, each with the module in it.
        embedding_name: the path of the token embeddings, where a cache names them.
    """

    serves: tuple[str, ...] = ()
    advice = ""
    embedding_name = ""

    def __init__(
        self, model: Any, conventions: Conventions | None = None, tokenizer: Any = None
    ) -> None:
        self.model = model
        self.conventions = conventions or Conventions()
        self._tokenizer = tokenizer
        self.under_autocast, self.past = False, BLOCKS
        self.wrappers: Mapping[nn.Module, nn.Module] = {}

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the wrapper, or one that the model itself carries, or None."""
        if self._tokenizer is not None:
            return self._tokenizer
        return getattr(self.model, "tokenizer", None)

    @property
    def root(self) -> Any:
        """The module that declared paths begin at: the model, or the one that it wraps."""
        return self.model

    @cached_property
    def state(self) -> State:
        """The state of the model's modules when this was first read: one walk for each backend."""
        return self.read_state()

    def read_state(self) -> State:
        """The state of the model's modules now."""
        return state_of(self.model)

    @property
    def compiled(self) -> bool:
        """True if a part of the model is compiled; hooks see it only when it runs eagerly."""
        return self.state.compiled

    @property
    def model_type(self) -> str:
        """The name that a declaration is found by."""
        raise NotImplementedError

    @cached_property
    def name(self) -> str:
        """The model's class and type, for messages and results."""
        return f"{type(self.root).__name__} ({self.model_type})"

    def check(self) -> None:
        """Refuse a model that cannot be attributed as it stands.

        Raises:
            InputError: for what is no such model, or not set up as it must be.
            TrainingModeError: (an InputError) for a model in training mode.
            UnsupportedModelError: for a model that no setting would help.
        """
        self.check_kind()
        self.check_evaluation_mode()

    def check_kind(self) -> None:
        """Refuse a model for what it is, or for how it is set up."""

    def check_evaluation_mode(self) -> None:
        """Refuse a model any part of which is in training mode; containers do not count.

        Raises:
            TrainingModeError: naming the first such part.
        """
        if self.state.training:
            path = next((path for path, module in self.modules() if is_training(module)), "")
            place = f" (in {path})" if path else ""
            raise TrainingModeError(
                f"the model is in training mode{place}, where dropout changes every run; "
                "call model.eval() first"
            )

    def check_cacheable(self) -> None:
        """Refuse a model whose activations never come from a stored ``ActivationCache``.

        Raises:
            InputError: for all but the models of TransformerLens.
        """
        raise InputError(
            f"{type(self.model).__name__} keeps no ActivationCache; "
            "direct_logit_attribution(model, input, ...) needs none"
        )

    def modules(self) -> list[tuple[str, nn.Module]]:
        """Every module, with its path."""
        return list(self.model.named_modules())

    def embedding(self) -> nn.Module:
        """The module that puts out the token embeddings."""
        raise NotImplementedError

    def n_tokens(self) -> int:
        """The number of tokens that can be embedded."""
        raise NotImplementedError

    def unembed(self) -> nn.Module:
        """The unembedding, as a linear module."""
        raise NotImplementedError

    @property
    def reads_two(self) -> bool:
        """Whether it is an encoder-decoder; what is attributed is then its decoder's stream."""
        return False

    @property
    def scores_labels(self) -> bool:
        """True for a model whose logits are labels' and not tokens'."""
        return False

    def check_prompt(self, prompt: Prompt) -> None:
        """Refuse a prompt that the model itself would read otherwise than it is attributed."""

    def answer_tokenizer(self, tokenizer: Any) -> Any:
        """The tokenizer that answers are read and named with; a prompt's, or a stand-in for it."""
        return tokenizer

    def number(self, field: str) -> Any:
        """A field of the model's config, or None."""
        raise NotImplementedError

    def linear(self, attention: nn.Module, seen: nn.Module) -> nn.Module:
        """The linear map from z to the stream: the module where z is seen, or one beside it."""
        return seen

    def last_stream(self, layers: str) -> str | None:
        """The path of a module that stands in for a missing final norm and returns its input.

        It is None where a model without a final norm is refused.
        """
        return None

    def stand_in(self, layers: str, final_norm: str) -> tuple[nn.Module, str] | None:
        """A module of ours that runs on the last block's output, and the path of that block.

        Args:
            layers: the path of the list of blocks.
            final_norm: the path at which the model says that it has no final norm; or there is no
                such module of ours (None).
        """
        return None

    @property
    def stands_in(self) -> bool:
        """Whether :meth:`stand_in` is in use: it runs during :meth:`forward` alone."""
        return False

    def norm_before(self, *, mlp: bool) -> str | None:
        """The name, in a block, of the norm before its MLP or attention; None: a run finds it."""
        return None

    def neurons(self, block: nn.Module) -> tuple[nn.Module, str, nn.Module] | None:
        """The place where the neurons of a block's MLP are seen.

        Returns:
            The module whose output they are, its path in the block, and the linear map from there
            to the stream; None where a run must find them.
        """
        return None

    def reads_with(self, tokenizer: Any, prepend_bos: bool | None) -> tuple[Any, bool | None]:
        """The tokenizer and the BOS custom for a call's strings.

        Args:
            tokenizer: the call's own, or None for this backend's. The conventions about a BOS
                belong to the backend's tokenizer and do not hold for another.
            prepend_bos: what the call says, or None.
        """
        if tokenizer is not None:
            return tokenizer, prepend_bos
        return self.tokenizer, self.conventions.prepend_bos if prepend_bos is None else prepend_bos

    def encode(self, text: str, tokenizer: Any, prepend_bos: bool | None) -> list[int]:
        """Token ids of a prompt.

        Args:
            text: the prompt.
            tokenizer: one that the caller gave, or the model's own.
            prepend_bos: True for exactly one BOS, False for none, None for the custom of the model.
        """
        return encode(text, tokenizer, prepend_bos)

    def named_weights(self) -> list[tuple[str, nn.Parameter]]:
        """Every parameter that is used, with its name."""
        return list(self.model.named_parameters())

    @contextmanager
    def without_user_hooks(self) -> Iterator[None]:
        """Run eagerly, and without the caller's hooks and wrappers: they belong to the prompt.

        Where a model was found to run with some of them only, these stay on.
        """
        needed = needed_hooks(self.model)
        off = silenced(one for one in self.hookable() if one not in needed)
        with eagerly(self.compiled), off, past_wrappers(self.wrappers):
            yield

    def hookable(self) -> Iterable[nn.Module]:
        """The modules whose hooks may be the caller's."""
        return modules_of(self.model)

    def run_synthetic(self, prompt: Prompt, columns: Tensor | None) -> Tensor:
        """Run the model on made-up activations, to measure something; see :meth:`forward`.

        A caller's autocast is switched off: the measurement also serves calls outside of it. A
        model that cannot run without keeps it (``under_autocast``). Whatever fails in it is raised
        as a SyntheticRunError, an UnsupportedModelError that names the module.
        """
        forward = self.forward if self.under_autocast else outside_autocast(self.forward)
        fails = synthetic_run(self.model, self.name, prompt.shape)
        with self.without_user_hooks(), fails:
            return forward(prompt, columns)

    def forward(self, prompt: Prompt, columns: Tensor | None) -> Tensor:
        """Run the plain forward pass eagerly, with logits at a few columns only.

        Args:
            prompt: the batch.
            columns: columns of the prompt [n], or None for the last.

        Returns:
            Logits [batch, n, vocabulary].
        """
        with eagerly(self.compiled):
            return self.run(prompt, columns)

    def run(self, prompt: Prompt, columns: Tensor | None) -> Tensor:
        """:meth:`forward`, as this backend does it."""
        raise NotImplementedError

    def forward_chunk(
        self, prompt: Prompt, chunk: range, columns: Tensor | None, past: Any
    ) -> tuple[Tensor, Any]:
        """Run the forward pass of some columns, on top of those that the model has read before.

        Args:
            prompt: the whole batch.
            chunk: the columns to run.
            columns: some of these [n], or None for the last.
            past: the second value that the chunk before returned, or None.

        Returns:
            Logits [batch, n, vocabulary], and ``past`` for the next chunk.

        Raises:
            UnsupportedModelError: for a model that cannot be run so.
        """
        with eagerly(self.compiled):
            return self.run_chunk(prompt, chunk, columns, past)

    def run_chunk(
        self, prompt: Prompt, chunk: range, columns: Tensor | None, past: Any
    ) -> tuple[Tensor, Any]:
        """:meth:`forward_chunk`, as this backend does it."""
        raise UnsupportedModelError(f"{type(self.root).__name__} runs a prompt at once")
