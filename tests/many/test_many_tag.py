"""A folder to resume and the hooks that are on the model."""

from __future__ import annotations

import pytest
import torch
from many_prompts import made

from dla_hooks import InputError, attribute_many, direct_logit_attribution

PROMPTS = [[0, 5, 17, 33], [0, 9, 2, 31, 8]]


def _logits(model, **options):
    return [float(one.logit) for one in attribute_many(model, PROMPTS, 7, **options)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_folder_without_tag_is_refused_while_hooks_are_on(family, tmp_path):
    model = made(family)
    plain = _logits(model, resume=tmp_path)
    handle = _some_mlp(model).register_forward_hook(lambda module, args, out: out * 0)
    with pytest.raises(InputError, match="hook of yours.*tag="):
        _logits(model, resume=tmp_path)
    with pytest.raises(InputError, match="another run: tag was None, now 'ablated'"):
        _logits(model, resume=tmp_path, tag="ablated")
    alone = [float(direct_logit_attribution(model, torch.tensor(p), 7).logit) for p in PROMPTS]
    other = tmp_path / "ablated"
    for _ in range(2):
        assert _logits(model, resume=other, tag="ablated") == pytest.approx(alone)
    handle.remove()
    assert _logits(model, resume=tmp_path) == plain
    with pytest.raises(InputError, match="another run: tag was 'ablated', now None"):
        _logits(model, resume=other)


def test_hooks_of_libraries_need_no_tag(tmp_path):
    model = made("llama")
    model(torch.tensor([PROMPTS[0]]), output_hidden_states=True)  # leaves hooks on some versions
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    model.eval()
    assert len(_logits(model, resume=tmp_path)) == 2


@pytest.mark.parametrize("tag", ["", 3])
def test_tag_that_is_no_name_is_refused(tag, tmp_path):
    with pytest.raises(InputError, match="tag must be a string"):
        _logits(made("llama"), resume=tmp_path, tag=tag)


def _some_mlp(model):
    return next(module for path, module in model.named_modules() if path.endswith("1.mlp"))
