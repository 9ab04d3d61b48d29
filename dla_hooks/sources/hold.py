"""Holds activations of generated tokens until it is known which tokens these are.

A token is known only after the logits, and taps fire before. While a model generates, what taps
will read is therefore held, one column of each activation, for some steps. Then it is shown, as the
columns of a chunk of the text are. Activations are copied, since a model may add to them in place.
Keys and values are those of the model's own cache, held by reference.

Decided here: which column of an activation is the newest (:func:`last_column`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from torch import Tensor

from dla_hooks.errors import HookError, UnsupportedModelError
from dla_hooks.modules.attention_interface import AttentionCall, AttentionTap
from dla_hooks.modules.hooks import Call, Place, Tap, hidden_in, hidden_out, is_ours
from dla_hooks.modules.outputs import tensor_in
from dla_hooks.modules.weights import whole_activation
from dla_hooks.residual.hooked import decoders, places_hooked
from dla_hooks.residual.stream import Stream

Key = tuple[bool, Place]
"""Whether it is an attention function, and the place."""


@dataclass(frozen=True)
class Column:
    """The newest column of one call of a module.

    Attributes:
        entered: what entered it [batch or 1, 1, ...]; None where it is no activation.
        left: what left it; None ahead of the module.
    """

    entered: Tensor | None
    left: Tensor | None


Step = Mapping[Key, "Column | AttentionCall"]
"""What is held of one step of the model, by place."""


class Hold:
    """Holds the newest column at every place that some taps read, at each forward pass.

    Args:
        stream: the located model.
        taps: taps whose places are held; the taps themselves are not called.
        batch: rows of the batch.

    Attributes:
        paused: set while the model runs for another purpose: nothing is then held.
        ran: whether any forward pass was seen.
        logits_BV: the newest logits [batch, vocabulary] that the model put out.
    """

    def __init__(self, stream: Stream, taps: Sequence[Tap], batch: int) -> None:
        self._stream, self._batch = stream, batch
        self._taps: dict[Key, _HoldingTap] = {}
        names = dict.fromkeys(decoders(stream), "last_hidden_state")
        names |= dict.fromkeys((stream.backend.model, stream.backend.root), "logits")
        for tap in taps:
            name = names.get(tap.place.module)
            new = _HoldingTap(tap.place, self, tap.optional, name)
            self._taps.setdefault(key_of(tap), new).optional &= tap.optional
        self.paused = self.ran = False
        self.logits_BV: Tensor | None = None
        self._width = self._passes = 0
        self._begun = False

    @property
    def one_by_one(self) -> bool:
        """Whether keys and values are held, so that steps should be shown as they come."""
        return any(is_attention for is_attention, _ in self._taps)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Hold within a ``with`` block, in this thread."""
        root, stream = Place(self._stream.backend.root, "the model"), self._stream
        looks: list[Tap] = [_Every(root.entered.ahead, self._begin)]
        if stream.ahead or places_hooked(stream):
            looks.append(_Every(stream.last, self._check_width))
        for (is_attention, _), tap in self._taps.items():
            looks.append(_AttentionTap(tap) if is_attention else tap)
        looks.append(_Every(root, self._end))
        with ExitStack() as stack:
            for look in looks:
                stack.callback(look.put_on(threading.get_ident()).remove)
            yield

    def take(self) -> Step:
        """What the newest forward pass has shown, once.

        Raises:
            HookError: for a place that was not seen, or more often than in one pass.
        """
        if self._passes != 1 and (self._begun or not self._passes):
            raise HookError(
                f"{self._stream.backend.name} ran {self._passes} times for one new token, so that "
                "which run made it cannot be told; attribute the finished text instead"
            )
        self._passes, self._begun = 0, True  # a prompt may run in pieces, a new token does not
        found: dict[Key, Column | AttentionCall] = {}
        for key, tap in self._taps.items():
            if tap.held is not None:
                found[key] = tap.held
            if not tap.held_as_expected:
                raise HookError(
                    f"{tap.place.name} ran {tap.fired} times for one new token, not "
                    f"{tap.place.use.of} as expected, so what it writes was not seen. A compiled "
                    "or skipped module does this; run the plain eager model"
                )
            tap.held = None
        return found

    def column(self, x: Tensor) -> Tensor | None:
        """A copy of the newest column of an activation of the present pass; None for ids."""
        if not x.is_floating_point():
            return None
        return last_column(x, self._batch, self._width)

    def _begin(self, call: Call) -> None:
        if self.paused:
            return
        name = "decoder_input_ids" if self._stream.backend.reads_two else "input_ids"
        given = call.kwargs.get(name, next(iter(call.args), None))
        if not isinstance(given, Tensor) or given.ndim < 2 or len(given) != self._batch:
            raise UnsupportedModelError(
                f"{self._stream.backend.name} generates from other arguments than a batch of "
                f"{self._batch} rows of ids, so its new tokens cannot be told apart; attribute the "
                "finished text instead"
            )
        self._width, self.logits_BV, self.ran = given.shape[1], None, True
        self._passes += 1
        for tap in self._taps.values():
            tap.fired, tap.held = 0, None

    def _check_width(self, call: Call) -> None:
        if self.paused:
            return
        shape, stream = call.activation.shape, self._stream
        wide = {rows * (n + self._width) for rows in (1, self._batch) for n in (0, stream.ahead)}
        if shape[:-1].numel() not in wide:
            raise UnsupportedModelError(
                f"a hook of yours on {places_hooked(stream)} makes other positions than the text "
                f"has: a stream of shape {list(shape)} for {[self._batch, self._width]} ids. Which "
                "position is which cannot be told; take the hook off"
            )

    def _end(self, call: Call) -> None:
        if self.paused:
            return
        logits = tensor_in(call.output, ("logits",))
        if logits is None or logits.ndim != 3:
            raise UnsupportedModelError(
                f"{self._stream.backend.name} returns no logits [batch, pos, vocabulary] while "
                "it generates; attribute the finished text instead"
            )
        logits = whole_activation(logits)
        self.logits_BV = logits[:, -1].clone() if logits.shape[1] > 1 else logits[:, -1]


class _Every(Tap):
    """A tap that is called at each run of its module."""

    def count(self, call: Call) -> None:
        self.on_activation(call)


class _HoldingTap(Tap):
    """Holds one place."""

    def __init__(self, place: Place, hold: Hold, optional: bool, name: str | None) -> None:
        super().__init__(place, _unused, optional=optional)
        self._hold, self._name = hold, name
        self.held: Column | AttentionCall | None = None

    @property
    def held_as_expected(self) -> bool:
        """Whether it ran as often as the place says in the newest pass."""
        runs = (self.place.use.of, *((0,) if self.optional else ()))
        return self.fired in runs or (not self.place.use.of and self.fired > 0)

    def count(self, call: Call) -> None:
        if self._hold.paused:
            return
        self.fired += 1
        if self.fired == self.place.use.nth + 1:
            left = None if self.place.before else self._hold.column(self._left(call))
            self.held = Column(self._entered(call), left)

    def count_attention(self, call: AttentionCall) -> None:
        """Hold what the attention function got, of the newest query."""
        if self._hold.paused:
            return
        self.fired += 1
        if self.fired == self.place.use.nth + 1:
            self.held = _newest_query(call)

    def _left(self, call: Call) -> Tensor:
        found = None
        if self._name is not None:  # of several tensors, the one that is read further on
            found = tensor_in(call.output, (self._name,))
        return whole_activation(hidden_out(call.output) if found is None else found)

    def _entered(self, call: Call) -> Tensor | None:
        try:
            found = hidden_in(call.args, call.kwargs)
        except HookError:  # it is called without tensors, and what leaves it is read
            return None
        return self._hold.column(whole_activation(found))


class _AttentionTap(AttentionTap):
    """Holds the calls of one attention function."""

    def __init__(self, holding: _HoldingTap) -> None:
        super().__init__(holding.place, holding.count_attention)
        self._holding = holding

    def count_call(self, call: AttentionCall) -> None:
        """Count one call of the function, and hold it."""
        self._holding.count_attention(call)


def last_column(x: Tensor, batch: int, width: int) -> Tensor | None:
    """A copy of the newest column of an activation, with an axis for the columns.

    Args:
        x: [batch, pos, ...]; or [1, pos, d] or [pos, d], shared by the rows; or [batch * pos, d].
            The model may put positions of its own before, or leave out all but the last.
        batch: rows of the batch.
        width: columns that are run.

    Returns:
        [batch or 1, 1, ...]; None for what has no such axes.
    """
    if x.ndim < 2:
        return None
    if x.ndim > 2 and (len(x) == batch or (len(x) == 1 and x.shape[1] == width)):
        return x[:, -1:].clone()
    if x.ndim == 2 and len(x) == width:
        return x[None, -1:].clone()
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) % batch:
        return None
    return rows.view(batch, -1, x.shape[-1])[:, -1:].clone()


def _newest_query(call: AttentionCall) -> AttentionCall:
    """A call of the attention function, with its last query alone.

    What a mask of flex attention says depends on a query's place, so that all are kept there.
    """
    if hasattr(call.mask, "mask_mod"):
        return replace(call, output=call.output.clone())
    bias = call.options.get("position_bias")
    options = dict(call.options)
    if isinstance(bias, Tensor):
        options["position_bias"] = bias[:, :, -1:]
    mask = call.mask
    if isinstance(mask, Tensor) and mask.ndim == 4:
        mask = mask[:, :, -1:]
    return replace(
        call,
        query=call.query[:, :, -1:],
        output=call.output[:, -1:].clone(),
        mask=mask,
        options=options,
    )


def key_of(tap: Tap) -> Key:
    """The place of a tap. Only hooks of others tell what is ahead of them from what is behind."""
    place, module = tap.place, tap.place.module
    tables = module._forward_hooks, module._forward_pre_hooks
    hooked = any(not is_ours(hook) for table in tables for hook in list(table.values()))
    where = place._replace(name="", first=place.first and hooked)
    return isinstance(tap, AttentionTap), where


def _unused(call: Call) -> None:
    raise AssertionError("this tap holds calls")
