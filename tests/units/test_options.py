"""Options that several units have."""

from __future__ import annotations

import pytest

import dla_hooks
from dla_hooks import InputError

RANKED = [dla_hooks.Neurons, dla_hooks.Experts, dla_hooks.SourceTokens]


@pytest.mark.parametrize("unit", [*RANKED, dla_hooks.Features], ids=lambda unit: unit.__name__)
@pytest.mark.parametrize("top", [0, -1, True, 1.5, "3"], ids=repr)
def test_top_that_is_no_count_is_refused_at_once(unit, top):
    with pytest.raises(InputError, match="top takes whole numbers from 1, or None for all; got"):
        unit(top=top)


@pytest.mark.parametrize("unit", RANKED, ids=lambda unit: unit.__name__)
@pytest.mark.parametrize("layers", ["3", -1, True, 1.5, [0, -2], []], ids=repr)
def test_layers_that_are_no_numbers_are_refused_at_once(unit, layers):
    with pytest.raises(InputError, match="layers"):
        unit(layers=layers)


@pytest.mark.parametrize("unit", RANKED, ids=lambda unit: unit.__name__)
def test_one_layer_and_several_are_read_alike(unit):
    assert unit(layers=1) == unit(layers=[1, 1])
    assert unit(layers=(2, 1)).layers == (1, 2)
