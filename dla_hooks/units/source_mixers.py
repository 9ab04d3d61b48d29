"""Mixers without attention among the sources: Mamba, linear attention, RWKV.

What such a mixer writes is split over the positions whose values its recurrence took up. That is
exact with all else frozen: what decides how long a value is kept, how it is read, gates and norms.
A value is what the recurrence takes up, so "the token at position 7" is the short convolution that
ends there, where one stands before the recurrence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dla_hooks.calibration.mixer_form import MixerForm, MixerForms, last_map, mixer_forms
from dla_hooks.errors import DecompositionError, UnsupportedModelError
from dla_hooks.modules.hooks import Call, Place, Tap
from dla_hooks.modules.linear import bias_of, pull_back
from dla_hooks.modules.recurrence_watch import RecurrenceTap
from dla_hooks.modules.recurrences import RecurrenceCall, parts_of_output
from dla_hooks.modules.user_hooks import callers_hooks
from dla_hooks.modules.weights import run_device
from dla_hooks.projection.attention_reads import Reads
from dla_hooks.projection.directions import Directions, of_constants
from dla_hooks.projection.ledger import FixedRows
from dla_hooks.projection.tiles import View
from dla_hooks.residual.stream import Stream, WriteSite
from dla_hooks.results.row_runs import Run
from dla_hooks.units.base import Claim, claims_of_writes
from dla_hooks.units.parts import Parts
from dla_hooks.units.parts_plan import PartsPlan

_TILE_ELEMENTS = 2**19


@dataclass(frozen=True)
class Mixer:
    """One mixer, and the directions that its channels are projected on.

    Attributes:
        write: what it writes.
        sub: which of its block's writes that read other positions it is.
        form: how that comes to be.
        entry: the input of its last linear map.
        folded: the directions at the input of its last linear map.
        bias: that map's bias with its directions, or None.
        place: of its heads, or of itself, among all mixers' rows of the unit.
    """

    write: WriteSite
    sub: int
    form: MixerForm
    entry: Place
    folded: Directions
    bias: tuple[Directions, Tensor | None]
    place: slice

    @property
    def n(self) -> int:
        """How many rows it has for each token: one for each head, or one where it has none."""
        return max(1, self.form.n_heads)


def runs_of_mixers(mixers: Sequence[Mixer], sum: str | None, n_sources: int) -> list[Run]:
    """The rows of some mixers: of each head, of each layer, or of all of them."""
    n, found = n_sources, list[Run]()
    if sum == "heads":
        return [Run("<{}", "source", n=n, of_sources=True) for _ in mixers[:1]]
    for one in mixers:
        layer, sub = one.write.layer, one.sub
        name = f"L{layer}.{sub}" if sub else f"L{layer}"
        if sum is None and one.form.n_heads:
            labels = [(f"{name}H{h}<{{}}", h) for h in range(one.form.n_heads)]
            found += [Run(label, "head", layer, sub, h, n, True) for label, h in labels]
        else:
            found.append(Run(f"{name}<{{}}", "layer", layer, sub, None, n, True))
    return found


def mixers_of(parts: PartsPlan, layers: Sequence[int] | None) -> list[Mixer]:
    """The mixers of some layers, or of all, with their directions.

    Raises:
        UnsupportedModelError: where nothing that is asked for can be split, as a mixer cannot.
    """
    stream, found, start = parts.stream, list[Mixer](), 0
    forms = mixer_forms(stream)
    _check_some(stream, forms, layers)
    for block in stream.blocks:
        mixing = [w for w in block.writes if w.heads is not None or w.label in forms.of]
        for sub, write in enumerate(mixing):
            if write.label not in forms.of or (layers is not None and block.layer not in layers):
                continue
            form, entry = forms.of[write.label], last_map(write)
            assert entry is not None
            at_output, proj = parts.directions(write.label), entry.module
            folded = at_output.then(lambda d_KM, proj=proj: pull_back(proj, d_KM))  # type: ignore[misc]
            place = slice(start, start + max(1, form.n_heads))
            found.append(Mixer(write, sub, form, entry, folded, (at_output, bias_of(proj)), place))
            start = place.stop
    return found


def _check_some(stream: Stream, forms: MixerForms, layers: Sequence[int] | None) -> None:
    asked = [write for write in stream.writes if layers is None or write.layer in layers]
    if any(write.heads is not None or write.label in forms.of for write in asked):
        return
    for write in asked:
        if write.label in forms.reasons:
            raise UnsupportedModelError(
                f"which tokens {forms.reasons[write.label]}. Whole sublayers can be attributed "
                "(leave out unit=)"
            )


class MixerRecorder:
    """What all chosen mixers read in one run.

    They are read where a prompt runs in one piece and not under autocast (which rounds within the
    recurrence), and where they carry no hooks of the caller's; otherwise what they wrote stays in
    the remainder.

    Args:
        mixers: the mixers.
        dtype: of the numbers.
        view: all entries.
        add: takes what was read, and the number of the mixer.
    """

    def __init__(
        self,
        mixers: Sequence[Mixer],
        dtype: torch.dtype,
        view: View,
        add: Callable[[Reads, int], None],
    ) -> None:
        self._mixers, self._add, self._calls = mixers, add, list[RecurrenceCall]()
        n_rows = mixers[-1].place.stop if mixers else 0
        self._given = FixedRows(n_rows, len(view), dtype)
        self._read = FixedRows(n_rows, len(view), dtype)
        self._dtype, self._seen, self._inside = dtype, set[int](), False

    @property
    def n_left_out(self) -> int:
        """How many of their rows were not read, of each token."""
        every = enumerate(self._mixers)
        return sum(mixer.n for number, mixer in every if number not in self._seen)

    def taps(self, view: View) -> list[Tap]:
        """Every recurrence, and every last linear map."""
        if not self._mixers or view.columns != range(view.entries.prompt_shape[1]):
            return []
        device = run_device(self._mixers[0].entry.module).type
        if torch.is_autocast_enabled(device):
            return []
        modules = [mixer.write.module for mixer in self._mixers]
        first = self._mixers[0].write
        place = Place(first.module, f"the recurrence of {first.name}", first.use)
        taps: list[Tap] = [RecurrenceTap(place, modules, self._see_call)]
        for number, mixer in enumerate(self._mixers):
            if next(callers_hooks(mixer.write.module), None) is None:
                taps.append(Tap(_input_of(mixer), self._begin))
                taps.append(Tap(mixer.entry.ahead, self._look(number, mixer, view)))
        return taps

    def finish(self, parts: Parts) -> tuple[Tensor, list[Claim]]:
        """What the rows of the mixers are worth in all [row, N], and what must hold of them."""
        scale_N = parts.reading.scale_N
        read_RN = self._read.gathered(scale_N.device) / scale_N
        seen = [mixer for number, mixer in enumerate(self._mixers) if number in self._seen]
        if not seen:
            return read_RN, []
        given_RN = self._given.gathered(scale_N.device) / scale_N
        rows = torch.cat([torch.arange(m.place.start, m.place.stop, device="cpu") for m in seen])
        rows = rows.to(scale_N.device)
        names = [f"the tokens that {m.write.name} reads" for m in seen for _ in range(m.n)]
        # Recurrences are computed in float32, also in models of float64.
        claim = Claim(names, read_RN[rows], given_RN[rows], through_norm=True)
        wrote_LN = torch.stack([given_RN[m.place].sum(0) for m in seen])
        biases_LK = of_constants([mixer.bias for mixer in seen])
        if biases_LK is not None:
            wrote_LN += parts.entries.of_target(biases_LK.to(wrote_LN.device)) / scale_N
        writes = [(m.write.label, f"what {m.write.name} reads", False) for m in seen]
        return read_RN, [claim, *claims_of_writes(writes, wrote_LN, parts)]

    def _begin(self, _: Call) -> None:
        self._inside = True

    def _see_call(self, call: RecurrenceCall) -> None:
        if self._inside:  # the mixer itself holds all of this until its last map has run
            self._calls.append(call)

    def _look(self, number: int, mixer: Mixer, view: View) -> Callable[[Call], None]:
        def see(seen: Call) -> None:
            calls, z = self._calls[:], seen.entered
            self._calls.clear()
            self._inside = False
            if not calls or any(call.goes_on for call in calls):
                return
            self._seen.add(number)
            for reads, given_HT in _reads(calls, z, view, mixer, self._dtype):
                index, device = reads.tile.index, z.device
                self._given.on(device)[mixer.place, index] = given_HT
                self._read.on(device)[mixer.place, index] = reads.values_HTS.sum(-1)
                self._add(reads, number)

        return see


def _input_of(mixer: Mixer) -> Place:
    write = mixer.write
    return Place(write.module, write.name, write.use, before=True)


def _reads(
    calls: Sequence[RecurrenceCall], z: Tensor, view: View, mixer: Mixer, dtype: torch.dtype
) -> Iterator[tuple[Reads, Tensor]]:
    """Yield what the entries in view read, by tiles; and what each head gives by z itself [H, T].

    Raises:
        UnsupportedModelError: where the recurrence does not line up with the prompt.
        DecompositionError: where what its output is multiplied by cannot be told.
    """
    batch, width = view.entries.prompt_shape[0], len(view.columns)
    y = torch.cat([call.left for call in calls], -1)
    if y.shape != z.shape or len(y) != batch or y.shape[1] < width:
        raise UnsupportedModelError(
            f"the recurrence of {mixer.write.name} puts out the shape {list(y.shape)}, which does "
            f"not line up with a prompt of shape {list(view.entries.prompt_shape)}; layers= leaves "
            "this layer out"
        )
    n_sources, n = y.shape[1], mixer.n
    for row, columns, tile in view.by_prompt(max(1, _TILE_ELEMENTS // n_sources), z.device):
        places = columns + (n_sources - width)
        z_TC = z[row].index_select(0, places).to(dtype)
        u_TC = tile.spread(mixer.folded.at(tile, z.device)).expand(len(places), -1)
        given_HT = (u_TC * z_TC).unflatten(-1, (n, -1)).sum(-1).T
        if mixer.form.scaled:
            y_TC = y[row].index_select(0, places).to(dtype)
            unclear_TC = (y_TC == 0) & (z_TC == 0)
            if bool(unclear_TC.any()):
                _check_unclear(calls, row, unclear_TC.any(0), mixer)
            u_TC = u_TC * (z_TC / y_TC).masked_fill(unclear_TC, 0)
        found = list[tuple[Tensor, Tensor]]()
        for call, u in zip(calls, u_TC.split([c.left.shape[-1] for c in calls], -1), strict=True):
            found.append(parts_of_output(call, row, places, u, n if len(calls) == 1 else 1))
        values, weights = (torch.stack(each) for each in zip(*found, strict=True))
        first = view.columns.stop - n_sources
        yield Reads(row, tile, values.sum(0), weights.mean(0), first), given_HT


def _check_unclear(
    calls: Sequence[RecurrenceCall], row: int, unclear_C: Tensor, mixer: Mixer
) -> None:
    v_SC = torch.cat([call.value[row] for call in calls], -1)
    if bool((v_SC.ne(0).any(0) & unclear_C).any()):
        raise DecompositionError(
            f"the recurrence of {mixer.write.name} put out exactly zero in a channel whose values "
            "are not zero, so that what its output is multiplied by cannot be told; leave this "
            "layer out (layers=)"
        )
