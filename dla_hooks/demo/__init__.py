"""A small trained model that ships with the package, for examples and tests without a network.

It is a GPT-2 of four layers, trained from scratch by ``python -m dla_hooks.demo.train`` on four
tasks whose mechanisms are well known: indirect objects, landmarks and their cities, agreement of
subject and verb across a distractor, and induction. Its attention heads write the answers: what
MLPs write had a price in training, and of three tasks one head was taught where to look.

    >>> from dla_hooks import demo
    >>> model, tokenizer = demo.load()
    >>> example = demo.examples()[0]
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dla_hooks.demo.corpus import TASKS, Example, held_out, literal_examples
from dla_hooks.quiet import quiet

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

__all__ = ["TASKS", "Example", "examples", "held_out", "load", "path"]


def path() -> Path:
    """The folder with the shipped model and tokenizer, as ``from_pretrained`` takes it."""
    return Path(__file__).parent / "model"


def load() -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast]:
    """Load the shipped model, in float32 and ready for evaluation, and its tokenizer.

    Only local files are read. The weights are stored in half precision to keep the package small.
    """
    folder = path()
    with quiet():
        import torch
        from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

        model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    return model.eval(), tokenizer


def examples() -> list[Example]:
    """Two well-known prompts of each task that the model answers right and never saw."""
    return literal_examples()
