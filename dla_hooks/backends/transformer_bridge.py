"""TransformerLens' ``TransformerBridge``: a wrapped model with hook points of the same names."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from dla_hooks.backends.base import Backend
from dla_hooks.backends.hooked_transformer import HookedTransformerBackend
from dla_hooks.errors import InputError, UnsupportedModelError
from dla_hooks.inputs.prompts import Prompt
from dla_hooks.modules.version import State, state_of

_HYBRID = {"mamba", "ssm", "mixer", "linear_attn"}
_INSTEAD = "The Hugging Face model itself can be passed instead, as it is."


class TransformerBridgeBackend(HookedTransformerBackend):
    """A ``TransformerBridge`` in compatibility mode, with its final norm folded."""

    serves = ("transformer_lens.TransformerBridge",)

    @property
    def model_type(self) -> str:
        return "TransformerBridge"

    def check_kind(self) -> None:
        """Refuse the bridges that TransformerLens' own attribution refuses, in its order.

        Raises:
            InputError: without compatibility mode, or with a final norm that is not folded.
            UnsupportedModelError: for hybrid layouts.
        """
        model = self.model
        # `TransformerBridge.__getattr__` forwards unknown names to the wrapped model, so read
        # `_modules` directly.
        blocks = (getattr(model, "_modules", None) or {}).get("blocks") or ()
        for layer, block in enumerate(blocks):
            if not getattr(block, "hook_out_is_single_residual_stream", True):
                raise InputError(
                    f"blocks.{layer} carries several residual streams at once, which are combined "
                    "before the unembedding; no single one can be attributed"
                )
        if not getattr(model, "compatibility_mode", False):
            raise InputError(
                "a TransformerBridge needs compatibility mode, so that its final norm is folded "
                f"into W_U: call model.enable_compatibility_mode() first. {_INSTEAD}"
            )
        self._check_final_norm()
        types = {str(name) for name in model.layer_types()}
        hybrid = sorted(name for name in types if _HYBRID & set(name.split("+")))
        if hybrid:
            raise UnsupportedModelError(
                f"hybrid layouts ({', '.join(hybrid)}) have no attention and MLP hook points in "
                f"every block of a TransformerBridge. {_INSTEAD}"
            )

    def _check_final_norm(self) -> None:
        norm = getattr(self.model, "ln_final", None)
        weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        offset = getattr(getattr(self.model, "cfg", None), "rmsnorm_uses_offset", False)
        for name, values, folded in (
            ("weight", weight, 0.0 if offset is True else 1.0),
            ("bias", bias, 0.0),
        ):
            if isinstance(values, Tensor) and not bool((values == folded).all()):
                raise InputError(
                    f"the final norm's {name} is not folded into the unembedding: load the bridge "
                    "anew and call enable_compatibility_mode() with fold_ln=True and "
                    f"no_processing=False. {_INSTEAD}"
                )

    def check_evaluation_mode(self) -> None:
        Backend.check_evaluation_mode(self)

    def read_state(self) -> State:
        return state_of(self.model, self.model.original_model)

    def modules(self) -> list[tuple[str, nn.Module]]:
        wrapped: Any = self.model.original_model
        return [*self.model.named_modules(), *wrapped.named_modules(prefix="original_model")]

    def number(self, field: str) -> Any:
        # Only a table of positions ends; rotary positions go on.
        if field == "n_ctx" and "pos_embed" not in self.model._modules:
            return None
        return super().number(field)

    def arguments(self, prompt: Prompt, device: torch.device) -> dict[str, Any]:
        accepted = inspect.signature(self.model.original_model.forward).parameters
        found = super().arguments(prompt, device)
        if "use_cache" in accepted:
            found["use_cache"] = False
        if prompt.padded and "position_ids" in accepted:
            found["position_ids"] = prompt.position_ids().to(device)
        return found
