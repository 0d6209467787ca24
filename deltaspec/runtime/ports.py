"""What the runtime asks of those above it: whoever loads deltas when they are needed, and whoever runs rows."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

from torch import Tensor, fx

from deltaspec.deltas.modules import Delta
from deltaspec.deltas.strengths import Strengths
from deltaspec.runtime.forward_gate import ForwardGate
from deltaspec.runtime.host import Host


class View(Protocol):
    """An active set, as far as the views that share its deltas know it."""

    active: tuple[str, ...]
    gate: ForwardGate
    host: Host
    strengths: Strengths

    def activate(self, names: Iterable[str], *, strengths: Mapping[str, float] | None = None) -> None:
        """Make exactly these deltas act, at these strengths."""

    def unready(self, name: str) -> None:
        """Let no switch to a delta be quick any more."""

    def forget(self, name: str) -> None:
        """Forget all that was made for a delta."""

    def leave(self, names: Collection[str]) -> None:
        """Detach these deltas, where they are attached."""

    def changed(self, gone: Collection[str], graph: fx.Graph | None) -> None:
        """Follow deltas that came, or are gone; take another trace of the whole model, where there is one."""

    def kept(self) -> dict[tuple[str, str], Tensor]:
        """Return the values that buffers will have when nothing is attached, by module's FQN and name."""

    def rebind(self) -> None:
        """Bind tensors anew."""


class Residency(Protocol):
    """Has deltas that are no modules of the backbone in memory when they are needed."""

    opened: list[Any]
    """Where they come from; empty while there are none, which is quick to see."""

    def __contains__(self, name: object) -> bool: ...

    def delta(self, name: str) -> Delta:
        """Return one that is in memory as a module. Raise KeyError for one that is not."""

    def in_memory(self, names: Iterable[str], view: View) -> AbstractContextManager[None]:
        """Have them in memory for what attaches them in a view."""

    def moved(self) -> None:
        """Follow the backbone to another device or dtype."""

    def require(self, names: Iterable[str]) -> None:
        """Have them in memory, all or none. Raise DeltaSpecError with all findings."""

    def touch(self, names: Iterable[str]) -> None:
        """Note that they are used now."""

    def pin(self, holder: object, names: Iterable[str]) -> None:
        """Keep them in memory for as long as an object lives that knows where they lie."""


View_contra = TypeVar("View_contra", contravariant=True)


class RowSwitch(Protocol[View_contra]):
    """Runs the rows of a batch under different deltas, in a view."""

    def begin(self, view: View_contra) -> None:
        """Start anew in a copied view. Until then a copy of this holds nothing: the copy's forwards may lead to it."""

    running: Any
    """What the forward that runs now has of rows; None where it has none."""

    @property
    def installed(self) -> bool:
        """Whether its forwards are in the backbone."""

    def install(self) -> None:
        """Put its forwards in, over what is attached."""

    def remove(self) -> bool:
        """Take them out; return whether they were in."""

    def end(self) -> None:
        """Leave a forward with rows that was interrupted."""

    def forget(self) -> None:
        """Forget all that holds tensors."""

    def changed(self, gone: Collection[str]) -> None:
        """Follow deltas that came, or are gone for good."""
