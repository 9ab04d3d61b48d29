"""Sparse dictionaries: any object that encodes and decodes, asked what it does.

What a dictionary makes of an activation is

    x = scale * (f @ W_dec + b_dec) + offset + error,    f = encode(x)

with a scale and an offset per position for those that norm what they read, and none for all others.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dla_hooks.errors import DLAError, InputError
from dla_hooks.modules.autocast import outside_autocast
from dla_hooks.modules.dictionary_settings import Settings, settings_of
from dla_hooks.modules.faults import described_error
from dla_hooks.modules.linear import pull_back, value_at
from dla_hooks.modules.vjp import past_hooks


class Codes(NamedTuple):
    """What a dictionary made of some activations.

    Attributes:
        f_TF: the features' activations.
        scale_T1: what their sum is multiplied by, or None.
        offset_T1: what is added to every channel, or None.
    """

    f_TF: Tensor
    scale_T1: Tensor | None = None
    offset_T1: Tensor | None = None


class Spot(NamedTuple):
    """What a dictionary is read for.

    Attributes:
        label: the place that it stands at, for messages.
        width: of the place.
        n_heads: the number of heads there, if it is what they put out; or None.
        dtype: in which a dictionary computes that says no other.
        device: where it does.
        n_blocks: of the model.
    """

    label: str
    width: int
    n_heads: int | None
    dtype: torch.dtype
    device: torch.device
    n_blocks: int


class Dictionary:
    """A dictionary that is read.

    Args:
        decoder: from features to what is read, an affine map.
        width: of what is read.
        n_features: how many there are.
        dtype: in which it computes.
        settings: what it says of itself.

    Attributes:
        width: the same.
        n_features: the same.
        dtype: the same.
        settings: the same.
        centred: whether it reads streams less their mean, as TransformerLens makes them.
    """

    def __init__(
        self,
        decoder: nn.Module,
        width: int,
        n_features: int,
        dtype: torch.dtype,
        settings: Settings,
    ) -> None:
        self._decoder, self.settings, self.centred = decoder, settings, False
        self.width, self.n_features, self.dtype = width, n_features, dtype

    def encode(self, x_TM: Tensor) -> Codes:
        """The features' activations [T, n_features]."""
        raise NotImplementedError(f"{type(self).__name__} must say how it encodes")

    def decode(self, codes: Codes) -> Tensor:
        """What the features rebuild [T, width]."""
        out_TM: Tensor = self._decoder.forward(codes.f_TF)
        if codes.scale_T1 is not None:
            out_TM = out_TM * codes.scale_T1
        return out_TM if codes.offset_T1 is None else out_TM + codes.offset_T1

    def pull_back(self, d_KM: Tensor) -> Tensor:
        """Directions [K, width] of what is read, as directions [K, n_features] of the features."""
        return pull_back(self._decoder, d_KM)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        found: torch.device = next(self._decoder.parameters()).device
        return found

    @outside_autocast
    def bias(self) -> Tensor:
        """What is rebuilt of no feature [width]."""
        return value_at(self._decoder, torch.zeros(self.n_features, dtype=self.dtype, device="cpu"))


class OfObject(Dictionary):
    """A dictionary of another library, or of one's own.

    Args:
        made: the object, with ``encode`` and ``decode``.
        spot: where it stands.

    Raises:
        InputError: for an object that is no such dictionary.
    """

    def __init__(self, made: Any, spot: Spot) -> None:
        what, width, dtype = spot.label, spot.width, spot.dtype
        kind = type(made).__name__
        if not all(callable(getattr(made, name, None)) for name in ("encode", "decode")):
            raise InputError(
                f"the dictionary at {what} is {made!r:.60}, which has no encode and decode; give "
                "an object that has both, or the path of a folder with its weights"
            )
        settings = settings_of(made)
        _check_settings(made, settings, spot)
        like = _tensor_of(made)
        dtype = dtype if like is None else like.dtype
        if dtype.itemsize < 4:
            raise InputError(
                f"the dictionary at {what} computes in {dtype}, whose rounding would pass for its "
                "error; convert it first: dictionary.float()"
            )
        self._made, self._on_heads = made, spot.n_heads if _reads_heads(made) else None
        if like is None:
            like = torch.empty(0, dtype=dtype, device="cpu")
        decoder = _Decode(made, like)
        super().__init__(decoder, width, 0, dtype, settings)
        generator = torch.Generator("cpu").manual_seed(5)
        noise = torch.randn(3, width, generator=generator, dtype=torch.float32, device="cpu")
        x_TM = noise.to(dtype)
        try:
            with torch.no_grad():
                codes = self.encode(x_TM)
                self.n_features = decoder.in_features = codes.f_TF.shape[-1]
                rebuilt = self.decode(codes)
                self._check_sizes(codes.f_TF, rebuilt, x_TM, what)
                d_M = x_TM[0].to(rebuilt)
                with past_hooks(decoder):
                    folded_F = self.pull_back(d_M[None])[0]
                by_rows_T = codes.f_TF @ folded_F + self.bias().to(d_M) @ d_M
                alone = self.encode(x_TM[:1])
        except InputError:
            raise
        except DLAError as error:  # what the probe of linear maps says
            raise InputError(
                f"the decode of the dictionary at {what} is not affine in the features: {error}"
            ) from error
        except Exception as error:
            raise InputError(
                f"the dictionary at {what} ({kind}) cannot encode and decode [3, {width}] "
                f"activations ({described_error(error)}); the place is {width} wide"
            ) from error
        whole_T = rebuilt @ d_M
        if not torch.allclose(by_rows_T, whole_T, rtol=1e-3, atol=1e-3 * float(whole_T.norm())):
            raise InputError(
                f"the decode of the dictionary at {what} ({kind}) makes something else of several "
                "features than their sum: it goes by what was encoded last, as one that norms its "
                "input does, or has hooks of its own; give an object without these"
            )
        if not torch.allclose(codes.f_TF[:1], alone.f_TF, rtol=1e-3, atol=1e-5):
            raise InputError(
                f"the encode of the dictionary at {what} ({kind}) makes other features of a "
                "position where others stand beside it, as a batch-wise top-k does; give it the "
                "threshold that it has for inference"
            )

    def _check_sizes(self, f_TF: Tensor, rebuilt: Tensor, x_TM: Tensor, what: str) -> None:
        kind = type(self._made).__name__
        if rebuilt.shape != x_TM.shape:
            raise InputError(
                f"the dictionary at {what} ({kind}) makes {list(rebuilt.shape)} of activations of "
                f"the shape {list(x_TM.shape)}"
            )
        if not bool(f_TF.isfinite().all() and rebuilt.isfinite().all()):
            raise InputError(
                f"the dictionary at {what} ({kind}) makes features or activations of random ones "
                "that are NaN or infinite; look at its weights"
            )

    def encode(self, x_TM: Tensor) -> Codes:
        x_TM = x_TM.to(self.device, self.dtype)
        given = x_TM if self._on_heads is None else x_TM.unflatten(-1, (self._on_heads, -1))
        f_TF = self._made.encode(given)
        is_tensor = isinstance(f_TF, Tensor) and not f_TF.is_complex()
        if not is_tensor or f_TF.ndim != 2 or len(f_TF) != len(x_TM):
            shape = f" of shape {list(f_TF.shape)}" if isinstance(f_TF, Tensor) else ""
            raise InputError(
                f"encode of {type(self._made).__name__} returned a {type(f_TF).__name__}{shape} "
                f"for {list(given.shape)}; it must return one tensor [positions, features]"
            )
        return Codes(f_TF.to(self.dtype))


class _Decode(nn.Module):
    """The decode of an object as a module; it is probed as all linear modules are."""

    def __init__(self, made: Any, like: Tensor) -> None:
        super().__init__()
        self.made = made
        self.in_features = 0
        # Its dtype and device are the module's.
        self.like = nn.Parameter(like.detach().new_empty(0), requires_grad=False)

    def forward(self, f: Tensor) -> Tensor:
        out: Tensor = self.made.decode(f.reshape(-1, f.shape[-1]))
        return out.reshape(*f.shape[:-1], out.shape[1:].numel())


_PER_TOKEN = ("layer_norm", "constant_norm_rescale")


def _check_settings(made: Any, settings: Settings, spot: Spot) -> None:
    """Refuse what SAELens keeps beside encode and decode, and what writes where it does not read.

    Raises:
        InputError: naming it.
    """
    what, norm = spot.label, settings.norm
    unread = settings.unread(at_z=spot.n_heads is not None)
    kind = type(made).__name__
    if unread is None and ("transcoder" in kind.lower() or hasattr(made, "W_skip")):
        unread = (
            f"it is a transcoder ({kind}): it reads one place and writes another, and features are "
            "read where they are written"
        )
    if unread is not None:
        raise InputError(f"the dictionary at {what} cannot be read: {unread}")
    if norm == "none":
        return
    way = (
        "save it and give the folder's path, where that is read"
        if norm in _PER_TOKEN
        else "fold the factor into its weights first (fold_activation_norm_scaling_factor)"
    )
    raise InputError(
        f"the dictionary at {what} norms what it reads (normalize_activations={norm!r}), so that "
        f"its decode depends on what it encoded last: {way}"
    )


def _reads_heads(made: Any) -> bool:
    return bool(getattr(made, "hook_z_reshaping_mode", False))


def _tensor_of(made: Any) -> Tensor | None:
    """A floating-point tensor that an object holds, or None."""
    found = [*made.parameters(), *made.buffers()] if isinstance(made, nn.Module) else []
    found += getattr(made, "__dict__", {}).values()
    return next((t for t in found if isinstance(t, Tensor) and t.is_floating_point()), None)
