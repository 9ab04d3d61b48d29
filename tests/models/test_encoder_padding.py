"""Padding of what an encoder reads: each row's numbers are those of the row alone, or refused."""

from __future__ import annotations

import pytest
import torch
from doors import by_name

from dla_hooks import UnsupportedModelError, direct_logit_attribution

TOKEN = 5


def padded(case, where, fill):
    """The prompt with three tokens of the first row's encoder masked, and that row alone."""
    ids = case.asked["input_ids"].clone()
    mask = torch.ones_like(ids)
    masked = {"left": slice(0, 3), "right": slice(-3, None), "middle": slice(2, 4)}[where]
    mask[0, masked] = 0
    if fill is not None:
        ids[0, masked] = fill
    alone = {name: value[:1] for name, value in case.asked.items()}
    alone["input_ids"] = ids[:1, mask[0].bool()]
    return {**case.asked, "input_ids": ids, "attention_mask": mask}, alone


@torch.no_grad()
@pytest.mark.parametrize("filled", [True, False], ids=["pad token", "other tokens"])
@pytest.mark.parametrize("where", ["left", "right", "middle"])
@pytest.mark.parametrize("name", ["t5", "mbart", "pegasus", "m2m_100"])
def test_padded_row_of_an_encoder_is_the_row_alone_or_refused(name, where, filled):
    case = next(iter(by_name("seq2seq").cases(name, seed=0)))
    model = case.model
    given, alone = padded(case, where, model.config.pad_token_id if filled else None)
    due = model(**alone).logits[0, -1, TOKEN]
    counted = {
        "t5": where == "middle",  # its distances are those of the columns
        "m2m_100": not filled and where != "right",  # positions are counted by the pad token
    }.get(name, where != "right")
    if counted:
        with pytest.raises(UnsupportedModelError, match="what its encoder reads is padded"):
            direct_logit_attribution(model, given, TOKEN)
        return
    found = direct_logit_attribution(model, given, TOKEN)
    torch.testing.assert_close(found.logit[0], due.to(found.logit), rtol=0, atol=1e-5)
