"""Compiled models found in what a trainer holds: a compiled model, its backbone, or a module around either.

Trainers wrap models and unwrap them, and know the backbone alone. So the deltas there keep word of the compiled model.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from deltaspec.backbone.reserved import Reserved
from deltaspec.compiler.build import Built
from deltaspec.runtime.verbs import Verb, put

_WORD = "compiled"


class Held(NamedTuple):
    """A compiled model that is part of another module, or that module itself."""

    place: str
    """FQN of its backbone there."""
    compiled: Any
    """The `CompiledModel`."""
    acts: Callable[[], bool]
    """Whether deltas are attached, or rows are under some; else it is the plain model."""
    trained: bool
    """Whether the plain model may be trained, too."""


def leave_word(built: Built, compiled: nn.Module, again: Callable[[Built], nn.Module]) -> None:
    """Let the deltas on a backbone lead to the compiled model; to one that is made `again` where it is gone."""
    put(built.host.deltas, _WORD, functools.partial(_held, built, weakref.ref(compiled), again))


def _held(built: Built, kept: weakref.ref[nn.Module], again: Callable[[Built], nn.Module], deltas: str) -> Held:
    compiled = kept()
    place = deltas.removesuffix(built.host.home).removesuffix(".")
    if compiled is None:
        compiled = again(built)
    return Held(place, compiled, lambda: built.active.acts, built.host.trained)


def held_in(model: nn.Module) -> list[Held]:
    """Return the compiled models that a module is, wraps, or has as parts, in order."""
    found = []
    for fqn, module in model.named_modules():
        word = module.__dict__.get(_WORD) if isinstance(module, Reserved) else None
        if isinstance(word, Verb) and word.do is not None:
            found.append(word(fqn))
    return found
