"""For the authors of methods: `check_method("mine")`, in a test of your own, checks the contract every method keeps.

Uses `contract` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from deltaspec.backbone.random_state import seeded_on_cpu
from deltaspec.contract.clauses import CLAUSES
from deltaspec.contract.snapshot import differences, snapshot
from deltaspec.contract.trial import Case, ContractError
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.planning.plan import Plan


def check_method(
    method: str,
    model: nn.Module | None = None,
    example_inputs: Any = None,
    *,
    target: Any = None,
    params: Mapping[str, Any] | None = None,
    capture: str = "modules",
    tolerance: float | None = None,
) -> Plan:
    """Check a method, by its name, against every clause of the contract; give the plan it was checked with.

    `model` is any model in evaluation mode whose forward gives the same bits twice, and `example_inputs` what it takes
    (a dict of keywords, a tuple, or one tensor); without them, a small net of linear layers. `target` is a selector
    as in a spec (None: the method's default roles; on the built-in net its linear layers), `params` are the method's
    parameters. `tolerance` is how far a merged model may be from the attached one, relative and absolute; None: what
    the coarsest dtype of the model and its outputs allows (1e-4 in float32, 5e-2 in bfloat16).

    After each clause the original model must be what it was: weights, buffers, flags, hooks, write counts. Raises
    ContractError with the clause that does not hold and what was seen, such as an error in the method's code,
    DeltaSpecError where the plan refuses the target, ValueError for a model that nothing can be told from.

    >>> from deltaspec.testing import check_method
    >>> plan = check_method("lora", params={"rank": 4})
    """
    own = model is None
    if model is None:
        model, example_inputs = _net(), torch.linspace(-1, 1, 24).reshape(3, 8)
        target = {"type": "Linear"} if target is None else target
    try:
        case = Case.of(method, model, example_inputs, target, dict(params or {}), capture, tolerance)
    except DeltaSpecError as error:
        raise DeltaSpecError(map(_at_home, error.diagnostics) if own else error.diagnostics) from None
    before = snapshot(model, identity=True)
    for name, clause in CLAUSES.items():
        try:
            clause(case)
            if changed := differences(before, snapshot(model, identity=True)):
                raise ContractError("the original model was changed: " + "; ".join(changed[:5]))
        except DeltaSpecError:
            raise
        except Exception as error:
            mine = isinstance(error, ContractError)
            seen = str(error) if mine else f"{type(error).__name__}: {error}"
            place = f"{method} on {type(model).__name__} ({capture})"
            raise ContractError(f"{place}, {name}: {seen}\n  clause: {clause.__doc__}") from (None if mine else error)
    return case.single


def _at_home(finding: Diagnostic) -> Diagnostic:
    """Say of a finding on the built-in net that another model can be given."""
    way = (
        "check_method's own net has Linear layers of widths 8, 16 and 4 and a LayerNorm: pass params= and target= that "
        "fit them, or model= and example_inputs="
    )
    return replace(finding, suggestion=f"{finding.suggestion}; {way}" if finding.suggestion else way)


def _net() -> nn.Module:
    with seeded_on_cpu(0):
        return nn.Sequential(
            nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4)
        ).eval()  # fmt: skip
