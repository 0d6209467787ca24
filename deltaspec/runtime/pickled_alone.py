"""What a part of a compiled model says to pickle: that it goes with the compiled model, and not alone.

A host's forward is made by us and leads to the whole engine; pickle would refuse it as a nameless function, or bring a
copy whose deltas act no more.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic

MARK = "_deltaspec_part"
"""What `mark` sets in the `__dict__` of a module; it stays there when nothing is attached."""


class Part:
    """Base of what belongs to a compiled model: it is copied as its class says, and not pickled."""

    __slots__ = ("__weakref__",)

    def __reduce_ex__(self, _: object) -> NoReturn:
        message = "c.backbone, or a part of it, cannot be pickled without its compiled model"
        hint = "pickle the compiled model (a net may hold c in the place of c.backbone), or write it with c.save(dir)"
        raise DeltaSpecError([Diagnostic("DS465", message, "<model>", suggestion=hint)])


class _Mark(Part):
    def __deepcopy__(self, memo: dict[int, Any]) -> _Mark:
        return self


def mark(module: nn.Module) -> None:
    """Let pickle refuse a host by name. To be called before its `forward` is set: pickle goes in order."""
    module.__dict__.setdefault(MARK, _Mark())


def unmark(module: nn.Module) -> None:
    """Undo `mark`, on a copy that is a plain model."""
    module.__dict__.pop(MARK, None)
