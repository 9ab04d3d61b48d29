"""Check a declaration against a model, block by block.

A few tokens are run, and every claim of the declaration is recomputed from the activations. Each
block's output is its input plus its writes. Heads sum to their write. The readout gives the model's
logits. A failed check uses this to name the place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dla_hooks.calibration.head_widths import head_widths
from dla_hooks.calibration.norm_constants import norm_at
from dla_hooks.calibration.prompt import made_up_vectors, short_prompt
from dla_hooks.errors import UnsupportedModelError
from dla_hooks.inputs.prompts import Prompt
from dla_hooks.modules.hooks import Call, Tap, tapped
from dla_hooks.modules.linear import check_readable, pull_back, value_at
from dla_hooks.modules.norms import frozen_scale
from dla_hooks.modules.weights import run_device
from dla_hooks.residual.gains import times
from dla_hooks.residual.head_site import HeadSite
from dla_hooks.residual.stream import Stream, WriteSite
from dla_hooks.targets.token_sets import TokenSets
from dla_hooks.targets.tokens import read_out

_MARKS = {True: "ok ", False: "BAD", None: "?  "}
_LONGEST = 8
_TOKENS = 64


@dataclass(frozen=True)
class Line:
    """One claim that was verified.

    Attributes:
        place: a module's path, or a layer.
        claim: the equation that should hold there.
        gap: the difference of its two sides, over the size of the expected one.
        ok: whether that is rounding; None where the model's form does not allow the check.
        note: the observation when it is not, or the reason why it cannot be checked.
    """

    place: str
    claim: str
    gap: float
    ok: bool | None
    note: str = ""


@dataclass(frozen=True)
class Verification:
    """The report of :func:`verify`.

    Attributes:
        model: the model's class and type.
        dtype: of its weights.
        lines: all claims, from the first block to the logits.
    """

    model: str
    dtype: str
    lines: tuple[Line, ...]

    @property
    def ok(self) -> bool:
        """True if every claim that can be checked holds."""
        return all(line.ok is not False for line in self.lines)

    @property
    def largest_gap(self) -> float:
        """The largest relative gap."""
        return max(line.gap for line in self.lines)

    def diagnosis(self) -> str:
        """One sentence: the first claim that does not hold, or that all of them do."""
        for line in self.lines:
            if line.ok is False:
                broken = f"First break: {line.place}: {line.claim}, but is off by {line.gap:.1e}."
                return f"{broken} {line.note}".rstrip()
        return (
            "Block by block a few tokens of it add up, so look for hooks of your own that change "
            "activations, or for rounding in a long or very deep model."
        )

    def __str__(self) -> str:
        width = max(len(line.place) for line in self.lines)
        claims = max(len(line.claim) for line in self.lines)
        head = f"{self.model}, {self.dtype}: {'adds up' if self.ok else 'DOES NOT ADD UP'}"
        rows = [
            f"  {_MARKS[line.ok]}  {line.place:<{width}}  {line.claim:<{claims}}"
            f"  {line.gap:.1e}  {line.note}".rstrip()
            for line in self.lines
        ]
        return "\n".join([head, *rows])

    __repr__ = __str__


def trace_report(stream: Stream, prompt: Prompt | None = None) -> Verification:
    """Run a few tokens and verify every claim of a located stream.

    Args:
        stream: the located model.
        prompt: the beginning of its first row is run; None runs synthetic tokens.
    """
    if prompt is None:
        prompt = short_prompt(stream, length=_LONGEST)
    else:
        ids = prompt.input_ids[0][prompt.mask[0]][None, :_LONGEST]
        mask = torch.ones_like(ids, dtype=torch.bool)
        prompt = Prompt(ids, mask, made_up_vectors(stream, 1))
    trace = _Trace(stream)
    logits = trace.run(prompt).double().cpu()
    lines = [*trace.blocks(), *trace.heads(), *_unseen_heads(stream), trace.readout(logits)]
    return Verification(
        model=stream.backend.name,
        dtype=str(stream.dtype).removeprefix("torch."),
        lines=tuple(lines),
    )


def _unseen_heads(stream: Stream) -> list[Line]:
    """The layers whose heads cannot be seen, or told apart; their components add up all the same.

    An attribution to heads refuses these.
    """
    found = head_widths(stream)
    names = {write.label: write.name for write in stream.writes}
    hidden = [
        (label, f"attention runs here, but there is no {path}")
        for label, path in found.hidden.items()
    ]
    claim = "heads can be told apart"
    return [
        Line(names[label], claim, 0.0, None, note)
        for label, note in (*hidden, *found.reasons.items())
    ]


class _Trace:
    """The activations of a few tokens, kept whole because they are few."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.seen: dict[tuple[str, Any], tuple[Tensor, Tensor]] = {}
        rounding = torch.finfo(stream.coarsest_dtype).eps
        self.tolerance = max(4 * rounding, 1e-5 if rounding > 1e-9 else 1e-9)
        products = torch.finfo(stream.product_dtype).eps
        self.product_tolerance = max(4 * products, self.tolerance)
        self.logit_tolerance = max(16 * rounding, 1e-5)
        # A few random directions and tokens expose a wrong map as well as all of them do.
        generator = torch.Generator().manual_seed(3)
        self.directions = torch.randn(
            4, stream.d_model, generator=generator, dtype=torch.float64, device="cpu"
        )
        self.tokens = torch.randperm(stream.vocabulary, generator=generator, device="cpu")[:_TOKENS]

    def run(self, prompt: Prompt) -> Tensor:
        stream = self.stream
        self.length = prompt.input_ids.shape[1]
        taps = [Tap(stream.final_norm, self._see("norm", 0))]
        for i, block in enumerate(stream.blocks):
            taps.append(Tap(stream.input_of(block), self._see("in", i)))
        for write in stream.writes:
            taps.append(Tap(write.place, self._see("write", write.label)))
            if write.heads is not None:
                taps.append(Tap(write.heads.place, self._see("proj", write.label, write.heads)))
                post_norm = write.heads.post_norm_place
                if post_norm is not None:
                    taps.append(Tap(post_norm, self._see("post", write.label)))
        with tapped(taps):
            try:
                return stream.backend.run_synthetic(prompt, torch.arange(self.length, device="cpu"))
            except UnsupportedModelError:  # some models return the last logits only
                for tap in taps:
                    tap.fired = 0
                return stream.backend.run_synthetic(prompt, None)

    def blocks(self) -> list[Line]:
        """Output = input + writes, block by block."""
        lines = []
        last = len(self.stream.blocks) - 1
        for i, block in enumerate(self.stream.blocks):
            before = self._out("in", i)
            after = self._in("norm", 0) if i == last else self._in("in", i + 1)
            kept = times(before, block.gain)
            if block.constant is not None:
                kept = kept + block.constant
            writes = [times(self._out("write", w.label), w.response) for w in block.writes]
            gap = _relative(after - kept - sum(writes), after)
            ok = gap <= self.tolerance * max(1.0, _relative(before, after))
            names = " + ".join(w.label.split("_", 1)[1] for w in block.writes)
            gained = "input" if block.gain is None else "gain * input"
            note = "" if ok else self._blame(block.writes, writes, after - kept)
            lines.append(Line(block.name, f"output = {gained} + {names}", gap, ok, note))
        return lines

    def heads(self) -> list[Line]:
        """Projection(z) = sum of heads + bias = the sublayer's write."""
        lines = []
        for write in self.stream.writes:
            if write.heads is None:
                continue
            claim = f"heads + bias = {write.label}"
            z = self._in("proj", write.label)
            before_norm = write.heads.post_norm is not None
            seen = self.seen["post" if before_norm else "write", write.label]
            wrote = seen[0] if before_norm else seen[1]
            directions, name = self.directions.to(self._device(write)), write.heads.name
            try:
                check_readable(write.heads.linear, name)
                nothing = z.new_zeros(z.shape[-1])
                bias = value_at(write.heads.linear, nothing).double().cpu()
                u = pull_back(write.heads.linear, directions, name).cpu()
            except UnsupportedModelError as error:  # the components may still add up
                lines.append(Line(name, claim, 0.0, None, str(error)))
                continue
            split, whole = z @ u.T + self.directions @ bias, wrote @ self.directions.T
            gap = _relative(split - whole, whole)
            ok = gap <= 4 * self.product_tolerance
            lines.append(Line(name, claim, gap, ok))
        return lines

    def readout(self, logits: Tensor) -> Line:
        """k * (W_U N(x) + b), capped, = the model's logits."""
        stream = self.stream
        readout = read_out(stream, TokenSets.of(self.tokens), center_unembed=False)
        # Only the last positions: a model may put positions of its own before the prompt.
        d_KM = readout.d_KM
        x, y = (t[-len(logits[0]) :].to(d_KM) for t in self.seen["norm", 0])
        scale_N, _ = frozen_scale(norm_at(stream, stream.final_norm), x, y)
        own = x @ d_KM.T / scale_N[:, None] + readout.bias_K
        own = own.double().cpu()
        if stream.softcap is not None:
            own = stream.softcap * torch.tanh(own / stream.softcap)
        theirs = logits.reshape(-1, stream.vocabulary)[:, self.tokens]
        gap = _relative(own - theirs, theirs)
        fit = float((own * theirs).sum() / own.square().sum())
        ok = gap <= self.logit_tolerance
        note = "" if ok else f"The model's logits are {fit:.4g} times ours at best."
        return Line(stream.final_norm.name, "unembedding of the norm = logits", gap, ok, note)

    def _blame(self, sites: tuple[WriteSite, ...], writes: list[Tensor], change: Tensor) -> str:
        """Find the write with a wrong factor by least squares, or report a missing write."""
        columns = torch.stack([write.reshape(-1) for write in writes], dim=1)
        target = change.reshape(-1, 1)
        factors = torch.linalg.lstsq(columns, target).solution[:, 0]
        unexplained = _relative(target[:, 0] - columns @ factors, target)
        if unexplained > 0.05:
            return (
                "No multiple of the writes explains the change: the block adds something that is "
                "not declared, or scales the stream itself."
            )
        for site, factor in zip(sites, factors.tolist(), strict=True):
            if abs(factor - 1) > 1e-3:
                return (
                    f"{site.label} enters the stream {factor:.4g} times as strongly as asked: a "
                    "gate that depends on the tokens, or a hook that changes activations."
                )
        return "Every write enters as declared, but something small is added besides."

    def _see(self, kind: str, key: Any, heads: HeadSite | None = None) -> Callable[[Call], None]:
        def see(call: Call) -> None:
            x = call.entered if heads is None else heads.flat(call.entered)
            y = call.activation
            flat = [t.detach().double().cpu().reshape(-1, t.shape[-1]).clone() for t in (x, y)]
            self.seen[kind, key] = (flat[0], flat[1])

        return see

    def _in(self, kind: str, key: Any) -> Tensor:
        return self.seen[kind, key][0]

    def _out(self, kind: str, key: Any) -> Tensor:
        return self.seen[kind, key][1]

    def _device(self, write: WriteSite) -> torch.device:
        assert write.heads is not None
        return run_device(write.heads.linear)


def _relative(difference: Tensor, whole: Tensor) -> float:
    size = float(whole.norm())
    return float(difference.norm()) / size if size else float(difference.norm())
