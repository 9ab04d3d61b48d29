"""Fresh documents as tensors, with the places where heads are taught where to look."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dla_hooks.demo.corpus import TASKS, training_document
from dla_hooks.demo.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass
class Batch:
    """Documents as tensors. Causal attention never looks ahead: padding on the right needs no mask.

    Attributes:
        tokens: ids [document, position].
        positions: position ids, the same shape; so are the weights of each token's loss.
        looks: for each task, the places that are taught where to look [document, query, key].
        foils: at these places, a token that does not follow [document, position].
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    weights: torch.Tensor
    looks: dict[str, torch.Tensor]
    foils: torch.Tensor


def batch_of(
    tasks: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    settings: Settings,
    rng: random.Random,
) -> Batch:
    """Fresh documents of the tasks."""
    counts = dict(zip(TASKS, settings.documents, strict=True))
    made = [training_document(task, rng) for task in tasks for _ in range(counts[task])]
    # No word reaches across the two parts, so their tokens are those of the whole text.
    given = tokenizer([one.given for one in made])["input_ids"]
    rest = tokenizer([one.rest for one in made])["input_ids"]
    end = tokenizer.eos_token_id
    longest = 2 + max(len(one) + len(other) for one, other in zip(given, rest, strict=True))
    tokens = torch.full((len(made), longest), end)
    weights = torch.zeros(len(made), longest)
    shifts = torch.zeros(len(made), 1, dtype=torch.long)
    foils = torch.zeros(len(made), longest, dtype=torch.long)
    looks = {task: torch.zeros(len(made), longest, longest, dtype=torch.bool) for task in tasks}
    for row, (one, other) in enumerate(zip(given, rest, strict=True)):
        head = [end] * (rng.random() < settings.bos_probability) + list(one)
        length = len(head) + len(other) + 1
        tokens[row, : length - 1] = torch.tensor(head + list(other))
        weights[row, : len(head)] = settings.given_weight
        weights[row, len(head) : length] = 1.0
        if rng.random() < settings.shift_probability:
            shifts[row] = rng.randint(0, min(settings.longest_shift, settings.positions - longest))
        for beginning, source, wrong in made[row].looks:
            query = len(head) - len(one) + len(tokenizer.encode(beginning)) - 1
            there = torch.isin(tokens[row, : len(head)], torch.tensor(tokenizer.encode(source)))
            looks[made[row].task][row, query, : len(head)] = there
            foils[row, query] = tokenizer.encode(wrong)[0]
    return Batch(tokens, torch.arange(longest) + shifts, weights, looks, foils)
