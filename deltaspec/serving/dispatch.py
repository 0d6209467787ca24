"""The batch of a forward with rows: how long it is, and by what its rows can be told apart."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.diagnostics.wording import counted
from deltaspec.runtime.sockets import Forward

_MAIN = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "inputs", "decoder_input_ids")
"""Names of arguments that surely have the rows as first dimension."""


@dataclass(slots=True)
class Batch:
    """The batch of the forward that runs now, as far as it tells rows apart."""

    rows: int = 0
    """Number of assigned rows."""
    size: int = 0
    """Length of the first dimension: the rows, times the beams of each."""
    totals: tuple[int, ...] = ()  # no set: its numbers would be constants in a compiled graph
    """Numbers of tokens that a batch flattened to `[tokens, width]` may have."""
    images: bool = False
    """The model was given images, which it may cut into windows along the first dimension."""

    def begin(self, rows: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take what the user called the model with. Raises DeltaSpecError (DS443) unless it has as many rows."""
        self.rows = self.size = rows
        if rows == 0:
            given = next(_tensors((*args, *kwargs.values())), None)
            if given is None or given.shape[0]:
                raise DeltaSpecError([_other_size(0 if given is None else given.shape[0], rows)])
        self.measure(args, kwargs)
        if self.size != rows:
            raise DeltaSpecError([_other_size(self.size, rows)])

    def measure(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take the size of the batch from the arguments of the model: the rows, or some beams of each.

        Raises DeltaSpecError (DS443) for another size.
        """
        main = [kwargs[name] for name in _MAIN if name in kwargs]
        tensors = list(_tensors((*args, *main, *kwargs.values())))
        if not tensors or not self.rows:
            return
        size = tensors[0].shape[0]
        if size % self.rows:
            raise DeltaSpecError([_other_size(size, self.rows)])
        self.size = size
        self.totals = tuple([t.shape[0] * t.shape[1] for t in tensors if t.dim() > 1 and t.shape[0] == size])
        self.images = any(t.dim() == 4 for t in tensors)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors that have rows among a call's arguments, those in outputs of an encoder included."""
    for value in values:
        if isinstance(value, Tensor) and value.dim():
            yield value
        elif isinstance(value, Mapping):
            yield from (inner for inner in value.values() if isinstance(inner, Tensor) and inner.dim())


def _other_size(size: int, rows: int) -> Diagnostic:
    message = f"deltas names {counted(rows, 'row')}, and the batch has {size}"
    return Diagnostic("DS443", message, suggestion="give one entry a row; None is the bare backbone")


Kinds = tuple[str, ...]
"""The kind in each slot, by a key that no other kind of this process has."""


class Current(Protocol):
    """Who knows what runs now."""

    batch: Batch
    running: Any

    def proving(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the model, watched if need be."""


class Dispatch:
    """The forward of a host while a mixer is installed."""

    __signature__ = property(lambda self: inspect.signature(self.own))  # generate passes what a forward takes by name

    def __init__(self, mixer: Current, own: Forward, mixed: Mapping[Kinds, Forward]) -> None:
        self._mixer, self.own, self._mixed = mixer, own, mixed
        self.plain = own
        """Forward under what is attached, without rows."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the host: by rows if this forward has some, else as it is attached."""
        kinds = self._mixer.running
        if kinds is None:
            return self.plain(*args, **kwargs)
        return self._mixed.get(kinds, self.own)(*args, **kwargs)


class Entering:
    """The forward of the whole model under rows: takes the size of the batch, and proves that sites are reached."""

    def __init__(self, mixer: Current, forward: Forward) -> None:
        self._mixer, self._forward = mixer, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        self._mixer.batch.measure(args, kwargs)
        return self._mixer.proving(self._forward, *args, **kwargs)
