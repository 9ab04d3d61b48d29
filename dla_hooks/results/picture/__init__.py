"""Pictures of numbers with labels, drawn as SVG by the standard library alone.

``bars``, ``grouped``, ``waterfall``, ``line``, ``heatmap`` and ``strip`` take plain lists of labels
and numbers, and give a :class:`Picture`, which a notebook shows and ``save`` writes.

    >>> from dla_hooks.results import picture
    >>> drawn = picture.bars(["embed", "0_attn_out"], [1.5, -0.25], title="Components")
    >>> drawn.values
    [('embed', 1.5), ('0_attn_out', -0.25)]
"""

from dla_hooks.results.picture.bars import bars, waterfall
from dla_hooks.results.picture.grouped import grouped
from dla_hooks.results.picture.heatmap import heatmap
from dla_hooks.results.picture.line import line
from dla_hooks.results.picture.picture import Picture, check_path
from dla_hooks.results.picture.strip import strip

__all__ = ["Picture", "bars", "check_path", "grouped", "heatmap", "line", "strip", "waterfall"]
