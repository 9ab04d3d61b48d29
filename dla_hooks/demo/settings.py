"""The size of the demonstration model, and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A part of the training.

    Attributes:
        steps: how many.
        learning_rate: the highest; it rises, and falls to nothing.
        warmup_steps: how long it rises.
        mlp_price: what MLPs write has a price, so that heads carry what heads can: at each token,
            this times the share of their squares in the last stream's.
        looking: how much it counts that a taught head looks elsewhere.
        others_price: where a head is taught, this times the square of the share of the answer
            that it did not write.
    """

    steps: int
    learning_rate: float
    warmup_steps: int
    mlp_price: float = 0.3
    looking: float = 0.0
    others_price: float = 0.0


@dataclass(frozen=True)
class Settings:
    """The size of the model, and its training."""

    seed: int = 0
    # First it learns the tasks; then heads are taught to carry them.
    stages: tuple[Stage, ...] = (
        Stage(steps=2000, learning_rate=3e-3, warmup_steps=100),
        Stage(
            steps=350,
            learning_rate=1.5e-3,
            warmup_steps=40,
            mlp_price=0.5,
            looking=0.3,
            others_price=0.1,
        ),
    )
    layers: int = 4
    width: int = 96
    heads: int = 6
    inner: int = 128
    positions: int = 64
    # Documents of each task in a step; the tasks that need attention to be learnt get more.
    documents: tuple[int, ...] = (20, 10, 10, 20)
    weight_decay: float = 0.05
    # Words that cannot be foreseen have little to teach and would drown the others.
    given_weight: float = 0.1
    bos_probability: float = 0.5
    # Some documents begin at a later position, so that left padding does no harm.
    shift_probability: float = 0.3
    longest_shift: int = 16
