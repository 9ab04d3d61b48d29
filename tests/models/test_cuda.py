"""On a GPU: the numbers of the CPU, of every family."""

import pytest
import torch
from zoo import ZOO, build

from dla_hooks import DLAError, direct_logit_attribution
from dla_hooks.units import unit_names

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

UNITS = [unit for unit in unit_names() if unit not in ("adapter", "feature")]
CASES = {
    "last": {"pos": -1},
    "all-padded": {"pos": None, "attention_mask": torch.tensor([[1] * 9, [0] * 3 + [1] * 6])},
    "pieces": {"pos": -1, "chunk_size": 4},
}


@pytest.fixture(autouse=True)
def whole_floats(monkeypatch):
    """Convolutions round their inputs to 10 bits on a GPU, unless they are told not to."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def outcome(model, ids, unit, case):
    """The result, or the reason why there is none."""
    try:
        return direct_logit_attribution(model, ids, 7, 11, unit=unit, **CASES[case])
    except DLAError as error:
        return type(error)


@pytest.mark.parametrize("family", [spec.name for spec in ZOO])
def test_numbers_on_a_gpu_are_those_on_the_cpu(family):
    model = build(family, dtype=torch.float32)
    ids = torch.randint(5, 40, (2, 9), generator=torch.Generator().manual_seed(3))
    asked = [(unit, case) for unit in UNITS for case in CASES]
    expected = {one: outcome(model, ids, *one) for one in asked}
    model.cuda()
    for one in asked:
        found, known = outcome(model, ids.cuda(), *one), expected[one]
        if isinstance(known, type):
            assert found is known, one
            continue
        assert found.attribution.device.type == "cuda", one
        ours, theirs = (
            # Of ranked rows, whose order may differ where two are alike, the sum and the size.
            torch.stack((own.attribution.nansum(0), own.attribution.abs().nansum(0)))
            if hasattr(own, "index")
            else own.attribution
            for own in (found, known)
        )
        size = max(1.0, float(theirs.nan_to_num().abs().max()))
        torch.testing.assert_close(
            ours.cpu() / size, theirs / size, rtol=0, atol=1e-3, equal_nan=True, msg=str(one)
        )
