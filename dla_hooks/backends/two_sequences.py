"""Encoder-decoders: how a model of two sequences is called, and what its encoder puts out.

The decoder's stream is attributed. What the encoder puts out is given: in a real run the model
makes it, and a made-up run is given a few made-up vectors in its place, so that the encoder, which
may need thousands of frames, does not run at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import ModelOutput

from dla_hooks.backends.base import Backend
from dla_hooks.backends.readouts import n_embedded
from dla_hooks.errors import InputError, UnsupportedModelError
from dla_hooks.inputs.encoder_outputs import ENCODED, Vectors
from dla_hooks.inputs.extras import EMBEDS, MASK, NEVER, POSITIONS, moved
from dla_hooks.inputs.prompts import Prompt
from dla_hooks.inputs.two_sequences import IDS, Reader, start_of
from dla_hooks.modules.outputs import tensor_in, with_tensor
from dla_hooks.modules.signature import Arguments, arguments_of, named

DECODER_IDS = "decoder_input_ids"
MADE_UP_POSITIONS = 5
"""Positions of the encoder in made-up runs."""

_OF_DECODER = {
    EMBEDS: "decoder_inputs_embeds",
    MASK: "decoder_attention_mask",
    POSITIONS: "decoder_position_ids",
}
"""What an encoder-decoder calls the arguments of its decoder."""
_FOR_DECODER = "decoder_hidden_size"
_WIDTHS = ("hidden_size", "d_model")


def reads_two(model: Any) -> bool:
    """Whether a model's forward takes the tokens of a decoder beside what its encoder reads."""
    return isinstance(model, nn.Module) and DECODER_IDS in arguments_of(model)


def decoder_name(name: str) -> str:
    """What an encoder-decoder calls an argument of its decoder."""
    return _OF_DECODER.get(name, name)


def of_decoder_alone(accepted: Arguments) -> Arguments:
    """The arguments of its decoder that a forward takes, named as for a model of one sequence."""
    return {own: accepted[theirs] for own, theirs in _OF_DECODER.items() if theirs in accepted}


def decoder_of(model: Any) -> nn.Module:
    """The decoder of an encoder-decoder; the model itself where it does not say."""
    found = model.get_decoder() if hasattr(model, "get_decoder") else None
    return found if isinstance(found, nn.Module) else model


def encoder_embedding(model: Any) -> nn.Module | None:
    """The embeddings of what an encoder reads, or None where it reads no tokens."""
    encoder: Any = model.get_encoder() if hasattr(model, "get_encoder") else None
    try:
        found = encoder.get_input_embeddings()
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return found if isinstance(found, nn.Module) else None


def check_writes_tokens(model: nn.Module, name: str, *, has_labels: bool) -> None:
    """Refuse an encoder-decoder that writes no tokens, or several at each position.

    Args:
        model: the model, whose config says that it is an encoder-decoder.
        name: of it, for the message.
        has_labels: whether it scores labels.

    Raises:
        UnsupportedModelError: saying what it does instead.
    """
    if has_labels or not reads_two(model):
        what = "scores labels" if reads_two(model) else "takes no decoder_input_ids"
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder that {what}, and only those that write tokens can "
            "be attributed; pass one with an unembedding"
        )
    config: Any = getattr(model, "config", None)
    n = getattr(getattr(config, "decoder_config", None), "num_channels", 1)
    if isinstance(n, int) and n > 1:
        raise UnsupportedModelError(
            f"{name} has one head for every codebook of its audio ({n}), and no single logit of a "
            "token; an attribution would need a choice of the codebook"
        )


def reader_of(
    backend: Backend,
    encode: Callable[[str], list[int]],
    encode_decoder: Callable[[str], list[int]],
) -> Reader:
    """How the two sequences of an encoder-decoder are read.

    Args:
        backend: of the model.
        encode: token ids of a string that the encoder reads.
        encode_decoder: token ids of a string that the decoder has written.
    """
    model = backend.root
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    return Reader(
        encode,
        encode_decoder,
        start_of(backend.model),
        backend.n_tokens(),
        n_embedded(encoder_embedding(model)),
        getattr(model, "main_input_name", IDS),
        pad if isinstance(pad, int) else 0,
    )


def check_encoder(model: nn.Module, prompt: Prompt) -> None:
    """Refuse arguments that an encoder-decoder does not take.

    Raises:
        InputError: naming what it does take.
    """
    accepted = arguments_of(model)
    given = [*(prompt.encoder or ()), *map(decoder_name, prompt.extras)]
    unknown = sorted(set(given) - set(accepted))
    if unknown:
        known = sorted(set(named(accepted)) - set(NEVER))
        raise InputError(
            f"input holds {', '.join(unknown)}, which the forward of {type(model).__name__} does "
            f"not take; leave it out. It takes {', '.join(known)}"
        )


def of_decoder(
    model: Any, ids: Tensor | None, arguments: dict[str, Any], prompt: Prompt, device: torch.device
) -> dict[str, Any]:
    """The arguments of a run, as an encoder-decoder takes them.

    Args:
        model: the model.
        ids: tokens of the decoder [batch, pos], or None where embeddings stand for them.
        arguments: for a model of one sequence.
        prompt: with what the encoder reads; without it the encoder's output is made up.
        device: where the decoder's tokens go.
    """
    found = {decoder_name(name): value for name, value in arguments.items()}
    if ids is not None:
        found[DECODER_IDS] = ids
    if prompt.encoder is None:
        found[ENCODED] = made_up_output(model, prompt.shape[0], device)
        return found
    return found | {
        name: _of_its_own(value) if name == ENCODED else moved(value, device)
        for name, value in prompt.encoder.items()
    }


def prompt_arguments(backend: Backend, prompt: Prompt, device: torch.device) -> dict[str, Any]:
    """The arguments of ``generate`` that hold a prompt: ids, and their mask where it takes one.

    Without a mask, generate takes pad tokens of the prompt for padding.
    """
    ids, mask = prompt.input_ids.to(device), {MASK: prompt.mask.long().to(device)}
    if backend.reads_two:
        return of_decoder(backend.root, ids, mask, prompt, device)
    return {IDS: ids, **(mask if MASK in arguments_of(backend.root) else {})}


def made_up_output(model: Any, batch: int, device: torch.device) -> ModelOutput:
    """The output of an encoder on a few made-up positions, the same for every row and each time."""
    generator = torch.Generator().manual_seed(3)
    size = 1, MADE_UP_POSITIONS, _width_of_encoder(model)
    made = torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")
    dtype = next(p.dtype for p in decoder_of(model).parameters() if p.is_floating_point())
    made = made.to(torch.bfloat16).to(device, dtype)
    made = made.expand(batch, -1, -1).contiguous()
    if _projects(_encoder_of(model)):
        return BaseModelOutputWithPooling(last_hidden_state=made, pooler_output=made)
    return Vectors(last_hidden_state=made)


def _of_its_own(encoded: Any) -> Any:
    """An encoder's output whose vectors a model may write into, as Moonshine's decoder does."""
    vectors = tensor_in(encoded)
    return encoded if vectors is None else with_tensor(encoded, vectors.detach().clone())


def _encoder_of(model: Any) -> Any:
    return model.get_encoder() if hasattr(model, "get_encoder") else None


def _projects(encoder: Any) -> bool:
    """Whether an encoder fits its output to the decoder, as PP-FormulaNet's ``pooler_output``."""
    return hasattr(encoder, "multi_modal_projector") and hasattr(encoder.config, _FOR_DECODER)


def _width_of_encoder(model: Any) -> int:
    """The width of what an encoder puts out for its decoder.

    Raises:
        UnsupportedModelError: where its config does not say.
    """
    encoder = _encoder_of(model)
    config: Any = getattr(encoder, "config", None) or getattr(model, "config", None)
    names = (_FOR_DECODER,) if _projects(encoder) else _WIDTHS
    for one in (getattr(config, "text_config", None), config):
        for name in names:
            width = getattr(one, name, None)
            if isinstance(width, int):
                return width
    raise UnsupportedModelError(
        f"the config of the encoder of {type(model).__name__} does not say how wide its output is "
        f"({' or '.join(_WIDTHS)})"
    )
