"""What each expert writes, by hand: a plain loop over positions and experts, from the weights.

Nothing here is shared with the library. A contribution is computed from the experts' weights; what
it does to the sublayer's write is found by running the model with the experts' output replaced by
that contribution alone, all norms of the block held at their scale. Its row in logits is then a
share of the write's own component row, since both are read by the same direction and scale.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def experts_of(block: nn.Module) -> tuple[str, nn.Module] | None:
    """The module that holds the experts of a block."""
    for path, module in block.named_modules():
        if path.rpartition(".")[2] == "experts":
            return path, module
    return None


def by_hand(module: Any, call: tuple[tuple[Any, ...], dict[str, Any]]) -> dict[int, Tensor]:
    """Each expert's weighted output [positions, d], by its number."""
    args = [*call[0], *call[1].values()]
    kind = type(module).__name__
    if kind == "Llama4TextExperts":  # expert by expert, the score times the input
        hidden = args[0].reshape(module.num_experts, -1, args[0].shape[-1])
        return {e: _one(module, e, x) for e, x in enumerate(hidden)}
    hidden, index, weights = args
    hidden = hidden.reshape(-1, hidden.shape[-1])
    found: dict[int, Tensor] = {}
    for position in range(len(hidden)):
        for slot in range(index.shape[-1]):
            e = int(index[position, slot])
            if kind == "ZayaExperts" and e >= module.num_experts:
                continue  # a token that skips the experts
            out = weights[position, slot] * _one(module, e, hidden[position][None])[0]
            found.setdefault(e, torch.zeros_like(hidden))[position] += out
    return found


def _one(m: Any, e: int, x: Tensor) -> Tensor:
    """One expert on some vectors [n, d], by formula."""
    kind = type(m).__name__
    if kind == "DbrxExperts":
        each = [
            w.reshape(m.num_experts, -1, m.hidden_size)[e] for w in (m.mlp.w1, m.mlp.v1, m.mlp.w2)
        ]
        return (torch.nn.functional.silu(x @ each[0].T) * (x @ each[1].T)) @ each[2]
    if kind == "LongcatFlashExperts" and e >= len(m.down_proj):
        return x
    if kind == "NemotronHExperts":
        return torch.relu(x @ m.up_proj[e].T).square() @ m.down_proj[e].T
    if kind == "GptOssExperts":
        both = x @ m.gate_up_proj[e] + m.gate_up_proj_bias[e]
        gate, up = both[:, 0::2].clamp(max=m.limit), both[:, 1::2].clamp(-m.limit, m.limit)
        hidden = (up + 1) * gate * torch.sigmoid(1.702 * gate)
        return hidden @ m.down_proj[e] + m.down_proj_bias[e]
    transposed = kind in ("AriaExperts", "Llama4TextExperts")
    both = x @ (m.gate_up_proj[e] if transposed else m.gate_up_proj[e].T)
    gate, up = both.chunk(2, -1)
    if kind == "MiniMaxM3VLExperts":
        gate, up = gate.clamp(max=m.limit), up.clamp(-m.limit, m.limit)
        hidden = (up + 1) * gate * torch.sigmoid(m.swiglu_alpha * gate)
    elif hasattr(m, "_apply_gate") and type(m)._apply_gate.__name__ != "_default_apply_gate":
        hidden = type(m)._apply_gate(m, both)  # clamps of their own
    else:
        hidden = m.act_fn(gate) * up
    return hidden @ (m.down_proj[e] if transposed else m.down_proj[e].T)


class Layer:
    """One block with experts, opened up.

    Args:
        model: the model.
        block: the block.
        written: the module whose output enters the stream.
        ids: the prompt [batch, pos].
    """

    def __init__(self, model: nn.Module, block: nn.Module, written: nn.Module, ids: Tensor) -> None:
        found = experts_of(block)
        assert found is not None
        self.model, self.block, self.written, self.ids = model, block, written, ids
        self.experts = found[1]
        seen: dict[str, Any] = {}
        ratios: dict[nn.Module, Tensor] = {}

        def keep_call(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            seen["call"], seen["out"] = (args, kwargs), output.clone()

        def keep_ratio(module: nn.Module, args: Any, output: Any) -> None:
            ratios[module] = output / args[0]

        with contextlib.ExitStack() as stack:
            hook = self.experts.register_forward_hook(keep_call, with_kwargs=True)
            stack.callback(hook.remove)
            for norm in self._norms():
                stack.callback(norm.register_forward_hook(keep_ratio).remove)
            self.write = self._write()
        self.call, self.output, self.ratios = seen["call"], seen["out"], ratios

    def _norms(self) -> list[nn.Module]:
        return [
            module
            for path, module in self.block.named_modules()
            if "Norm" in type(module).__name__ and path.rpartition(".")[2].startswith("post_")
        ]

    def _write(self) -> Tensor:
        found: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            found.append((output[0] if isinstance(output, tuple) else output).clone())

        handle = self.written.register_forward_hook(keep)
        try:
            with torch.no_grad():
                self.model(self.ids, use_cache=False)
        finally:
            handle.remove()
        return found[0].reshape(self.ids.numel(), -1)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """The block's later norms, each at the scale that it has in the plain run."""
        handles = [
            norm.register_forward_hook(lambda m, args, out: args[0] * self.ratios[m])
            for norm in self.ratios
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def write_with(self, module: nn.Module, change: Callable[[Tensor], Tensor]) -> Tensor:
        """The write [positions, d_model] with one module's output changed."""

        def replace(_: nn.Module, args: Any, output: Any) -> Any:
            return change(output)

        handle = module.register_forward_hook(replace)
        try:
            with self.frozen():
                return self._write()
        finally:
            handle.remove()

    def contributions(self) -> dict[int, Tensor]:
        """What each expert adds to the write [positions, d_model]."""
        out = self.output
        nothing = self.write_with(self.experts, torch.zeros_like)
        found = {}
        for e, own in by_hand(self.experts, self.call).items():
            alone = torch.zeros_like(out).reshape(-1, out.shape[-1])
            if len(alone) == len(own):
                alone += own
            else:
                alone.view(-1, *own.shape)[e] = own
            new = alone.reshape(out.shape)
            found[e] = self.write_with(self.experts, lambda _, new=new: new) - nothing
        return found

    def ablated(self, e: int) -> Tensor:
        """How the write changes when one expert's down weights are zero [positions, d_model]."""
        names = [n for n, _ in self.experts.named_parameters() if n.startswith("down_proj")]
        weights = [self.experts.get_parameter(n) for n in names]
        if not weights:  # dbrx
            w2 = self.experts.mlp.w2
            weights = [w2.data.view(self.experts.num_experts, -1, w2.shape[-1])]
        kept = [w.detach()[e].clone() for w in weights]
        with torch.no_grad():
            for w in weights:
                w[e] = 0
            try:
                with self.frozen():
                    return self.write - self._write()
            finally:
                for w, own in zip(weights, kept, strict=True):
                    w[e] = own


def direction(model: Any, norm: nn.Module, answer: int, incorrect: int) -> Tensor:
    """What reads the last stream, up to a factor [d_model]."""
    W = model.get_output_embeddings().weight.detach()
    weight = getattr(norm, "weight", None)
    gamma = torch.ones_like(W[0]) if weight is None else weight.detach()
    x = torch.linspace(-2, 3, len(gamma), dtype=gamma.dtype)
    x = x - x.mean()
    with torch.no_grad():
        y = norm(x[None, None])[0, 0] - (0 if getattr(norm, "bias", None) is None else norm.bias)
    if not torch.allclose(y / y.norm(), gamma * x / (gamma * x).norm(), atol=1e-5):
        gamma = 1 + gamma
        assert torch.allclose(y / y.norm(), gamma * x / (gamma * x).norm(), atol=1e-5)
    d = gamma * (W[answer] - W[incorrect])
    with torch.no_grad():
        centred = torch.allclose(norm(x[None, None]), norm(x[None, None] + 5), atol=1e-4)
    return d - d.mean() if centred else d
