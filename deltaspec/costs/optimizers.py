"""What optimizers keep of each parameter, in bytes, as those of torch and of bitsandbytes make it in a first step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import ceil, prod
from typing import NamedTuple

from deltaspec.language.conditions import Optimizer


class Trained(NamedTuple):
    """A parameter that an optimizer is given."""

    shape: tuple[int, ...]
    itemsize: int
    """Bytes of one value."""

    @property
    def bytes(self) -> int:
        """Bytes of all its values."""
        return prod(self.shape) * self.itemsize


def state_bytes(optimizer: Optimizer, parameters: Iterable[Trained]) -> int:
    """Return the bytes of an optimizer's state for these parameters, the counts of its steps included."""
    return sum(map(_STATES[optimizer], parameters))


_STEP = 4
"""Bytes of a parameter's own count of steps: one float32."""
_BLOCK, _SMALLEST = 256, 4096
"""Values that share a scale in bitsandbytes, and values from which on a parameter's state is kept in 8 bits."""


def _times(count: int, more: int = _STEP) -> Callable[[Trained], int]:
    """Keep so many tensors of the parameter's own size and dtype."""
    return lambda parameter: count * parameter.bytes + more


def _packed(count: int) -> Callable[[Trained], int]:
    """Keep so many tensors of a byte a value, with a float32 scale a block; small parameters in float32."""

    def state(parameter: Trained) -> int:
        values = prod(parameter.shape)
        each = values + 4 * ceil(values / _BLOCK) if values >= _SMALLEST else 4 * values
        return count * each

    return state


def _factored(parameter: Trained) -> int:
    """Keep the means of rows and of columns of what has two dimensions or more, and all of the rest."""
    if len(parameter.shape) < 2:
        return _STEP + parameter.bytes
    *rest, rows, columns = parameter.shape
    return _STEP + prod(rest) * (rows + columns) * parameter.itemsize


_STATES: Mapping[Optimizer, Callable[[Trained], int]] = {
    "none": _times(0, 0),
    "adadelta": _times(2),
    "adafactor": _factored,
    "adagrad": _times(1),
    "adam": _times(2),
    "adam_8bit": _packed(2),
    "adamax": _times(2),
    "adamw": _times(2),
    "adamw_8bit": _packed(2),
    "lion": _times(1, 0),
    "lion_8bit": _packed(1),
    "muon": _times(1, 0),
    "nadam": _times(2, 2 * _STEP),
    "radam": _times(2),
    "rmsprop": _times(1),
    "sgd": _times(0, 0),
    "sgd_momentum": _times(1, 0),
}
