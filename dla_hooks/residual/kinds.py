"""What kind of sublayer a write comes from."""

from __future__ import annotations


def kind_of(label: str) -> str:
    """Read off a write's label whether it is attention, an MLP (experts are), or another mixer.

    >>> kind_of("0_attn_out"), kind_of("3_shared_mlp_out"), kind_of("2_mixer_out")
    ('attn', 'mlp', 'other')
    """
    name = label.partition("_")[2]
    if any(word in name for word in ("attn", "cross")):
        return "attn"
    return "mlp" if any(word in name for word in ("mlp", "moe", "expert")) else "other"
