"""Questions about classifiers, and in coarse dtypes."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification
from zoo import BY_NAME, _config, _randomise, build, example_ids

from dla_hooks import NEXT, RUNNER_UP, TOP, Continuation, Each, InputError, Mean, Tokens
from dla_hooks import direct_logit_attribution as attribute

IDS = torch.randint(5, 50, (2, 6), generator=torch.Generator().manual_seed(1))


def classifier(family, n_labels):
    config = _config(BY_NAME[family])
    config.num_labels, config.pad_token_id = n_labels, 2
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForSequenceClassification.from_config(config).double().eval()
    _randomise(model, torch.Generator().manual_seed(0))
    return model


class TestLabels:
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_sets_of_labels_are_sums_of_scores(self, family):
        model = classifier(family, 3)
        with torch.no_grad():
            scores = model(IDS).logits
        for answer, wrong, expected in (
            (Tokens({0: 2, 1: -0.5}), None, 2 * scores[:, 0] - 0.5 * scores[:, 1]),
            (0, Mean([1, 2]), scores[:, 0] - scores[:, 1:].mean(-1)),
            (TOP, RUNNER_UP, scores.topk(2).values[:, 0] - scores.topk(2).values[:, 1]),
        ):
            found = attribute(model, IDS, answer, wrong)
            torch.testing.assert_close(found.logit, expected, rtol=1e-5, atol=1e-5)
            whole = found.attribution.sum(0) + found.bias
            torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-5)
        each = attribute(model, IDS, Each([0, 1, 2]))
        torch.testing.assert_close(each.logit, scores, rtol=1e-5, atol=1e-5)

    def test_what_a_classifier_lacks_is_refused(self):
        model = classifier("llama", 3)
        for answer in (NEXT, Continuation([5])):
            with pytest.raises(InputError, match="classifier"):
                attribute(model, IDS, answer)
        with pytest.raises(InputError, match="RUNNER_UP needs 2"):
            attribute(classifier("llama", 1), IDS, TOP, RUNNER_UP)


@pytest.mark.parametrize("spec", ["gpt2", "llama", "gemma2", "granite", "gpt_neox-parallel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", [0, 1])
def test_questions_pass_the_check_in_coarse_dtypes(spec, dtype, seed):
    model, ids = build(spec, seed, dtype=dtype), example_ids(spec, seed=seed)
    fine = build(spec, seed)
    for answer, wrong in (
        (Tokens({5: 1.0, 7: -0.5, 8: -0.5}), None),
        (Tokens({5: 1e4, 7: -3e3}), None),
        (5, Mean([7, 8, 9])),
        (Each([5, 6]), Mean([7, 8])),
        (TOP, RUNNER_UP),
    ):
        found = attribute(model, ids, answer, wrong, pos=None)
        if dtype == torch.float32 and answer is not TOP:
            expected = attribute(fine, ids, answer, wrong, pos=None)
            spread = float(expected.logit.abs().max())
            torch.testing.assert_close(
                found.attribution.double(), expected.attribution, rtol=0, atol=1e-3 * spread
            )
