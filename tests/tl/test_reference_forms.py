"""Every form of ``input``, ``pos`` and the answers means what it means to the reference."""

from __future__ import annotations

import pytest
import torch
from parity import FEW_POSITIONS, LENGTH, POSITIONS, UNITS, assert_same, cells, theirs
from tl_models import NAMES, ids_for
from zoo import tiny_tokenizer

from dla_hooks import direct_logit_attribution

pytest.importorskip("transformer_lens")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # the reference's own
    pytest.mark.tl,
]

TEXT = " John gave Mary a drink"
TEXTS = [TEXT, " When the cat sat on"]  # of one length: the reference pads on the right
INPUTS = {
    "a string": TEXT,
    "a list of one string": [TEXT],
    "a list of strings": TEXTS,
    "[pos]": torch.arange(3, 10),
    "[1, pos]": torch.arange(3, 10)[None],
    "[batch, pos]": torch.arange(3, 24).reshape(3, 7),
    "int32": torch.arange(3, 17, dtype=torch.int32).reshape(2, 7),
    "one token": torch.tensor([[4]]),
}


MORE_POSITIONS = [place for place in POSITIONS if place not in FEW_POSITIONS]


def ours(model, *args, **options):
    processed = {"center_unembed": True, "fold_value_biases": True, "tokenizer": tiny_tokenizer()}
    return direct_logit_attribution(model, *args, **{**processed, **options})


@pytest.fixture(scope="module")
def caches(references):
    """The reference's caches, so that it runs once per prompt instead of once per cell."""
    kept = {}

    def cache_of(name, batch):
        if (name, batch) not in kept:
            reference = references.bridged(name)
            ids = ids_for(references.raw(name), batch, LENGTH)
            kept[name, batch] = ids, reference.run_with_cache(ids)[1]
        return kept[name, batch]

    return cache_of


def sweep(names, units, positions=POSITIONS, batches=(1, 2, 3), slow=True):
    for name in names:
        for unit in units:
            for cell in cells(positions, batches):
                marks = [pytest.mark.slow] * slow
                yield pytest.param(
                    name, unit, *cell[1:], id=f"{name}-{unit}-{cell[0]}", marks=marks
                )


@pytest.mark.parametrize(
    ("name", "unit", "batch", "pos", "answer", "incorrect"),
    [
        *sweep(["gpt2"], ["component"], batches=(2,), slow=False),
        *sweep(["gpt2"], ["component"], FEW_POSITIONS, batches=(1,), slow=False),
        *sweep(["llama"], ["head"], FEW_POSITIONS, batches=(3,), slow=False),
        *sweep(["gpt2"], ["component"], MORE_POSITIONS, batches=(1,)),
        *sweep(["gpt2"], ["layer", "head"], batches=(3,)),
        *sweep(["llama"], ["component", "head"], batches=(1,)),
        *sweep(["gpt_neox-parallel", "gemma"], UNITS, batches=(2,)),
        *sweep(NAMES, ["component"], ["(start,stop)"], batches=(2,)),
    ],
)
def test_answers_at_positions_match_reference(
    references, caches, name, unit, batch, pos, answer, incorrect
):
    ids, cache = caches(name, batch)
    options = {"unit": unit, "pos": pos}
    expected = theirs(references.bridged(name), None, answer, incorrect, cache=cache, **options)
    assert_same(ours(references.raw(name), ids, answer, incorrect, **options), expected)


# The reference puts a BOS before strings where its config says so, ours where the tokenizer does.
@pytest.mark.parametrize("form", INPUTS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom"])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("pos", [-1, None], ids=str)
def test_input_forms_match_reference(references, form, name, unit, pos):
    prompt = INPUTS[form]
    options = {"unit": unit, "pos": pos}
    reference = references.bridged(name)
    bos = {}
    if not isinstance(prompt, torch.Tensor):
        bos = {"prepend_bos": reference.cfg.default_prepend_bos}
    expected = theirs(reference, prompt, " Paris", " Berlin", **options)
    given = ours(references.raw(name), prompt, " Paris", " Berlin", **options, **bos)
    assert_same(given, expected)
