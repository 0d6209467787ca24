"""Inputs that several sites of one forward make again in its backward (q, k and v): they are made once."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deltaspec.graphs.recipe_steps import Steps, make

_KEY = "deltaspec"


class Remade:
    """One input, which the node that gave it holds; it has no tensor but between the first and the last use."""

    __slots__ = ("left", "uses", "value")

    def __init__(self) -> None:
        self.uses = self.left = 0
        self.value: Tensor | None = None

    def get(self, steps: Steps, kept: tuple[Tensor, ...]) -> Tensor:
        """Return the input for one site, made of what is kept."""
        found = self.value
        if found is None:
            found, self.left = make(steps, kept), self.uses
        self.left -= 1
        self.value = found if self.left > 0 else None
        return found


def remade(node: Any) -> Remade:
    """Return what the sites share that read the output of a node, and count one more of them."""
    known: dict[str, Any] = node.metadata
    found: Remade = known.setdefault(_KEY, Remade())
    found.uses += 1
    return found
