"""The arguments of a model's forward pass: which it takes, and those that a prompt brings along."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dla_hooks.errors import DLAError, InputError, UnsupportedModelError
from dla_hooks.inputs.extras import EMBEDS, MASK, NEVER, POSITIONS, described, moved
from dla_hooks.inputs.prompts import Prompt, check_ids
from dla_hooks.modules.signature import Arguments, arguments_of, named, takes_any, takes_keywords

_OF_TEXT = {EMBEDS, "token_type_ids", "cross_attention_states"}
"""Arguments beside which positions are counted as for ids alone."""
_OF_ENCODER = {"input_ids", MASK}
"""What an encoder of text reads: checked before, so that no run fails of it."""
_PIXELS, _IMAGE, _PLACES = "pixel_values", "image_embeds", "image_embeds_position_mask"
_OFFSET = "rope_deltas"
_PLACEHOLDER = re.compile(r"(image|video|audio|vision|speech|media)\w*_token_(id|index)")


def check_extras(model: nn.Module, prompt: Prompt, n_tokens: int, attention: Any) -> None:
    """Refuse further arguments that a model does not take.

    Args:
        model: the model.
        prompt: with further arguments.
        n_tokens: the number of tokens that it embeds.
        attention: the name of its attention implementation, where it has one.

    Raises:
        InputError: naming what it does take.
        TokenError: for ids that are neither tokens nor placeholders of images and the like.
    """
    accepted = arguments_of(model)
    names = set(named(accepted))
    if takes_keywords(accepted):
        # What it does not name it hands on to the decoder inside.
        inside = getattr(model, "model", None)
        names.update(named(arguments_of(inside)) if isinstance(inside, nn.Module) else ())
    unknown = sorted(set(prompt.extras) - names)
    if unknown and not takes_any(model):
        known = sorted(names - set(NEVER) - {"input_ids"})
        raise InputError(
            f"input holds {', '.join(unknown)}, which the forward of {type(model).__name__} does "
            f"not take; leave it out. It takes {', '.join(known) or 'nothing besides ids'}"
        )
    masks = prompt.extras.get(MASK)
    for mask in masks.values() if isinstance(masks, Mapping) else [masks]:
        if attention == "eager" and isinstance(mask, Tensor) and mask.dtype == torch.bool:
            raise InputError(
                "eager attention adds a mask with 4 axes to its scores, so that bools would add "
                "their ones; give floats: 0 where a position is read, a large negative number else"
            )
    if not prompt.embedded:
        ids = prompt.input_ids[prompt.mask]
        check_ids(ids[~torch.isin(ids, torch.tensor(_placeholders(model), device="cpu"))], n_tokens)


def extra_arguments(
    prompt: Prompt, chunk: range, accepted: Arguments, device: torch.device
) -> dict[str, Any]:
    """The arguments of a run besides ids: mask, positions, and what the prompt brings along.

    Args:
        prompt: the whole batch.
        chunk: the columns that are run; those before are in the model's cache.
        accepted: the arguments that the forward takes.
        device: where they go.
    """
    found: dict[str, Any] = {}
    here = slice(chunk.start, chunk.stop)
    if prompt.padded:
        found[MASK] = prompt.mask[:, : chunk.stop].long().to(device)
        # A model that reads images counts positions itself, by where they are.
        if POSITIONS in accepted and set(prompt.extras) <= _OF_TEXT:
            found[POSITIONS] = prompt.position_ids()[:, here].to(device)
    for name, value in prompt.extras.items():
        found[name] = moved(value[:, here] if name == EMBEDS else value, device)
    if _PLACES in accepted and _PIXELS in accepted and not found.keys() & {_PIXELS, _IMAGE}:
        # Kosmos-2 does not run on text alone: an image of no positions stands nowhere.
        batch = len(prompt.input_ids)
        found[_IMAGE] = torch.zeros(batch, 0, 1, dtype=torch.float32, device=device)
        found[_PLACES] = torch.zeros(batch, len(chunk), dtype=torch.long, device=device)
    return found


def call_with(
    ids: Tensor | None, arguments: dict[str, Any], accepted: Arguments
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """What a model is called with: arguments by position, and by name.

    Args:
        ids: token ids; None where embeddings stand among the arguments.
        arguments: all others, by name.
        accepted: the arguments that the forward takes.
    """
    first = next(iter(accepted.values()), None)
    if ids is None:
        return (), arguments
    is_named = first is None or first.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD
    if is_named or "input_ids" in accepted:
        return (), {"input_ids": ids, **arguments}
    return (ids,), arguments  # the first argument has another name, as nanoGPT's `idx`


@contextmanager
def refusing(model: nn.Module, prompt: Prompt) -> Iterator[None]:
    """Turn what a forward raises, because of arguments that it may not take, into a refusal.

    Raises:
        InputError: where the prompt brings arguments along.
        UnsupportedModelError: where a forward that names none does not take a mask.
    """
    try:
        yield
    except (DLAError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        encoded = {n: v for n, v in (prompt.encoder or {}).items() if n not in _OF_ENCODER}
        if not prompt.extras and not encoded:
            if isinstance(error, TypeError) and prompt.padded and takes_any(model):
                raise no_mask(model) from error
            raise
        raise InputError(
            f"the forward of {type(model).__name__} fails on this input (ids {list(prompt.shape)}, "
            f"{described({**prompt.extras, **encoded})}): {type(error).__name__}: {error}"
        ) from error


@contextmanager
def without_traces(model: nn.Module, *, in_chunks: bool) -> Iterator[None]:
    """Leave a model without what a run with images keeps for the tokens that it generates next.

    It is an offset of positions, which later runs against a cache would add.

    Args:
        model: the model.
        in_chunks: whether the run goes on from an earlier chunk: then an offset that is there
            belongs to another prompt, and is put aside.
    """
    places = [vars(one) for one in (model, model._modules.get("model")) if one is not None]
    kept = [(place, place[_OFFSET]) for place in places if _OFFSET in place]
    for place, _ in kept if in_chunks else ():
        place[_OFFSET] = None
    try:
        yield
    finally:
        for place, offset in kept:
            place[_OFFSET] = offset


def no_mask(model: nn.Module) -> UnsupportedModelError:
    """The refusal of padding, for a model that takes no mask."""
    return UnsupportedModelError(
        f"{type(model).__name__} takes no attention mask, so that padding would change its logits; "
        "run prompts of different lengths one at a time"
    )


def _placeholders(model: nn.Module) -> list[int]:
    """Ids that stand for images and the like; they need no embedding."""
    settings: Any = getattr(model, "config", None)
    named = vars(settings).items() if hasattr(settings, "__dict__") else ()
    return [v for name, v in named if isinstance(v, int) and _PLACEHOLDER.fullmatch(name)]
