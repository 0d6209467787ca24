"""One opened library: its entries, its limit, and what of it is in memory."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from mmap import mmap

from deltaspec.diagnostics.findings import Diagnostic
from deltaspec.diagnostics.progress import tracked
from deltaspec.library.catalogue import SavedDelta, Source
from deltaspec.library.entries import Contents, Reader, Template

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]i?)?B")
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


@dataclass(slots=True, eq=False)
class Opened:
    """One directory, and what of it is in memory."""

    directory: str
    """Its name as it was given."""
    source: Source
    entries: dict[str, SavedDelta]
    reader: Reader
    count: int | None = None
    """The most deltas in memory."""
    size: int | None = None
    """The most bytes of their tensors."""
    loaded: OrderedDict[str, Template] = field(default_factory=OrderedDict)
    """Deltas in memory, the one not used for longest first."""

    def read(self, names: Iterable[str], findings: list[Diagnostic]) -> list[Staged]:
        """Read and check those of these deltas that are not in memory; findings for what is wrong with them."""
        staged, missing = [], [name for name in names if name not in self.loaded]
        for name in tracked(missing, "loading deltas", len(missing)):
            entry = self.entries[name]
            template = self.reader.template(entry, findings)
            found = None if template is None else self.reader.read(entry, template, findings)
            if template is not None and found is not None:
                staged.append(Staged(name, template, *found))
        return staged

    def exceeds(self, templates: Iterable[Template]) -> bool:
        """Return whether so many deltas are more than may be in memory."""
        if self.count is not None:
            return sum(1 for _ in templates) > self.count
        return self.size is not None and sum(template.size for template in templates) > self.size

    def too_many(self, count: int) -> Diagnostic:
        """Return the finding about more deltas at once than may be in memory."""
        message = f"{count} deltas at once are more than the limit of {self.directory}"
        return Diagnostic("DS531", message, self.directory, suggestion="raise the limit, or detach some first")

    def in_use(self, name: str, trained: bool, in_rows: bool) -> Diagnostic:
        """Return the finding about a delta that cannot be dropped now."""
        reason, hint = "is attached", f"c.detach({name!r}) first"
        if trained:
            reason = "has parameters that require a gradient, and what they learned would be lost"
            hint = "p.requires_grad_(False) first"
        elif in_rows:
            reason, hint = "is in rows that were prepared", "let go of what c.rows(...) gave first"
        return Diagnostic("DS532", f"the delta {name!r} {reason}", self.directory, suggestion=hint)


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
