"""Layers: the stream as it grows, read through the final norm's frozen scale.

Entry i is the running sum of the parts up to that point, so the difference of two neighbours is
the part between them.
"""

from __future__ import annotations

from dla_hooks.calibration.mid_streams import mid_streams
from dla_hooks.units.base import Split, Unit


class LayerUnit(Unit):
    """The running sum of the parts."""

    def split(self) -> Split:
        """``0_pre``, ``0_mid``, ``1_pre``, …, ``final_post``.

        A parallel block has no mid stream, and so no ``_mid`` entry.
        """
        run = self.run
        running = run.parts_CN.cumsum(0)
        last = run.labels.index(run.stream.blocks[0].writes[0].label) - 1  # of the embeddings

        labels, rows = [], []
        mids = mid_streams(run.stream)
        for block, end, n_before in zip(run.stream.blocks, run.last_of_block, mids, strict=True):
            labels.append(f"{block.layer}_pre")
            rows.append(last)
            if n_before is not None:
                labels.append(f"{block.layer}_mid")
                rows.append(last + n_before)
            last = end
        labels.append("final_post")
        rows.append(last)
        return Split(labels, running[rows])
