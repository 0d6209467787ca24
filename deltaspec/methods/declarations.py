"""What a method declares, as data: parameters, tensors, initial values, promises, refusals; and the site it sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from deltaspec.backbone.table import Row
from deltaspec.names.paths import below
from deltaspec.roles.parts import Parts

if TYPE_CHECKING:
    from torch import Tensor

    from deltaspec.backbone.attention import AttentionShape

InitKind = Literal["zeros", "ones", "normal", "kaiming_uniform", "xavier_uniform", "constant", "copy"]


class MethodParams(BaseModel):
    """Base of every method's `params`: closed, strict, immutable, finite."""

    # Built when first used: a process may need one method's of all those it imports.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)


@dataclass(frozen=True, slots=True)
class Init:
    """How a delta tensor starts.

    `constant`: `value`. `normal`: mean 0, standard deviation `value`. `kaiming_uniform`: negative slope `value`
    (`nn.Linear` uses sqrt(5)). `xavier_uniform`: Glorot's, over the last two dimensions. `copy`: the
    backbone tensor `source`, an FQN, or only its `rows`.
    """

    kind: InitKind = "zeros"
    value: float = 0.0
    source: str | None = None
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a delta at one site, as data: the plan counts it without making it."""

    name: str
    shape: tuple[int, ...]
    init: Init = Init()
    buffer: bool = False
    """State that is saved with the delta but gets no gradient (BatchNorm statistics)."""
    dtype: str | None = None
    """A torch dtype's name; None follows the backbone."""
    key: str | None = None
    """Name it is stored under, for a tensor that several sites share; None: `<site>.<name>`."""
    stack: int = 0
    """Length of the first dimension, where it stacks one tensor a matrix of a stacked parameter; 0: it does not."""

    @property
    def count(self) -> int:
        """Number of trainable values; 0 for a buffer."""
        return 0 if self.buffer else prod(self.shape)


@dataclass(frozen=True, slots=True)
class Form:
    """All that a method's formula may depend on besides its params; sites of one form share one graph."""

    kind: str
    """`linear`, `conv1d` (transformers' Conv1D), `embedding`, `conv`, `norm` or `other`."""
    weight_dims: int = 0
    """Number of dimensions of the module's own weight (a conv over n axes has n + 2)."""
    channel_dims: int = 0
    """Number of dimensions of the output after its channels (0 where channels come last)."""
    groups: int = 1
    """Groups of the convolution."""
    tensors: tuple[str, ...] = ()
    """Names of the delta's tensors here."""
    parts: Parts | None = None
    """What the output of a fused projection is made of (q, k and v)."""


@dataclass(frozen=True, slots=True)
class Site:
    """One place of the backbone that one delta changes."""

    row: Row
    parameter: str | None = None
    """Own name of the parameter, where a `parameter:` atom chose a parameter and not its module."""
    in_width: int | None = None
    """Width of the hidden state that enters (last dimension), observed; None where unknown."""
    width: int | None = None
    """Width of the hidden state that leaves (last dimension), observed; None where unknown."""
    host: str | None = None
    """FQN of the module whose forward reads this site's weight without calling it; None where it is called."""
    reads: tuple[str, ...] | None = None
    """Own names of the parameters that the host reads; None: all."""
    attention: AttentionShape | None = None
    """What its attention function was given, observed; None where it calls none."""
    dims: int | None = None
    """Number of dimensions of the hidden state that leaves, observed; None where unknown."""
    stack: tuple[int, ...] | None = None
    """Leading dimensions of a parameter that is seen as the weight of linear layers: `()` one matrix, `(experts,)` a
    stack of them; None where the site is no such parameter. See `Method.matrices`."""
    moves: bool = False
    """What leaves has other positions (all dimensions but the last) than what enters, observed."""
    stream: str | None = None
    """FQN of the module whose input the formula reads besides; None where it reads none. See `Method.stream`."""
    stream_width: int | None = None
    """Width of that input (last dimension); None where unknown."""

    @property
    def fqn(self) -> str:
        """Name of the site: the module's FQN, or the parameter's."""
        return self.row.fqn if self.parameter is None else below(self.row.fqn, self.parameter)

    def is_read(self, parameter: str) -> bool:
        """Return whether a change of an own parameter, by its own name, reaches the output."""
        return self.reads is None or parameter in self.reads

    @property
    def kind(self) -> str:
        """Kind of module, as `Form.kind`."""
        return self.row.kind


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a method does not take a site (becomes a DS4 finding), and the way out."""

    reason: str
    suggestion: str


@dataclass(frozen=True, slots=True)
class Promises:
    """What a method promises; tested for every method by the contract suite."""

    identity_at_start: bool
    """The output is unchanged, bit for bit, until the first training step."""
    weight: Literal["add", "replace"] | None
    """Expressible as a change of the host's parameters, so it merges, and works on bypassed modules; None: it is not.

    `add`: its `fold` computes from the parameters it is given, so others can fold before it. `replace`: it puts others
    in their place, so no delta before it on the site would be seen."""
    per_row: bool
    """Usable for single rows of a mixed batch."""


class DeltaTensors:
    """A delta's tensors at one site, as attributes (what `Method.fold` sees as `t`)."""

    def __init__(self, names: tuple[str, ...], tensors: Sequence[Tensor]) -> None:
        for index, name in enumerate(names):
            setattr(self, name, tensors[index])

    def __getattr__(self, name: str) -> Tensor:
        raise AttributeError(f"the delta has no tensor {name!r} here")
