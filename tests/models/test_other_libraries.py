"""What other libraries put around a model: looked through, or refused with what to pass instead."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo import build, example_ids

from dla_hooks import InputError, direct_logit_attribution


def of_library(home: str, name: str, attribute: str, base: type = nn.Module):
    """A stand-in for a library's wrapper: known by its home and name, the model an attribute."""

    def __init__(self, model):
        base.__init__(self)
        setattr(self, attribute, model)

    def forward(self, *args, **kwargs):
        return getattr(self, attribute)(*args, **kwargs)

    return type(name, (base,), {"__module__": home, "__init__": __init__, "forward": forward})


@torch.no_grad()
def test_control_model_is_looked_through():
    model, ids = build("llama"), example_ids("llama")
    wrapped = of_library("repeng.control", "ControlModel", "model")(model).eval()
    found = direct_logit_attribution(wrapped, ids, 5)
    due = direct_logit_attribution(model, ids, 5)
    torch.testing.assert_close(found.attribution, due.attribution)
    assert found.labels == due.labels


@pytest.mark.parametrize(
    ("home", "name", "attribute", "base"),
    [
        ("nnsight.modeling.base", "NNsight", "_module", object),
        ("pyvene.models.intervenable_base", "IntervenableModel", "model", nn.Module),
    ],
)
def test_wrapper_that_acts_in_its_own_calls_is_refused_with_the_model_to_pass(
    home, name, attribute, base
):
    made = of_library(home, name, attribute, base)(build("llama"))
    with pytest.raises(InputError, match=rf"pass the model in it, \.{attribute}"):
        direct_logit_attribution(made, example_ids("llama"), 5)
