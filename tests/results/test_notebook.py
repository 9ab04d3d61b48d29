"""What a notebook shows, saves, and shows again: without a network, and without Altair."""

from __future__ import annotations

import re

import pytest
import torch

from dla_hooks import DirectLogitAttribution

SETUP = """
import socket, sys
for name in ("altair", "vl_convert", "cairosvg", "pandas"):
    sys.modules[name] = None
def refuse(*args):
    raise OSError("there is no network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import dla_hooks
model, tokenizer = dla_hooks.demo.load()
result = dla_hooks.direct_logit_attribution(
    model, "The keys near the cabinet", " are", " is", unit="head", pos=None, tokenizer=tokenizer
)
"""
SHOWN = (
    "result",
    "result.plot()",
    "result.plot('heatmap', pos=-1)",
    "result.plot('strip', row='L3H3')",
    "dla_hooks.summarize([result]).plot()",
    "dla_hooks.summarize([result])",
    "dla_hooks.promoted_tokens(model, 'The keys', tokenizer=tokenizer).plot()",
)


def result() -> DirectLogitAttribution:
    return DirectLogitAttribution(
        torch.tensor([[1.0], [-2.0]]), ["embed", "0_mlp_out"], "component", torch.zeros(1),
        torch.tensor([-1.0]), 0.0,
    )  # fmt: skip


def test_ipython_is_given_html_svg_and_text():
    formatters = pytest.importorskip("IPython.core.formatters")
    data, _ = formatters.DisplayFormatter().format(result().plot())
    assert set(data) == {"text/html", "image/svg+xml", "text/plain"}
    assert 'data-value="-2"' in data["text/html"]
    assert data["image/svg+xml"].startswith("<svg")
    assert data["text/plain"].startswith("<Picture ")


@pytest.mark.slow
def test_executed_notebook_holds_its_pictures_without_a_network(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    book = nbformat.v4.new_notebook()
    book.cells = [nbformat.v4.new_code_cell(code) for code in (SETUP, *SHOWN)]
    nbclient.NotebookClient(book, timeout=300, kernel_name="python3").execute()
    nbformat.write(book, tmp_path / "book.ipynb")
    saved = nbformat.read(tmp_path / "book.ipynb", as_version=4)
    for cell in saved.cells[1:]:
        (output,) = (one for one in cell.outputs if one.output_type == "execute_result")
        page = output.data["text/html"]
        assert not re.search(r"https?:|src=|href=|<script", page)
        drawn = "plot(" in cell.source
        assert ("<svg" in page, "image/svg+xml" in output.data) == (drawn, drawn)
