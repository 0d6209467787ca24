"""What a reader of another library's files found: deltas as data, each key accounted for. No torch code runs here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class IncomingSite:
    """One place of the base model, and what a delta has there."""

    fqn: str
    """FQN of the module, as the base model at hand calls it."""
    tensors: Mapping[str, Tensor]
    """Values by the names that the method declares. Those that sites share are given at each, the same object.
    Buffers that the method computes from the base's weights alone may be left out."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """Parameters that differ here from the delta's."""
    parameter: str | None = None
    """Own name of the parameter, where a parameter is the site and not its module."""


@dataclass(frozen=True, slots=True)
class IncomingDelta:
    """One delta of ours: a foreign adapter may be several (lora, and a head in full)."""

    name: str
    method: str
    params: Mapping[str, Any]
    """Parameters as in a spec; what has its default may be left out."""
    sites: tuple[IncomingSite, ...]
    target: Any = None
    """Selector as in a spec; None: it is made from the sites. Give one only where the method needs it so."""
    default_target: bool = False
    """Whether `target` is left out of the spec: the method's own default means these sites."""
    strength: float = 1.0
    attached: bool = True


@dataclass(slots=True)
class Incoming:
    """All that a foreign directory holds."""

    folder: Path
    kind: str
    """Format for people: `PEFT lora`."""
    deltas: list[IncomingDelta] = field(default_factory=list)
    """In order of application."""
    account: dict[str, str] = field(default_factory=dict)
    """Each key of its files, and what became of it."""
    remarks: list[str] = field(default_factory=list)
    """What its reader must know: where the original library computes something odd, what was left out and why."""
    origin: dict[int, tuple[str, str]] = field(default_factory=dict)
    """File and name there of each tensor that was read, by its identity: one that is passed on need not be copied."""
    held: list[Tensor] = field(default_factory=list)
    """Those tensors: while an identity is looked up, no other may have it."""
    base: str | None = None
    """Name or path of the base model that its files name."""
    revision: str | None = None
