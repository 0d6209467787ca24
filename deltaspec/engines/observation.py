"""What was found in an adapter, before it is asked what an engine does about it."""

from __future__ import annotations

from dataclasses import dataclass

from deltaspec.diagnostics.findings import Path


@dataclass(frozen=True, slots=True)
class Observation:
    """A fact about an adapter."""

    fact: str
    """A name of `vocabulary.FACTS`."""
    says: str
    """What is there, as a noun with what belongs to it."""
    value: str = ""
    """What rules tell such facts apart by."""
    sites: tuple[str, ...] = ()
    """Modules, or keys, that it concerns."""
    path: Path | None = None
    """Where it stands in adapter_config.json; None: in the file of the tensors."""
    hint: str | None = None
    """Way out that is known from this adapter and base."""
    number: int = 0
    """The rank, of the fact `rank`."""
