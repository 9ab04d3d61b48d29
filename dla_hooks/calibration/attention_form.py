"""How z comes from what the attention function returns, measured on a short made-up run.

In most models z is what attention returned, head after head. Some multiply it by a gate, or norm
it, before the output projection. That can be read through where it multiplies every channel by
a number that does not depend on the values (but for a norm's scale, which is frozen). So two rows
are run that differ in what attention returned, channel by channel: z must differ likewise.

Kept per version of a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dla_hooks.calibration.prompt import short_prompt
from dla_hooks.calibration.two_rows import as_first_row, noise
from dla_hooks.modules.attention_interface import AttentionCall, Look, watching
from dla_hooks.modules.attention_rows import attention_weights, head_blocks
from dla_hooks.modules.edits import Edit, edited
from dla_hooks.modules.hooks import Call, Place, Tap, Use, tapped
from dla_hooks.modules.version import Remembered
from dla_hooks.residual.head_site import HeadSite
from dla_hooks.residual.stream import Stream

_LENGTH = 8
_ANY_USE = Use(0, 0)


@dataclass(frozen=True)
class AttentionForm:
    """How the z of one write comes to be.

    Attributes:
        scaled: whether something between the attention function and z multiplies each channel;
            otherwise z is what attention returned.
        dtype: in which the weights are computed: models of float64 may do it in float32.
    """

    scaled: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class AttentionForms:
    """What is measured of one model's attention, by the label of the write.

    Attributes:
        of: how z comes to be.
        reasons: why the tokens that its heads read cannot be told apart.
        unseen: writes that called no attention function, as linear attention does.
    """

    of: dict[str, AttentionForm]
    reasons: dict[str, str]
    unseen: tuple[str, ...]


_known: Remembered[AttentionForms] = Remembered()


def attention_forms(stream: Stream) -> AttentionForms:
    """Measure every write that has heads; once per version of a model.

    Args:
        stream: the located model, with measured head widths.
    """
    key = stream.architecture
    return _known.of(stream.model, stream.version, lambda: _measure(stream.whole), key)


def _measure(stream: Stream) -> AttentionForms:
    sites = {write.label: write.heads for write in stream.writes if write.heads is not None}
    run = _Run(stream, sites)
    with watching(run.looks), tapped(run.taps), edited(run.edits):
        stream.backend.run_synthetic(run.prompt, None)
    forms = AttentionForms({}, {}, tuple(label for label in sites if not run.calls.get(label)))
    for label, calls in run.calls.items():
        if not calls:
            continue
        try:
            forms.of[label] = _form(stream, sites[label], calls, run.z[label])
        except _NotReadable as error:
            forms.reasons[label] = f"{sites[label].name}: {error}"
    return forms


class _NotReadable(Exception):
    """Why one write's sources cannot be told apart."""


@dataclass(frozen=True)
class _Seen:
    """One call.

    Attributes:
        output: as it was changed [2, pos, head, d].
        recomputed: what its weights and values give for the last query of row 0 [head, d], by the
            dtype of the softmax.
        reason: why nothing could be recomputed.
        n_sources: how many positions were read.
    """

    output: Tensor
    recomputed: dict[torch.dtype, Tensor]
    reason: str
    n_sources: int


class _Run:
    """A run of two rows that reach each attention alike, and leave it differently.

    Attributes:
        calls: of each write, by its label: what its attention function was seen to do before z.
        z: of each write, what entered its output projection [2, pos, channel].
    """

    def __init__(self, stream: Stream, sites: dict[str, HeadSite]) -> None:
        self.prompt = short_prompt(stream, batch=2, length=_LENGTH)
        self.prompt.input_ids.copy_(self.prompt.input_ids[:1].expand_as(self.prompt.input_ids))
        self.calls: dict[str, list[_Seen]] = {}
        self.z: dict[str, Tensor] = {}
        self._waiting: dict[nn.Module, list[_Seen]] = {}
        self._dtype = stream.work_dtype
        attentions = {site.attention: None for site in sites.values()}
        self.looks: dict[nn.Module, Look] = {module: self._see for module in attentions}
        self.taps = [
            Tap(Place(site.proj, site.name, site.use, before=True), self._keep(label, site))
            for label, site in sites.items()
        ]
        same = {block.module: None for block in stream.blocks} | attentions
        self.edits = [Edit(module, as_first_row, at_input=True) for module in same]

    def _see(self, call: AttentionCall) -> Tensor:
        output = call.output.detach()
        reason = _is_odd(call)
        dtypes = () if reason else (self._dtype, torch.float32)
        recomputed = {dtype: _recomputed(call, self._dtype, dtype) for dtype in dtypes}
        changed = output.clone()
        changed[1:] *= noise(output.shape[2:]).to(output)
        n_sources = call.key.shape[2] if call.key.ndim == 4 else 0
        seen = _Seen(changed.double().cpu().clone(), recomputed, reason, n_sources)
        self._waiting.setdefault(call.module, []).append(seen)
        return changed

    def _keep(self, label: str, site: HeadSite) -> Callable[[Call], None]:
        def keep(call: Call) -> None:
            self.calls[label] = self._waiting.pop(site.attention, [])
            z = site.flat(call.entered).detach().double().cpu()
            self.z[label] = z.reshape(2, -1, z.shape[-1]).clone()

        return keep


def _is_odd(call: AttentionCall) -> str:
    """Why what an attention function got is not queries, keys and values side by side, or ""."""
    shapes = [list(x.shape) for x in (call.query, call.key, call.value)]
    odd = f"its attention function gets queries, keys and values of the shapes {shapes}"
    if any(len(shape) != 4 for shape in shapes):
        return odd
    (batch, n_heads, _, _), (_, n_shared, n_sources, _), v_shape = shapes
    fits = batch == 2 and n_heads % n_shared == 0 and v_shape[1:3] == [n_shared, n_sources]
    return "" if fits else odd


def _recomputed(call: AttentionCall, dtype: torch.dtype, softmax_dtype: torch.dtype) -> Tensor:
    """What the weights and values give for the last query of row 0 [head, d]."""
    last, found = torch.tensor([call.query.shape[2] - 1], device=call.query.device), []
    for block in head_blocks(call, range(call.query.shape[1]), 1):
        p_HTS = attention_weights(call, 0, last, block, dtype, softmax_dtype)
        v_VSD = call.value[0, block.shared].to(dtype)
        p_VGS = p_HTS.reshape(len(v_VSD), -1, p_HTS.shape[-1])
        found.append(torch.bmm(p_VGS, v_VSD).flatten(0, 1))
    return torch.cat(found).double().cpu()


def _form(stream: Stream, site: HeadSite, calls: list[_Seen], z: Tensor) -> AttentionForm:
    """How z comes from what attention returned.

    Raises:
        _NotReadable: where it is anything else.
    """
    if len(calls) > 1:
        raise _NotReadable(
            f"its attention function is called {len(calls)} times in one layer, and what is made "
            "of the outputs is no plain sum over tokens (differential attention does this)"
        )
    (seen,) = calls
    if seen.reason:
        raise _NotReadable(seen.reason)
    if stream.backend.reads_two and not site.cross and seen.n_sources != seen.output.shape[1]:
        raise _NotReadable(
            "it reads the tokens of the decoder and the positions of the encoder in one attention, "
            "so that its rows would name two sequences"
        )
    a, rounding = seen.output, torch.finfo(stream.product_dtype).eps
    if a.ndim != 4 or a.shape[2:] != (site.n_heads, z.shape[-1] // site.n_heads):
        raise _NotReadable(
            f"its attention function returns the shape {list(a.shape)}, and {z.shape[-1]} channels "
            f"of {site.n_heads} heads enter the output projection"
        )
    off = {dtype: float((own - a[0, -1]).norm()) for dtype, own in seen.recomputed.items()}
    dtype = min(off, key=off.__getitem__)
    if not off[dtype] <= (1e-4 + 16 * rounding) * float(a[0, -1].norm()):
        raise _NotReadable(
            "its attention function does more than softmax(scale * q k^T) v with its mask, cap "
            "and sinks"
        )
    z = z[:, -a.shape[1] :].unflatten(-1, a.shape[2:])
    if _close(z, a, 4 * rounding):
        return AttentionForm(False, dtype)
    live = (a[0] != 0) & (a[1] != 0)
    moved, expected = z[1], z[0] * torch.where(live, a[1] / a[0], 0)
    # A norm's scale changes, too: one number for each head, or for all of them.
    scale = (moved * expected).sum(-1, keepdim=True) / expected.square().sum(-1, keepdim=True)
    if not _close(moved, expected * scale.nan_to_num(), 1e-4 + 16 * rounding):
        raise _NotReadable(
            "between its attention function and the output projection stands something else than "
            "a gate or a norm that multiplies each channel"
        )
    return AttentionForm(True, dtype)


def _close(one: Tensor, other: Tensor, relative: float) -> bool:
    return bool((one - other).norm() <= relative * other.norm())
