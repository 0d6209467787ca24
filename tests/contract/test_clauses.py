"""The contract of `deltaspec.testing` for every method there is, on models of different build."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, TRANSFORMERS, Architecture
from torch import nn

from deltaspec.contract.trial import ContractError
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.methods.builtin.adapter import Adapter
from deltaspec.methods.builtin.lora import Lora
from deltaspec.methods.declarations import Init, Refusal
from deltaspec.methods.registry import GROUP, methods
from deltaspec.testing import check_method

# Parameters that a method is checked with besides its small ones.
MORE: dict[str, tuple[dict[str, Any], ...]] = {
    "lora": (
        {"rank": 2, "scaling": "rslora", "bias": True, "dropout": 0.1, "init": "normal"},
        {"rank": 2, "init": "orthogonal"},
    ),
    "adapter": ({"width": 3, "position": "before", "scale": 0.5, "activation": "silu", "dropout": 0.1},),
    "full": ({"tied": "alone"},),
    "p_tuning": ({"tokens": 3, "width": 8, "encoder": "lstm", "dropout": 0.1},),
    "prefix": ({"tokens": 2, "reparametrisation": "mlp", "width": 8},),
}
CASES = [
    pytest.param(method, params, architecture, id=f"{method}-{number}-{architecture}")
    for method in methods()
    for number, params in enumerate((methods()[method].small, *MORE.get(method, ())))
    for architecture in ARCHITECTURES
]
REFUSALS = {"DS350", "DS402", "DS404", "DS403"}
"""What a plan may answer where a method has no place: no default role, not this kind of site, bypassed, not reached."""


def served(method: str, params: dict[str, Any], architecture: Architecture) -> tuple[Any, list[DeltaSpecError]]:
    """Check a method at the first target it takes; give that target (`...`: none takes it) and the refusals."""
    refused = []
    for target in (None, *architecture.targets):
        try:
            check_method(
                method,
                architecture.model(),
                architecture.inputs(),
                target=target,
                params=params,
                capture=architecture.capture,
            )
        except DeltaSpecError as error:
            refused.append(error)
        else:
            return target, refused
    return ..., refused


@pytest.mark.parametrize(("method", "params", "architecture"), CASES)
def test_every_method_keeps_the_contract_wherever_it_has_a_place(method, params, architecture):
    target, refused = served(method, params, ARCHITECTURES[architecture])
    for error in refused:
        for finding in error.diagnostics:
            assert finding.code in REFUSALS, f"{finding}"
            assert finding.suggestion, f"a refusal without a way out: {finding}"
    assert target is not ... or len(refused) == len(ARCHITECTURES[architecture].targets) + 1


@pytest.mark.parametrize("method", methods())
def test_every_method_has_a_place_by_its_default_roles_on_some_transformer(method):
    from deltaspec.planning.resolve import plan

    params = methods()[method].small
    places = {}
    for name in TRANSFORMERS:
        spec = {"deltaspec": 1, "deltas": [{"name": "d", "method": method, "params": params}]}
        try:
            places[name] = len(plan(ARCHITECTURES[name].model(), spec).sites)
        except DeltaSpecError as error:
            places[name] = sorted({finding.code for finding in error.diagnostics})
    assert any(isinstance(count, int) and count > 0 for count in places.values()), places


@pytest.mark.parametrize(
    ("method", "architecture"), [(m, a) for m in ("lora", "adapter", "bitfit", "full") for a in ARCHITECTURES]
)
def test_the_first_four_methods_have_a_place_everywhere(method, architecture):
    from deltaspec.planning.resolve import plan

    chosen = ARCHITECTURES[architecture]
    params = methods()[method].small
    target = {"type": "Linear"} if architecture != "gpt2" else {"type": "Conv1D"}
    spec = {"deltaspec": 1, "deltas": [{"name": "d", "method": method, "params": params, "target": target}]}
    assert plan(chosen.model(), spec, example_inputs=chosen.inputs()).trainable > 0


def test_the_built_in_net_serves_authors_without_a_model():
    assert check_method("lora", params={"rank": 2}).trainable == 2 * (8 + 16 + 16 + 16 + 16 + 4)


# The suite itself: each broken method is caught, by the clause it breaks.


class _Loud(Lora):
    name = "loud"

    def apply(self, form, params, t, x, base):
        return super().apply(form, params, t, x, base) + 1e-3


class _Deaf(Lora):
    name = "deaf"

    def apply(self, form, params, t, x, base):
        return base(x) + t.up.detach().sum() + t.down.sum() * 0


class _Dead(Adapter):
    name = "dead"

    def apply(self, form, params, t, x, base):
        return base(x)


class _Misfolded(Lora):
    name = "misfolded"

    def fold(self, site, params, t, weights):
        return {"weight": weights["weight"] - params.scale * t.up @ t.down}


class _Random(Lora):
    name = "random"

    def initialise(self, site, params, weights, generator):
        return {"down": torch.randn(params.rank, site.row.in_features)}


class _Writing(Lora):
    name = "writing"

    def initialise(self, site, params, weights, generator):
        weights["weight"].add_(1e-3)
        return {}


class _Stuck(Lora):
    name = "stuck"

    def tensors(self, site, params):
        return tuple(replace(spec, init=Init("zeros")) for spec in super().tensors(site, params))


class _Mistaken(Lora):
    name = "mistaken"

    def fold(self, site, params, t, weights):
        return {"wieght": super().fold(site, params, t, weights)["weight"]}


class _Refusing(Lora):
    name = "refusing"

    def refuse(self, site, params):
        return Refusal("no", "yes")


@pytest.fixture
def register(monkeypatch):
    """Register a method as another installed package would, through the entry-point group."""

    def add(kind):
        entry = SimpleNamespace(name=kind.name, load=lambda: kind)
        monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [entry] if group == GROUP else [])
        methods.cache_clear()

    yield add
    methods.cache_clear()


@pytest.mark.parametrize(
    ("kind", "clause", "seen"),
    [
        (_Loud, "identity at start", "before any training"),
        (_Deaf, "gradients", "got no gradient|zero at every site"),
        (_Dead, "gradients", "no trainable value reaches the output"),
        (_Misfolded, "merging", "differ from attached by up to"),
        (_Random, "initial values", "advanced torch's random state|start otherwise"),
        (_Writing, "counts|initial values", "the original model was changed"),
        (_Stuck, "learning", "all gradients of a fresh delta are zero"),
        (_Mistaken, "merging", "KeyError: 'wieght'"),
    ],
)
def test_a_broken_method_is_caught_by_the_clause_it_breaks(register, kind, clause, seen):
    register(kind)
    params = {"rank": 2} if issubclass(kind, Lora) else {"width": 2}
    with pytest.raises(
        ContractError, match=rf"(?s){kind.name} on Sequential \(modules\), ({clause}): .*({seen}).*clause: "
    ) as caught:
        check_method(kind.name, params=params)
    assert isinstance(caught.value, AssertionError)


def test_a_refusal_and_an_unfit_model_are_not_failures_of_the_contract(register):
    register(_Refusing)
    with pytest.raises(DeltaSpecError, match="DS402"):
        check_method("refusing")
    with pytest.raises(ValueError, match="evaluation mode"):
        check_method("lora", nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 2), target="0")

    class Noise(nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.rand(())

    with pytest.raises(ValueError, match="other bits on a second run"):
        check_method("lora", nn.Sequential(Noise(2, 2)).eval(), torch.zeros(1, 2), target="0")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["lora", "hra", "ia3", "ssf", "adapter", "bitfit"])
def test_the_tolerance_follows_the_dtype(method, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).eval().to(dtype)
    x = torch.linspace(-1, 1, 24, dtype=dtype).reshape(3, 8)
    check_method(method, model, x, target={"type": "Linear"})
    if dtype is torch.bfloat16 and method == "lora":
        with pytest.raises(ContractError, match="merged .* differ from attached"):
            check_method(method, model, x, target={"type": "Linear"}, tolerance=1e-6)


@pytest.mark.parametrize("method", ["soft_prompt", "prefix", "fourierft", "norm", "trainable_tokens"])
def test_a_refusal_on_the_built_in_net_says_that_another_can_be_given(method):
    with pytest.raises(DeltaSpecError, match=r"pass params= and target= that fit them, or model= and example_inputs="):
        check_method(method)
    with pytest.raises(DeltaSpecError) as caught:
        check_method("norm", nn.Sequential(nn.Linear(2, 2)).eval(), torch.ones(1, 2), target="0")
    assert "own net" not in str(caught.value)
    assert check_method("norm", target={"type": "LayerNorm"}).trainable == 32
