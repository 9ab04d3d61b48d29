"""Questions about stored caches: sets of tokens are served, and what needs a run is refused."""

from __future__ import annotations

import pytest
import torch

from dla_hooks import NEXT, RUNNER_UP, TOP, Continuation, Each, InputError, Mean, Tokens, prepare
from dla_hooks import direct_logit_attribution as attribute

pytest.importorskip("transformer_lens")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # the reference's own
    pytest.mark.tl,
]


def test_caches_serve_sets_and_refuse_what_needs_a_run(references):
    model = references.bridged("gpt2")
    ids = torch.randint(1, 50, (2, 5), generator=torch.Generator().manual_seed(0))
    _, cache = model.run_with_cache(ids)
    for answer, wrong in ((Tokens({5: 1, 7: -0.5}), None), (5, Mean([7, 8])), (Each([5, 6]), 7)):
        found = attribute(model, None, answer, wrong, cache=cache)
        expected = attribute(model, ids, answer, wrong)
        torch.testing.assert_close(found.attribution, expected.attribution, rtol=1e-4, atol=1e-4)
    for answer, pos in ((TOP, -1), (NEXT, None), (RUNNER_UP, -1), (Continuation([5]), -1)):
        with pytest.raises(InputError, match="cache"):
            attribute(model, None, answer, cache=cache, pos=pos)
        plan = prepare(model, answer)
        with pytest.raises(InputError, match="cache"):
            plan(cache=cache, pos=pos)


def test_cache_without_a_batch_axis_serves_several_answers(references):
    model = references.bridged("gpt2")
    ids = torch.randint(1, 50, (1, 5), generator=torch.Generator().manual_seed(0))
    _, cache = model.run_with_cache(ids)
    expected = attribute(model, None, Each([5, 6]), cache=cache)
    _, cache = model.run_with_cache(ids, remove_batch_dim=True)
    found = attribute(model, None, Each([5, 6]), cache=cache)
    assert found.attribution.shape == expected.attribution[:, 0].shape
    torch.testing.assert_close(found.attribution, expected.attribution[:, 0])
