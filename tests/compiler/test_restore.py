"""`deltaspec.restore`: everything that was saved comes back, in this process and in another."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import live_model
import pytest
import torch
from models import ARCHITECTURES, Traceable
from repository import ROOT
from saved_set import CHOSEN, build, manifest, refused, rewrite, run, save
from torch import nn
from torch.nn.utils import parametrizations

import deltaspec
from deltaspec.diagnostics.findings import DeltaSpecError


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path)


def test_everything_comes_back_in_this_process(saved):
    compiled = build()
    compiled.only("low", "norms")
    back = deltaspec.restore(CHOSEN.model(), saved)
    assert back.attached == ("norms", "low")
    for names in ((), ("low",), ("wide",), ("norms", "low", "wide")):
        compiled.only(*names)
        back.only(*names)
        assert torch.equal(run(compiled), run(back))
    assert back.plan.trainable == compiled.plan.trainable


def test_strengths_come_back(tmp_path):
    compiled = build()
    compiled.only({"low": 0.25, "wide": 1.0})
    compiled.save(tmp_path)
    back = deltaspec.restore(CHOSEN.model(), tmp_path)
    assert back.strengths == {"low": 0.25, "wide": 1.0}
    assert torch.equal(run(back), run(compiled))
    rewrite(tmp_path, lambda data: data.pop("strengths"))  # as sets saved by earlier versions are
    assert deltaspec.restore(CHOSEN.model(), tmp_path).strengths == {"low": 1.0, "wide": 1.0}


def test_everything_comes_back_in_another_process(tmp_path):
    compiled = build()
    compiled.only("norms", "low")
    compiled.save(tmp_path / "deltas")
    torch.save(run(compiled), tmp_path / "expected.pt")
    code = f"""
import sys; sys.path[:0] = {[str(Path(deltaspec.__file__).parents[1]), str(ROOT / "tests" / "support")]!r}
import torch, deltaspec
from models import ARCHITECTURES
chosen = ARCHITECTURES["traceable-modules"]
model = chosen.model()
back = deltaspec.restore(model, {str(tmp_path / "deltas")!r})
assert back.attached == ("norms", "low"), back.attached
with torch.no_grad():
    out = back(chosen.inputs())
    assert torch.equal(out, torch.load({str(tmp_path / "expected.pt")!r}, weights_only=True))
    assert torch.equal(back.detach()(chosen.inputs()), model(chosen.inputs()))
print("restored")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "restored", done.stderr


def test_a_half_precision_backbone_comes_back(tmp_path):
    chosen = ARCHITECTURES["bert"]
    model = chosen.model().to(torch.bfloat16)
    spec = {"deltaspec": 1, "deltas": [{"name": "low", "method": "lora"}, {"name": "head", "method": "full"}]}
    compiled = build(model, spec=spec)
    compiled.save(tmp_path)
    back = deltaspec.restore(model, tmp_path)
    with torch.no_grad():
        left, right = compiled(**chosen.inputs()).logits, back(**chosen.inputs()).logits
    assert left.dtype is torch.bfloat16
    assert torch.equal(left, right)
    kinds = {key: value.dtype for key, value in back.deltas["low"].tensors()}
    assert set(kinds.values()) == {torch.float32}


def test_nothing_is_unpickled(saved, monkeypatch):
    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a pickle was read")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, forbidden)
    assert deltaspec.restore(CHOSEN.model(), saved).attached == ("norms", "low")


class Wider(Traceable):
    """The same net with another head."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(24, 6)


def test_another_backbone_and_other_weights(saved):
    with pytest.raises(DeltaSpecError, match=r"DS523.*another backbone: Traceable, whose structure differs"):
        deltaspec.restore(Wider().eval(), saved)
    # Nor is another kind of model taken for a mistake in the spec.
    with pytest.raises(DeltaSpecError) as caught:
        deltaspec.restore(nn.Sequential(nn.Linear(2, 2)), saved)
    assert [d.code for d in caught.value.diagnostics][:2] == ["DS523", "DS302"]
    other = CHOSEN.model()
    with torch.no_grad():
        other.head.weight[0, 0] += 1
    assert refused(saved, other) == ["DS523"]


def test_a_saved_spec_that_was_damaged(saved):
    (saved / manifest(saved)["deltas"][1]["spec"]).write_text("{")
    with pytest.raises(DeltaSpecError, match="DS522"):
        deltaspec.restore(CHOSEN.model(), saved)
    (saved / manifest(saved)["deltas"][1]["spec"]).unlink()
    with pytest.raises(DeltaSpecError):
        deltaspec.restore(CHOSEN.model(), saved)


def test_running_statistics_are_part_of_what_a_backbone_is(tmp_path):
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
            self.u = parametrizations.spectral_norm(nn.Linear(6, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.u(self.norm(self.a(x)))

    torch.manual_seed(0)
    model = Normed().train()
    spec = {"deltaspec": 1, "deltas": [{"name": "a", "method": "lora", "target": "a"}]}
    c = deltaspec.compile(model, spec, example_inputs=torch.randn(3, 4))
    c(torch.randn(3, 4))  # spectral_norm writes its vectors, which are put back once nothing is attached
    c.save(tmp_path)
    assert deltaspec.restore(model, tmp_path, example_inputs=torch.randn(3, 4)).attached == ("a",)
    c.load(tmp_path)
    moved = copy.deepcopy(model)
    moved.norm.running_mean += 1.0
    with pytest.raises(DeltaSpecError, match="DS523"):
        deltaspec.restore(moved, tmp_path, example_inputs=torch.randn(3, 4))


class Around(nn.Module):
    """A model around a whole one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor) -> object:
        return self.inner(input_ids=input_ids)


def test_a_model_around_the_same_one_is_one_place(tmp_path):
    compiled = live_model.build(live_model.lora("a"))
    compiled.save(tmp_path)
    again = deltaspec.restore(Around(live_model.llama()), tmp_path)
    assert torch.equal(live_model.logits(again), live_model.logits(compiled))
