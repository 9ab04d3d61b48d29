"""What can be done with a result; its looks are tested in test_report.py and test_plots.py."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from units import UNIT_NAMES
from zoo import build, example_ids

from dla_hooks import CheckpointError, DirectLogitAttribution, InputError, direct_logit_attribution

IDS = example_ids("gpt2")


@pytest.fixture(scope="module")
def model():
    return build("gpt2")


def made(attribution: torch.Tensor) -> DirectLogitAttribution:
    rest = torch.zeros(attribution.shape[1:])
    labels = [f"row{i}" for i in range(len(attribution))]
    return DirectLogitAttribution(attribution, labels, "component", rest, rest, 0.0)


def test_top_and_bottom_rank_by_signed_mean():
    result = made(torch.tensor([[1.0, 3.0], [-5.0, -7.0], [0.0, 1.0], [float("nan"), 2.5]]))
    assert result.top(2) == [("row3", 2.5), ("row0", 2.0)]
    assert result.bottom(2) == [("row1", -6.0), ("row2", 0.5)]
    assert [label for label, _ in result.top(99)] == ["row3", "row0", "row2", "row1"]
    assert len(result.top()) == 4
    assert result.top(0) == []
    with pytest.raises(InputError, match="negative, got -1"):
        result.top(-1)


def test_top_of_one_entry_per_row():
    assert made(torch.tensor([1.0, 2.0])).top(1) == [("row1", 2.0)]


@pytest.mark.parametrize("unit", UNIT_NAMES)
def test_a_saved_result_comes_back_whole(model, tmp_path, unit):
    mask = torch.ones_like(IDS)
    mask[0, 0] = 0
    result = direct_logit_attribution(
        model.float(), IDS, 5, 7, unit=unit, pos=None, attention_mask=mask
    )
    model.double()
    path = result.save(tmp_path / "result.safetensors")
    loaded = DirectLogitAttribution.load(path)
    for name, value in vars(result).items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(getattr(loaded, name), value, equal_nan=True, msg=name)
        else:
            assert getattr(loaded, name) == value, name
    assert repr(loaded) == repr(result)


def test_the_file_is_plain_safetensors_with_json(model, tmp_path):
    from safetensors import safe_open

    path = direct_logit_attribution(model, IDS, 5).save(tmp_path / "r.safetensors")
    assert set(load_file(path)) == {"attribution", "bias", "logit", "positions"}
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert header["version"] == "2"
    assert json.loads(header["result"])["unit"] == "component"


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        DirectLogitAttribution.load(tmp_path / "missing.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\x00\x00")
    with pytest.raises(CheckpointError, match="cannot be read"):
        DirectLogitAttribution.load(tmp_path / "torn.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="no saved attribution"):
        DirectLogitAttribution.load(tmp_path / "other.safetensors")
    header = {"format": "dla_hooks.result", "version": "3", "result": "{}"}
    save_file({"x": torch.zeros(1)}, tmp_path / "newer.safetensors", metadata=header)
    with pytest.raises(InputError, match="newer dla_hooks"):
        DirectLogitAttribution.load(tmp_path / "newer.safetensors")


def test_a_dataframe_has_a_line_per_real_entry(model):
    pandas = pytest.importorskip("pandas")
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    result = direct_logit_attribution(
        model.float(), IDS, 5, unit="head", pos=None, attention_mask=mask
    )
    model.double()
    frame = result.to_dataframe()
    assert isinstance(frame, pandas.DataFrame)
    assert len(frame) == len(result.labels) * int(mask.sum())
    line = frame[(frame.label == "L1H2") & (frame.row == 1) & (frame.position == 3)]
    row = result.labels.index("L1H2")
    assert line.attribution.item() == pytest.approx(float(result.attribution[row, 1, 3]))
    assert (line["layer"].item(), line["head"].item()) == (1, 2)
    assert frame.attribution.notna().all()
