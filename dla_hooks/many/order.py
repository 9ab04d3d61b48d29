"""Which of many prompts run together, and in which order."""

from __future__ import annotations

from collections.abc import Sequence


def batches_of(
    lengths: Sequence[int],
    max_tokens: int,
    *,
    same_length: bool = False,
    longest_padded: int | None = None,
) -> list[list[int]]:
    """Sort prompts by length and fill batches with them.

    Args:
        lengths: tokens of each prompt.
        max_tokens: the most that a batch may hold, padding counted: its rows times its longest. A
            prompt that is longer is a batch of its own.
        same_length: put prompts of one length together only, so that nothing is padded.
        longest_padded: the same for prompts of more tokens than this; None is no limit.

    Returns:
        Indices into ``lengths``, a list for each batch; every index once, longest prompts first.
    """
    batches: list[list[int]] = []
    # Longest first, so that running out of memory shows at once.
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[batches[-1][0]] if batches else 0
        full = not batches or (len(batches[-1]) + 1) * longest > max_tokens
        alone = same_length or (longest_padded is not None and longest > longest_padded)
        if full or (alone and lengths[index] != longest):
            batches.append([])
        batches[-1].append(index)
    return batches
