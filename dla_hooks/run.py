"""One run of a model: what every unit shares, and the forward pass itself.

:class:`Run` holds the plan of a call (stream, sites, directions) and the scalars it gathers. Its
own rows are the *parts*: every term of the residual stream, measured one by one, whatever the
unit. Units add rows of their own, and the parts are what each call is checked by.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from dla_hooks.answers import Targets
from dla_hooks.errors import UnsupportedModelError
from dla_hooks.hooks import Tap, tapped
from dla_hooks.kernels import project
from dla_hooks.locate import Stream
from dla_hooks.readout import FinalStream, read_out
from dla_hooks.sites import Sites
from dla_hooks.tokens import Prompt


class Run:
    """The plan and the scalars of one call.

    Args:
        stream: the located model.
        sites: where the stream is read.
        targets: what is attributed there.
        center_unembed: see :func:`dla_hooks.readout.read_out`.
        fold_value_biases: see :mod:`dla_hooks.folding`.

    Attributes:
        labels: names of the parts, in stream order.
        finite_C: whether each part is finite, before the division by the final scale.
        parts_CN: contribution of each part to the logit (difference) at each site.
        final: what the final norm saw.
    """

    def __init__(
        self,
        stream: Stream,
        sites: Sites,
        targets: Targets,
        *,
        center_unembed: bool = False,
        fold_value_biases: bool = False,
    ) -> None:
        self.stream = stream
        self.sites = sites
        self.fold_value_biases = fold_value_biases
        self.readout = read_out(stream, targets, center_unembed=center_unembed)
        readouts = [self.readout]
        if stream.softcap is not None and targets.incorrect is not None:
            # The cap acts on each logit, not on their difference: measure both for the check.
            for ids in (targets.correct, targets.incorrect):
                readouts.append(read_out(stream, Targets(ids, None), center_unembed=False))
        self.final = FinalStream(stream, sites, readouts)

        self.labels = ["embed"]
        if stream.positions is not None:
            self.labels.append("pos_embed")
        self.labels += [write.label for write in stream.writes]
        self.parts_CN = self.readout.d_KM.new_zeros(len(self.labels), len(sites))
        self.finite_C = torch.ones(len(self.labels), dtype=torch.bool)

    def part(self, label: str) -> Tensor:
        """The row [N] of one part."""
        return self.parts_CN[self.labels.index(label)]

    def forward(self, prompt: Prompt, taps: list[Tap], columns: Tensor | None) -> Tensor:
        """Run the model once, with the parts' taps and a unit's on it.

        Args:
            prompt: what to run on.
            taps: the unit's own taps.
            columns: where the model's own logits are wanted, or None for the least it can do.

        Returns:
            Logits [batch, n_columns, vocabulary].
        """
        with tapped([*self._taps(), self.final.tap, *taps]):
            logits = run_model(self.stream.model, prompt, columns)
        self._finish()
        return logits

    def _taps(self) -> list[Tap]:
        stream, d_KM = self.stream, self.readout.d_KM
        first = stream.blocks[0]

        def tap(module: nn.Module, name: str, label: str, before: bool = False) -> Tap:
            row_N = self.part(label)

            def see(_: Tensor, out: Tensor) -> None:
                if out.shape[-1] != stream.d_model:
                    raise UnsupportedModelError(
                        f"{name} puts out {out.shape[-1]} channels, but the stream has "
                        f"{stream.d_model}: it is not what the block adds to the stream"
                    )
                project(out, self.sites, d_KM, row_N)

            return Tap(module, name, see, before)

        taps = [tap(first.module, first.name, "embed", before=True)]
        if stream.positions is not None:
            taps.append(tap(stream.positions, stream.architecture.positions or "", "pos_embed"))
        taps += [tap(write.written_by, write.name, write.label) for write in stream.writes]
        return taps

    def _finish(self) -> None:
        # What enters block 0 is the sum of the embeddings; the tokens' part is what positions
        # leave of it, with whatever scaling, norm or projection the model puts on it.
        if self.stream.positions is not None:
            self.part("embed").sub_(self.part("pos_embed"))
        for write in self.stream.writes:
            if write.scale != 1.0:
                self.part(write.label).mul_(write.scale)
        self.finite_C = torch.isfinite(self.parts_CN).all(-1)
        self.parts_CN /= self.final.scale_N


def run_model(model: Any, prompt: Prompt, columns: Tensor | None) -> Tensor:
    """The plain forward pass, with logits at a few columns only.

    Args:
        model: a Hugging Face causal LM.
        prompt: the batch.
        columns: columns of the prompt [n], or None for the last.

    Returns:
        Logits [batch, n, vocabulary].
    """
    accepted = inspect.signature(model.forward).parameters
    device = model.get_input_embeddings().weight.device
    arguments: dict[str, Any] = {"input_ids": prompt.input_ids.to(device), "use_cache": False}
    if prompt.padded:
        arguments["attention_mask"] = prompt.mask.long().to(device)
        if "position_ids" in accepted:
            arguments["position_ids"] = prompt.position_ids().to(device)
    if columns is None:
        columns = torch.tensor([prompt.input_ids.shape[1] - 1])
    if "logits_to_keep" in accepted:
        arguments["logits_to_keep"] = columns.to(device)
        logits: Tensor = model(**arguments, return_dict=True).logits
        return logits
    logits = model(**arguments, return_dict=True).logits
    return logits[:, columns.to(logits.device)]
