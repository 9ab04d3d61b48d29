"""Attribution tells the truth about the shipped model: what it names, removed, moves the logit."""

from __future__ import annotations

import pytest
import torch
from oracle import ablation_effects, head_effects, last_stream, stream_parts
from oracle_families import frozen_norm, norm_scale

from dla_hooks import demo, direct_logit_attribution

N_PROMPTS = 40


@pytest.fixture(scope="module")
def shipped():
    return demo.load()


def ids_of(tokenizer, example) -> tuple[torch.Tensor, int, int]:
    answer, incorrect = (tokenizer.encode(text)[0] for text in (example.answer, example.incorrect))
    return torch.tensor([tokenizer.encode(example.prompt)]), answer, incorrect


@pytest.mark.parametrize("example", demo.examples(), ids=lambda example: example.prompt)
def test_the_parts_sum_to_a_logit_difference_that_favours_the_answer(shipped, example):
    model, tokenizer = shipped
    for unit in ("component", "head"):
        result = direct_logit_attribution(
            model, example.prompt, example.answer, example.incorrect, unit=unit, tokenizer=tokenizer
        )
        torch.testing.assert_close(
            result.attribution.sum(0) + result.bias, result.logit, atol=1e-4, rtol=0
        )
        assert float(result.logit) > 1


@pytest.mark.parametrize("example", demo.examples(), ids=lambda example: example.prompt)
def test_removing_a_write_moves_the_logit_difference_by_its_attribution(shipped, example):
    """With the final scale frozen: of the six strongest components, and the six strongest heads."""
    model, tokenizer = shipped
    ids, answer, incorrect = ids_of(tokenizer, example)
    final_norm = model.transformer.ln_f

    def difference(stream: torch.Tensor, scale: torch.Tensor) -> float:
        normed = frozen_norm("layer", final_norm, stream, scale)
        logits = model.lm_head(normed.float())[0, -1]
        return float(logits[answer] - logits[incorrect])

    with torch.no_grad():
        stream, parts = last_stream(model, ids), stream_parts(model, ids)
        scale = norm_scale("layer", final_norm, stream)
        components = direct_logit_attribution(model, ids, answer, incorrect)
        for label, value in components.top(3) + components.bottom(3):
            moved = difference(stream, scale) - difference(stream - parts[label], scale)
            assert moved == pytest.approx(value, abs=2e-4), label

    heads = direct_logit_attribution(model, ids, answer, incorrect, unit="head")
    effects = head_effects(model, ids, answer, incorrect, eps=-1.0)[..., 0, -1]
    for label, value in heads.top(3) + heads.bottom(3):
        if label != "remainder":
            layer, head = map(int, label[1:].split("H"))
            assert float(effects[layer, head]) == pytest.approx(value, abs=2e-4), label


@pytest.mark.parametrize("task", demo.TASKS)
def test_head_rankings_agree_with_real_ablation(shipped, task):
    """Heads of the last layer have little but their direct path: there the two rankings agree.

    So they do in the layer of the induction head. Earlier heads act through later layers too (a
    previous-token head has no direct effect at all), which direct attribution does not claim to
    see.
    """
    model, tokenizer = shipped
    n_layers, n_heads = model.config.n_layer, model.config.n_head
    direct = torch.zeros(n_layers, n_heads)
    real = torch.zeros(n_layers, n_heads, dtype=torch.float64)
    for example in demo.held_out(task, N_PROMPTS):
        ids, answer, incorrect = ids_of(tokenizer, example)
        result = direct_logit_attribution(model, ids, answer, incorrect, unit="head")
        direct += result.attribution[:-1, 0].reshape(n_layers, n_heads)
        real += ablation_effects(model, ids, answer, incorrect)[..., 0]
    layer = 1 if task == "induction" else -1
    assert float(torch.corrcoef(torch.stack((direct[layer].double(), real[layer])))[0, 1]) > 0.8
    assert int(direct[layer].argmax()) == int(real[layer].argmax())
    assert float(real[layer].max()) > 0
