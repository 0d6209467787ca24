"""The module table: what is known of each module of a model, as plain data. Nothing here needs torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from deltaspec.roles.parts import Parts


@dataclass(frozen=True, slots=True)
class Packed:
    """The form of a weight that is kept as codes (4 bits, 8 bits, float8), not as the values that it stands for."""

    name: str
    """Name for people: `bitsandbytes 4-bit`."""
    readable: bool
    """Whether its library says what values the codes stand for."""


@dataclass(frozen=True, slots=True)
class ParameterInfo:
    """One parameter that a module owns directly."""

    name: str
    """Own name, such as `weight`."""
    fqn: str
    shape: tuple[int, ...]
    """Shape of the values; of a packed parameter, of those that its codes stand for."""
    dtype: str
    """Name of its dtype, without the `torch.` prefix: `float32`."""
    tied: tuple[str, ...] = ()
    """FQNs of the other places that hold the very same parameter."""
    packed: Packed | None = None
    """Form of the codes that it is kept as; None for plain values."""

    @property
    def count(self) -> int:
        """Number of values."""
        return prod(self.shape)


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
    """Names of all base classes but nn.Module and object, the class itself first."""
    kind: str
    """`linear`, `conv1d` (transformers' Conv1D), `embedding`, `conv`, `norm` or `other`, by base class."""
    roles: tuple[str, ...]
    stack: str | None
    """FQN of the ModuleList-like container of repeated layers it lies in (`encoder.layer`)."""
    layer: int | None
    """Index of its layer in that container."""
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
    attends: bool = False
    """Whether it looks up its attention function in transformers' AttentionInterface."""
    entrance: Entrance | None = None
    """Entrance of its ids into the model, if it is the embedding of token ids."""
    positions: Positions | None = None
    """Where the positions of what it attends to are told, if it attends to tokens."""
    computed: tuple[str, ...] = ()
    """Names of the tensors that a hook computes before each forward (the older weight and spectral norms)."""
    arguments: tuple[str, ...] = ()
    """Names of the arguments that its forward takes by name."""
    transposed: bool = False
    """Whether stacked parameters are `[experts, in, out]` (transformers' `is_transposed`, Llama 4), not
    `[experts, out, in]`."""
    parts: Parts | None = None
    """Parts of its output, where it is a fused projection and the layout is known."""
    faithful: bool = True
    """Whether its forward computes what torch's class of its kind (linear, conv1d, norm) does."""
    fixed: bool = False
    """Whether a forward that runs on its own weights only was put onto it, and computes something of its own."""
    vocabulary: bool = False
    """Whether it is the table of input embeddings, as the model itself says (`get_input_embeddings`)."""
    parametrised: tuple[str, ...] = ()
    """Names of the tensors that parametrisations compute (`torch.nn.utils.parametrize`)."""
    unpacked: str | None = None
    """Class name that it has in the model before its weights were packed; None where they are not."""

    @property
    def packed(self) -> Packed | None:
        """Form of its weight, where that is kept as codes."""
        return next((p.packed for p in self.parameters if p.packed is not None), None)

    @property
    def conv_groups(self) -> int:
        """Groups of the convolution; 1 for other modules."""
        return 1 if self.conv is None else self.conv.groups

    def has_parameter(self, name: str) -> bool:
        """Return whether the module owns a parameter of this own name."""
        return any(p.name == name for p in self.parameters)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of an own parameter; KeyError where there is none."""
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
    role_maps: tuple[str, ...] = ()
    """Model types whose role maps named the rows' roles; empty where no architecture in it is known."""


@dataclass(frozen=True, slots=True)
class Entrance:
    """The place where the ids of one embedding enter the model."""

    fqn: str
    """FQN of the innermost model that takes ids and a mask."""
    follower: str | None = None
    """FQN of the decoder that is given this encoder's output together with the encoder's mask."""
    scale: float = 1.0
    """Factor that the embedding puts on its rows."""
    places: int | None = None
    """Number of positions that the model has, where its config says."""
    problem: str | None = None
    """Reason why no tokens can be put in front here; None: they can."""


@dataclass(frozen=True, slots=True)
class Positions:
    """Where a model is told which positions the tokens have that some of its modules attend to."""

    fqn: str
    """FQN of the innermost model that takes ids and a mask."""
    takers: tuple[str, ...] = ()
    """FQNs of the modules whose forward is given the positions: embeddings of them, rotary ones, or the model."""
    together: tuple[str, ...] = ()
    """FQNs of all modules that attend to these tokens, where one of them makes a bias by distance for all."""
    places: int | None = None
    """Number of positions that the model has, where they are a table."""
    problem: str | None = None
    """Reason why they cannot be told otherwise; None: they can."""
