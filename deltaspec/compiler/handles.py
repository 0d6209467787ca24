"""Handles that a compiled model gives out: its deltas by name, and the context that puts the active set back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType

from torch import nn

from deltaspec.deltas.modules import Delta, Deltas
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic, require_known
from deltaspec.library.libraries import Libraries
from deltaspec.runtime.active import Active
from deltaspec.runtime.host import Host
from deltaspec.runtime.interrupts import surely
from deltaspec.runtime.shared import Shared
from deltaspec.storage.identity import MARK

_FEWEST = 4
"""Digits of an identity that stand for it at least."""


class Restore:
    """The result of `only` and `detached`: as a context, it puts the active set back at its end."""

    __slots__ = ("_active", "_before", "_strengths")

    def __init__(self, active: Active) -> None:
        self._active, self._before, self._strengths = active, active.active, active.strengths.as_dict()

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        surely(lambda: self._active.activate(self._before, strengths=self._strengths))


class DeltasView(Mapping[str, Delta]):
    """The deltas of a model that are in memory, by name: the compiled ones, then those of libraries."""

    def __init__(self, deltas: Deltas, libraries: Libraries) -> None:
        self._deltas, self._libraries = deltas, libraries

    def __getitem__(self, name: str) -> Delta:
        own = self._deltas.get(name)
        return self._libraries.expose(name) if own is None else own

    def __iter__(self) -> Iterator[str]:
        yield from (delta.name for delta in self._deltas.held())
        yield from self._libraries.loaded

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"<deltas: {', '.join(self)}>"


def known_names(shared: Shared, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return these names, or those of all compiled deltas; the beginning of an identity (`sha256:3f9a…`) will do.

    Raises UnknownDeltaError, TypeError for what is no name.
    """
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise TypeError(f"names of deltas are given one by one, as in attach('a', 'b'), not {wrong[0]!r}")
    names = tuple(_whole(name, shared.order) for name in names)
    require_known(names, shared.order)
    return names or tuple(delta.name for delta in shared.plan.deltas)


def _whole(name: str, known: Mapping[str, int]) -> str:
    """Return the identity that a name is the beginning of, where it is that of one delta alone; else the name."""
    if name in known or not name.startswith(MARK) or len(name) < len(MARK) + _FEWEST:
        return name
    found = [whole for whole in known if whole.startswith(name)]
    return found[0] if len(found) == 1 else name


def trainable(host: Host, deltas: Mapping[str, Delta], names: tuple[str, ...]) -> Iterator[nn.Parameter]:
    """Return the parameters of these deltas that require gradients; with none, those of a backbone that may be trained.

    Raises DeltaSpecError (DS418) where there is neither.
    """
    if names:
        return (p for name in names for p in deltas[name].parameters() if p.requires_grad)
    if host.trained:
        own = (p for module in host.modules.values() for p in module._parameters.values() if p is not None)
        return iter({id(p): p for p in own if p.requires_grad}.values())
    message, hint = "nothing is attached, so there is nothing to train", "attach deltas first, or name them"
    raise DeltaSpecError([Diagnostic("DS418", message, file="<model>", suggestion=hint)])
