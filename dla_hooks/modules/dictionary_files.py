"""Dictionaries in folders: those of SAELens, and plain safetensors with the same names.

Decided here: which settings and weights are known. A setting that is not is refused by its name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dla_hooks.errors import InputError, warn
from dla_hooks.modules.autocast import outside_autocast
from dla_hooks.modules.dictionaries import Codes, Dictionary, OfObject, Spot
from dla_hooks.modules.dictionary_settings import Settings

_EPS = 1e-5
"""Of SAELens's layer norm."""
_NORMS = ("none", "layer_norm", "constant_norm_rescale")
_WEIGHTS = {
    "standard": {"b_enc"},
    "topk": {"b_enc"},
    "abstopk": {"b_enc"},
    "jumprelu": {"b_enc", "threshold"},
    "gated": {"b_gate", "r_mag", "b_mag"},
}
_ALWAYS = {"W_enc", "W_dec", "b_dec"}


@outside_autocast
def read_dictionary(made: Any, spot: Spot) -> Dictionary:
    """Read an object that encodes and decodes, or a folder.

    Raises:
        InputError: for what is neither, and for one of another width.
    """
    is_path = isinstance(made, (str, Path))
    found: Dictionary = Folder(Path(made), spot) if is_path else OfObject(made, spot)
    if found.width != spot.width:
        raise InputError(
            f"the dictionary at {spot.label} is {found.width} wide, and the place is {spot.width} "
            "wide; it belongs to another place or model"
        )
    trained_at = found.settings.trained_at(spot.n_blocks)
    if trained_at not in (None, spot.label):
        warn(
            f"the dictionary at {spot.label} says that it was trained at {trained_at} "
            f"({found.settings.get('hook_name')}): elsewhere its features may mean nothing"
        )
    return found


class Folder(Dictionary):
    """A dictionary in a folder.

    Args:
        path: a folder with ``sae_weights.safetensors`` (or one other safetensors file) and
            ``cfg.json``.
        spot: where it stands.

    Raises:
        InputError: naming the file, weight or setting that cannot be read.
    """

    def __init__(self, path: Path, spot: Spot) -> None:
        self._what = f"the dictionary at {spot.label} ({path})"
        dtype, device, at_z = spot.dtype, spot.device, spot.n_heads is not None
        weights, cfg = self._weights(path), Settings(self._config(path))
        self._kind = kind = self._architecture(weights, cfg)
        self._check(weights, cfg, at_z)
        self._w = {name: tensor.to(device, dtype) for name, tensor in weights.items()}
        W_dec, W_enc = self._w["W_dec"], self._w["W_enc"]
        if cfg.get("rescale_acts_by_decoder_norm"):
            norm_F = W_dec.norm(dim=-1)
            W_dec = W_dec / norm_F[:, None]
            self._w["W_enc"] = W_enc * norm_F
            self._w["b_enc"] = self._w["b_enc"] * norm_F
        self._k = self._top(cfg) if kind in ("topk", "abstopk") else None
        self._norm = cfg.norm
        # SAELens did so before it had the setting.
        self._shifted = cfg.get("apply_b_dec_to_input", True)
        decoder = nn.utils.skip_init(nn.Linear, *W_dec.shape, dtype=dtype, device=device)
        decoder.weight = nn.Parameter(W_dec.T, requires_grad=False)
        decoder.bias = nn.Parameter(self._w["b_dec"], requires_grad=False)
        super().__init__(decoder, W_dec.shape[1], W_dec.shape[0], dtype, cfg)

    def encode(self, x_TM: Tensor) -> Codes:
        x_TM, scale, offset = self._normed(x_TM.to(self.dtype).to(self._w["W_enc"].device))
        w = self._w
        if self._shifted:
            x_TM = x_TM - w["b_dec"]
        pre_TF = x_TM @ w["W_enc"]
        if self._kind == "gated":
            size_TF = (x_TM @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]).relu()
            return Codes(size_TF * (pre_TF + w["b_gate"] > 0), scale, offset)
        pre_TF = pre_TF + w["b_enc"]
        signed = self._kind == "abstopk"
        f_TF = pre_TF if signed else pre_TF.relu()
        if self._kind == "jumprelu":
            f_TF = f_TF * (pre_TF > w["threshold"])
        elif self._k is not None:
            strength_TF = pre_TF.abs() if signed else pre_TF
            index = strength_TF.topk(min(self._k, pre_TF.shape[-1]), dim=-1).indices
            f_TF = torch.zeros_like(pre_TF).scatter_(-1, index, f_TF.gather(-1, index))
        return Codes(f_TF, scale, offset)

    def _normed(self, x_TM: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What is encoded, and how what is rebuilt of it is made large again."""
        if self._norm == "layer_norm":
            mean_T1 = x_TM.mean(-1, keepdim=True)
            std_T1 = (x_TM - mean_T1).std(-1, keepdim=True)
            return (x_TM - mean_T1) / (std_T1 + _EPS), std_T1, mean_T1
        if self._norm == "constant_norm_rescale":
            by_T1 = x_TM.shape[-1] ** 0.5 / x_TM.norm(dim=-1, keepdim=True)
            return x_TM * by_T1, 1 / by_T1, None
        return x_TM, None, None

    def _weights(self, path: Path) -> dict[str, Tensor]:
        if path.is_file():
            raise self._refused("it is a file; give the folder that holds it and its cfg.json")
        if not path.is_dir():
            raise self._refused("there is no such folder")
        found = sorted(path.glob("*.safetensors"))
        named = [one for one in found if one.name == "sae_weights.safetensors"] or found
        if len(named) != 1:
            given = [one.name for one in found or sorted(path.iterdir())[:8]]
            raise self._refused(
                "one file of weights is expected, sae_weights.safetensors with W_enc [width, "
                f"features], W_dec, b_enc and b_dec, and there are {given}"
            )
        try:
            return load_file(named[0])
        except (OSError, SafetensorError) as error:
            raise self._refused(f"{named[0].name} cannot be read: {error}") from error

    def _config(self, path: Path) -> Mapping[str, Any]:
        file = path / "cfg.json"
        try:
            found = json.loads(file.read_text("utf-8"))
        except FileNotFoundError:
            raise self._refused(
                'cfg.json is missing; write one, such as {"architecture": "standard", '
                '"apply_b_dec_to_input": false}'
            ) from None
        except (OSError, ValueError) as error:
            raise self._refused(f"cfg.json cannot be read: {error}") from error
        if not isinstance(found, dict):
            raise self._refused("cfg.json does not hold a mapping")
        return found

    def _architecture(self, weights: Mapping[str, Tensor], cfg: Settings) -> str:
        kind = cfg.get("architecture") or ("jumprelu" if "threshold" in weights else "standard")
        function = cfg.get("activation_fn_str") or cfg.get("activation_fn") or "relu"
        if kind == "standard" and function == "topk":
            kind = "topk"
        elif function != "relu" and (kind, function) != ("topk", "topk"):
            raise self._refused(f"its activation function {function!r} is not read")
        if kind == "batchtopk" and "threshold" in weights:
            kind = "jumprelu"  # as it is used, once trained
        if not isinstance(kind, str) or kind not in _WEIGHTS:
            more = " without the threshold that it has for inference" if kind == "batchtopk" else ""
            if "transcoder" in str(kind):
                more = " (it reads one place and writes another)"
            raise self._refused(f"its architecture {kind!r}{more} is not read")
        return kind

    def _check(self, weights: Mapping[str, Tensor], cfg: Settings, at_z: bool) -> None:
        needed = _ALWAYS | _WEIGHTS[self._kind]
        given = set(weights)
        if "scaling_factor" in given and bool((weights["scaling_factor"] == 1).all()):
            given.remove("scaling_factor")
        if given != needed:
            lacks, more = sorted(needed - given), sorted(given - needed)
            raise self._refused(f"of the weights of {self._kind!r}, {lacks} lack; unread: {more}")
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        if len(shapes["W_enc"]) != 2:
            raise self._refused(f"W_enc is of the shape {list(shapes['W_enc'])}, and no matrix")
        width, n = shapes["W_enc"]
        right = {name: (n,) for name in given} | {"W_enc": (width, n), "W_dec": (n, width)}
        right["b_dec"] = (width,)
        wrong = {name: shapes[name] for name in needed if shapes[name] != right[name]}
        if wrong:
            raise self._refused(f"these weights do not fit W_enc {[width, n]}: {wrong}")
        broken = [name for name in needed if not bool(weights[name].isfinite().all())]
        if broken:
            raise self._refused(f"these weights are NaN or infinite in part: {sorted(broken)}")
        if cfg.norm not in _NORMS:
            way = ""
            if cfg.norm == "expected_average_only_in":
                way = "; fold the factor into the weights (fold_activation_norm_scaling_factor)"
            raise self._refused(f"normalize_activations={cfg.norm!r} is not read{way}")
        shifted = cfg.get("apply_b_dec_to_input")
        if not isinstance(shifted, bool) and (shifted is not None or not cfg.of_saelens):
            raise self._refused("cfg.json must say apply_b_dec_to_input, true or false")
        reshaped = cfg.get("reshape_activations") or "none"
        if reshaped != "none" and not (reshaped == "hook_z" and at_z):
            raise self._refused(f"reshape_activations={reshaped!r} is not read at this place")
        unread = cfg.unread(at_z=at_z)
        if unread is not None:
            raise self._refused(unread)
        if cfg.get("rescale_acts_by_decoder_norm") and "b_enc" not in given:
            raise self._refused(f"rescale_acts_by_decoder_norm is not read of {self._kind!r}")

    def _top(self, cfg: Settings) -> int:
        k = cfg.get("k") or cfg.within("activation_fn_kwargs", "k")
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise self._refused(f"of a topk dictionary cfg.json must say k, and says {k!r}")
        return k

    def _refused(self, why: str) -> InputError:
        return InputError(f"{self._what}: {why}")
