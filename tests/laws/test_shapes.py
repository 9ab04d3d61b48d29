"""The check of types and shapes is on, and finds what is wrong."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from dla_hooks import DirectLogitAttribution

jaxtyping = pytest.importorskip("jaxtyping")
pytest.importorskip("beartype")


def result(**changes) -> DirectLogitAttribution:
    fields = {
        "attribution": torch.zeros(2, 1),
        "labels": ["embed", "0_attn_out"],
        "unit": "component",
        "bias": torch.zeros(1),
        "logit": torch.zeros(1),
        "gap": 0,  # an int will do for a float
    }
    return DirectLogitAttribution(**{**fields, **changes})


def test_result_of_wrong_types_fails():
    assert result().labels == ["embed", "0_attn_out"]
    for wrong in ({"labels": "embed"}, {"attribution": [[0.0], [0.0]]}, {"gap": "small"}):
        with pytest.raises(jaxtyping.TypeCheckError):
            result(**wrong)


def test_mismatched_shape_fails_by_annotated_axes():
    """The names are found although the module that uses them never imports them when it runs."""
    from shapes import checked

    source = "from __future__ import annotations\nfrom torch import Tensor\n"
    source += 'def both(rows: Float[Tensor, "row *at"], one: Float[Tensor, "*at"]) -> None: ...\n'
    names: dict = {"__name__": "a_module"}
    exec(source, names)
    both = jaxtyping.jaxtyped(names["both"], typechecker=checked)
    both(torch.zeros(3, 2, 5), torch.zeros(2, 5))
    with pytest.raises(jaxtyping.TypeCheckError):
        both(torch.zeros(3, 2, 5), torch.zeros(2, 4))


def test_the_library_itself_imports_no_checker():
    code = "import sys, dla_hooks; dla_hooks.direct_logit_attribution; dla_hooks.Summary\n"
    code += "assert not {'jaxtyping', 'beartype'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
