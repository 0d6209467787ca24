"""Deltas of a library are written in another library's form as compiled ones are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_library import LLAMA, build, lora

import deltaspec


@pytest.mark.parametrize("by", ["delta", "identity"])
def test_deltas_of_a_library_are_written_out_beside_compiled_ones(saved: Any, tmp_path: Path, by: str) -> None:
    directory, _ = saved
    model = build(lora("own"))
    name = model.library(directory, by=by).names[0]
    model.only({"own": 1, name: 0.5})
    model.save_as("peft", tmp_path / "out")
    with torch.no_grad():
        expected = model(**LLAMA.inputs()).logits
    written = [json.loads(file.read_bytes()) for file in sorted((tmp_path / "out").glob("*.deltaspec.json"))]
    assert sorted(delta["name"] for spec in written for delta in spec["deltas"]) == sorted(["own", name])
    assert all(len(spec["deltas"]) == 1 for spec in written)
    assert f"- `{name}`: lora at strength 0.5" in (tmp_path / "out" / "README.md").read_text()
    with torch.no_grad():
        again = deltaspec.restore(LLAMA.model(), tmp_path / "out")(**LLAMA.inputs()).logits
    assert torch.allclose(again, expected, atol=1e-6)
