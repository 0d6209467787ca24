"""The parts of an estimate: what a step of training takes, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from deltaspec.language.conditions import Conditions


@dataclass(frozen=True)
class KeptAt:
    """Modules that are alike, and what autograd keeps from their forwards."""

    name: str
    """FQN, with `*` for the numbers of layers."""
    modules: int
    bytes: int


@dataclass(frozen=True)
class Costs:
    """What one step of training takes: memory in bytes, and floating-point operations.

    What cannot be known without weights is None, and `notes` say why.
    """

    conditions: Conditions
    """What it was estimated for; the length is there, where the model has one."""
    trained: tuple[str, ...]
    """Names of the deltas that are attached and trained."""
    parameters: int
    """The backbone's parameters and buffers."""
    delta_parameters: int
    """Those of all deltas."""
    gradients: int
    optimizer_state: int
    inputs: str = ""
    """Names and shapes of the inputs."""
    activations: int | None = None
    """What autograd keeps from the forward for the backward."""
    activations_without_passes: int | None = None
    """The same with `passes=False`."""
    working: int | None = None
    """What the fullest moment of a step takes beside all of the above: gradients of activations, what is in work."""
    forward_flops: int | None = None
    backward_flops: int | None = None
    places: tuple[KeptAt, ...] = ()
    """Modules from whose forwards autograd keeps most, the largest first."""
    notes: tuple[str, ...] = ()

    @property
    def parts(self) -> Mapping[str, int | None]:
        """The parts of the memory, by what they are called; their sum is the total."""
        return {
            "backbone": self.parameters,
            "deltas": self.delta_parameters,
            "gradients": self.gradients,
            "optimizer state": self.optimizer_state,
            "kept activations": self.activations,
            "working memory": self.working,
        }

    @property
    def total(self) -> int:
        """Memory of the step at its fullest moment; of the parts that are known, where one is not."""
        return sum(part or 0 for part in self.parts.values())

    @property
    def complete(self) -> bool:
        """Whether all parts are known."""
        return None not in self.parts.values()
