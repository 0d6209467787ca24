"""Signatures of forwards: reading one of transformers' takes longer than planning a layer, so each is read once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def arguments_of(forward: Callable[..., Any]) -> tuple[inspect.Parameter, ...]:
    """Give the parameters of a class's forward, without `self`."""
    return tuple(inspect.signature(forward).parameters.values())[1:]
