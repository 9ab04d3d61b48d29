"""What a sparse dictionary says of itself, in its ``cfg``: as SAELens writes it, old and new.

The same settings stand in the ``cfg.json`` of a folder and beside an object. Newer versions keep
some of them under ``metadata``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_HOOK = re.compile(r"blocks\.([0-9]+)\.(?:attn\.)?hook_(\w+)")
_PLACES = ("attn_out", "mlp_out", "z")
_OLD = {"hook_name": "hook_point", "hook_head_index": "hook_point_head_index"}
_OF_SAELENS = {"hook_name", "hook_point", "d_sae", "metadata", "sae_lens_version"}


class Settings:
    """The settings of one dictionary.

    Args:
        cfg: a mapping, or an object with attributes, or None.
    """

    def __init__(self, cfg: Any) -> None:
        self._cfg = cfg

    def get(self, name: str, default: Any = None) -> Any:
        """A setting, wherever it is kept; the default where it is not there, or None."""
        names = [name, _OLD[name]] if name in _OLD else [name]
        for part in (self._cfg, _of(self._cfg, "metadata")):
            for one in names:
                found = _of(part, one)
                if found is not None:
                    return found
        return default

    def within(self, name: str, key: str) -> Any:
        """What a setting that is itself a mapping says of a key; None where it is no mapping."""
        return _of(self.get(name), key)

    @property
    def of_saelens(self) -> bool:
        """Whether SAELens wrote them, as far as their names tell."""
        return isinstance(self._cfg, Mapping) and bool(_OF_SAELENS & set(self._cfg))

    @property
    def norm(self) -> Any:
        """How the dictionary norms what it reads: ``"none"``, or a name."""
        found = self.get("normalize_activations")
        if found is True:  # as the oldest versions call it
            return "expected_average_only_in"
        return found or "none"

    @property
    def centred(self) -> bool:
        """Whether it was trained on the centred streams of TransformerLens."""
        return bool(self.within("model_from_pretrained_kwargs", "center_writing_weights"))

    def trained_at(self, n_blocks: int) -> str | None:
        """The name of the place that it was trained at; None where that is not told.

        Args:
            n_blocks: of the model.
        """
        match = _HOOK.fullmatch(str(self.get("hook_name", "")))
        if match is None:
            return None
        layer, name = int(match[1]), match[2]
        if name == "resid_post":
            return "final_post" if layer + 1 == n_blocks else f"{layer + 1}_pre"
        if name in ("resid_pre", "resid_mid"):
            return f"{layer}_{name.removeprefix('resid_')}"
        return f"{layer}_{name}" if name in _PLACES else None

    def unread(self, *, at_z: bool) -> str | None:
        """Why a dictionary with these settings is not read here; None if it is.

        Args:
            at_z: whether it is to read what heads put out.
        """
        if self.get("hook_head_index") is not None:
            return "it reads one head alone (hook_head_index)"
        if at_z and self.within("model_from_pretrained_kwargs", "fold_value_biases"):
            return "it was trained on z without the value biases (fold_value_biases)"
        if self.get("hook_name_out") is not None or self.get("d_out") is not None:
            return (
                "it is a transcoder: it reads one place and writes another, and features are read "
                "where they are written"
            )
        return None


def settings_of(made: Any) -> Settings:
    """The settings beside an object."""
    return Settings(getattr(made, "cfg", None))


def _of(part: Any, name: str) -> Any:
    if isinstance(part, Mapping):
        return part.get(name)
    return None if isinstance(part, (str, list, tuple)) else getattr(part, name, None)
