"""What the clauses of the contract work with: a method on a model, its outputs, and ways to compare them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from deltaspec.backbone.inputs import call_arguments
from deltaspec.backbone.observations import Observations
from deltaspec.backbone.random_state import seeded_on_cpu
from deltaspec.compiler.compile import compile_plan
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.methods.registry import methods
from deltaspec.planning.plan import Plan
from deltaspec.planning.resolve import plan_observed

Outputs = list[Tensor]

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far a merged model may be from the attached one, by the dtype that rounds most."""


class ContractError(AssertionError):
    """A clause of the contract does not hold."""


@dataclass(frozen=True, slots=True)
class Case:
    """One method on one model: the plan of a delta `one`, and that of `one` and `two` side by side."""

    method: str
    model: nn.Module
    inputs: Any
    capture: str
    tolerance: float
    single: Plan
    pair: Plan
    reference: Outputs
    """The original's outputs."""

    @classmethod
    def of(
        cls,
        method: str,
        model: nn.Module,
        inputs: Any,
        target: Any,
        params: dict[str, Any],
        capture: str,
        tolerance: float | None,
    ) -> Case:
        """Plan one method on one model; the arguments are those of `check_method`."""

        def delta(name: str, **rest: Any) -> dict[str, Any]:
            found = {"name": name, "method": method, "params": params, **rest}
            return found if target is None else {**found, "target": target}

        observations = Observations(model, inputs)

        def planned(*deltas: dict[str, Any]) -> Plan:
            return plan_observed(model, observations, {"deltaspec": 1, "deltas": list(deltas)})

        if model.training:
            raise ValueError("give a model in evaluation mode: model.eval()")
        reference = run(model, inputs)
        if not same(reference, run(model, inputs)):
            raise ValueError(f"{type(model).__name__} gives other bits on a second run; nothing can be told from it")
        if tolerance is None:
            tolerance = max(TOLERANCES.get(t.dtype, 1e-4) for t in (*floats(reference), *model.parameters()))
        pair = planned(delta("two", attached=False), delta("one"))
        return cls(method, model, inputs, capture, tolerance, planned(delta("one")), pair, reference)

    def compile(self, *, trained: bool = True) -> CompiledModel:
        """Compile both deltas; `trained` moves them away from their initial values."""
        compiled = compile_plan(self.model, self.pair, self.capture)
        if trained:
            disturb(compiled)
        return compiled

    def active_sets(self, compiled: CompiledModel) -> Iterator[tuple[str, ...]]:
        """Return the sets that can be active at once; only methods that replace or read weights exclude others."""
        yield from ((), ("one",), ("two",))
        try:
            with compiled.only("one", "two"):
                pass
            yield ("two", "one")
        except DeltaSpecError as error:
            codes = {finding.code for finding in error.diagnostics}
            method = methods()[self.method]
            sites = [(site.site, site.params) for delta in self.pair.deltas for site in delta.sites]
            reads = (method.reads_weight, method.reads_bias, method.needs_base)
            exclusive = method.promises.weight == "replace" or any(read(*site) for read in reads for site in sites)
            require(exclusive and codes == {"DS436"}, f"two deltas of one method cannot be attached together: {error}")

    def run(self, compiled: nn.Module) -> Outputs:
        """Run a model on the example inputs, without gradients."""
        return run(compiled, self.inputs)

    def loss(self, compiled: nn.Module) -> Tensor:
        """Return the distance of the first output from a fixed place near the original's."""
        args, kwargs = call_arguments(self.inputs)
        output = floats(compiled(*args, **kwargs))[0]
        reference = floats(self.reference)[0]
        with seed(7):
            drawn = torch.randn(reference.shape, device="cpu").to(reference.device)  # the same on every device
        goal = reference + drawn * (reference.std() + 0.1)
        return F.mse_loss(output.float(), goal.to(output.device).float())


def require(holds: bool, otherwise: str) -> None:
    """Raise ContractError, saying what was seen, unless this holds."""
    if not holds:
        raise ContractError(otherwise)


@torch.no_grad()
def run(model: nn.Module, inputs: Any) -> Outputs:
    """Return the tensors of a model's output, without gradients."""
    args, kwargs = call_arguments(inputs)
    outputs = [leaf for leaf in tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]
    require(bool(outputs), "the model's output holds no tensor")
    return outputs


def floats(output: Any) -> Outputs:
    """Return the tensors of floating point in an output."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def same(left: Outputs, right: Outputs) -> bool:
    """Return whether two outputs have the same bits."""
    return len(left) == len(right) and all(map(torch.equal, left, right))


@torch.no_grad()
def disturb(compiled: CompiledModel) -> None:
    """Move every delta away from its initial values, always in the same way."""
    generator = torch.Generator().manual_seed(11)
    for delta in compiled.deltas.values():
        for parameter in delta.parameters():
            parameter.add_((torch.randn(parameter.shape, generator=generator) * 0.05).to(parameter))


@contextmanager
def seed(value: int) -> Iterator[None]:
    """Fix torch's random state inside this context, and put it back."""
    with seeded_on_cpu(value):
        yield


def storages(model: nn.Module) -> set[int]:
    """Return the addresses of the storages of a model's parameters and buffers."""
    return {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers()) if t.numel()}
