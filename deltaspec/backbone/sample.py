"""Samples of tensors' values: small enough to lie beside a delta, enough to tell two models' weights apart.

Values are compared within the rounding of the coarser of the two types that they went through, so that casts of the
same weights agree; a digest of their bytes would differ.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaspec.backbone.values import Values

VALUES = 128
"""Values kept of each tensor."""
_TEXT = re.compile(r"([a-z]\w*)\[((?:\d{1,18}(?:,\d{1,18})*)?)\](?:~(\d))? ?([A-Za-z0-9+/=]*)", re.ASCII)
_HALVES = (torch.bfloat16, torch.float16)
_TELLING = 8
"""Different values from which on it is no accident that all of them are exact in a coarser type."""
_LOSS = {4: 0.25, 8: 0.05}
"""Error of quantised values, over the size of all, up to which they count as the same: several times the usual."""


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """A fixed, evenly spaced choice of a tensor's values."""

    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    values: Tensor | None
    """The values, in its own dtype, on the CPU; None where they could not be read."""
    bits: int | None = None
    """Bits of each value, where the tensor was quantised."""

    def __str__(self) -> str:
        """Write it on one line."""
        if self.values is None:
            return f"unknown[{_dims(self.shape)}]"
        data = base64.b64encode(self.values.contiguous().view(torch.uint8).numpy().tobytes()).decode()
        form = "" if self.bits is None else f"~{self.bits}"
        return f"{str(self.values.dtype).removeprefix('torch.')}[{_dims(self.shape)}]{form} {data}".rstrip()

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of its values; None where there are none."""
        return None if self.values is None else self.values.dtype


def take(shape: tuple[int, ...], values: Values) -> Sample:
    """Sample a tensor of this shape."""
    return Sample(shape, _at(values.plain, None), values.bits)


def read(text: str) -> Sample:
    """Read what `str` wrote. Raises ValueError."""
    found = _TEXT.fullmatch(text)
    if found is None:
        raise ValueError(f"{text[:40]!r} is no sample of a tensor")
    shape = tuple(map(int, found[2].split(","))) if found[2] else ()
    bits = int(found[3]) if found[3] else None
    if found[1] == "unknown":
        return Sample(shape, None, bits)
    dtype = getattr(torch, found[1], None)
    if not isinstance(dtype, torch.dtype) or bits not in (None, *_LOSS):
        raise ValueError(f"{found[1]!r} is no dtype")
    try:
        data = base64.b64decode(found[4], validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None
    count = min(math.prod(shape), VALUES)
    if len(data) != count * dtype.itemsize:
        raise ValueError(f"a sample of {list(shape)} has {count} values")
    return Sample(shape, torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype), bits)


def positions(shape: tuple[int, ...]) -> Tensor:
    """Return where the sampled values of a tensor of this shape stand, counted from its start. The same everywhere."""
    size = math.prod(shape)
    if size <= VALUES:
        return torch.arange(size)
    return torch.arange(VALUES) * (size - 1) // (VALUES - 1)  # integers: no machine rounds them otherwise


def _at(tensor: Tensor | None, where: Tensor | None) -> Tensor | None:
    """Return the values at places counted from the start, on the CPU; by default those that are sampled."""
    if tensor is None:
        return None
    where = positions(tuple(tensor.shape)) if where is None else where
    if not tensor.dim():
        return tensor.reshape(1).cpu()[where]
    place = torch.unravel_index(where.to(tensor.device), tensor.shape)
    if tensor.is_floating_point() and tensor.itemsize == 1:  # torch picks no values out of float8
        return tensor.view(torch.uint8)[place].view(tensor.dtype).cpu()
    return tensor[place].cpu()


@dataclass(frozen=True, slots=True)
class Types:
    """How exact the values of a model are: a float32 model may be a cast of one in half precision."""

    coarsest: dict[torch.dtype, torch.dtype]
    """For each dtype, the coarsest that the values of most tensors of it went through."""

    @classmethod
    def of(cls, samples: Iterable[Tensor | None]) -> Types:
        """Look at the samples of a whole model."""
        found: dict[torch.dtype, Counter[torch.dtype]] = {}
        for values in samples:
            if values is not None and values.is_floating_point():
                kinds = found.setdefault(values.dtype, Counter())
                if (kind := _went_through(values)) is not None:
                    kinds[kind] += 1
        return cls({dtype: kinds.most_common(1)[0][0] if kinds else dtype for dtype, kinds in found.items()})

    def of_values(self, values: Tensor) -> torch.dtype:
        """Return the type that decides how exact a tensor's values are; where they do not tell, that of the others."""
        return _went_through(values) or self.coarsest.get(values.dtype, values.dtype)


def _went_through(values: Tensor) -> torch.dtype | None:
    """Return the coarsest type that has exactly these values; None where they are too few to tell."""
    if values.itemsize <= 2:
        return values.dtype
    wide = values.flatten().to(torch.float64)
    if len(set(wide.tolist())) < _TELLING:
        return None
    return next((half for half in _HALVES if torch.equal(wide.to(half).double(), wide)), values.dtype)


@dataclass(frozen=True, slots=True)
class Sampled:
    """What is sampled of a tensor of today, at the places of an earlier sample of it."""

    saved: Tensor
    now: Tensor
    bits: int | None
    """Bits of each value, on the side that has fewer."""

    def agree(self, before: Types, today: Types) -> bool:
        """Return whether both can be the same weights."""
        wide = torch.complex128 if self.saved.is_complex() or self.now.is_complex() else torch.float64
        saved, now = self.saved.to(wide), self.now.to(wide)
        if self.bits is not None:
            return bool((saved - now).norm() <= _LOSS[self.bits] * saved.norm())
        if wide.is_complex:
            return bool(torch.equal(saved, now))
        one, other = before.of_values(self.saved), today.of_values(self.now)
        if one == other:
            return bool(torch.equal(saved, now))
        margin = (torch.finfo(one).eps + torch.finfo(other).eps) / 2 * torch.maximum(saved.abs(), now.abs())
        if not {one, other}.isdisjoint(_HALVES):
            # One half may have been the other before; small numbers have equal steps there, great ones are infinite.
            margin = margin * 1.25 + 2.0**-24
            saved, now = (value.clamp(-65_504, 65_504) for value in (saved, now))
        same = (saved - now).abs() <= margin
        return bool((same | (saved.isnan() & now.isnan())).all())


def again(sample: Sample, values: Values, rows: frozenset[int] | None = None) -> Sampled | None:
    """Sample a tensor where an earlier one was, in the rows that both have, but for `rows`; None where that is nowhere.

    Both have the same shape but for the number of rows.
    """
    if sample.values is None or values.plain is None:
        return None
    places, width = positions(sample.shape), math.prod(sample.shape[1:])
    kept = places < values.plain.numel()
    if rows:
        kept &= ~torch.isin(places // max(width, 1), torch.tensor(sorted(rows)))
    now = _at(values.plain, places[kept])
    assert now is not None
    few = min((bits for bits in (sample.bits, values.bits) if bits is not None), default=None)
    return Sampled(sample.values[kept], now, few)


def _dims(shape: tuple[int, ...]) -> str:
    return ",".join(map(str, shape))
