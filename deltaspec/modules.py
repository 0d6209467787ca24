"""The module table: every module and parameter of a model as plain data (real or meta weights alike)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ParameterInfo:
    """One parameter that a module owns directly."""

    name: str
    """Own name, such as `weight`."""
    fqn: str
    shape: tuple[int, ...]
    dtype: str
    """Without the `torch.` prefix: `float32`."""
    tied: tuple[str, ...] = ()
    """FQNs of the other places that hold the very same parameter."""

    @property
    def count(self) -> int:
        """Number of values."""
        total = 1
        for size in self.shape:
            total *= size
        return total


@dataclass(frozen=True, slots=True)
class ConvInfo:
    """Geometry of a convolution."""

    groups: int
    transposed: bool


@dataclass(frozen=True, slots=True)
class Row:
    """One module."""

    fqn: str
    """Fully qualified name; the root's is the empty string."""
    type: str
    """Class name."""
    bases: tuple[str, ...]
    """Names of all base classes up to and without nn.Module, the class itself first."""
    kind: str
    """`linear` | `conv1d` (transformers' Conv1D) | `embedding` | `conv` | `norm` | `other`; subclasses count as what they are."""
    roles: tuple[str, ...]
    stack: str | None
    """FQN of the ModuleList-like container of repeated layers it lies in (`encoder.layer`)."""
    layer: int | None
    """Index in that container."""
    parameters: tuple[ParameterInfo, ...]
    """Parameters the module owns directly."""
    buffers: tuple[ParameterInfo, ...]
    """Persistent buffers the module owns directly."""
    subtree_parameters: int
    """Number of values in all parameters at and below this module, tied ones once."""
    children: int
    """Number of direct child modules."""
    in_features: int | None = None
    """Linear, Conv1D: input width. Embedding: number of rows. Conv: input channels."""
    out_features: int | None = None
    """Linear, Conv1D: output width. Embedding: row width. Conv: output channels."""
    conv: ConvInfo | None = None
    aliases: tuple[str, ...] = ()
    """Other FQNs under which the very same module object is found."""

    @property
    def conv_groups(self) -> int:
        """Groups of the convolution; 1 for other modules."""
        return 1 if self.conv is None else self.conv.groups

    def has_parameter(self, name: str) -> bool:
        """Tell whether the module owns a parameter of this own name."""
        return any(p.name == name for p in self.parameters)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Give the shape of an own parameter; KeyError where there is none."""
        for p in self.parameters:
            if p.name == name:
                return p.shape
        raise KeyError(name)


@dataclass(frozen=True, slots=True)
class ModuleTable:
    """All modules of one model, in `named_modules` order."""

    rows: tuple[Row, ...]
    model_class: str
    """Class name of the model."""
    module: str
    """Python module of that class (`transformers.models.bert.modeling_bert`)."""
    model_type: str | None
    """`config.model_type` of a transformers model."""
    parameters: int
    """Number of values in all parameters, tied ones once."""
