"""Layers: the stream as it grows, read through the final norm's frozen scale.

Row i is the running sum of the parts up to that point, so the difference of two neighbours is
the part between them.
"""

from __future__ import annotations

import torch

from dla_hooks.calibration.mid_streams import mid_streams
from dla_hooks.modules.hooks import Place
from dla_hooks.residual.stream import Stream
from dla_hooks.results.rows import Row, Words
from dla_hooks.units.base import Split, Unit
from dla_hooks.units.parts import Parts


class Layers(Unit):
    """``0_pre``, ``0_mid``, ``1_pre``, …, ``final_post``: the running sum of the parts.

    A parallel block has no mid stream, and so no ``_mid`` row.

    >>> import dla_hooks
    >>> model, tokenizer = dla_hooks.demo.load()
    >>> result = dla_hooks.direct_logit_attribution(
    ...     model, "The keys near the cabinet", " are", unit=dla_hooks.Layers(),
    ...     tokenizer=tokenizer)
    >>> result.labels[:3], result.labels[-1]
    (['0_pre', '0_mid', '1_pre'], 'final_post')
    """

    words = Words(
        name="layer",
        title="Layers, running sum of the components",
        sentence="layers: the running sum of the components",
        chart="line",
        cumulative=True,
    )
    reads_each_write = False
    kept_in = "they are running sums; take out components"

    def places(self, stream: Stream) -> list[Place]:
        """The beginning of the stream and every write."""
        return [stream.start, *(write.place for write in stream.writes)]

    def split(self, parts: Parts) -> Split:
        """The running sum at the beginning, in the middle and at the end of each block."""
        stream, rows, steps = parts.plan.stream, [], []
        for number, (block, n_first) in enumerate(
            zip(stream.blocks, mid_streams(stream), strict=True)
        ):
            places = parts.places[number]
            rows.append(Row(f"{block.layer}_pre", "pre", block.layer))
            steps.append(places[0])
            if n_first is not None:
                rows.append(Row(f"{block.layer}_mid", "mid", block.layer))
                steps.append(places[n_first])
        last = stream.last_label
        if rows and rows[-1].label == last:  # it ends in the middle of a block
            rows, steps = rows[:-1], steps[:-1]
        rows.append(Row(last, last.rpartition("_")[2]))
        steps.append(parts.places[-1][0])
        values_CN = parts.steps_SN.cumsum(0)[steps]
        for label, added_RN in sorted(parts.reading.hooks_RN.items()):  # behind the last stream
            rows.append(Row(label, "hook"))
            values_CN = torch.cat((values_CN, values_CN[-1:] + added_RN[:1]))
        return Split(rows, values_CN)
