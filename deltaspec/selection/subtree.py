"""The modules of a table that lie below others."""

from __future__ import annotations

from itertools import islice, takewhile

from deltaspec.backbone.table import ModuleTable, Row
from deltaspec.names.paths import is_inside


class Subtrees:
    """Finds modules by their container, at a cost of what is inside and not of the whole table."""

    def __init__(self, table: ModuleTable) -> None:
        self._rows = table.rows
        self._aliased = [row for row in table.rows if row.aliases]
        self.order = {row.fqn: number for number, row in enumerate(table.rows)}
        """Number of each module in the table, by its first name."""

    def of(self, row: Row) -> list[Row]:
        """Return a module and all below it; one that is found there under several names may come twice."""
        # The table is in the order of a walk, so what a module holds comes right after it. Every name counts: one
        # shared with another part of the model may have its first name there.
        below = takewhile(lambda r: is_inside(r.fqn, row.fqn), islice(self._rows, self.order[row.fqn], None))
        return [*below, *(r for r in self._aliased if any(is_inside(alias, row.fqn) for alias in r.aliases))]
