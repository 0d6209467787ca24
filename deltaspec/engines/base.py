"""The base model as the names and shapes of its modules, and what else an adapter's key may have meant."""

from __future__ import annotations

import re
from collections.abc import Collection

from deltaspec.backbone.table import ModuleTable, Row
from deltaspec.engines.keys import PREFIX
from deltaspec.names.prefixes import prefixes

_HEADS = ("lm_head", "embed_out", "output_projection")
"""Names of output heads where no map of roles says which module it is."""
_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")


class Base:
    """A base model's modules by their names, those of shared modules included."""

    def __init__(self, table: ModuleTable) -> None:
        self.model_type = table.model_type or table.model_class
        self.model_class = table.model_class
        self.rows = {name: row for row in table.rows for name in (row.fqn, *row.aliases)}
        self._layouts: dict[str, list[str]] = {}
        for name in self.rows:
            self._layouts.setdefault(_without_numbers(name), []).append(name)
        stacked = (row for row in table.rows if any(len(parameter.shape) == 3 for parameter in row.parameters))
        self._stacks_experts = any(row.fqn.rpartition(".")[2] == "experts" for row in stacked)
        self._own_names = {name.rpartition(".")[2] for name in self.rows}

    def row(self, module: str) -> Row | None:
        """Return what is known of a module; None where the base has none of this name."""
        return self.rows.get(module)

    def placed(self, site: str) -> tuple[str, str | None]:
        """Return a site of ours as a module, and the own name of its parameter where it is a stack of matrices."""
        if site in self.rows:
            return site, None
        module, _, parameter = site.rpartition(".")
        row = self.rows.get(module)
        if row is None or not row.has_parameter(parameter):
            return site, None
        return module, None if len(row.shape_of(parameter)) == 2 else parameter

    def has_stacked(self, module: str) -> bool:
        """Return whether a module is one of several experts, as older models name them, which are one stack here."""
        return self._stacks_experts and _ONE_EXPERT.search(module) is not None

    def is_stack(self, module: str) -> bool:
        """Return whether a module holds stacks of matrices."""
        row = self.rows.get(module)
        return row is not None and any(len(parameter.shape) == 3 for parameter in row.parameters)

    def has_layout(self, module: str) -> bool:
        """Return whether there is a module of this name but for the numbers of layers."""
        return _without_numbers(module) in self._layouts

    def has_own_name(self, module: str) -> bool:
        """Return whether some module has the last part of this name for its own."""
        return module.rpartition(".")[2] in self._own_names

    def on_some_layers(self, modules: Collection[str]) -> tuple[str, ...]:
        """Return those of some modules of the base whose like in other layers are not among them."""
        chosen = {module for module in modules if module in self.rows}
        layouts = {_without_numbers(module) for module in chosen}
        part = {layout for layout in layouts if not chosen.issuperset(self._layouts[layout])}
        return tuple(module for module in modules if module in chosen and _without_numbers(module) in part)

    def elsewhere(self, modules: Collection[str]) -> str | None:
        """Return under which prefix the base has all these modules, in words; None where it has them nowhere."""
        found = [prefix for prefix in prefixes(modules, self.rows) if prefix.changes] if modules else []
        return str(found[0]).replace("of the saved model", "in the file") if found else None

    def module_of(self, key: str) -> str:
        """Return the innermost module of the base that a key names; the root's empty name where it names none."""
        segments = key.removeprefix(PREFIX).split(".")
        names = (".".join(segments[:depth]) for depth in range(len(segments), 0, -1))
        return next((name for name in names if name in self.rows), "")

    def stops_above(self, key: str) -> bool:
        """Return whether a key leads nowhere: well above its end, it names a part that a module does not have."""
        module = self.module_of(key)
        rest = key.removeprefix(PREFIX).removeprefix(module).strip(".").split(".")
        return self.rows[module].children > 0 and len(rest) > 2

    def is_head(self, row: Row) -> bool:
        """Return whether a module makes the scores of tokens."""
        last = row.fqn.rpartition(".")[2]
        return last in _HEADS or ("head" in row.roles and row.kind == "linear" and "." not in row.fqn)


def is_tied(row: Row) -> bool:
    """Return whether a module shares its weight with another place."""
    return any(parameter.tied for parameter in row.parameters if parameter.name == "weight")


def _without_numbers(name: str) -> str:
    return ".".join("*" if segment.isdigit() else segment for segment in name.split("."))
