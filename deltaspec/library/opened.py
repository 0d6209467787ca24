"""One opened library: its entries, its limit, and what of it is in memory."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from mmap import mmap

from deltaspec.library.entries import Contents, Reader, SavedDelta, Template

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]i?)?B")
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


@dataclass(slots=True, eq=False)
class Opened:
    """One directory, and what of it is in memory."""

    directory: str
    entries: dict[str, SavedDelta]
    reader: Reader
    count: int | None = None
    """The most deltas in memory."""
    size: int | None = None
    """The most bytes of their tensors."""
    loaded: OrderedDict[str, Template] = field(default_factory=OrderedDict)
    """Deltas in memory, the one not used for longest first."""

    def exceeds(self, templates: Iterable[Template]) -> bool:
        """Return whether so many deltas are more than may be in memory."""
        if self.count is not None:
            return sum(1 for _ in templates) > self.count
        return self.size is not None and sum(template.size for template in templates) > self.size


@dataclass(frozen=True, slots=True)
class Staged:
    """A delta that was read and checked, and is not in memory yet."""

    name: str
    template: Template
    file: mmap
    contents: Contents


def limits(limit: int | str | None) -> tuple[int | None, int | None]:
    """Read a limit: (number of deltas, bytes)."""
    if limit is None:
        return None, None
    if isinstance(limit, int) and not isinstance(limit, bool) and limit > 0:
        return limit, None
    if isinstance(limit, str) and (found := _SIZE.fullmatch(limit.strip())):
        return None, int(float(found[1]) * _UNITS[found[2] or ""])
    raise ValueError(f'limit is a number of deltas or a size such as "2GiB", not {limit!r}')
