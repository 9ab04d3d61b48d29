"""Small prompts fit into one tile, and few targets into one set of directions: here they do not."""

from __future__ import annotations

import pytest
import torch
from units import UNIT_NAMES
from zoo import build, example_ids

from dla_hooks import direct_logit_attribution as attribute
from dla_hooks.projection import directions
from dla_hooks.projection import tiles as sites

pytestmark = pytest.mark.lowest

CONVENTIONS = {"center_unembed": True, "fold_value_biases": True}


def answers_of(form: str, ids: torch.Tensor) -> tuple:
    """One target; one per row; one per site; and few that recur in another order."""
    recurring = (ids * 7) % 3
    return {
        "one": (5, 7),
        "rows": (torch.tensor([5, 8, 9]), torch.tensor([7, 7, 4])),
        "sites": (ids.roll(-1), None),
        "recurring": (recurring, recurring + 3),
    }[form]


@pytest.mark.parametrize("unit", UNIT_NAMES)
@pytest.mark.parametrize("form", ["one", "rows", "sites", "recurring"])
@pytest.mark.parametrize("spec", ["gpt2", "gemma2", "granite", "olmo2-bias-tied"])
@pytest.mark.parametrize("pos", [None, [1, 4, 5, 10]], ids=["all", "some"])
def test_small_tiles_and_fresh_directions_change_nothing(monkeypatch, spec, form, unit, pos):
    model, ids = build(spec), example_ids(spec, batch=3, length=11)
    correct, incorrect = answers_of(form, ids)
    if pos is not None and form in ("sites", "recurring"):
        correct = correct[:, pos]
        incorrect = None if incorrect is None else incorrect[:, pos]
    conventions = CONVENTIONS if spec == "gpt2" else {}
    options = {"unit": unit, "pos": pos, **conventions}
    expected = attribute(model, ids, correct, incorrect, **options)
    monkeypatch.setattr(directions, "_HELD_ELEMENTS", 0)
    monkeypatch.setattr(sites, "_TILE_ELEMENTS", {"cpu": 4 * model.config.hidden_size})
    found = attribute(model, ids, correct, incorrect, **options)
    atol = 1e-10 * float(expected.logit.abs().max())
    torch.testing.assert_close(found.attribution, expected.attribution, rtol=0, atol=atol)
    torch.testing.assert_close(found.bias, expected.bias, rtol=0, atol=atol)


@pytest.mark.parametrize("form", ["rows", "sites", "recurring"])
def test_many_targets_match_single_targets(form):
    model, ids = build("llama-bias"), example_ids("llama-bias", batch=3, length=5)
    correct, incorrect = answers_of(form, ids)
    whole = attribute(model, ids, correct, incorrect, unit="head", pos=None).attribution
    for row in range(3):
        for column in range(5):
            place = (row,) if correct.ndim == 1 else (row, column)
            wrong = None if incorrect is None else int(incorrect[place])
            alone = attribute(
                model, ids[row], int(correct[place]), wrong, unit="head", pos=column
            ).attribution
            torch.testing.assert_close(whole[:, row, column], alone[:, 0], rtol=0, atol=1e-5)
