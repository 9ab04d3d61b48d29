"""Layers: the stream as it grows, read through the final norm's frozen scale.

Row i is the running sum of the parts up to that point, so the difference of two neighbours is
the part between them.
"""

from __future__ import annotations

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

    def places(self, stream: Stream) -> list[Place]:
        """The beginning of the stream and every write."""
        return [stream.start, *(write.place for write in stream.writes)]

    def split(self, parts: Parts) -> Split:
        """The running sum at the beginning, in the middle and at the end of each block."""
        plan = parts.plan
        rows, places = [], []
        before = 0  # parts up to here, the embeddings counted as one
        mids = mid_streams(plan.stream)
        for block, end, n_first in zip(plan.stream.blocks, plan.last_of_block, mids, strict=True):
            rows.append(Row(f"{block.layer}_pre", "pre", block.layer))
            places.append(before)
            if n_first is not None:
                rows.append(Row(f"{block.layer}_mid", "mid", block.layer))
                places.append(before + n_first)
            before = end - plan.n_embeddings + 1
        rows.append(Row("final_post", "post"))
        places.append(before)
        return Split(rows, parts.running_CN[places])
