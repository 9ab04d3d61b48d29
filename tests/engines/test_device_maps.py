"""Device maps: a model whose blocks are on several devices, with stand-ins for GPUs.

Blocks on the CPU alternate with blocks on the meta device, whose weights accelerate brings while
they run, as it moves activations between GPUs.
"""

from __future__ import annotations

import pytest
import torch
from many_prompts import random_prompts
from zoo import build

from dla_hooks import Attributor, direct_logit_attribution

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

SLOW = pytest.mark.slow
IDS = torch.randint(5, 50, (2, 7), generator=torch.Generator().manual_seed(1))


def in_turn(model, folder):
    """The model with every second block, and the unembedding, on the meta device."""
    places = {}
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            number = next((int(piece) for piece in name.split(".") if piece.isdigit()), 0)
            places[name] = "disk" if number % 2 or name == "lm_head" else "cpu"
    return accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True
    )


@pytest.mark.parametrize(
    ("family", "seed"),
    [("llama", 0), *(pytest.param(name, seed, marks=SLOW) for seed in (0, 1) for name in (
        "gpt2", "gemma2", "granite", "gpt_neox-parallel", "mixtral"))],
)  # fmt: skip
def test_blocks_on_devices_in_turn_have_the_numbers_of_one(family, seed, tmp_path):
    plain = build(family, seed, dtype=torch.float32)
    spread = in_turn(build(family, seed, dtype=torch.float32), tmp_path)
    assert {parameter.is_meta for parameter in spread.parameters()} == {True, False}
    with torch.no_grad():
        spread(IDS)  # from here on accelerate keeps tied weights apart
    before = {name: parameter.device for name, parameter in spread.named_parameters()}
    for unit in ("component", "head"):
        for pos in (-1, None):
            found, expected = (
                direct_logit_attribution(one, IDS, 7, 9, unit=unit, pos=pos)
                for one in (spread, plain)
            )
            assert found.labels == expected.labels
            torch.testing.assert_close(
                found.attribution, expected.attribution, rtol=1e-4, atol=1e-5
            )
    assert {name: parameter.device for name, parameter in spread.named_parameters()} == before


def test_worker_loads_a_model_that_is_partly_on_disk(tmp_path):
    model = build("llama", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    batch = {"input_ids": [ids.tolist() for ids in random_prompts((4, 7))]}
    here = Attributor(tmp_path, answer=7, unit="head")(batch)
    away = Attributor(tmp_path, answer=7, unit="head", device_map="disk")(batch)
    assert away["error"] == ["", ""]
    for one, other in zip(here["attribution"], away["attribution"], strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-5)
    assert away["about"][0] == here["about"][0]  # the same weights, wherever they are
