"""Masks with holes, and padding on both sides: as the row alone, or refused."""

from __future__ import annotations

import pytest
import torch
from mapping_zoo import build_any
from zoo import build

from dla_hooks import UnsupportedModelError, direct_logit_attribution

IDS = torch.tensor([[4, 9, 17, 33, 8, 21, 5], [7, 21, 5, 40, 12, 3, 9]])
HOLE = torch.tensor([[1, 1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma"])
def test_row_with_a_hole_equals_the_row_without_it(family):
    model = build(family, attn="sdpa")
    result = direct_logit_attribution(model, IDS, 3, 7, attention_mask=HOLE)
    for row, real in zip(range(2), HOLE.bool(), strict=True):
        own = model(IDS[row, real][None]).logits[0, -1]
        assert float(result.logit[row]) == pytest.approx(
            float((own[3] - own[7]).detach()), abs=1e-5
        )


@pytest.mark.parametrize("family", ["mamba", "jamba", "lfm2"])
def test_hole_that_a_model_reads_is_refused(family):
    with pytest.raises(UnsupportedModelError, match="in its middle"):
        direct_logit_attribution(build_any(family), IDS, 3, 7, attention_mask=HOLE)


def test_hole_in_a_window_shorter_than_the_prompt_is_refused():
    model = build("mistral", attn="sdpa")
    model.config.sliding_window = 3
    wide = torch.arange(1, 41)[None]
    mask = torch.ones_like(wide)
    mask[0, 20:22] = 0
    try:
        result = direct_logit_attribution(model, wide, 3, 7, pos=None, attention_mask=mask)
    except UnsupportedModelError as error:
        assert "in its middle" in str(error)  # noqa: PT017
    else:
        alone = direct_logit_attribution(model, wide[mask.bool()], 3, 7, pos=None)
        assert torch.allclose(result.logit[mask.bool()], alone.logit[0], atol=1e-5)


@pytest.mark.parametrize("family", ["cpmant", "llama"])
def test_padding_on_both_sides_is_measured_on_both(family):
    model = build_any(family) if family == "cpmant" else build(family, attn="sdpa")
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])
    try:
        result = direct_logit_attribution(model, IDS, 3, 7, attention_mask=mask)
    except UnsupportedModelError as error:
        assert "padded on the" in str(error)  # noqa: PT017
        assert family != "llama"
    else:
        for row, real in zip(range(2), mask.bool(), strict=True):
            own = direct_logit_attribution(model, IDS[row, real], 3, 7).logit
            assert float(result.logit[row]) == pytest.approx(float(own), abs=1e-5)
