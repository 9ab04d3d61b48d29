"""What each head of any model adds to its logits, by taking it out and running the model again.

Where `oracle` knows a few families well, this takes the paths of the modules from the library and
everything else from the model: all other writes are put back as they were, and every norm on the
way is held to what it did. The model itself adds up, scales, and reads.

    for label, effect in head_effects(case).items(): ...   # [*result shape], answer - incorrect
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from doors import Case
from torch import Tensor, nn

from dla_hooks.verification.recognise import stream_of


@torch.no_grad()
def head_effects(case: Case) -> dict[str, Tensor]:
    """The direct effect of every head on the case's question."""
    model, stream = case.model, stream_of(case.model)
    writes = [write for block in stream.blocks for write in block.writes]
    last = stream.final_norm.module
    norms = {last, *(write.post_norm for write in writes if write.post_norm is not None)}
    with ExitStack() as stack:
        outputs = {w.written_by: _recorded(stack, w.written_by) for w in writes}
        passed = {norm: _recorded(stack, norm, inputs=True) for norm in norms}
        clean = _answer(case, model)
    effects = {}
    for write in writes:
        site = write.heads
        for head in range(0 if site is None else site.n_heads):
            with ExitStack() as stack:
                for other in {w.written_by for w in writes} - {write.written_by}:
                    _on(stack, other, _gives(outputs[other][0]))
                for norm in {last, write.post_norm} & norms:
                    _on(stack, norm, _frozen(norm, *passed[norm][0]))
                columns = slice(head * site.d_head, (head + 1) * site.d_head)
                stack.enter_context(_Without(site.proj, columns))
                effects[f"L{write.layer}H{head}"] = clean - _answer(case, model)
    return effects


def _answer(case: Case, model: Any) -> Tensor:
    asked = case.asked if isinstance(case.asked, dict) else {"input_ids": case.asked}
    output = model(**asked)
    logits = getattr(output, "logits", None)
    if logits is None:
        logits = torch.stack((output.start_logits, output.end_logits), -1)
    one, other = case.columns
    return logits[..., one] - (0 if other is None else logits[..., other])


def _tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _recorded(stack: ExitStack, module: nn.Module, inputs: bool = False) -> list[Any]:
    seen: list[Any] = []

    def see(module: nn.Module, given: Any, output: Any) -> None:
        left = _tensor(output).clone()
        seen.append((given[0].clone(), left) if inputs else left)

    stack.callback(module.register_forward_hook(see).remove)
    return seen


def _on(stack: ExitStack, module: nn.Module, hook: Callable[..., Any]) -> None:
    stack.callback(module.register_forward_hook(hook).remove)


def _gives(value: Tensor) -> Callable[..., Any]:
    # A clone: some models add to what a module returned in place.
    return lambda module, given, out: (
        value.clone() if isinstance(out, Tensor) else (value.clone(), *out[1:])
    )


def _frozen(norm: nn.Module, x: Tensor, y: Tensor) -> Callable[..., Any]:
    """The norm as the affine map that it was on the clean run."""
    bias = getattr(norm, "bias", None)
    centred = "LayerNorm" in type(norm).__name__ and bool(
        torch.allclose(norm(x + 1), norm(x), atol=1e-6)
    )
    shift = 0 if not isinstance(bias, Tensor) else bias

    def middle(x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if centred else x

    ratio = (y - shift) / middle(x)
    return lambda module, given, out: ratio * middle(given[0]) + shift


class _Without:
    """A stretch in which some columns of a projection's input are zero."""

    def __init__(self, proj: nn.Module, columns: slice) -> None:
        self.proj, self.columns = proj, columns

    def __enter__(self) -> None:
        self.handle = self.proj.register_forward_pre_hook(self._cut)

    def __exit__(self, *_: Any) -> None:
        self.handle.remove()

    def _cut(self, module: nn.Module, given: Any) -> Any:
        z = given[0].clone()
        z[..., self.columns] = 0
        return (z, *given[1:])
