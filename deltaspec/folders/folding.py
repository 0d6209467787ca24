"""Folding deltas into the tensors of a folder: one module at a time, its tensors from whatever shards they lie in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from deltaspec.folders.weights import Named
from deltaspec.names.paths import below
from deltaspec.planning.planned import PlannedDelta, PlannedSite
from deltaspec.transforms.merge import fold_all, require_as_finite

Changes = Mapping[str, Sequence[tuple[PlannedDelta, PlannedSite]]]
"""What changes each module, by its FQN."""


class Folding:
    """What deltas make of the tensors of a folder, by key."""

    def __init__(
        self,
        model: nn.Module,
        names: Named,
        changes: Changes,
        tensors: Mapping[str, Mapping[str, Tensor]],
        strengths: Mapping[str, float],
    ) -> None:
        self._model, self._names, self._changes = model, names, changes
        self._tensors, self._strengths = tensors, strengths
        self._made: dict[str, dict[str, Tensor]] = {}
        """Results by module that are not all written yet."""
        self._as_kept: dict[str, dict[str, Mapping[str, Tensor]]] = {}
        """Those by the keys of the folder, by module and name: of many pieces, all are made at once."""
        self._places: dict[str, list[tuple[str, str]]] = {}
        """Modules that change, and names of their tensors, by key."""
        self._left: dict[str, int] = {}
        """How many tensors of each module are not written yet."""
        for fqn in changes:
            for name in self._own(fqn):
                for key in names.kept(below(fqn, name)):
                    self._places.setdefault(key, []).append((fqn, name))
                    self._left[fqn] = self._left.get(fqn, 0) + 1
        self._apart: dict[str, Tensor] = {}
        self.beside: dict[str, str] = {}
        """For tensors that are added, the key of the one that they were tied to."""
        self.unties = False
        """Whether one end of a tie gets weights of its own; known once `untied` was called."""

    @property
    def keys(self) -> list[str]:
        """Keys of all tensors that may change."""
        return list(self._places)

    def needed(self) -> Iterator[str]:
        """Yield the names of the tensors that are read: all of the modules that change."""
        for fqn in self._changes:
            yield from (below(fqn, name) for name in self._own(fqn))

    def untied(self) -> dict[str, Tensor]:
        """Return the tensors to be added, by key.

        Where one end of a tie gets weights of its own, each place of every tie does: transformers ties all of a model,
        or nothing.
        """
        groups = self._groups()
        values = {place: self._at(place) for group in groups for place in group if self._owner(place) in self._changes}
        for group in groups:
            first, *rest = (values.get(place, self._names.find(place)) for place in group)
            self.unties |= any(not _equal(first, other) for other in rest)
        if not self.unties:
            return {}
        added: dict[str, Tensor] = {}
        for group in groups:
            key = self._names.key(group[0])
            assert key is not None
            for place in group:
                own = self._names.own_key(place)
                value = values.get(place)
                if own is None:
                    held = self._names.find(place)
                    assert held is not None
                    added[new := self._names.new_key(place)] = held if value is None else value
                    self.beside[new] = key
                else:
                    self._apart[own] = self._names.folder.tensor(own) if value is None else value
        return added

    def value(self, key: str) -> Tensor | None:
        """Return what a tensor becomes; None where nothing changes it."""
        found = None
        for fqn, name in self._places.get(key, ()):
            made = self._results(fqn).get(name)
            if made is not None:
                kept = self._as_kept.setdefault(fqn, {})
                if name not in kept:
                    kept[name] = self._names.as_kept(below(fqn, name), made)
                found = kept[name][key]
            self._left[fqn] -= 1
            if not self._left[fqn]:
                self._made.pop(fqn, None)
                self._as_kept.pop(fqn, None)
        return self._apart.pop(key, found)

    def _groups(self) -> list[tuple[str, ...]]:
        """Return the places of each tie of the model that a change touches, or all ties where one is touched."""
        groups = {tuple(sorted((name, *tied))) for name, tied in self._names.ties.items() if tied}
        touched = any(self._owner(place) in self._changes for group in groups for place in group)
        return sorted(group for group in groups if self._names.key(group[0]) is not None) if touched else []

    def _owner(self, place: str) -> str:
        return place.rpartition(".")[0]

    def _at(self, place: str) -> Tensor:
        """Return what becomes of a parameter at one place."""
        fqn, _, name = place.rpartition(".")
        made = self._results(fqn)
        if name in made:
            return made[name]
        found = self._names.find(place)
        assert found is not None
        return found

    def _own(self, fqn: str) -> list[str]:
        """Return the names of a module's own tensors that a checkpoint holds."""
        module = self._model.get_submodule(fqn)
        buffers = (n for n, b in module._buffers.items() if b is not None)
        kept = [name for name in buffers if name not in module._non_persistent_buffers_set]
        return [*(name for name, parameter in module._parameters.items() if parameter is not None), *kept]

    def _results(self, fqn: str) -> dict[str, Tensor]:
        """Fold all deltas into one module, which has its values only meanwhile; rounded as the folder has them."""
        if fqn in self._made:
            return self._made[fqn]
        module = self._model.get_submodule(fqn)
        before = dict(module._parameters), dict(module._buffers)
        held: dict[str, Tensor] = {}
        try:
            for name in self._own(fqn):
                found = self._names.find(below(fqn, name))
                assert found is not None
                held[name] = found
                if name in module._parameters:
                    module._parameters[name] = nn.Parameter(found, requires_grad=False)
                else:
                    module._buffers[name] = found
            folded = fold_all(module, self._changes[fqn], lambda name, key: self._tensors[name][key], self._strengths)
            made = {name: value.to(held[name].dtype) for name, value in folded.items()}
            require_as_finite(fqn, module, made)
        finally:
            module._parameters.update(before[0])
            module._buffers.update(before[1])
        self._made[fqn] = {name: value.detach() for name, value in made.items()}
        return self._made[fqn]


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)
