"""The TransformerLens-shaped face of a raw Hugging Face model: no conversion, nothing stored.

>>> from dla_hooks import wrap
>>> wrapped = wrap(model, tokenizer)                                  # doctest: +SKIP
>>> wrapped.W_U[:, wrapped.to_single_token(" Paris")]                 # doctest: +SKIP
>>> wrapped.blocks[3].attn.W_O.shape                                  # doctest: +SKIP
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dla_hooks.backends import Conventions, Wrapper
from dla_hooks.backends.two_sequences import reads_two
from dla_hooks.errors import InputError, UnsupportedModelError
from dla_hooks.inputs.prompts import check_tokenizer
from dla_hooks.modules.vjp import dtype_of
from dla_hooks.modules.weights import run_device
from dla_hooks.residual.stream import Stream
from dla_hooks.tl import weights
from dla_hooks.tl.arguments import check_flag
from dla_hooks.tl.config import Config, describe
from dla_hooks.tl.forward import ForwardMethods
from dla_hooks.tl.weights import Processing
from dla_hooks.verification.recognise import stream_of

_NO_CACHE = (
    "no activation is cached here. For logits split into parts call "
    "dla_hooks.direct_logit_attribution(wrapped, prompt, answer, unit=...), which keeps one number "
    "per part"
)
_NO_HOOKS = "no hook points are added to the model; put PyTorch hooks on the modules of"
_ABSENT = {
    "run_with_cache": f"{_NO_CACHE}; for the activations themselves use PyTorch hooks on",
    "add_caching_hooks": f"{_NO_CACHE}; for the activations themselves use PyTorch hooks on",
    **dict.fromkeys(("run_with_hooks", "add_hook", "hooks", "hook_dict", "hook_points"), _NO_HOOKS),
    "reset_hooks": "there are no hooks to take off: none outlives a call. Yours are those of",
}


def wrap(
    model: Any,
    tokenizer: Any = None,
    *,
    fold_ln: bool = True,
    center_writing_weights: bool = True,
    center_unembed: bool = True,
    fold_value_biases: bool = True,
    default_prepend_bos: bool | None = None,
) -> Wrapped:
    """Give a raw Hugging Face causal LM the face of a TransformerLens model.

    The four keywords about weights are those of ``HookedTransformer.from_pretrained``, with its
    defaults. They decide which numbers ``W_U``, ``b_U``, ``W_O``, ``b_O``, ``W_E`` and ``W_pos``
    show; all False gives the raw model's (``from_pretrained_no_processing``). The model itself is
    the same either way, and so are its log-probabilities. In every setting the logits before any
    cap are ``n @ W_U + b_U``, where ``n`` is the final norm's output (with ``fold_ln``, the
    output that it would have without its gain and bias).

    Args:
        model: a causal LM in evaluation mode, PEFT-wrapped or not.
        tokenizer: for everything that takes or gives text; read, never changed.
        fold_ln: the final norm's gain and bias are folded into ``W_U`` and ``b_U`` (and ``W_U``
            centred over d_model, where the norm is a LayerNorm); the bias of the norm before
            attention counts as part of the value biases.
        center_writing_weights: take the mean over d_model off ``W_E``, ``W_pos``, ``W_O`` and
            ``b_O``, which no LayerNorm can tell. Done where the final norm is one.
        center_unembed: take the mean over the vocabulary off ``W_U`` and ``b_U``, and off the
            logits that a call returns. Not done where logits are capped.
        fold_value_biases: ``b_O`` holds the value biases too, seen through ``W_O``.
        default_prepend_bos: whether strings get a BOS where a call does not say. None takes
            TransformerLens' default for the model type, and False where the tokenizer has none.

    Raises:
        InputError: for what is no Hugging Face model, is wrapped already, or is a TransformerLens
            model; for a tokenizer that is none; for a keyword that is not a bool.
        TrainingModeError: (an InputError) for a model in training mode.
        UnsupportedModelError: for a model that cannot be attributed.
    """
    if isinstance(model, Wrapped):
        raise InputError("model is wrapped already; for other settings wrap(wrapped.model, …)")
    if any(kind.__module__.split(".")[0] == "transformer_lens" for kind in type(model).__mro__):
        raise InputError(
            f"{type(model).__name__} is a TransformerLens model and has this face already: use it "
            "as it is, or wrap the Hugging Face model that it was made from"
        )
    if reads_two(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder, for which TransformerLens' face has no "
            "place; attribute the model itself"
        )
    flags = {
        "fold_ln": fold_ln,
        "center_writing_weights": center_writing_weights,
        "center_unembed": center_unembed,
        "fold_value_biases": fold_value_biases,
    }
    for name, value in flags.items():
        check_flag(value, name)
    if default_prepend_bos is not None:
        check_flag(default_prepend_bos, "default_prepend_bos")
    if tokenizer is None:
        tokenizer = getattr(model, "tokenizer", None)
    check_tokenizer(tokenizer)
    return Wrapped(model, tokenizer, Processing(**flags), default_prepend_bos)


class Wrapped(ForwardMethods, Wrapper):
    """A raw model with a TransformerLens-shaped face; made by :func:`wrap`.

    Weights are computed each time they are asked for, in the model's dtype and on its device, and
    kept nowhere: bind ``W_U`` to a name rather than asking for it in a loop.

    Attributes:
        model: the Hugging Face model, untouched.
        tokenizer: the caller's, untouched, or None.
        processing: what the weights show.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        processing: Processing,
        default_prepend_bos: bool | None,
    ) -> None:
        stream = stream_of(model)  # refuses what cannot be attributed, before anything is asked
        self.model = model
        self.tokenizer = tokenizer
        self.processing = processing
        self._cfg = describe(stream, tokenizer, processing, default_prepend_bos)

    @property
    def conventions(self) -> Conventions:
        """The values of keywords that an attribution of this model leaves out."""
        return Conventions(
            center_unembed=self.processing.center_unembed,
            fold_value_biases=self.processing.fold_value_biases,
            prepend_bos=self._cfg.default_prepend_bos,
        )

    @property
    def cfg(self) -> Config:
        """The model's sizes and conventions, under TransformerLens' names."""
        # The model may have been moved or converted since.
        self._cfg.device = str(run_device(self.model.get_input_embeddings()))
        self._cfg.dtype = dtype_of(self.model.get_output_embeddings())
        return self._cfg

    @property
    def W_U(self) -> Tensor:
        """The unembedding [d_model, d_vocab_out]."""
        return weights.unembedding(self._stream(), self.processing)

    @property
    def b_U(self) -> Tensor:
        """Its bias [d_vocab_out], zeros where there is none."""
        return weights.unembedding_bias(self._stream(), self.processing)

    @property
    def W_E(self) -> Tensor:
        """The embedding [d_vocab, d_model], with the scale that the model puts on it."""
        return weights.embedding(self._stream(), self.processing)

    @property
    def W_pos(self) -> Tensor:
        """The position embeddings [n_ctx, d_model], where positions are added to the stream."""
        stream = self._stream()
        if stream.positions is None:
            raise AttributeError(
                f"{type(self.model).__name__} has no W_pos: its positions are not added to the "
                f"stream (cfg.positional_embedding_type is {self.cfg.positional_embedding_type!r})"
            )
        return weights.positional_embedding(stream, self.processing)

    @property
    def W_O(self) -> Tensor:
        """All layers' output projections [n_layers, n_heads, d_head, d_model]."""
        stream = self._stream()
        layers = list(range(len(stream.blocks)))
        parts = weights.output_matrices(stream, self.processing, layers)
        if len({part.shape for part in parts}) > 1:
            shapes = ", ".join(str(list(part.shape)) for part in parts)
            raise UnsupportedModelError(
                f"W_O cannot be stacked, since layers differ ({shapes}); "
                "ask for one layer: wrapped.blocks[layer].attn.W_O"
            )
        return torch.stack([part.to(parts[0].device) for part in parts])

    @property
    def b_O(self) -> Tensor:
        """All layers' output biases [n_layers, d_model]."""
        stream = self._stream()
        return weights.output_biases(stream, self.processing, list(range(len(stream.blocks))))

    @property
    def blocks(self) -> tuple[BlockFace, ...]:
        """The layers, for ``wrapped.blocks[layer].attn``."""
        return tuple(BlockFace(AttentionFace(self, n)) for n in range(self.cfg.n_layers))

    def tokens_to_residual_directions(self, tokens: str | int | Tensor) -> Tensor:
        """Columns of ``W_U``, without making the rest of it.

        Args:
            tokens: a string of one token, an id, or an integer tensor of any shape.

        Returns:
            [d_model] for a single token (also in a tensor with one element), else
            [*tokens.shape, d_model].

        Raises:
            TokenError: for a string that is not one token, or an id outside the vocabulary.
            InputError: for anything else.
        """
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        ids = self._ids(tokens, "tokens", self.cfg.d_vocab_out)
        if not ids.numel():
            raise InputError("tokens is empty: there is no direction to give")
        stream = self._stream()
        rows, _ = weights.UnembedReader(stream, self.processing).read(ids.reshape(-1))
        shape = ids.shape if ids.numel() > 1 else ()
        return rows.to(stream.dtype).reshape(*shape, -1)

    def __repr__(self) -> str:
        cfg = self._cfg
        on = [name for name, value in vars(self.processing).items() if value]
        tokenizer = "no tokenizer" if self.tokenizer is None else type(self.tokenizer).__name__
        return (
            f"Wrapped({type(self.model).__name__}, {cfg.model_name}: {cfg.n_layers} layers, "
            f"d_model {cfg.d_model}, {cfg.d_vocab_out} tokens, {cfg.dtype}; {tokenizer}; "
            f"weights {', '.join(on) if on else 'as they are'})"
        )

    def __getattr__(self, name: str) -> Any:
        if isinstance(getattr(type(self), name, None), property):
            return object.__getattribute__(self, name)  # raises its own AttributeError again
        if name in _ABSENT:
            raise AttributeError(f"{name}: {_ABSENT[name]} wrapped.model")
        hint = "direct_logit_attribution(wrapped, …) answers what this face does not"
        if hasattr(self.__dict__.get("model"), name):
            hint = f"the Hugging Face model has it: wrapped.model.{name}"
        raise AttributeError(f"a wrapped model has no attribute {name!r}; {hint}")

    def _stream(self) -> Stream:
        """The located model; located anew for each use, since weights may have changed."""
        return stream_of(self.model)


class AttentionFace:
    """``wrapped.blocks[layer].attn``."""

    def __init__(self, wrapped: Wrapped, layer: int) -> None:
        self._wrapped, self._layer = wrapped, layer

    @property
    def W_O(self) -> Tensor:
        """The output projection [n_heads, d_head, d_model], as the module makes it of z.

        A norm or a scale after the projection is not in it.
        """
        wrapped = self._wrapped
        (W_O,) = weights.output_matrices(wrapped._stream(), wrapped.processing, [self._layer])
        return W_O

    @property
    def b_O(self) -> Tensor:
        """The output bias [d_model]."""
        wrapped = self._wrapped
        return weights.output_biases(wrapped._stream(), wrapped.processing, [self._layer])[0]

    @property
    def n_heads(self) -> int:
        """The number of heads of this layer."""
        return weights.head_site(self._wrapped._stream(), self._layer)[1].n_heads

    @property
    def d_head(self) -> int:
        """The width of one head."""
        return weights.head_site(self._wrapped._stream(), self._layer)[1].d_head


class BlockFace(NamedTuple):
    """``wrapped.blocks[layer]``."""

    attn: AttentionFace
