"""Components: embeddings, and each sublayer's write."""

from __future__ import annotations

from dla_hooks.modules.hooks import Place
from dla_hooks.residual.stream import Stream
from dla_hooks.results.rows import Words
from dla_hooks.units.base import Split, Unit
from dla_hooks.units.parts import Parts


class Components(Unit):
    """``embed``, ``pos_embed``, ``0_attn_out``, ``0_mlp_out``, …: the parts themselves.

    >>> import dla_hooks
    >>> model, tokenizer = dla_hooks.demo.load()
    >>> result = dla_hooks.direct_logit_attribution(
    ...     model, "The keys near the cabinet", " are", unit=dla_hooks.Components(),
    ...     tokenizer=tokenizer)
    >>> result.labels[:3]
    ['embed', 'pos_embed', '0_attn_out']
    """

    words = Words(
        name="component",
        title="Components",
        sentence="components: embeddings, and what each sublayer wrote",
    )

    taken_out = ("write",)

    def places(self, stream: Stream) -> list[Place]:
        """The embeddings and every write."""
        embeddings = [stream.embedding]
        if stream.positions is not None:
            embeddings.append(stream.positions)
        return [*embeddings, *(write.place for write in stream.writes)]

    def split(self, parts: Parts) -> Split:
        """The parts, in the order of the stream."""
        return Split(parts.rows, parts.values_CN)
