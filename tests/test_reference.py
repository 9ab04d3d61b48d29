"""The same numbers, labels and shapes as TransformerLens' own tool (extra ``tl``).

Its models are processed by default; ``center_unembed`` and ``fold_value_biases`` reproduce that
from raw weights.
"""

from __future__ import annotations

import pytest
import torch
from zoo import build, example_ids

from dla_hooks import direct_logit_attribution

pytest.importorskip("transformer_lens")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # the reference's own
    pytest.mark.tl,
]

SPECS = ("gpt2", "gpt_neox-parallel", "gpt_neox-sequential", "llama", "llama-mqa", "qwen2")
UNITS = ("component", "layer", "head")


@pytest.fixture(scope="module", params=SPECS)
def pair(request, tmp_path_factory):
    from tl_models import hooked, log_probabilities_agree

    model = build(request.param, dtype=torch.float32)
    ids = example_ids(request.param)
    reference = hooked(model, tmp_path_factory.mktemp("reference"))
    assert log_probabilities_agree(reference, model, ids)
    return model, reference, ids


def both(pair, answer, incorrect=None, **options):
    from transformer_lens.tools.analysis import direct_logit_attribution as theirs

    model, reference, ids = pair
    ours = direct_logit_attribution(
        model, ids, answer, incorrect, center_unembed=True, fold_value_biases=True, **options
    )
    return ours, theirs(reference, ids, answer, incorrect, **options)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("pos", [-1, 2, None, (1, 4), [0, -1]], ids=str)
@pytest.mark.parametrize("incorrect", [None, 7], ids=["logit", "difference"])
def test_equal_to_the_reference(pair, unit, pos, incorrect):
    if unit == "layer" and pair[1].cfg.parallel_attn_mlp:
        with pytest.raises(KeyError):  # the reference's; ours leaves the mid entries out
            both(pair, 5, incorrect, unit=unit, pos=pos)
        return
    ours, theirs = both(pair, 5, incorrect, unit=unit, pos=pos)
    assert ours.labels == theirs.labels
    assert ours.attribution.shape == theirs.attribution.shape
    assert ours.attribution.dtype == theirs.attribution.dtype
    torch.testing.assert_close(ours.attribution, theirs.attribution, rtol=1e-5, atol=1e-5)
    for (label, value), (their_label, their_value) in zip(ours.top(3), theirs.top(3), strict=True):
        assert label == their_label
        assert value == pytest.approx(their_value, abs=1e-5)


@pytest.mark.parametrize("unit", ["component", "head"])
@pytest.mark.parametrize(
    ("answer", "pos"),
    [
        (torch.tensor([5, 9]), -1),
        (torch.arange(7), None),
        (torch.arange(7)[None], None),
        (torch.arange(14).reshape(2, 7), None),
        (torch.tensor([[5], [9]]), None),
        (torch.tensor([5]), [0, 1]),
    ],
    ids=lambda value: str(list(value.shape)) if isinstance(value, torch.Tensor) else str(value),
)
def test_answers_of_every_shape(pair, unit, answer, pos):
    ours, theirs = both(pair, answer, unit=unit, pos=pos)
    torch.testing.assert_close(ours.attribution, theirs.attribution, rtol=1e-5, atol=1e-5)


def test_unprocessed_numbers_differ_where_they_should(pair):
    """Else the two conventions would not be tested at all."""
    model, _, ids = pair
    raw = direct_logit_attribution(model, ids, 5, unit="head")
    ours, _ = both(pair, 5, unit="head")
    assert not torch.allclose(raw.attribution, ours.attribution, atol=1e-3)
    torch.testing.assert_close(raw.attribution.sum(0) + raw.bias, raw.logit, atol=1e-4, rtol=1e-4)
