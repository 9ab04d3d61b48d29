"""TransformerLens' ``HookedTransformer``: its hook points are modules, so taps go on them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dla_hooks.backends.base import Backend
from dla_hooks.errors import InputError, UnsupportedModelError
from dla_hooks.inputs.prompts import Prompt, encode
from dla_hooks.modules.edits import Edit, edited
from dla_hooks.modules.weights import run_device


class HookedTransformerBackend(Backend):
    """A ``HookedTransformer``, processed or not."""

    serves = ("transformer_lens.HookedTransformer",)

    advice = "The Hugging Face model itself can be passed"
    embedding_name = "hook_embed"

    @property
    def model_type(self) -> str:
        return "HookedTransformer"

    @property
    def name(self) -> str:
        return f"{type(self.model).__name__} ({getattr(self.model.cfg, 'model_name', '?')})"

    def check_evaluation_mode(self) -> None:
        """Accept either mode: the model has no dropout, and comes in training mode."""

    def check_cacheable(self) -> None:
        """Accept the model: its activations may come from an ``ActivationCache``."""

    def embedding(self) -> nn.Module:
        found: nn.Module = self.model.hook_embed
        return found

    def n_tokens(self) -> int:
        return int(self.model.cfg.d_vocab)

    def unembed(self) -> nn.Module:
        return as_linear(self.model.W_U.T, self.model.b_U)

    def check_prompt(self, prompt: Prompt) -> None:
        """Refuse further arguments of a forward: this one takes ids and a mask.

        Raises:
            InputError: naming them.
        """
        if prompt.extras:
            raise InputError(
                f"input holds {', '.join(prompt.extras)}, and a model of TransformerLens is run on "
                "token ids and a mask [batch, pos] only; leave it out, or pass the Hugging Face "
                "model itself"
            )

    def number(self, field: str) -> Any:
        return getattr(self.model.cfg, field, None)

    def linear(self, attention: nn.Module, seen: nn.Module) -> nn.Module:
        """W_O, with its heads side by side as in every other backend."""
        found: Any = attention
        return as_linear(found.W_O.flatten(0, 1).T, getattr(found, "b_O", None))

    def last_stream(self, layers: str) -> str | None:
        # A model made without norms: the last stream's own hook point returns its input.
        return f"{layers}.{len(self.model.blocks) - 1}.hook_resid_post"

    def norm_before(self, *, mlp: bool) -> str | None:
        return "ln2" if mlp else "ln1"

    def neurons(self, block: nn.Module) -> tuple[nn.Module, str, nn.Module] | None:
        mlp: Any = getattr(block, "mlp", None)
        if mlp is None or not hasattr(mlp, "hook_post") or not hasattr(mlp, "W_out"):
            return None  # experts
        return mlp.hook_post, "mlp.hook_post", as_linear(mlp.W_out.T, getattr(mlp, "b_out", None))

    def encode(self, text: str, tokenizer: Any, prepend_bos: bool | None) -> list[int]:
        if tokenizer is not getattr(self.model, "tokenizer", None):
            custom = getattr(self.model.cfg, "default_prepend_bos", None)
            return encode(text, tokenizer, custom if prepend_bos is None else prepend_bos)
        # Its own tokenizer, by its own rules; but a prompt that is too long is for us to refuse.
        ids = self.model.to_tokens(text, prepend_bos=prepend_bos, truncate=False)
        return [int(i) for i in ids[0]]

    def named_weights(self) -> list[tuple[str, nn.Parameter]]:
        named = super().named_weights()
        if getattr(self.model.cfg, "positional_embedding_type", None) in ("alibi", "rotary"):
            # The table is there all the same, unused and never filled.
            return [(name, weight) for name, weight in named if name != "pos_embed.W_pos"]
        return named

    def hookable(self) -> Iterable[nn.Module]:
        """The hook points: all other hooks are TransformerLens' own."""
        return [module for module in self.model.modules() if hasattr(module, "fwd_hooks")]

    def run(self, prompt: Prompt, columns: Tensor | None) -> Tensor:
        device = run_device(self.model.embed)
        if columns is None:
            columns = torch.tensor([prompt.input_ids.shape[1] - 1], device="cpu")
        # There is no `logits_to_keep`: let the unembedding see the wanted columns only.
        narrow = Edit(self.model.unembed, lambda x: x[:, columns.to(x.device)], at_input=True)
        with edited([narrow]):
            logits: Tensor = self.model(
                prompt.input_ids.to(device),
                return_type="logits",
                **self.arguments(prompt, device),
            )
        return logits

    def run_chunk(
        self, prompt: Prompt, chunk: range, columns: Tensor | None, past: Any
    ) -> tuple[Tensor, Any]:
        raise UnsupportedModelError(
            "models of TransformerLens are run at once; the Hugging Face model itself can be passed"
        )

    def arguments(self, prompt: Prompt, device: torch.device) -> dict[str, Any]:
        """Arguments of a forward pass besides the tokens."""
        return {"attention_mask": prompt.mask.long().to(device)} if prompt.padded else {}


def as_linear(weight_OI: Tensor, bias_O: Any) -> nn.Linear:
    """A linear module around weights [d_out, d_in] that live elsewhere, without a copy."""
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.weight = nn.Parameter(weight_OI.detach(), requires_grad=False)
    if isinstance(bias_O, Tensor):
        linear.bias = nn.Parameter(bias_O.detach(), requires_grad=False)
    return linear
