"""PEFT's wrapped models: the model inside, as its active adapters change it."""

from __future__ import annotations

from typing import Any

from dla_hooks.backends.huggingface import HuggingFaceBackend
from dla_hooks.errors import UnsupportedModelError


class PeftBackend(HuggingFaceBackend):
    """A ``PeftModel`` or ``PeftMixedModel`` around a causal LM, adapters merged or not.

    Modules are found in the model inside; what is run is the model that was given, since PEFT
    sets its adapters up in its own forward pass.
    """

    serves = ("peft.PeftMixedModel", "peft.PeftModel")

    @property
    def root(self) -> Any:
        # Virtual tokens need no tuner around the model.
        outer = self.model.base_model
        virtual = any(config.is_prompt_learning for config in self.model.peft_config.values())
        return outer if virtual else outer.model

    @property
    def name(self) -> str:
        active = list(self._active())
        adapters = "no adapter" if not active else "adapter" if len(active) == 1 else "adapters"
        return f"{super().name} with {adapters} {', '.join(active)}".rstrip()

    def check_kind(self) -> None:
        """Refuse adapters that do more than change the output of modules.

        Raises:
            UnsupportedModelError: naming the adapter, and why.
        """
        active = self._active()
        for adapter, config in self.model.peft_config.items():
            method = str(getattr(config.peft_type, "value", config.peft_type))
            if not active or (adapter not in active and method != "XLORA"):
                continue  # X-LoRA is at work when the LoRAs that it mixes are active
            reason = None
            if config.is_prompt_learning:
                reason = "puts virtual tokens before the prompt, whose logits are no longer its own"
            elif getattr(config, "alora_invocation_tokens", None) is not None:
                reason = (
                    "is an activated LoRA, which is on from some token of each prompt and off "
                    "before it: its modules are not one linear map for all positions"
                )
            elif method == "XLORA":
                reason = (
                    "mixes its LoRAs anew at every position (X-LoRA): its modules are not one "
                    "linear map for all of them"
                )
            elif method == "POLY":
                reason = "chooses its modules by a task id that belongs to each prompt"
            if reason is not None:
                raise UnsupportedModelError(
                    f"adapter {adapter!r} ({method}) {reason}. Attribute the model without it: "
                    "`with model.disable_adapter(): ...`"
                )
        super().check_kind()

    def _active(self) -> dict[str, Any]:
        """The configs of the adapters that are on, by name."""
        model = self.model
        adapters_off = self.state.adapters_off
        if (adapters_off and all(adapters_off)) or getattr(model, "_adapters_disabled", False):
            return {}
        names = model.active_adapters
        return {name: model.peft_config[name] for name in names}
