"""The record of a backbone: its modules' classes and a sample of each tensor, as data that lies beside saved deltas."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any

from torch import Tensor, nn

from deltaspec.backbone.entrances import part_of
from deltaspec.backbone.fingerprint import structure_fingerprint
from deltaspec.backbone.reserved import find
from deltaspec.backbone.sample import Sample, Types, read, take
from deltaspec.backbone.tabulate import class_of, tabulate
from deltaspec.backbone.values import Values, known_values
from deltaspec.backbone.walk import named, own
from deltaspec.backbone.weight_forms import is_packed, packed_weight, plain_class, shape_of_values, unpacked_class
from deltaspec.names.folding import fold, unfold
from deltaspec.names.paths import below, is_inside

Kept = Mapping[tuple[str, str], Tensor]
"""Values that buffers will have when nothing is attached, by module's FQN and name."""
_MOST_MODULES = 1_000_000


@dataclass(frozen=True)
class Record:
    """A backbone as it was when deltas were saved for it."""

    modules: Mapping[str, str]
    """Class names of the modules, by FQN."""
    tensors: Mapping[str, Sample]
    """Samples of its parameters and saved floating-point buffers, by FQN, in the model's order."""
    vocabulary: int | None = None
    """Number of rows of its table of input embeddings."""
    replaced: Mapping[str, frozenset[int] | None] = field(default_factory=dict)
    """Tensors that the saved deltas stand for, by FQN: these rows of them, or all (None)."""
    unused: frozenset[str] = frozenset()
    """FQNs of modules of which nothing reached the output, as far as that was known."""

    @property
    def model_class(self) -> str:
        """Class name of the model."""
        return self.modules[""]

    @cached_property
    def types(self) -> Types:
        """How exact its values are."""
        return Types.of(sample.values for sample in self.tensors.values())

    def to_data(self) -> dict[str, Any]:
        """Return it as JSON data, names folded over layers."""
        kinds: dict[str, list[str]] = {}
        for fqn, kind in self.modules.items():
            kinds.setdefault(kind, []).append(fqn)
        return {
            "vocabulary": self.vocabulary,
            "modules": {kind: fold(names) for kind, names in kinds.items()},
            "unused": fold(sorted(self.unused)),
            "replaced": {n: rows if rows is None else sorted(rows) for n, rows in self.replaced.items()},
            "tensors": {name: str(sample) for name, sample in self.tensors.items()},
        }

    @classmethod
    def from_data(cls, data: Any) -> Record:
        """Read what `to_data` wrote. Raises ValueError."""
        parts = ("vocabulary", "modules", "unused", "replaced", "tensors")
        if not isinstance(data, dict) or not {*parts} <= data.keys():
            raise ValueError("its record of the backbone is malformed")
        vocabulary, kinds, unused, replaced, tensors = (data[part] for part in parts)
        if not isinstance(kinds, dict) or not isinstance(tensors, dict):
            raise ValueError("its record of the backbone is malformed")
        listed: list[list[Any]] = [names if isinstance(names, list) else [None] for names in (*kinds.values(), unused)]
        if not all(isinstance(text, str) for text in (*tensors.values(), *chain.from_iterable(listed))):
            raise ValueError("its record of the backbone is malformed")
        if vocabulary is not None and (not isinstance(vocabulary, int) or isinstance(vocabulary, bool)):
            raise ValueError("its vocabulary is no number")
        modules: dict[str, str] = {}
        for kind, patterns in kinds.items():
            for pattern in patterns:
                modules |= dict.fromkeys(unfold(pattern, _MOST_MODULES - len(modules)), str(kind))
        if "" not in modules:
            raise ValueError("its record of the backbone names no model")
        samples = {name: read(text) for name, text in tensors.items()}
        idle = frozenset(chain.from_iterable(unfold(pattern) for pattern in unused))
        return cls(modules, samples, vocabulary, _replaced(replaced), idle)


def _replaced(data: Any) -> dict[str, frozenset[int] | None]:
    if not isinstance(data, dict):
        raise ValueError("what it says that deltas replace is malformed")
    found: dict[str, frozenset[int] | None] = {}
    for name, rows in data.items():
        if rows is not None and not (isinstance(rows, list) and all(type(row) is int for row in rows)):
            raise ValueError(f"the rows of {name!r:.80} that it says deltas replace are malformed")
        found[name] = rows if rows is None else frozenset(rows)
    return found


class Present:
    """A backbone as it is now, without its deltas: what a record is made of, or compared with."""

    def __init__(
        self, backbone: nn.Module, kept: Kept | None = None, unused: Callable[[], frozenset[str]] = frozenset
    ) -> None:
        self.backbone, self.kept, self._unused = backbone, kept or {}, unused
        found = find(backbone)
        self._home = None if found is None else found[0]
        self._modules = dict(named(backbone, but="\0" if found is None else found[0]))

    @cached_property
    def structure(self) -> str:
        """Fingerprint of its structure, exactly."""
        table = tabulate(self.backbone)
        home = self._home
        rows = table.rows if home is None else tuple(row for row in table.rows if not is_inside(row.fqn, home))
        return structure_fingerprint(replace(table, rows=rows))

    @cached_property
    def modules(self) -> dict[str, str]:
        """Class names of its modules, by FQN."""
        kinds = ((n, unpacked_class(m) if is_packed(m) else class_of(m)) for n, m in self._modules.items())
        return {fqn: kind.__name__ for fqn, kind in kinds}

    @cached_property
    def unused(self) -> frozenset[str]:
        """FQNs of modules of which nothing reaches the output, as far as a forward could show it. Runs that forward."""
        return self._unused()

    @cached_property
    def vocabulary(self) -> int | None:
        """Number of rows of its table of input embeddings."""
        weight = getattr(part_of(self.backbone, "get_input_embeddings"), "weight", None)
        return weight.shape[0] if isinstance(weight, Tensor) and weight.dim() == 2 else None

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Its parameters and saved floating-point buffers, by FQN; codes under the name of what they stand for."""
        return {below(fqn, name): tensor for fqn, name, tensor in self._own()}

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Return the shape of the values of one of its tensors, in the model whose weights are not packed."""
        fqn, _, name = tensor.rpartition(".")
        packed = packed_weight(self._modules[fqn]) if name == "weight" else None
        if packed is None:
            return tuple(self.tensors[tensor].shape)
        shape = shape_of_values(self._modules[fqn], *packed)
        return shape[::-1] if self.is_turned(tensor) else shape

    def values(self, tensor: str) -> Values:
        """Return the values of one of its tensors. Sharded ones need all processes to ask."""
        fqn, _, name = tensor.rpartition(".")
        found = known_values(self._modules[fqn], name, self.tensors[tensor])
        return replace(found, plain=found.plain.t()) if found.plain is not None and self.is_turned(tensor) else found

    def is_turned(self, tensor: str) -> bool:
        """Return whether a weight is packed as the transpose of what it was: a Conv1D's, as bitsandbytes keeps it."""
        fqn, _, name = tensor.rpartition(".")
        module = self._modules[fqn]
        return name == "weight" and is_packed(module) and unpacked_class(module) is not plain_class(module)

    def record(
        self, replaced: Mapping[str, frozenset[int] | None], reads: Iterable[str], unused: frozenset[str]
    ) -> Record:
        """Make the record: without values of what deltas replace, but with those that some of them read."""
        read_too, samples = set(reads), {}
        for name in self.tensors:
            gone = name in replaced and replaced[name] is None and name not in read_too
            known = Values(None) if gone else self.values(name)
            samples[name] = take(self.shape(name), known)
        return Record(self.modules, samples, self.vocabulary, replaced, unused)

    def _own(self) -> Iterator[tuple[str, str, Tensor]]:
        for fqn, module in self._modules.items():
            if (packed := packed_weight(module)) is not None:  # scales and the like are part of the codes
                yield fqn, "weight", packed[1]
                if (bias := module._parameters.get("bias")) is not None:
                    yield fqn, "bias", bias
                continue
            for name, parameter in own(module._parameters):
                yield fqn, name, parameter
            for name, buffer in own(module._buffers):
                if name not in module._non_persistent_buffers_set and buffer.is_floating_point():
                    yield fqn, name, self.kept.get((fqn, name), buffer)
