"""One run of a model on synthetic activations, and the scales that it shows.

Known vectors replace each block's input, the outputs of its writes, and the input of the
unembedding. Each has its own row of the batch. The results are for
:mod:`dla_hooks.calibration.scales`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dla_hooks.calibration.logits import finest_that_holds, that_move
from dla_hooks.calibration.prompt import short_prompt
from dla_hooks.errors import UnsupportedModelError
from dla_hooks.modules.hooks import Call, Edit, Place, Tap, Use, edited, tapped
from dla_hooks.modules.linear import rows as rows_of
from dla_hooks.modules.linear import value_at
from dla_hooks.modules.vjp import dtype_of
from dla_hooks.residual.stream import Block, Stream, coarsest

_TOKENS = 64  # enough to recognise the map to the vocabulary


def refusal(stream: Stream, what: str) -> UnsupportedModelError:
    instead = f". {stream.backend.advice}" if stream.backend.advice else ""
    return UnsupportedModelError(
        f"{type(stream.backend.root).__name__} (model type {stream.backend.model_type!r}) cannot "
        f"be attributed: {what}{instead}"
    )


@dataclass(frozen=True)
class Dtypes:
    """The dtypes that were seen in a made-up run.

    Attributes:
        stream: of what enters the blocks and the final norm.
        writes: of what the writes put out.
        read: of the final norm's output, the unembedding and the logits.
    """

    stream: set[torch.dtype] = field(default_factory=set)
    writes: set[torch.dtype] = field(default_factory=set)
    read: set[torch.dtype] = field(default_factory=set)

    def rounding(self) -> float:
        """The rounding of the coarsest dtype in which the blocks are added up."""
        return float(torch.finfo(coarsest(self.stream | self.writes)).eps)


class SyntheticRun:
    """One run on synthetic activations.

    Row 0 of the batch is zero everywhere. Then come two rows for the input and two for each write.
    The first has +-1 in every channel and shows a factor to the last bit. The second has noise and
    shows whether the block is linear. The last row has noise everywhere at once. It shows whether
    one term depends on another, as with a gate.
    """

    def __init__(
        self, stream: Stream, live: list[tuple[int, tuple[int, ...]]], norm_use: Use
    ) -> None:
        self.stream = stream
        self.live = live
        self.norm_use = norm_use
        self.n_slots = 1 + max(len(writes) for _, writes in live)
        self.n_rows = 1 + 2 * self.n_slots + 1
        generator = torch.Generator().manual_seed(4)
        d_model = stream.d_model
        self.signs = torch.ones(d_model, dtype=torch.float64, device="cpu")
        self.signs[torch.randperm(d_model, generator=generator, device="cpu")[: d_model // 2]] = -1
        # Larger than the signs, or a norm would treat the two alike; rounded, so that what is put
        # in is what the model sees, whichever dtype a place has.
        self.noise = 4 * torch.randn(
            d_model, generator=generator, dtype=torch.float64, device="cpu"
        )
        self.noise = self.noise.to(torch.bfloat16).double()
        together = torch.randn(
            self.n_slots, d_model, generator=generator, dtype=torch.float64, device="cpu"
        )
        self.together = together.to(torch.bfloat16).double()
        self.outputs: dict[int, Tensor] = {}
        self.dtypes = Dtypes()

    def run(self) -> Tensor:
        """Logits [rows, vocabulary] at the last token."""
        prompt = short_prompt(self.stream, batch=self.n_rows, length=2)
        prompt.input_ids.copy_(prompt.input_ids[:1].expand_as(prompt.input_ids))
        blocks = [self.stream.blocks[index] for index, _ in self.live]
        taps = [Tap(block.input, self._keep(i - 1)) for i, block in enumerate(blocks) if i]
        norm = self.stream.final_norm._replace(use=self.norm_use)
        taps.append(Tap(norm.entered, self._keep(len(blocks) - 1)))
        edits = [self._edit(norm, self._normed(), self.dtypes.read)]
        if self.stream.positions is not None:
            # The input of block 0 for positions alone.
            taps.append(Tap(blocks[0].input, self._keep(-1)))
            edits.append(Edit(self.stream.backend.embedding(), torch.zeros_like))
            edits.append(self._edit(self.stream.positions, self._slot(0)))
        for block, (_, writes) in zip(blocks, self.live, strict=True):
            start = self.stream.declared_start if block is blocks[0] else None
            edits.append(self._edit(start or block.input, self._slot(0)))
            for slot, j in enumerate(writes, start=1):
                edits.append(
                    self._edit(block.writes[j].place, self._slot(slot), self.dtypes.writes)
                )
        # Taps first: they must see what reaches a block before it is replaced.
        with tapped(taps), edited(edits):
            logits = self.stream.backend.run_synthetic(prompt, None)
        if logits.ndim != 3 or logits.shape[0] != self.n_rows:
            raise refusal(self.stream, f"its logits have the shape {list(logits.shape)}")
        self.dtypes.read.update((logits.dtype, dtype_of(self.stream.unembed)))
        self.dtypes.read.update(finest_that_holds(logits))
        return logits[:, 0].double().cpu()

    def factor(self, position: int, slot: int, block: Block) -> Tensor | None:
        """The factor of a block's input (slot 0) or of one of its writes."""
        out = self.outputs[position] - self.outputs[position][0]
        of_signs, of_noise = out[1 + 2 * slot], out[2 + 2 * slot]
        factor = of_signs * self.signs
        expected = factor * self.noise
        tolerance = self._tolerance()
        off = float((of_noise - expected).norm() / (expected.norm() + of_noise.norm() + 1e-30))
        if slot == 0 and self.dtypes.stream == {torch.float64} and off > 1e-12:
            self.dtypes.stream.add(torch.float32)  # as Mamba does, whatever the model's dtype
        if not off <= tolerance:
            what = "its input" if slot == 0 else block.writes[slot - 1].label
            raise refusal(
                self.stream,
                f"{block.name} is no sum: what it returns does not depend linearly on {what} "
                f"(off by {off:.1e}), as with a norm on the sum itself or several mixed streams",
            )
        if slot == 0 and not bool(factor.any()):
            raise refusal(
                self.stream,
                f"{block.name} does not carry its input on: one of the modules that are said to "
                "write to the stream returns the stream itself",
            )
        if bool((factor == factor[0]).all()):
            # One number for all channels. In 16 bits noise gives it more precisely than +-1 does.
            fit = of_noise @ self.noise / self.noise.square().sum()
            rounded = self.dtypes.rounding() > 1e-6
            factor = fit if rounded and factor[0] != 1 else factor[0]
            return None if factor == 1 else factor
        return factor

    def check_together(self, position: int, block: Block, factors: list[Tensor | None]) -> None:
        """Refuse a block whose terms depend on each other.

        Args:
            position: of the block among those that run.
            block: the block.
            factors: of its input and of each write, as :meth:`factor` found them.
        """
        out = self.outputs[position]
        expected = out[0].clone()
        for slot, factor in enumerate(factors):
            put_in = self.together[slot]
            expected += put_in if factor is None else put_in * factor
        off = float((out[-1] - expected).norm() / (expected.norm() + 1e-30))
        if not off <= self._tolerance():
            raise refusal(
                self.stream,
                f"{block.name} is no sum: its terms depend on each other (off by {off:.1e}), as "
                "with a gate on one that is computed from another",
            )

    def positions(self) -> tuple[bool, Tensor | None]:
        """Find whether positions enter the stream on their own, and their factor."""
        out = self.outputs[-1] - self.outputs[-1][0]
        factor = out[1] * self.signs
        off = float((out[2] - factor * self.noise).norm() / (out[2].norm() + 1e-30))
        if not off <= self._tolerance() or not bool(factor.any()):
            return False, None  # normed with the tokens, say: no part of their own
        if bool((factor == factor[0]).all()):
            return True, None if factor[0] == 1 else factor[0]
        return True, factor

    def _tolerance(self) -> float:
        return 1e-5 + 3 * self.dtypes.rounding()

    def constant(self, position: int) -> Tensor:
        """The output of a block for zeros everywhere [d_model]."""
        return self.outputs[position][0]

    def readout(self, logits: Tensor) -> tuple[float, float | None]:
        """The logit scale and the softcap."""
        stream = self.stream
        moves = that_move(logits)
        if not bool(moves.any()):
            raise refusal(
                stream,
                "none of its logits depends on what the final norm puts out, as where the "
                "unembedding is zero, so there is nothing to attribute; load weights for it",
            )
        cap = self._cap(logits, moves)
        moving = moves.nonzero()[:, 0]
        shuffled = torch.randperm(
            len(moving), generator=torch.Generator().manual_seed(5), device="cpu"
        )
        ids = moving[shuffled[:_TOKENS]]
        W, b = (t.double().cpu() for t in rows_of(stream.unembed, ids, torch.float64))
        # The largest of the small rows that a cap does not bend.
        row = next(
            (r for r in (1, 4) if cap is None or float(logits[r, ids].abs().max()) < cap / 2), 5
        )
        y = self._normed()[row]
        for module in stream.after_norm:
            y = value_at(module, y).double().cpu()
        linear = W @ y
        seen = logits[row, ids] if cap is None else cap * torch.atanh(logits[row, ids] / cap)
        # The bias is scaled along with the rest: seen = k * (linear + b).
        ours = linear + b
        if not bool(ours.any()):
            raise refusal(
                stream,
                "its unembedding makes nothing of any stream, as one whose weights are all zero, "
                "so that there is nothing to attribute; load weights for it",
            )
        scale = float(ours @ seen / ours.square().sum())
        off = float((scale * ours - seen).norm() / seen.norm())
        rounding = torch.finfo(coarsest(self.dtypes.read)).eps
        if not off <= 1e-4 + 16 * rounding:
            raise refusal(
                stream,
                "its logits are not the unembedding of the final norm's output: even a best fit is "
                f"off by {off:.1e}; another layer or nonlinearity stands between them",
            )
        return (1.0 if abs(scale - 1) < 1e-6 + rounding else scale), cap

    def _cap(self, logits: Tensor, moves: Tensor) -> float | None:
        """The value that most logits stop at when what enters the unembedding doubles."""
        large, larger = logits[2][moves].abs(), logits[3][moves].abs()
        usual = float(larger.median())
        # A few tokens may be large for a reason of their own, as a bias.
        if usual < math.inf and abs(usual - float(large.median())) <= 1e-3 * usual:
            return float(larger[larger <= 1.001 * usual].max())
        return None

    def _slot(self, slot: int) -> Tensor:
        rows = torch.zeros(self.n_rows, self.stream.d_model, dtype=torch.float64, device="cpu")
        rows[1 + 2 * slot], rows[2 + 2 * slot] = self.signs, self.noise
        rows[-1] = self.together[slot]
        return rows

    def _normed(self) -> Tensor:
        """Rows for the final norm's output: zeros, small noise, and noise that reaches a cap."""
        sizes = torch.zeros(self.n_rows, 1, dtype=torch.float64, device="cpu")
        sizes[1], sizes[2], sizes[3], sizes[4], sizes[5] = 0.25, 1e3, 2e3, 0.02, 0.001
        return sizes * self.noise

    def _fill(self, name: str, like: Tensor, rows: Tensor) -> Tensor:
        if like.shape[-1] != self.stream.d_model:
            raise refusal(
                self.stream,
                f"{name} puts out {like.shape[-1]} channels, but the stream has "
                f"{self.stream.d_model}: it is not what the block adds to the stream",
            )
        if like.numel() < self.n_rows * like.shape[-1]:  # shared by the rows, as positions are
            like = like.reshape(1, -1, like.shape[-1]).expand(self.n_rows, -1, -1)
        per_row = like.numel() // (self.n_rows * like.shape[-1])
        new = rows[:, None, :].expand(-1, per_row, -1).reshape(like.shape)
        return new.to(like, copy=True)  # a model may go on to write into it

    def _edit(self, place: Place, rows: Tensor, seen: set[torch.dtype] | None = None) -> Edit:
        def change(x: Tensor) -> Tensor:
            if seen is not None:
                seen.add(x.dtype)
            return self._fill(place.name, x, rows)

        return Edit(place.module, change, place.before)

    def _keep(self, position: int) -> Callable[[Call], None]:
        def keep(call: Call) -> None:
            x = call.activation
            self.dtypes.stream.add(x.dtype)
            rows = x.detach().double().cpu().reshape(self.n_rows, -1, x.shape[-1])
            self.outputs[position] = rows[:, 0].clone()

        return keep
