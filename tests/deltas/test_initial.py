"""Initial values of delta tensors: what they depend on, and the formulas they follow."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from models import ARCHITECTURES
from module_trees import shared, tied
from torch import Tensor, nn

import deltaspec
from deltaspec import DeltaSpecError
from deltaspec.contract.trial import disturb
from deltaspec.deltas.initial import _tensor

CHOSEN = ARCHITECTURES["bert"]
LOW = {"name": "low", "method": "lora", "params": {"rank": 4}}
WIDE = {"name": "wide", "method": "adapter", "params": {"width": 5}}


def tensors(name: str, *deltas: dict[str, Any], model: nn.Module | None = None, **rest: Any) -> dict[str, Tensor]:
    compiled = deltaspec.compile(model or CHOSEN.model(), {"deltaspec": 1, "deltas": list(deltas), **rest})
    return dict(compiled.deltas[name].tensors())


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def random_ones(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in found.items() if value.std() > 0}


def test_neither_order_nor_company_nor_random_state_matter():
    alone = tensors("low", LOW)
    torch.manual_seed(123)
    assert equal(alone, tensors("low", LOW))
    assert equal(alone, tensors("low", WIDE, LOW))
    assert equal(alone, tensors("low", LOW, WIDE))
    assert equal(alone, tensors("low", LOW | {"attached": False}))


def test_a_site_alone_starts_as_it_does_among_others():
    query = "bert.encoder.layer.1.attention.self.query"
    alone = tensors("low", LOW | {"target": query})
    among = tensors("low", LOW)
    assert set(alone) == {f"{query}.down", f"{query}.up"}
    assert all(torch.equal(alone[key], among[key]) for key in alone)


def test_seed_name_site_and_tensor_each_matter():
    base = random_ones(tensors("low", LOW))
    assert len(base) == 4
    other_seed = random_ones(tensors("low", LOW, seed=1))
    other_name = random_ones(tensors("high", LOW | {"name": "high"}))
    for key, value in base.items():
        assert not torch.equal(value, other_seed[key])
        assert not torch.equal(value, other_name[key])
    values = list(base.values())
    assert not any(torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])


def test_the_global_random_state_is_not_advanced():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    tensors("low", LOW, WIDE)
    assert torch.equal(torch.rand(3), expected)


def test_each_dtype_draws_the_same_values():
    full = tensors("low", LOW)
    double = tensors("low", LOW, model=CHOSEN.model().double())
    half = tensors("low", LOW, model=CHOSEN.model().bfloat16())
    for key, value in full.items():
        assert value.dtype is torch.float32
        assert double[key].dtype is torch.float64 and torch.equal(double[key].float(), value)
        assert half[key].dtype is torch.float32 and torch.equal(half[key], value)


def stream(text: str) -> torch.Generator:
    """Return the generator that the documentation promises: SHA-256 of (seed, delta, tensor)."""
    digest = hashlib.sha256(text.encode()).digest()[:8]
    return torch.Generator().manual_seed(int.from_bytes(digest, "big", signed=True))


def test_lora_starts_by_the_formula():
    model = nn.Sequential(nn.Linear(12, 7)).eval()
    found = tensors("d", {"name": "d", "method": "lora", "params": {"rank": 3}, "target": "0"}, model=model, seed=9)
    # nn.Linear's own start: uniform within 1 / sqrt(fan_in).
    bound = 1 / 12**0.5
    expected = torch.empty(3, 12).uniform_(-bound, bound, generator=stream("9\0d\0000.down"))
    torch.testing.assert_close(found["0.down"], expected, rtol=1e-6, atol=1e-8)
    assert torch.equal(found["0.up"], torch.zeros(7, 3))


def test_lora_normal_has_the_standard_deviation_of_one_over_rank():
    model = nn.Sequential(nn.Linear(5000, 3)).eval()
    delta = {"name": "d", "method": "lora", "params": {"rank": 4, "init": "normal"}, "target": "0"}
    down = tensors("d", delta, model=model)["0.down"]
    assert abs(down.std().item() - 0.25) < 0.01 and abs(down.mean().item()) < 0.01


def test_lora_on_a_convolution_takes_the_kernel_into_its_fan_in():
    model = nn.Sequential(nn.Conv2d(6, 4, 5)).eval()
    down = tensors("d", {"name": "d", "method": "lora", "params": {"rank": 64}, "target": "0"}, model=model)["0.down"]
    bound = 1 / (6 * 25) ** 0.5
    assert down.abs().max() <= bound and down.abs().max() > 0.99 * bound


def test_lora_on_an_embedding_starts_with_the_looked_up_factor_at_zero():
    model = nn.Sequential(nn.Embedding(30, 400)).eval()
    found = tensors("d", {"name": "d", "method": "lora", "params": {"rank": 50}, "target": "0"}, model=model)
    assert torch.equal(found["0.down"], torch.zeros(50, 30))
    assert abs(found["0.up"].std().item() - 1) < 0.02


def test_an_adapter_starts_as_the_paper_says_and_as_the_identity():
    model = nn.Sequential(nn.Linear(40, 300)).eval()
    delta = {"name": "d", "method": "adapter", "params": {"width": 64}, "target": "0"}
    found = tensors("d", delta, model=model)
    assert abs(found["0.down"].std().item() - 0.01) < 2e-4
    assert all(found[f"0.{name}"].count_nonzero() == 0 for name in ("down_bias", "up", "up_bias"))


def test_full_starts_as_a_copy_and_shares_nothing():
    model = ARCHITECTURES["traceable-modules"].model()
    found = tensors("d", {"name": "d", "method": "full", "target": ["bn", "head"]}, model=model)
    for key, value in found.items():
        source = model.state_dict()[key]
        assert torch.equal(value, source)
        assert value.data_ptr() != source.data_ptr()


@pytest.mark.parametrize("init", ["kaiming_uniform", "orthogonal", "pissa"])
def test_tensors_are_laid_out_as_those_of_a_restored_delta(init):
    found = tensors("low", {"name": "low", "method": "lora", "params": {"rank": 4, "init": init}})
    assert [key for key, value in found.items() if not value.is_contiguous()] == []


@pytest.mark.parametrize("device", ["meta"])
def test_a_model_without_values_gives_tensors_without_values(device):
    with torch.device(device):
        model = CHOSEN.build().eval()
    found = tensors("low", LOW, model=model)
    assert {value.device.type for value in found.values()} == {device}


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


@pytest.mark.parametrize("build", [tied, shared])
def test_tensors_by_name(build):
    net = build()
    named = [*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False)]
    assert all(_tensor(net, name) is tensor for name, tensor in named)
    with pytest.raises(KeyError):
        _tensor(net, "0.a.nothing")
