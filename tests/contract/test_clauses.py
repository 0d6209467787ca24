"""The contract of `deltaspec.testing` for every method there is, on models of different build."""

from __future__ import annotations

from typing import Any

import pytest
from broken_methods import Dead, Deaf, Loud, Misfolded, Mistaken, Random, Stuck, Writing
from models import ARCHITECTURES, TRANSFORMERS, Architecture
from whole import in_turn, some_of_each

from deltaspec.contract.trial import ContractError
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.methods.builtin.lora import Lora
from deltaspec.methods.registry import methods
from deltaspec.planning.resolve import plan
from deltaspec.testing import check_method

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
"""Parameters that a method is checked with besides its small ones."""
TEXT = ("bert", "gpt2", "llama", "t5")
"""Architectures on which every method has a place."""
FIRST = ("lora", "adapter", "bitfit", "full")
"""Methods with a place everywhere."""
VARIED = {(m, number): p for m in methods() for number, p in enumerate((methods()[m].small, *MORE.get(m, ())))}
SOME = {
    *some_of_each(VARIED, TEXT),
    *(((m, 0), a) for number, a in enumerate(ARCHITECTURES) if a not in TEXT for m in in_turn(FIRST, number)),
}
CASES = [
    pytest.param(method, VARIED[method, number], architecture, id=f"{method}-{number}-{architecture}", marks=marks)
    for method, number in VARIED
    for architecture in ARCHITECTURES
    for marks in [() if ((method, number), architecture) in SOME else pytest.mark.whole]
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
    chosen = ARCHITECTURES[architecture]
    params = methods()[method].small
    target = {"type": "Linear"} if architecture != "gpt2" else {"type": "Conv1D"}
    spec = {"deltaspec": 1, "deltas": [{"name": "d", "method": method, "params": params, "target": target}]}
    assert plan(chosen.model(), spec, example_inputs=chosen.inputs()).trainable > 0


@pytest.mark.parametrize(
    ("kind", "clause", "seen"),
    [
        (Loud, "identity at start", "before any training"),
        (Deaf, "gradients", "got no gradient|zero at every site"),
        (Dead, "gradients", "no trainable value reaches the output"),
        (Misfolded, "merging", "differ from attached by up to"),
        (Random, "initial values", "advanced torch's random state|start otherwise"),
        (Writing, "counts|initial values", "the original model was changed"),
        (Stuck, "learning", "all gradients of a fresh delta are zero"),
        (Mistaken, "merging", "KeyError: 'wieght'"),
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
