"""The passes over training steps that a spec or a call may leave out, by name. No torch."""

from __future__ import annotations

from typing import Final

PASSES: Final = {
    "recompute": "a site keeps its input and the bits of its dropout, and computes the rest again",
    "rematerialise": "a site's input is made again from what the backbone keeps anyway: a norm's, an activation's",
    "feed_forward": "what an activation gave, in front of a gate or alone, is made again from what entered it",
}
"""What each does, by name."""

ALL: Final = frozenset(PASSES)
