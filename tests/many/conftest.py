"""What the tests of many prompts share: a model, and the batches that it ran."""

from __future__ import annotations

import pytest
from many_prompts import batches_seen, made


@pytest.fixture(scope="module")
def model():
    return made("gpt2")


@pytest.fixture
def ran(model):
    with batches_seen(model) as shapes:
        yield shapes
