"""One number that a linear module makes of the stream: a router's logit, a neuron's pre-activation.

    y_c = W[c] . N(x) + b[c]

is a reading of the stream x through the norm N ahead of the module, if there is one.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, nn

from dla_hooks.calibration.linear_readers import FirstOutput, reader_of
from dla_hooks.errors import InputError
from dla_hooks.modules.hooks import Call
from dla_hooks.modules.linear import check_readable, declared_width, output_width, rows
from dla_hooks.projection.directions import Directions
from dla_hooks.residual.stream import Stream
from dla_hooks.targets.base import Request, Target, Witness
from dla_hooks.targets.stream_target import StreamTarget
from dla_hooks.targets.token_sets import TokenSets
from dla_hooks.targets.tokens import TokenTarget


class Output(Request):
    """A channel of a linear module that reads the stream, mostly through its block's norm.

    Routers, the gate and up projections of an MLP (a neuron's pre-activation), query, key and value
    projections, and a classifier's or reward model's score are such modules. What the model itself
    puts out there, ahead of hooks of yours, is the ``logit`` of the result. Blocks behind it do not
    run.

    Args:
        module: the module's path, as ``model.named_modules()`` has it.
        channel: which of its outputs.

    Raises:
        InputError: when it meets the model, for a path or channel that is not there.
        UnsupportedModelError: for a module that does not read the stream linearly.

    >>> import dla_hooks
    >>> model, tokenizer = dla_hooks.demo.load()
    >>> result = dla_hooks.direct_logit_attribution(
    ...     model, "The keys near the cabinet", dla_hooks.Output("transformer.h.2.mlp.c_fc", 5),
    ...     tokenizer=tokenizer)
    >>> result.answer
    ["Output('transformer.h.2.mlp.c_fc', 5)"]
    """

    def __init__(self, module: str, channel: int) -> None:
        if not isinstance(module, str):
            raise InputError(f"module must be the path of a module, got {module!r:.60}")
        try:
            self.module, self.channel = module, operator.index(channel)
        except TypeError:
            raise InputError(f"channel must be an int, got {channel!r:.40}") from None

    def __repr__(self) -> str:
        return f"Output({self.module!r}, {self.channel})"

    def on(self, stream: Stream) -> Target:
        """The channel on a located model."""
        module = self._find(stream)
        if module is stream.unembed:
            self._check_channel(stream.vocabulary)
            channel = self.channel % stream.vocabulary
            # The model may multiply what the module puts out: the logit is k times that.
            return TokenTarget(
                stream, TokenSets.made_of([([channel], [1 / stream.logit_scale])], (), False)
            )
        reader = reader_of(stream, module, self.module)
        says = declared_width(module) is not None  # as linear modules do; routers say nothing
        linear = module if says else FirstOutput(module, stream.d_model)
        check_readable(linear, self.module)
        self._check_channel(output_width(linear))
        channel = self.channel % output_width(linear)
        W_KM, b_K = rows(linear, torch.tensor([channel], device="cpu"), stream.work_dtype)

        def look(call: Call) -> Tensor:
            return call.left[..., channel : channel + 1]

        one = Directions.held(torch.ones(1, 1, dtype=stream.work_dtype, device=W_KM.device))
        witness = Witness(reader.place, look, one)
        return StreamTarget(reader.stream, reader.norm, W_KM, witness, repr(self), b_K)

    def _find(self, stream: Stream) -> nn.Module:
        for model in dict.fromkeys((stream.backend.model, stream.backend.root)):
            every: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
            found = every.get(self.module)
            if found is not None:
                return found
        last = self.module.rpartition(".")[2]
        alike = [path for path, _ in stream.model.named_modules() if path.endswith(last) and last]
        hint = f"; did you mean {alike[0]!r}?" if alike else ""
        raise InputError(
            f"{stream.backend.name} has no module {self.module!r}; print(model) shows them{hint}"
        )

    def _check_channel(self, n: int) -> None:
        if not -n <= self.channel < n:
            raise InputError(f"channel {self.channel} of {self.module} is not there: it has {n}")
