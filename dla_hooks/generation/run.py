"""One generation: the model's own ``generate``, with a look at each new token.

Taps are put on once for all of it. What they read is held for a few steps, until the tokens are
known, and is then measured as the last columns of the text (:mod:`dla_hooks.sources.held`).

Where a model's cache does not give the numbers of one run over the text, or a unit reads more than
activations, the finished text is attributed instead, in a run of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from dla_hooks.attribution import Plan
from dla_hooks.backends import Conventions
from dla_hooks.backends.two_sequences import prompt_arguments
from dla_hooks.call import ReadModel
from dla_hooks.errors import DLAError, HookError, InputError
from dla_hooks.generation.options import check_growing_cache, value_of
from dla_hooks.generation.stops import Stop
from dla_hooks.generation.text import Text
from dla_hooks.inputs.answers import Answers
from dla_hooks.inputs.prompts import Prompt
from dla_hooks.measure.asked import Asked as AskedOfPrompt
from dla_hooks.modules.compiled import eagerly
from dla_hooks.modules.faults import described_error
from dla_hooks.modules.weights import run_device
from dla_hooks.results.ranked import Result
from dla_hooks.sources.base import Source
from dla_hooks.sources.held import Held
from dla_hooks.sources.hold import Hold, Step
from dla_hooks.sources.live import Live, chunk_size_for, why_not_in_chunks
from dla_hooks.targets.token_sets import TokenSets
from dla_hooks.targets.tokens import TokenTarget
from dla_hooks.units.base import Unit
from dla_hooks.units.plan import Recording

_STEPS = 16
"""New tokens that are held before they are measured together."""
RUNNER_UP = "runner-up"

Emit = Callable[[range, Mapping[str, Result]], None]
"""Takes some new tokens, and their results by unit."""


@dataclass(frozen=True)
class Asked:
    """What is asked of a generation.

    Attributes:
        read: the model.
        units: by the key of their result.
        conventions: of the call.
        check: whether the parts are held against the model's logits.
        max_new_tokens: the most new tokens.
        against: a token, or :data:`RUNNER_UP`, or None.
        stops: what ends a row.
        options: further arguments of the model's ``generate``.
        streams: whether each token is measured at once.
    """

    read: ReadModel
    units: Mapping[str, Unit]
    conventions: Conventions
    check: bool
    max_new_tokens: int
    against: int | str | None
    stops: tuple[Stop, ...]
    options: Mapping[str, Any]
    streams: bool


class Generation:
    """One generation, to be run once.

    Args:
        asked: what is asked.
        prompt: the batch.

    Attributes:
        text: what has been generated so far.
        longest: the most new tokens.
    """

    def __init__(self, asked: Asked, prompt: Prompt) -> None:
        self._asked, self.text, self._read = asked, Text(prompt), asked.read
        self.longest = asked.max_new_tokens
        # All that no token changes is measured before the model generates.
        nothing = torch.zeros((), dtype=torch.long, device="cpu")
        plan = self._plan(Answers(nothing, None if asked.against is None else nothing))
        self._holds = self._can_hold()
        taps = []
        n_steps = asked.max_new_tokens
        if self._holds:
            text = Text(prompt)
            text.add(torch.zeros(prompt.shape[0], dtype=torch.long, device="cpu"), None)
            data = plan._data
            places = text.places(range(1), prompt.mask, single=False)
            entries = data.target.align(places, prompt.shape)
            recording = Recording(data, entries, lambda place: None)
            taps = recording.taps(recording.view)
            n_steps = 4 if recording.needs_all_logits else _STEPS
        self._hold = Hold(self._read.stream, taps, prompt.shape[0])
        if self._hold.one_by_one:
            check_growing_cache(self._read.backend.model, asked.options)
        self._at_once = 1 if asked.streams or self._hold.one_by_one else n_steps
        self._steps: list[Step] = []
        self._logits: list[tuple[int, Tensor]] = []
        self._measured = 0

    def run(self, emit: Emit, count: Callable[[], Any]) -> Tensor:
        """Generate.

        Args:
            emit: takes the results of some new tokens, in order.
            count: called at each new token.

        Returns:
            The new tokens [batch, n] on the CPU, as ``generate`` gives them.

        Raises:
            InputError: for options that the model's ``generate`` refuses.
            HookError: where it does something else than one forward pass for each token.
        """

        def see(ids: Tensor, scores: Any) -> Tensor:
            if not self._is_over():
                self._see(ids, scores)
                count()
                if len(self.text) - self._measured == self._at_once or self._is_over():
                    self._measure(emit)
            return self.text.ended_B.to(ids.device)

        width, backend = self.text.width, self._read.backend
        sequences: Any = None
        looks = self._holds or self._asked.against == RUNNER_UP
        with ExitStack() as stack:
            stack.enter_context(eagerly(backend.compiled))
            stack.enter_context(self._hold.on() if looks else nullcontext())
            try:
                sequences = backend.model.generate(**self._arguments(see))
            except (DLAError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                if self._hold.ran or len(self.text):
                    raise
                raise InputError(
                    f"model.generate fails on this call, before any token: {described_error(error)}"
                ) from error
        if len(self.text) > self._measured:  # it ran out of time
            self._measure(emit)
        new: Tensor = sequences[:, width:].cpu()
        self._check_tokens(new)
        return new

    def _arguments(self, see: Callable[[Tensor, Any], Tensor]) -> dict[str, Any]:
        asked, prompt, backend = self._asked, self.text.prompt, self._read.backend
        device = run_device(backend.embedding())
        found = {
            **asked.options,
            **prompt_arguments(backend, prompt, device),
            "max_new_tokens": asked.max_new_tokens,
            "stopping_criteria": StoppingCriteriaList([_Watch(see)]),
            "return_dict_in_generate": False,
        }
        return found

    def _can_hold(self) -> bool:
        """Whether steps against the model's cache have the numbers of one run over the text."""
        units = self._asked.units.values()
        if not all(unit.by_column or type(unit).prepare is Unit.prepare for unit in units):
            return False
        prompt, n = self.text.prompt, self._asked.max_new_tokens
        more = torch.ones(prompt.shape[0], n, dtype=torch.long, device="cpu")
        ids, mask = (
            torch.cat((prompt.input_ids, 0 * more), 1),
            torch.cat((prompt.mask, more == 1), 1),
        )
        longer = replace(prompt, input_ids=ids, mask=mask)
        return why_not_in_chunks(self._read.stream, longer) is None

    def _is_over(self) -> bool:
        return bool(self.text.ended_B.all()) or len(self.text) == self._asked.max_new_tokens

    def _see(self, ids: Tensor, scores: Any) -> None:
        """Take one new token of each row."""
        asked, text, hold = self._asked, self.text, self._hold
        new_B = ids[:, -1].cpu()
        text.add(new_B, self._against(new_B))
        for stop in asked.stops:
            text.ended_B |= stop(ids, scores, text.width)
        if not self._holds:
            return
        self._steps.append(hold.take())
        if asked.check and hold.logits_BV is not None:
            # Of the tokens that are measured together, the first and the last are checked.
            self._logits = [*self._logits[:1], (len(text) - 1, hold.logits_BV)]

    def _against(self, new_B: Tensor) -> Tensor | None:
        against, logits_BV = self._asked.against, self._hold.logits_BV
        if against is None:
            return None
        if against != RUNNER_UP:
            return torch.full_like(new_B, int(against))
        if logits_BV is None:
            raise HookError("the model put out no logits for a new token, so it has no runner-up")
        first_B, second_B = logits_BV.topk(2).indices.cpu().unbind(-1)
        return torch.where(second_B == new_B, first_B, second_B)

    def _measure(self, emit: Emit) -> None:
        """Measure the tokens that have come since the last time."""
        steps, text = range(self._measured, len(self.text)), self.text
        single = self._asked.streams
        self._hold.paused = True  # the model may run to be measured anew
        try:
            plan, source = self._plan(text.answers(steps, single=single)), self._source(steps)
            places = text.places(steps, source.prompt.mask, single=single)
            found = plan._attribute(source, AskedOfPrompt(plan._question, places))
            self._read = plan._read
        finally:
            self._hold.paused = False
        self._measured, self._steps, self._logits = len(text), [], []
        emit(steps, found)

    def _source(self, steps: range) -> Source:
        prompt, stream = self.text.whole(steps.stop - 1), self._read.stream
        if not self._holds:
            whole = self.text.whole(steps.stop)  # sparse attention may depend on the last token
            limit = stream.position_limit
            if not self._asked.streams and (limit is None or whole.shape[1] <= limit):
                prompt = whole
            return Live(stream, prompt, chunk_size_for(stream, prompt, None))
        columns = [self.text.width - 1 + step for step, _ in self._logits]
        logits = [logits_BV for _, logits_BV in self._logits]
        return Held(
            prompt,
            self._steps,
            torch.tensor(columns, dtype=torch.long, device="cpu"),
            torch.stack(logits, 1) if logits else torch.zeros(0, dtype=torch.float32, device="cpu"),
        )

    def _plan(self, answers: Answers) -> Plan:
        asked, centred = self._asked, self._asked.conventions.center_unembed
        return Plan(
            self._read.backend.model,
            self._read,
            lambda stream: TokenTarget(
                stream,
                TokenSets.of(answers.correct, answers.incorrect),
                center_unembed=centred,
            ),
            asked.units,
            False,
            asked.conventions,
            asked.check,
        )

    def _check_tokens(self, new: Tensor) -> None:
        """Refuse a generation that is not the one that was seen.

        Raises:
            HookError: saying what differs.
        """
        text, n = self.text, len(self.text)
        if new.shape[1] != n or not bool(((new == text.new_BS) | ~text.real_BS).all()):
            raise HookError(
                f"{self._read.backend.name}.generate returned {new.shape[1]} new tokens, and "
                f"{n} were seen, or other ones; attribute the finished text instead"
            )
        timed = value_of(self._read.backend.model, self._asked.options, "max_time") is not None
        if n < self._asked.max_new_tokens and not bool(text.ended_B.all()) and not timed:
            raise HookError(
                f"{self._read.backend.name}.generate stopped after {n} new tokens for a reason "
                "that is not known; give what ends a text as stop="
            )


class _Watch(StoppingCriteria):
    """Sees each new token, and says which rows end with it."""

    def __init__(self, see: Callable[[Tensor, Any], Tensor]) -> None:
        self._see = see

    def __call__(self, input_ids: Any, scores: Any, **more: Any) -> Any:
        return self._see(input_ids, scores)
