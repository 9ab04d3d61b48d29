"""What adapters in front of a sublayer's last map write through it, with pattern and gate frozen.

A head's z is a sum over the tokens that it reads, each with its weight and its value. So what an
adapter adds to the values makes its own part of z. A gated hidden layer is a product of the gate
and of what it multiplies; so what an adapter adds there makes its own part of that layer, too. Both
parts go on through the base's last map.

An adapter's term is B a with few channels a. Of each position that may be read no more than a is
kept, and only until the sublayer's last map runs (in chunks, until the last of them).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dla_hooks.calibration.attention_form import AttentionForm, attention_forms
from dla_hooks.calibration.head_widths import with_head_widths
from dla_hooks.calibration.inner_adapters import Inner, inner_adapters
from dla_hooks.calibration.last_maps import neuron_sites
from dla_hooks.calibration.norm_constants import norm_at
from dla_hooks.errors import UnsupportedModelError
from dla_hooks.modules.adapters import at_work, inside, low_rank, terms
from dla_hooks.modules.hooks import Place
from dla_hooks.modules.linear import check_readable, input_width, pull_back
from dla_hooks.modules.onto import onto
from dla_hooks.projection.adapted import AdaptedModule
from dla_hooks.projection.directions import Directions
from dla_hooks.projection.way_out import WayOut
from dla_hooks.residual.stream import Stream, WriteSite
from dla_hooks.units.parts_plan import PartsPlan


class InnerSite:
    """The adapters in front of one sublayer's last map, with what their terms are projected on.

    Args:
        parts: the parts of the stream.
        write: what the sublayer writes.
        last: where its last map is read: the map's input.
        linear: the map; of an adapted one, the module inside.
        factor: what its output is multiplied by [d_model] or one; None is one.
        d_head: the width of a head; of hidden layers, of all channels.
        modules: the adapted modules.
        attention: the attention module, and how z comes to be; None for hidden layers.

    Attributes:
        label: the write's.
        width: of what enters the last map.
        names: of the rows: the adapter, and where it is.
    """

    def __init__(
        self,
        parts: PartsPlan,
        write: WriteSite,
        last: Place,
        linear: nn.Module,
        factor: Tensor | float | None,
        d_head: int,
        modules: list[tuple[nn.Module, Inner, nn.Module | None]],
        attention: tuple[Place, AttentionForm] | None = None,
    ) -> None:
        self.label, self.last, self.attention = write.label, last, attention
        post_norm = None if write.post_norm is None else write.place
        norm = None if post_norm is None else norm_at(parts.stream, post_norm)
        self.way = WayOut(parts.directions(write.label), [], post_norm, norm)
        check_readable(linear, last.name)

        def fold(d_KM: Tensor) -> Tensor:
            by = factor.to(d_KM) if isinstance(factor, Tensor) else factor
            return pull_back(linear, d_KM if by is None else d_KM * by)

        self.folded, self.width = self.way.at_output.then(fold), input_width(linear)
        self.modules = [InnerModule(*one, write, self.folded, d_head) for one in modules]
        self.names = [name for module in self.modules for name in module.names]


class InnerModule:
    """One adapted module in front of a sublayer's last map.

    Attributes:
        module: as PEFT wrapped it.
        inner: where its channels are.
        gate: what multiplies these; None for values.
        adapters: those at work in it.
        place: its output.
        n_shared: how many heads of values there are.
        at_read: what is read of it is projected on, as if with weight one.
        at_output: the same for its output.
        names: of their rows.
        adapted: its terms, projected on these.
    """

    def __init__(
        self,
        module: nn.Module,
        inner: Inner,
        gate: nn.Module | None,
        write: WriteSite,
        folded: Directions,
        d_head: int,
    ) -> None:
        self.module, self.inner = module, inner
        self.gate = None if gate is None else Place(gate, inner.gate or "", write.use)
        self.adapters = at_work(module)
        self.place = Place(module, inner.path, write.use)
        self.names = [f"{name}@{inner.name}" for name in self.adapters]
        self.n_shared = len(inner.channels) // d_head
        n_out = low_rank(module, self.adapters[0])[1].shape[0]

        def of_group(u_KI: Tensor) -> Tensor:
            # The heads of a group read the same values.
            return u_KI.view(len(u_KI), self.n_shared, -1, d_head).sum(2).flatten(1)

        def scatter(u_KC: Tensor) -> Tensor:
            channels = self.channels(u_KC.device)
            return u_KC.new_zeros(len(u_KC), n_out).index_add_(1, channels, u_KC)

        self.at_read = folded.then(of_group)
        self.at_output = self.at_read.then(scatter)
        self.adapted = AdaptedModule(module, inner.path, write.use, self.at_output)

    def channels(self, device: torch.device) -> Tensor:
        """Which of the module's channels are read, on a device."""
        return onto(self.inner.channels, device)

    def matrices(self, name: str, like: Tensor) -> tuple[Tensor, Tensor]:
        """What an adapter adds: A [r, d_in], and B [d_out, R], with all factors."""
        A, B = (one.to(like) for one in low_rank(self.module, name))
        factor = self.adapted.factor(name)
        return A, B if factor is None else B * factor.to(B)[:, None]


def inner_sites(parts: PartsPlan, ended: dict[str, list[nn.Module]]) -> list[InnerSite]:
    """Where adapters in front of last maps have a direct part.

    Args:
        parts: the parts of the stream.
        ended: the adapted modules that each write ends with, by its label.
    """
    stream = parts.stream
    found, asked = list[InnerSite](), inner_adapters(stream)
    if not asked:
        return found
    modules = dict(stream.model.named_modules())
    neurons, heads = neuron_sites(stream), _with_forms(stream, set(asked))
    for write in stream.writes:
        inner = [
            (modules[one.path], one, None if one.gate is None else modules[one.gate])
            for one in asked.get(write.label, [])
        ]
        if write.label in heads and inner:
            own, form = heads[write.label]
            assert own.heads is not None
            site = own.heads
            name = f"the attention function of {site.name.rpartition('.')[0] or site.name}"
            attention = Place(site.attention, name, site.use), form
            linear, factor = _base_of(site.linear, ended.get(write.label, []))
            last = site.place.entered
            found.append(
                InnerSite(parts, write, last, linear, factor, site.d_head, inner, attention)
            )
        elif write.label in neurons and inner:
            place = neurons[write.label]
            if (place.norm is None) != (write.post_norm is None):
                continue  # the MLP ends in a norm of its own
            linear, factor = _base_of(place.linear, ended.get(write.label, []))
            by = place.factor if factor is None else factor * place.factor
            width = len(inner[0][1].channels)
            found.append(InnerSite(parts, write, place.place, linear, by, width, inner))
    return found


def _base_of(linear: nn.Module, ended: list[nn.Module]) -> tuple[nn.Module, Tensor | None]:
    """The base's own part of a last map, and what multiplies it."""
    if linear not in ended:
        return linear, None
    return inside(linear), terms(linear)[0].factor


def _with_forms(stream: Stream, among: set[str]) -> dict[str, tuple[WriteSite, AttentionForm]]:
    """The writes whose heads' weights can be computed anew, and how their z comes to be."""
    if not any(w.label in among and w.heads is not None for w in stream.writes):
        return {}
    try:
        sized = with_head_widths(stream)
        forms = attention_forms(sized).of
    except UnsupportedModelError:  # its heads cannot be told apart
        return {}
    if stream.product_dtype == torch.float16:
        # What attention returns may vanish there, and then its gate cannot be told.
        forms = {label: form for label, form in forms.items() if not form.scaled}
    own = {w.label: w for w in sized.writes if w.heads is not None and w.label in among}
    return {label: (write, forms[label]) for label, write in own.items() if label in forms}
