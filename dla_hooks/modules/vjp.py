"""Linear modules without a plain weight: adapted, quantised, parametrized.

A direction at the output of such a module becomes one at its input by the module's own
vector-Jacobian product. The product is accepted only if the module is linear and its backward pass
is the transpose of its forward pass. Extra rows in the same call check both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dla_hooks.errors import UnsupportedModelError
from dla_hooks.modules.asides import aside
from dla_hooks.modules.compiled import eagerly, is_compiled
from dla_hooks.modules.faults import as_refusal
from dla_hooks.modules.user_hooks import hooked_modules, silenced
from dla_hooks.modules.weights import gathered, run_device

_LARGE = 64.0
"""One large channel of a test row: a module that quantises each row loses all the others."""


def pull_back(module: nn.Module, d_KM: Tensor, width: int, name: str, instead: str) -> Tensor:
    """Directions at a module's output, as directions at its input.

    Args:
        module: any module that is an affine map along its last axis.
        d_KM: directions [n, d_out].
        width: the width of its input.
        name: its path, for the message of an error; or nothing.
        instead: the way out, for the message of the error.

    Returns:
        [n, width], in the dtype and on the device of ``d_KM``.

    Raises:
        UnsupportedModelError: where the module has no backward pass, is not linear, or its
            backward pass is not the transpose of its forward pass.
    """
    dtype, device, n = dtype_of(module), run_device(module), len(d_KM)
    rows = _made_up(width).to(device, dtype)
    what = f"{name} ({describe(module)})" if name else describe(module)
    wide = torch.promote_types(dtype, torch.float32)
    unusable = f"{what} has no usable backward pass, through which alone it could be read"
    with past_hooks(module), torch.inference_mode(False), torch.enable_grad():
        z = torch.cat((torch.zeros(n, width, dtype=dtype, device=device), rows))
        z.requires_grad_()
        with as_refusal(unusable, f". {instead}"):
            out = module.forward(z[:, None])[:, 0]  # [batch, pos, d_in], as in a model
        seen = out.detach()[n:].to(wide)
        eps = _coarsest(module, out.dtype)
        bend = _bend(seen, eps)
        if not bend <= 1:
            raise UnsupportedModelError(
                f"{what} is not linear in its input: it misses by {bend:.0f} times what rounding "
                f"in {str(dtype).removeprefix('torch.')} explains, as where activations are "
                f"quantised too, so that nothing can be read through it exactly. {instead}"
            )
        with as_refusal(unusable, f". {instead}"):
            at_output = torch.zeros_like(out)
            at_output[:n] = d_KM.to(out)
            (u,) = torch.autograd.grad(out, z, at_output)
    mismatch = _mismatch(seen, rows.to(seen), d_KM.to(seen), u[:n].to(seen), eps)
    if not mismatch <= 1:
        raise UnsupportedModelError(
            f"{what} has a backward pass that is not that of its forward pass: it "
            f"misses by {mismatch:.0f} times what rounding explains. {instead}"
        )
    return u[:n].to(d_KM)


@contextmanager
def past_hooks(module: nn.Module) -> Iterator[None]:
    """A module's own map within a ``with`` block: not autocast, not compiled, not sharded.

    Hooks of the caller's on modules inside of it belong to the caller's run, too, and taps to that
    of the model.
    """
    device = run_device(module).type
    with (
        torch.autocast(device, enabled=False),
        eagerly(is_compiled(module)),
        gathered(module),
        silenced(hooked_modules(module.modules())),
        aside(),
    ):
        yield


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype that a module runs in: the one of its floating-point parameters or buffers.

    Some quantised modules hold integers alone; for these ``compute_dtype`` is read.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point() and tensor.dtype.itemsize > 1:  # weights in 8 bits are codes
            return tensor.dtype
    dtype = getattr(module, "compute_dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.get_default_dtype()


def describe(module: nn.Module) -> str:
    """A module's class, and its weight's class if that is no plain tensor."""
    kind, weight = type(module).__name__, getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or type(weight) in (Tensor, nn.Parameter):
        return kind
    return f"{kind} with its {type(weight).__name__}"


def _made_up(width: int) -> Tensor:
    """Rows [6, width]: zeros, two of noise, one with a large channel, and two sums of these.

    The noise is rounded, so that the sums are exact in any dtype. It is small, so that none of
    it counts as an outlier.
    """
    generator = torch.Generator().manual_seed(0)
    noise = (
        torch.randn(2, width, generator=generator, dtype=torch.float32, device="cpu")
        .mul(8)
        .round()
        .div(8)
        .clamp(-3, 3)
    )
    large = torch.zeros(width, dtype=torch.float32, device="cpu")
    large[0] = _LARGE
    one, other = noise
    return torch.stack((torch.zeros_like(one), one, other, large, one + other, one + large))


def _bend(seen: Tensor, eps: float) -> float:
    """Distance of the test rows' outputs from those of a linear map, over rounding."""
    nothing, one, other, large, together, next_to_large = seen
    worst = 0.0
    for added, whole in ((other, together), (large, next_to_large)):
        miss = (whole - one - added + nothing).norm()
        size = whole.norm() + one.norm() + added.norm() + nothing.norm()
        worst = max(worst, float(miss / ((1e-5 + 2 * eps) * size + 1e-30)))
    return worst


def _mismatch(seen: Tensor, rows: Tensor, d_KM: Tensor, u_KM: Tensor, eps: float) -> float:
    """Distance of <d, f(x) - f(0)> from <u, x>, over rounding (independent in each term)."""
    terms_out, terms_in = d_KM * (seen[1] - seen[0]), u_KM * rows[1]
    size = terms_out.norm(dim=-1) + terms_in.norm(dim=-1) + (d_KM * seen[0]).norm(dim=-1)
    miss = (terms_out.sum(-1) - terms_in.sum(-1)).abs()
    return float((miss / ((1e-5 + 8 * eps) * size + 1e-30)).amax()) if len(miss) else 0.0


def _coarsest(module: nn.Module, dtype: torch.dtype) -> float:
    """The rounding of the coarsest dtype that takes part."""
    dtypes = {t.dtype for t in (*module.parameters(), *module.buffers())} | {dtype}
    return max(torch.finfo(d).eps for d in dtypes if d.is_floating_point and d.itemsize > 1)
