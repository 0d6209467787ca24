"""An Average of LoRAs comes in as them at strengths, with the logits that AdapterHub computed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from written_elsewhere import base_of, copied, difference, inputs, refuse

import deltaspec
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.formats.convert import convert

CASE = "average_lora_bert"
CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str, str]] = {
    "weights of another sum": (lambda s: s["kwargs"].update(weights=[0.5, 2.0]), "DS539", "sum to 2.5"),
    "fewer weights": (lambda s: s["kwargs"].update(weights=[1.0]), "DS544", "not 2 numbers"),
    "words": (lambda s: s["kwargs"].update(weights=["a", "b"]), "DS544", "not 2 numbers"),
    "a member twice": (lambda s: s["children"].append(s["children"][1]), "DS549", "has b twice"),
    "a Stack in it": (lambda s: s["children"].append({"type": "Stack", "children": []}), "DS549", "has a Stack"),
}  # fmt: skip


def changed(change: Callable[[dict[str, Any]], object], folder: Path) -> Path:
    whole = json.loads((folder / "adapter_setup.json").read_text())
    change(whole["adapter_setup"])
    (folder / "adapter_setup.json").write_text(json.dumps(whole))
    return folder


def test_logits() -> None:
    """The second member is alone in half of its places, where AdapterHub gives it the weights of both."""
    assert difference("adapterhub", CASE) < 5e-5


def test_strengths(tmp_path: Path) -> None:
    folder = changed(lambda s: s["kwargs"].update(weights=[0.25, 0.75]), copied("adapterhub", CASE, tmp_path))
    compiled = deltaspec.restore(base_of("adapterhub", CASE), folder)
    assert dict(compiled.strengths) == {"adapter-a": 0.125, "adapter-b": 0.375}


def test_converted(tmp_path: Path) -> None:
    """Deltas of one selector are written out each, and come back at their strengths."""
    model, (given, _) = base_of("adapterhub", CASE), inputs("adapterhub", CASE)
    folder = changed(lambda s: s["kwargs"].update(weights=[0.25, 0.75]), copied("adapterhub", CASE, tmp_path))
    shutil.rmtree(folder / "b")
    shutil.copytree(folder / "a", folder / "b")  # on the same places
    spec = convert(folder, tmp_path / "out", model).spec
    assert [delta.name for delta in deltaspec.load(spec).deltas] == ["adapter-a", "adapter-b"]
    restored = deltaspec.restore(model, tmp_path / "out")
    assert dict(restored.strengths) == {"adapter-a": 0.125, "adapter-b": 0.375}
    assert torch.equal(restored(**given).logits, deltaspec.restore(model, folder)(**given).logits)


def test_weight_of_zero(tmp_path: Path) -> None:
    """What has no weight acts where it is alone, and there at that of all."""
    model, (given, _) = base_of("adapterhub", CASE), inputs("adapterhub", CASE)
    folder = changed(lambda s: s["kwargs"].update(weights=[1.0, 0.0]), copied("adapterhub", CASE, tmp_path))
    found = deltaspec.restore(model, folder)
    alone = deltaspec.restore(model, folder / "b")
    second = dict(alone.deltas["b"].tensors())
    for name, value in found.deltas["adapter-b"].tensors():
        expected = second[name] if "intermediate" in name or name.endswith("down") else torch.zeros_like(value)
        assert torch.equal(value, expected), name
    assert torch.isfinite(found(**given).logits).all()


@pytest.mark.parametrize("name", CHANGES)
def test_refused(name: str, tmp_path: Path) -> None:
    change, code, said = CHANGES[name]
    refuse("adapterhub", CASE, changed(change, copied("adapterhub", CASE, tmp_path)), code, said)


def test_some_of_the_members_in_one_place(tmp_path: Path) -> None:
    folder = copied("adapterhub", CASE, tmp_path)
    shutil.copytree(folder / "b", folder / "c")
    third = {"type": "single", "children": ["c"]}
    changed(lambda s: (s["children"].append(third), s.update(kwargs={})), folder)
    with pytest.raises(DeltaSpecError, match="AdapterHub itself cannot run its Average at .*intermediate") as caught:
        deltaspec.restore(base_of("adapterhub", CASE), folder)
    assert {finding.code for finding in caught.value.diagnostics} == {"DS549"}
