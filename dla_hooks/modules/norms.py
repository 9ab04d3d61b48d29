"""Norms, measured instead of recognised by their names.

Every norm that is accepted has the form

    N(x) = gamma * (x - centre(x)) / s(x) + beta,   s(x) = one number per position,

with ``centre`` the mean over d_model (a LayerNorm) or nothing (an RMSNorm). Its constants are
found by running the norm on a few made-up vectors: ``beta = N(0)``; on a vector of +-A with mean
zero, for A so large that the epsilon vanishes, ``(x - centre(x)) / s`` is +-1, exactly and in any
dtype, which leaves gamma; and a norm centres if adding a constant to its input changes nothing.
The scale of a real position is read off what the norm made of it (:func:`frozen_scale`). Only a
vector of zeros leaves no scale to read; there it is the root of the epsilon, which small vectors
show. Parts that cancel, as after a hook that silences a block, are divided by it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dla_hooks.errors import UnsupportedModelError
from dla_hooks.modules.autocast import outside_autocast
from dla_hooks.modules.faults import as_refusal
from dla_hooks.modules.vjp import past_hooks
from dla_hooks.modules.weights import run_device
from dla_hooks.tolerance import misfit_tolerance

_AMPLITUDE = 2.0**12
_AMPLITUDE_HALF = 2.0**7
"""Their squares are far larger than any epsilon, yet fit float32 (the second, float16)."""
_SMALL = (2.0**-20, 2.0**-14, 2.0**-10, 2.0**-6, 2.0**-3)
"""Among their squares is one near to any epsilon."""


@dataclass(frozen=True)
class Norm:
    """The measured constants of a norm.

    Attributes:
        gamma: the gain [d_model].
        beta: the bias [d_model].
        centred: whether the mean over d_model is subtracted first.
        name: the module's path, for messages.
        at_zero: the scale of a vector of zeros: the root of the epsilon.
    """

    gamma: Tensor
    beta: Tensor
    centred: bool
    name: str
    at_zero: float = 1.0

    def pull_back(self, d_KM: Tensor) -> Tensor:
        """Directions after the norm as directions before it, without the division by the scale."""
        folded = d_KM * self.gamma.to(d_KM)
        return folded - folded.mean(-1, keepdim=True) if self.centred else folded

    def at_scale_one(self, x: Tensor) -> Tensor:
        """gamma * (x - centre(x)): the norm's output, less beta, times its scale."""
        centred = x - x.mean(-1, keepdim=True) if self.centred else x
        return centred * self.gamma.to(x)


def probe(module: nn.Module, d_model: int, name: str, dtype: torch.dtype) -> Norm:
    """Measure the constants of a norm.

    Args:
        module: the norm. It runs on a few synthetic vectors, without its hooks.
        d_model: the width of the stream.
        name: the module's path, for the message of an error.
        dtype: in which the result is kept (at least float32).

    Raises:
        UnsupportedModelError: when the norm is none of the form above.
    """
    parameter = next((p for p in module.parameters() if p.is_floating_point()), None)
    device = run_device(module)
    run_dtype = parameter.dtype if parameter is not None else dtype

    signs = torch.ones(d_model, dtype=torch.float32, device=device)
    signs[1::2] = -1.0
    if d_model % 2:  # an odd width has no +-1 vector of mean zero: leave one channel out, in turn
        signs[-1] = 0.0
    other = signs.roll(1)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(d_model, generator=generator, dtype=torch.float32, device="cpu").to(device)
    amplitude = _AMPLITUDE_HALF if run_dtype == torch.float16 else _AMPLITUDE
    large = (signs * amplitude, other * amplitude)
    small = [signs * size for size in _SMALL]
    made_up = torch.stack(
        (torch.zeros_like(signs), *large, -large[0], -large[1], *small, noise, noise + 2.0)
    )
    what = f"{name} ({type(module).__name__}) cannot be run on made-up vectors of width {d_model}"
    with as_refusal(what), past_hooks(module), torch.no_grad():
        out = module.forward(made_up[None].to(run_dtype))[0]
        answers = out.to(dtype)
    # The dtype of a norm without parameters shows only in its output.
    run_dtype = max(run_dtype, out.dtype, key=lambda one: torch.finfo(one).eps)
    if answers.shape != made_up.shape:
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__}) returns vectors of width {answers.shape[-1]}, not "
            f"{d_model}: it is no norm"
        )
    beta, first, second, minus_first, minus_second, *of_small, of_noise, of_shifted = answers

    rms = signs.to(dtype).square().mean().sqrt()  # one, or sqrt(1 - 1/d_model) for an odd width
    usable = signs != 0
    if not bool(torch.isfinite(beta).all()):  # an epsilon of zero leaves N(0) undefined
        beta = torch.where(usable, first + minus_first, second + minus_second) / 2
    pattern = torch.where(usable, signs, other).to(dtype)
    gamma = (torch.where(usable, first, second) - beta) * pattern * rms
    moved = (of_noise - of_shifted).norm()
    # The shift of 2 changes an RMSNorm's output by about its own size; rounding, by far less.
    rounding = 16 * torch.finfo(run_dtype).eps + 1e-4
    centred = bool(moved <= rounding * (of_noise.norm() + beta.norm()))
    norm = Norm(gamma, beta, centred, name)
    if torch.equal(answers[1:], made_up[1:].to(run_dtype).to(dtype)):
        return Norm(torch.ones_like(gamma), torch.zeros_like(beta), False, name)  # not a norm

    norm = replace(norm, at_zero=_scale_at_zero(norm, torch.stack(small), torch.stack(of_small)))
    x = made_up[-2:].to(run_dtype).to(dtype)
    _, misfit = frozen_scale(norm, x, answers[-2:])
    tolerance = misfit_tolerance(run_dtype)
    if not bool(torch.isfinite(answers[1:]).all()):
        return norm  # weights that are not finite are found, and named, after the run
    if misfit > tolerance:
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__}) is not a LayerNorm or RMSNorm in disguise: "
            f"gamma * (x - centre) / s + beta misses its output by {misfit:.1e} of its size. "
            "A stream read through any other function cannot be split into parts exactly."
        )
    return norm


@outside_autocast
def _scale_at_zero(norm: Norm, x_NM: Tensor, y_NM: Tensor) -> float:
    """The root of the epsilon, from small vectors and what the norm made of them."""
    x_NM = x_NM.to(y_NM)
    squares, (s, _) = x_NM.square().mean(-1), frozen_scale(norm, x_NM, y_NM)
    seen = torch.isfinite(s)
    if not bool(seen.any() and norm.gamma.any()):
        return 1.0  # its weights are not finite, or every product is zero, whatever the scale
    # Rounding hides the epsilon beneath a larger square, and the output beneath a larger epsilon:
    # in 16 bits a bias may hide it whole.
    off = (squares.sqrt() / s - 0.5**0.5).abs()
    best = int(off.masked_fill(~seen, torch.inf).argmin())
    return float((s[best].square() - squares[best]).clamp(min=0).sqrt())


@outside_autocast
def frozen_scale(norm: Norm, x_NM: Tensor, y_NM: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the scale that a norm divided by, from its input and output.

    With ``a = gamma * (x - centre(x))`` the norm's output is ``a / s + beta``; s is the least
    squares fit ``|a|^2 / (a . (y - beta))``, whose rounding errors average out over d_model.

    Args:
        norm: the norm's constants.
        x_NM: inputs [n, d_model], in at least float32.
        y_NM: the outputs for them.

    Returns:
        s [n], and the largest part of an output that the fit leaves unexplained (relative to the
        output's largest entry) [], which is rounding alone for a norm of the right form. It stays
        on the device: a number asked for in a hook would make the device wait.
    """
    if not len(x_NM):
        return x_NM.new_zeros(0), x_NM.new_zeros(())
    # Of few kinds of operations: between a model's own, each costs most when it is first used.
    largest_of = torch.linalg.vector_norm
    a = norm.at_scale_one(x_NM)
    y = y_NM - norm.beta.to(y_NM)
    square = (a * a).sum(-1, keepdim=True)
    s = (square / (a * y).sum(-1, keepdim=True)).masked_fill_(square == 0, norm.at_zero)
    unexplained = largest_of(y.addcdiv_(a, s, value=-1), torch.inf, -1)
    most = largest_of(y_NM, torch.inf, -1).add_(torch.finfo(y_NM.dtype).tiny)
    misfits = unexplained.div_(most)
    return s[:, 0], misfits[0] if len(misfits) == 1 else largest_of(misfits, torch.inf)


def largest(misfits: list[Tensor]) -> float:
    """The largest of several misfits; NaN if any is."""
    if len(misfits) == 1:
        return float(misfits[0])
    return float(torch.stack([misfit.cpu() for misfit in misfits]).max()) if misfits else 0.0
