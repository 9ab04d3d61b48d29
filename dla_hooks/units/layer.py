"""Layers: the stream as it grows, read through the final norm's frozen scale.

Entry i is the running sum of the parts up to that point, so the difference of two neighbours is
the part between them.
"""

from __future__ import annotations

from dla_hooks.questions import mlp_reads_mid
from dla_hooks.units.base import Split, Unit


class LayerUnit(Unit):
    """The running sum of the parts."""

    def split(self) -> Split:
        """``0_pre``, ``0_mid``, ``1_pre``, …, ``final_post``.

        A parallel block has no mid stream, and so no ``_mid`` entry.
        """
        run = self.run
        has_mid = mlp_reads_mid(run.stream)
        running = run.parts_CN.cumsum(0)
        position = {label: i for i, label in enumerate(run.labels)}
        last = position[run.stream.blocks[0].writes[0].label] - 1  # the last of the embeddings

        labels, rows = [], []
        for layer, block in enumerate(run.stream.blocks):
            labels.append(f"{layer}_pre")
            rows.append(last)
            if has_mid[layer]:
                labels.append(f"{layer}_mid")
                rows.append(position[block.writes[0].label])
            last = position[block.writes[-1].label]
        labels.append("final_post")
        rows.append(last)
        return Split(labels, running[rows])
