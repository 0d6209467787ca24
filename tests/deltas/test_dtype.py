"""The dtype of a delta's tensors: the backbone's, float32 beside half precision, or what the spec says."""

import pytest
import torch
from torch import nn

import deltaspec
from deltaspec import DeltaSpecError
from deltaspec.contract.trial import disturb

X = torch.linspace(-1, 1, 8).reshape(2, 4)


def spec(method="lora", **more):
    return {"deltaspec": 1, "deltas": [{"name": "d", "method": method, "target": {"type": "Linear"}, **more}]}


def dtypes(compiled):
    return {parameter.dtype for parameter in compiled.deltas["d"].parameters()}


@pytest.mark.parametrize("backbone", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["lora", "adapter", "bitfit", "full"])
def test_left_out_it_follows_the_backbone_but_not_to_half_precision(backbone, method):
    model = nn.Sequential(nn.Linear(4, 4)).to(backbone)
    compiled = deltaspec.compile(model, spec(method))
    assert dtypes(compiled) == {backbone if backbone in (torch.float64, torch.float32) else torch.float32}
    assert torch.equal(compiled(X.to(backbone)), model(X.to(backbone)))


@pytest.mark.parametrize("backbone", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["lora", "adapter", "bitfit", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_the_spec_overrides_it(backbone, method, dtype):
    model = nn.Sequential(nn.Linear(4, 4)).to(backbone)
    compiled = deltaspec.compile(model, spec(method, dtype=dtype))
    assert dtypes(compiled) == {getattr(torch, dtype)}
    x = X.to(backbone)
    assert compiled(x).dtype == backbone
    with torch.no_grad():
        for parameter in compiled.deltas["d"].parameters():
            parameter.add_(0.25)
    changed = compiled(x)
    assert changed.dtype == backbone and not torch.equal(changed, model(x))
    changed.float().pow(2).sum().backward()
    assert all(p.grad is not None for p in compiled.deltas["d"].parameters())
    assert torch.equal(compiled.detach()(x), model(x))
    assert f"its tensors are {dtype}" in str(compiled.plan)


def test_a_wrong_one_is_a_finding():
    with pytest.raises(DeltaSpecError, match="DS205.*dtype"):
        deltaspec.compile(nn.Linear(4, 4), spec(dtype="int8"))


def test_it_is_saved(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    deltaspec.compile(model, spec(dtype="bfloat16")).save(tmp_path)
    assert dtypes(deltaspec.restore(model, tmp_path)) == {torch.bfloat16}


@pytest.mark.parametrize("backbone", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("method", ["lora", "adapter", "bitfit", "full", "ssf"])
def test_a_narrower_delta_rounds_nothing_but_its_own(backbone, method):
    model = nn.Sequential(nn.Linear(4, 4)).to(backbone)
    compiled = deltaspec.compile(model, spec(method, dtype="bfloat16"))
    disturb(compiled)
    x = torch.randn(3, 4).to(backbone)
    with torch.no_grad():
        bare, whole = model(x), compiled(x)
        compiled.only({"d": 0.0})
        assert torch.equal(compiled(x), bare)
        compiled.only({"d": 1.0})
        assert torch.equal(compiled(x), whole)
        compiled.detach()
        mixed = compiled(x, deltas=["d", None, {"d": 0.0}])
        close = 1e-2 if backbone is torch.float16 else 1e-6
        torch.testing.assert_close(mixed, torch.stack([whole[0], *bare[1:]]), rtol=close, atol=close)
