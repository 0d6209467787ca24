"""The passes over training steps that a spec or a call may leave out, by name. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.diagnostics.wording import closest

PASSES: Final = {
    "recompute": "a site keeps its input and the bits of its dropout, and computes the rest again",
    "rematerialise": "a site's input is made again from what the backbone keeps anyway: a norm's, an activation's",
    "dropout": "the backbone's own dropouts keep their masks in bits",
    "feed_forward": "what an activation gave, in front of a gate or alone, is made again from what entered it",
}
"""What each does, by name."""

ALL: Final = frozenset(PASSES)


def chosen(passes: bool | Iterable[str]) -> frozenset[str]:
    """Return the passes that a call asks for: all, none, or these. Raises DeltaSpecError (DS480) for unknown names."""
    if isinstance(passes, bool):
        return ALL if passes else frozenset()
    names = (passes,) if isinstance(passes, str) else tuple(passes)
    if findings := [_unknown(name) for name in names if name not in ALL]:
        raise DeltaSpecError(findings)
    return frozenset(names)


def _unknown(name: str) -> Diagnostic:
    near = closest(str(name), ALL)
    hint = f"did you mean {near!r}? " if near else ""
    return Diagnostic("DS480", f"no pass is named {name!r}", suggestion=f"{hint}known: {', '.join(PASSES)}")
