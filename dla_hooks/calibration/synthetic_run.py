"""One run of a model on synthetic activations, and the scales that it shows.

Known vectors replace each block's input, its writes' outputs and the unembedding's input, each in a
row of its own. The results are for :mod:`dla_hooks.calibration.scales`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from dla_hooks.calibration.between_blocks import factor_between
from dla_hooks.calibration.dtypes import Dtypes
from dla_hooks.calibration.logits import finest_that_holds
from dla_hooks.calibration.prompt import short_prompt
from dla_hooks.errors import UnsupportedModelError
from dla_hooks.modules.edits import Edit, edited
from dla_hooks.modules.hooks import Call, Place, Tap, Use, tapped
from dla_hooks.modules.vjp import dtype_of
from dla_hooks.residual.stream import Block, Stream

_LENGTH = 2


def refusal(stream: Stream, what: str) -> UnsupportedModelError:
    instead = f". {stream.backend.advice}" if stream.backend.advice else ""
    return UnsupportedModelError(
        f"{type(stream.backend.root).__name__} (model type {stream.backend.model_type!r}) cannot "
        f"be attributed: {what}{instead}"
    )


class SyntheticRun:
    """One run on synthetic activations.

    Row 0 of the batch is zero everywhere. Then come two rows for the input and two for each write.
    The first has +-1 in every channel and shows a factor to the last bit. The second has noise and
    shows whether the block is linear. Two rows follow for each carrier, in which the same is added
    to what it has. The last row has noise everywhere at once. It shows whether one term depends on
    another, as with a gate.
    """

    def __init__(
        self, stream: Stream, live: list[tuple[int, tuple[int, ...]]], norm_use: Use
    ) -> None:
        self.stream = stream
        self.live = live
        self.norm_use = norm_use
        self.n_slots = 1 + max(len(writes) for _, writes in live)
        n_carriers = max(len(stream.blocks[index].carriers) for index, _ in live)
        self.n_rows = 1 + 2 * (self.n_slots + n_carriers) + 1
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
        self._left: dict[int, Tensor] = {}  # the same as the blocks put it out
        self.ahead = 0  # positions that the model puts before those of the prompt
        self.dtypes = Dtypes()
        self._calls: list[tuple[nn.Module, bool]] = []  # of all places that are changed, in order
        # By the label of a write: whether each row reads another stream than row 0 does.
        self._reads: dict[str, Tensor] = {}

    def run(self) -> Tensor:
        """Logits [rows, vocabulary] at the last token."""
        prompt = short_prompt(self.stream, batch=self.n_rows, length=_LENGTH)
        prompt.input_ids.copy_(prompt.input_ids[:1].expand_as(prompt.input_ids))
        blocks = [self.stream.blocks[index] for index, _ in self.live]
        taps = [Tap(block.input, self._keep(i - 1)) for i, block in enumerate(blocks) if i]
        norm = self.stream.final_norm._replace(use=self.norm_use)
        taps.append(Tap(norm.entered, self._keep(len(blocks) - 1)))
        for i, block in enumerate(blocks):
            taps.append(Tap(block.output, self._keep_left(i)))
        edits = [self._edit(norm, self.normed(), self.dtypes.read)]
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
        carriers = {
            (carrier.place.module, carrier.place.before): self._add(carrier.place, number)
            for block in blocks
            for number, carrier in enumerate(block.carriers)
        }
        edits += carriers.values()
        for block, (_, writes) in zip(blocks, self.live, strict=True):
            for write in (block.writes[j] for j in writes if block.carriers):
                read = Place(write.module, write.name, write.use)
                taps.append(Tap(read, self._keep_read(write.label)))
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
        factor, off = self._seen(position, slot)
        tolerance = self._tolerance()
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
        return self._simplest(factor, position, slot)

    def carriers(self, position: int, block: Block) -> Iterator[tuple[int, int, Tensor | None]]:
        """Those of a block that carry the stream on.

        Yields:
            The number of each, how many writes stand before it, and its factor. A write does that
            runs before it, or does not read what it puts out.
        """
        writes = [block.writes[j] for j in self.live[position][1]]
        for number, carrier in enumerate(block.carriers):
            place, slot = carrier.place, self.n_slots + number
            factor, off = self._seen(position, slot)
            as_counted = self._calls.count((place.module, place.before)) == place.use.of
            if as_counted and off <= self._tolerance() and bool(factor.any()):
                after = sum(
                    self._when(write.place) < self._when(place)
                    or not self._reads[write.label][1 + 2 * slot]
                    for write in writes
                )
                yield number, after, self._simplest(factor, position, slot)

    def behind(self, position: int) -> Tensor | None:
        """The factor between what a block puts out and what reads the stream next; None for one."""
        carried = slice(0, 3)  # nothing, and two rows that the block's input alone has
        left, read = self._left[position][carried], self.outputs[position][carried]
        return factor_between(left, read, self._tolerance())

    def _seen(self, position: int, slot: int) -> tuple[Tensor, float]:
        """The factor [d_model] that the rows of a slot show, and how far that is from linear."""
        out = self.outputs[position] - self.outputs[position][0]
        of_signs, of_noise = out[1 + 2 * slot], out[2 + 2 * slot]
        factor = of_signs * self.signs
        expected = factor * self.noise
        off = float((of_noise - expected).norm() / (expected.norm() + of_noise.norm() + 1e-30))
        return factor, off

    def _simplest(self, factor: Tensor, position: int, slot: int) -> Tensor | None:
        """A factor as one number, where all channels have the same; None for one."""
        if not bool((factor == factor[0]).all()):
            return factor
        # In 16 bits noise gives it more precisely than +-1 does.
        of_noise = self.outputs[position][2 + 2 * slot] - self.outputs[position][0]
        fit = of_noise @ self.noise / self.noise.square().sum()
        rounded = self.dtypes.rounding() > 1e-6
        one = fit if rounded and factor[0] != 1 else factor[0]
        return None if one == 1 else one

    def _when(self, place: Place) -> int:
        """When a changed place was called in the use that is meant, among all changed places."""
        key, nth = (place.module, place.before), place.use.nth
        return [n for n, call in enumerate(self._calls) if call == key][nth:][:1][0]

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

    def _slot(self, slot: int) -> Tensor:
        rows = torch.zeros(self.n_rows, self.stream.d_model, dtype=torch.float64, device="cpu")
        rows[1 + 2 * slot], rows[2 + 2 * slot] = self.signs, self.noise
        if slot < self.n_slots:
            rows[-1] = self.together[slot]
        return rows

    def normed(self) -> Tensor:
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
            self._calls.append((place.module, place.before))
            if seen is not None:
                seen.add(x.dtype)
            return self._fill(place.name, x, rows)

        return Edit(place.module, change, place.before)

    def _add(self, place: Place, number: int) -> Edit:
        """What a block's carrier has, and in two rows something besides."""
        rows = self._slot(self.n_slots + number)

        def change(x: Tensor) -> Tensor:
            self._calls.append((place.module, place.before))
            width = self.n_rows * self.stream.d_model
            fits = x.shape[-1:] == (self.stream.d_model,) and x.numel() % width == 0
            return x + self._fill(place.name, x, rows) if fits and x.numel() else x

        return Edit(place.module, change, place.before, optional=True)

    def _keep_read(self, label: str) -> Callable[[Call], None]:
        def keep(call: Call) -> None:
            rows = call.entered.detach().double().cpu().reshape(self.n_rows, -1)
            self._reads[label] = (rows - rows[:1]).norm(dim=-1) > 1e-3 * rows[0].norm()

        return keep

    def _keep_left(self, position: int) -> Callable[[Call], None]:
        def keep(call: Call) -> None:
            self._left[position] = self._rows(call.activation)[:, 0].clone()

        return keep

    def _keep(self, position: int) -> Callable[[Call], None]:
        def keep(call: Call) -> None:
            x = call.activation
            self.dtypes.stream.add(x.dtype)
            rows = self._rows(x)
            self.outputs[position] = rows[:, 0].clone()
            self.ahead = rows.shape[1] - _LENGTH

        return keep

    def _rows(self, x: Tensor) -> Tensor:
        return x.detach().double().cpu().reshape(self.n_rows, -1, x.shape[-1])
