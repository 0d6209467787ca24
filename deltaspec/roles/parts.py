"""Fused projections: which rows of one linear layer's output are q, k and v, or gate and up. Never imports torch.

A role file says it as data, per fused role: `{"widths": {"q": 1, "k": 1, "v": 1}}` are thirds of the output, in this
order. Widths are proportions; a text is an attribute of the model's config (`"num_key_value_heads"`). `"repeat"` says
how many times the parts follow each other (`"num_attention_heads"`: head by head). Where an architecture has several
layouts, a list of them: the first counts whose `"when"` (config attribute -> value) holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Parts:
    """The output of one fused projection: its parts, one after the other, again and again."""

    repeats: int
    widths: tuple[tuple[str, int], ...]
    """Name and width of each part in one repeat, in order."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parts, in order."""
        return tuple(name for name, _ in self.widths)

    def rows(self, name: str) -> int:
        """Return the number of output features that belong to a part. Raises KeyError for another name."""
        return self.repeats * dict(self.widths)[name]


def resolve(layouts: tuple[Mapping[str, Any], ...], config: object, width: int) -> Parts | None:
    """Read a role file's layouts of one fused role for an output of this width.

    None where no layout holds, or where it does not add up for this config.
    """
    for layout in layouts:
        if all(_attribute(config, name) == value for name, value in layout.get("when", {}).items()):
            break
    else:
        return None
    repeats = _number(layout.get("repeat", 1), config)
    shares = {name: _number(share, config) for name, share in layout["widths"].items()}
    if repeats is None or width % repeats:
        return None
    known = {name: share for name, share in shares.items() if share is not None}
    each, whole = width // repeats, sum(known.values())
    if len(known) < len(shares) or any(each * share % whole for share in known.values()):
        return None
    return Parts(repeats, tuple((name, each * share // whole) for name, share in known.items()))


def _number(value: int | str, config: object) -> int | None:
    found = _attribute(config, value) if isinstance(value, str) else value
    return found if isinstance(found, int) and found > 0 else None


def _attribute(config: object, name: str) -> object:
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)
