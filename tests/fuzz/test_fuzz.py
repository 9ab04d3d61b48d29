"""Random models, interventions and questions: right, or a DLAError; never anything else.

`tests/fuzz/run.py` draws as many as there is time for. Here a fixed few are drawn: a hundred in
every run of the tests, and three hundred more in CI.
"""

from __future__ import annotations

import pytest
import torch
from draws import outcome_of
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from interventions import TABLE

import dla_hooks

LARGEST_SHARE_REFUSED = 0.35


def _drawn(n: int) -> settings:
    """So many draws, the same ones each time; without shrinking, which takes minutes."""
    return settings(
        max_examples=n,
        derandomize=True,
        deadline=None,
        database=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )


def _holds(n: int) -> None:
    kinds: list[str] = []

    @_drawn(n)
    @given(rng=st.randoms(use_true_random=False))
    def one(rng):
        found = outcome_of(rng)
        kinds.append(found.kind)
        if found.kind == "failed":
            pytest.fail("\n".join([*found.said, found.error]), pytrace=False)

    one()
    judged = len(kinds) - kinds.count("discarded")
    assert kinds.count("refused") <= LARGEST_SHARE_REFUSED * judged
    assert kinds.count("right") >= 0.5 * judged


def test_random_draws_are_right_or_refused():
    _holds(100)


@pytest.mark.slow
def test_many_random_draws_are_right_or_refused():
    _holds(300)
