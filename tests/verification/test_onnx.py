"""Golden answers beside those of ONNX Runtime, where it is installed."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from moved import moved
from torch import nn

import deltaspec
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.verification import packages, verify

LACKING = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
SPEC = {
    "deltaspec": 1,
    "deltas": [
        {"name": "low", "method": "lora", "params": {"rank": 2}, "target": "0"},
        {"name": "wide", "method": "adapter", "params": {"width": 2}, "target": "2"},
    ],
}


def save(folder):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3))
    moved(deltaspec.compile(model, SPEC)).save(folder, golden=torch.linspace(-1, 1, 8).reshape(2, 4))
    return model


@pytest.mark.skipif(bool(LACKING), reason=f"not installed: {', '.join(LACKING)}")
def test_an_exported_model_gives_the_same_numbers(tmp_path):
    found = verify(tmp_path, save(tmp_path), against="onnx")
    assert found and [each.name for each in found] == ["low", "wide", "low + wide"]


def test_a_package_that_is_missing_is_named_with_the_way_to_install_it(tmp_path, monkeypatch):
    model = save(tmp_path)
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(DeltaSpecError, match=r"comparing with onnx needs onnxruntime, onnx, onnxscript") as raised:
        verify(tmp_path, model, against="onnx")
    [finding] = raised.value.diagnostics
    assert finding.code == "DS553" and finding.suggestion == "pip install 'deltaspec[onnx]'"
