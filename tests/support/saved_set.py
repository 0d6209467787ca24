"""A compiled model, the directory it is saved to, and ways to damage that directory."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHITECTURES
from moved import moved
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import deltaspec
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.contract.snapshot import differences, snapshot
from deltaspec.diagnostics.findings import DeltaSpecError

CHOSEN = ARCHITECTURES["traceable-modules"]
INPUTS = CHOSEN.inputs()
SPEC = {
    "deltaspec": 1,
    "seed": 5,
    "selectors": {"ends": ["head", "up"]},
    "deltas": [
        {"name": "norms", "method": "full", "target": ["bn", "norm"]},
        {"name": "low", "method": "lora", "params": {"rank": 2}, "target": {"ref": "ends"},
         "overrides": [{"match": "head", "params": {"rank": 3}}]},
        {"name": "wide", "method": "adapter", "params": {"width": 3}, "target": "up", "attached": False},
    ],
}  # fmt: skip


def build(model: nn.Module | None = None, number: int = 1, spec: Any = None) -> CompiledModel:
    """Compile, and move all tensors off their initial values."""
    compiled = deltaspec.compile(model or CHOSEN.model(), spec or SPEC, capture="modules")
    return moved(compiled, number)


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(INPUTS)


def state(compiled: CompiledModel) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in compiled.state_dict().items()}


def save(folder: Path) -> Path:
    """Save a model of which two deltas are attached."""
    compiled = build()
    compiled.only("low", "norms")
    compiled.save(folder)
    return folder


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def rewrite(folder: Path, change: Any) -> None:
    """Change a manifest's data in place."""
    data = manifest(folder)
    change(data)
    (folder / "manifest.json").write_text(json.dumps(data))


def forge(folder: Path, delta: str, change: Any) -> Path:
    """Change the tensors of one delta, and make the manifest's digest fit."""
    entry = next(e for e in manifest(folder)["deltas"] if e["name"] == delta)
    path = folder / entry["file"]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    rewrite(folder, lambda data: next(e for e in data["deltas"] if e["name"] == delta).update(file_sha256=digest))
    return path


def refused(folder: Path, model: nn.Module | None = None) -> list[str]:
    """Return the codes with which both `load` and `restore` refuse; nothing may have changed."""
    compiled = build(model, number=2)
    before, snap = state(compiled), snapshot(compiled, identity=True)
    with pytest.raises(DeltaSpecError) as loading:
        compiled.load(folder)
    after = state(compiled)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert differences(snap, snapshot(compiled, identity=True)) == []
    fresh = model or CHOSEN.model()
    snap = snapshot(fresh, identity=True)
    with pytest.raises(DeltaSpecError) as restoring:
        deltaspec.restore(fresh, folder)
    assert differences(snap, snapshot(fresh, identity=True)) == []
    assert {d.code for d in restoring.value.diagnostics} <= {d.code for d in loading.value.diagnostics}
    for finding in loading.value.diagnostics:
        assert finding.suggestion, finding
        assert folder in (Path(finding.file), Path(finding.file).parent)
    return sorted(d.code for d in loading.value.diagnostics)
