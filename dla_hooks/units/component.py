"""Components: embeddings, and each sublayer's write."""

from __future__ import annotations

from dla_hooks.units.base import Split, Unit


class ComponentUnit(Unit):
    """The parts themselves."""

    shows_embeddings = True

    def split(self) -> Split:
        """``embed``, ``pos_embed``, ``0_attn_out``, ``0_mlp_out``, …"""
        return Split(list(self.run.labels), self.run.parts_CN)
