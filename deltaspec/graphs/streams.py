"""What entered a module, kept until another one's formula reads it in the same forward."""

from __future__ import annotations

from threading import local

from torch import Tensor

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic


class Stream(local):
    """The hidden state that entered a module, of each thread's own forward. A copy begins empty."""

    entered: Tensor | None = None

    def __init__(self, read: str, site: str) -> None:
        self.read, self.site = read, site
        """FQNs of that module, and of the one whose formula reads it."""

    def __reduce__(self) -> tuple[type[Stream], tuple[str, str]]:
        """Copy and pickle it without what is in it."""
        return Stream, (self.read, self.site)


def entered(stream: Stream) -> Tensor:
    """Return what entered. Raises DeltaSpecError (DS586) where nothing did in this forward."""
    if stream.entered is None:
        message = f"{stream.site or 'the model'} runs without {stream.read} before it, and a delta there reads what "
        message += "enters that"
        hint = "run both, as where the spec was planned; under checkpointing, put both into one part"
        raise DeltaSpecError([Diagnostic("DS586", message, suggestion=hint)])
    return stream.entered
