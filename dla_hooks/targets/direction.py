"""A direction in the stream: a probe, a steering or refusal direction, a dictionary's encoder row.

The stream before block l is read as it is, ``x . v``, or as the block reads it, through its norm:

    y . v = x . d / s + beta . v,     d = centre(gamma * v)

with the norm's scale s frozen (:mod:`dla_hooks.projection.reading_point` has the symbols).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dla_hooks.calibration.early_streams import stream_before, stream_within
from dla_hooks.calibration.sublayers import norm_before
from dla_hooks.errors import InputError, UnsupportedModelError
from dla_hooks.inputs.plain import check_dense
from dla_hooks.modules.hooks import Place
from dla_hooks.residual.stream import Stream
from dla_hooks.targets.base import Request, Target
from dla_hooks.targets.stream_target import StreamTarget

FINAL = "final_post"


class Direction(Request):
    """A direction in the stream: ``answer_tokens=dla_hooks.Direction(vector, at="8_pre")``.

    Everything that was written before that place is attributed; what comes after does not run, nor
    do hooks there. The ``logit`` of the result is then the number ``x . vector``.

    Args:
        vector: the direction [d_model]: a tensor, an array or a list.
        at: where the stream is read: a label of the ``layer`` unit. ``"8_pre"`` is what block 8
            reads, ``"8_mid"`` what its MLP reads, ``"final_post"`` the last stream.
        through_norm: read it as the block does, through its norm with the scale frozen.

    Raises:
        InputError: for a vector that is none, or holds NaN; when it meets a model, for another
            width or a label that the model lacks.
        UnsupportedModelError: for a norm where there is none, or a stream that nothing shows.

    >>> import dla_hooks, torch
    >>> model, tokenizer = dla_hooks.demo.load()
    >>> probe = torch.randn(model.config.n_embd)
    >>> result = dla_hooks.direct_logit_attribution(
    ...     model, "The keys near the cabinet", dla_hooks.Direction(probe, at="2_pre"),
    ...     tokenizer=tokenizer)
    >>> result.labels[-1]
    '1_mlp_out'
    """

    def __init__(self, vector: Any, at: str = FINAL, through_norm: bool = False) -> None:
        self.vector, self.at, self.through_norm = as_vector(vector), at, bool(through_norm)
        if not isinstance(at, str):
            raise InputError(f"at must be a label of the layer unit, as '8_pre'; got {at!r:.40}")

    def __repr__(self) -> str:
        through = ", through_norm=True" if self.through_norm else ""
        return f"Direction([{len(self.vector)}], at={self.at!r}{through})"

    def on(self, stream: Stream) -> Target:
        """The direction on a located model."""
        if len(self.vector) != stream.d_model:
            raise InputError(
                f"the direction has {len(self.vector)} entries, but the stream of "
                f"{stream.backend.name} is {stream.d_model} wide"
            )
        ended, norm = self._read_at(stream)
        return StreamTarget(ended, norm, self.vector[None], None, repr(self))

    def _read_at(self, stream: Stream) -> tuple[Stream, Place | None]:
        """The stream up to the reading point, and the norm behind it."""
        if self.at == FINAL:
            return stream, stream.final_norm if self.through_norm else None
        for number, block in enumerate(stream.blocks):
            within = self.at == f"{block.layer}_mid"
            if within or self.at == f"{block.layer}_pre":
                norm = self._norm(stream, number, within) if self.through_norm else None
                end = stream_within if within else stream_before
                return end(stream, number, None if norm is None else norm.entered), norm
        layers = [block.layer for block in stream.blocks]
        raise InputError(
            f"{self.at!r:.40} is no place of the stream of {stream.backend.name}; places are "
            f"'{layers[0]}_pre' to '{layers[-1]}_pre', '{layers[0]}_mid' to '{layers[-1]}_mid' in "
            f"sequential blocks, and {FINAL!r}"
        )

    def _norm(self, stream: Stream, number: int, within: bool) -> Place:
        try:
            return norm_before(stream, number, mlp=within)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(
                f"no norm of block {stream.blocks[number].layer} reads {self.at} of "
                f"{stream.backend.name}; leave out through_norm"
            ) from error


def as_vector(vector: Any, name: str = "vector") -> Tensor:
    """A vector of finite numbers, as a tensor of at least float32 on the CPU.

    Raises:
        InputError: for anything else.
    """
    check_dense(vector, name)
    try:
        found = torch.as_tensor(vector, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} must hold numbers, got {type(vector).__name__}") from error
    if found.ndim != 1 or found.is_complex() or not found.numel():
        raise InputError(f"{name} must have one axis [d_model], got shape {list(found.shape)}")
    found = found.to(torch.promote_types(found.dtype, torch.float32))
    if not bool(torch.isfinite(found).all()):
        raise InputError(f"{name} holds NaN or infinity")
    return found
