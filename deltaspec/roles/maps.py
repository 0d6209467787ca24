"""Roles: architecture-independent names for the parts of a transformer, one data file per architecture.

`<model_type>.json` holds `{"model_type": str, "aliases": [str, ...], "roles": {role: [glob, ...]}, "parts": {…}}`.
`aliases` are further `config.model_type`s laid out the same. A glob is matched against a module's fully qualified name
(`*` is one segment, `**` any number of them, none included), so `**.layers.*.self_attn.q_proj` serves the bare model
and every headed one. `norm.attn` implies `norm`; `attn.q` does not imply `attn`. A role that an architecture fuses is
named as such (`attn.qkv`), and `parts` says how its output is laid out (see `roles/parts.py`). A new architecture is
a new file. Nothing here imports torch.

`embed` are embedding tables and patch projections, `block` one layer, `attn` the whole attention module, `mlp` the
feed-forward module or, where a model has none, its output projection, `norm` every normalisation outside of heads,
`expert` a module that holds experts, `head` the outermost modules after the backbone.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from deltaspec.names.patterns import Pattern, compile_glob, fullmatch
from deltaspec.roles.parts import Parts, resolve
from deltaspec.roles.vocabulary import ROLES

_FUSED = {"qkv": ("q", "k", "v", "kv"), "kv": ("k", "v"), "gate_up": ("gate", "up")}
"""Which parts one fused projection may hold."""


@dataclass(frozen=True, slots=True)
class RoleMap:
    """The roles of one architecture."""

    model_type: str
    patterns: dict[str, tuple[str, ...]]
    """Globs of each role."""
    layouts: dict[str, tuple[dict[str, Any], ...]]
    """Layouts of each fused role's output; the first that fits the config holds."""

    def roles_of(self, fqn: str) -> tuple[str, ...]:
        """Return the roles of a module by its name, in the vocabulary's order."""
        by_tail = _by_tail(self.model_type)
        found = set()
        for tail in (fqn.rpartition(".")[2], "*"):
            for role, pattern in by_tail.get(tail, ()):
                if fullmatch(pattern, fqn):
                    found.add(role)
                    if role.startswith("norm."):
                        found.add("norm")
        return tuple(sorted(found, key=ROLES.index)) if len(found) > 1 else tuple(found)

    def parts_of(self, roles: Collection[str], config: object, width: int) -> Parts | None:
        """Return the parts that a fused projection's output is made of; None for other modules."""
        fused = next((role for role in roles if role in self.layouts), None)
        return None if fused is None else resolve(self.layouts[fused], config, width)


def role_map(model_type: str) -> RoleMap | None:
    """Return the role map of a model type; None where there is none."""
    return _role_maps().get(model_type)


def architectures() -> tuple[str, ...]:
    """Return the model types that have a file, sorted."""
    return tuple(sorted({found.model_type for found in _role_maps().values()}))


def fused_role(role: str, present: Collection[str]) -> str | None:
    """Return the present role in which a model fuses this one (`attn.q` -> `attn.qkv`); None where it does not."""
    family, _, part = role.rpartition(".")
    wholes = (f"{family}.{whole}" for whole, parts in _FUSED.items() if part in parts)
    return next((whole for whole in wholes if whole in present), None)


def fused_parts(role: str) -> str:
    """Return what a fused role holds: `q, k and v`."""
    *parts, last = (part for part in _FUSED[role.rpartition(".")[2]] if part != "kv")
    return f"{', '.join(parts)} and {last}"


def roles_called(name: str) -> frozenset[str]:
    """Return the roles that modules of this name have in some architecture (`q_proj` -> `attn.q`, `cross_attn.q`)."""
    pairs = (pair for found in _role_maps().values() for pair in found.patterns.items() if name != "*")
    return frozenset(role for role, globs in pairs if any(glob.rpartition(".")[2] == name for glob in globs))


@cache
def _role_maps() -> dict[str, RoleMap]:
    found: dict[str, RoleMap] = {}
    for file in files(__package__).iterdir():
        if not file.name.endswith(".json"):
            continue
        data = json.loads(file.read_text(encoding="utf-8"))
        patterns = {role: tuple(globs) for role, globs in data["roles"].items()}
        if unknown := set(patterns).difference(ROLES):
            raise ValueError(f"{file.name}: {', '.join(sorted(unknown))} is no role of the vocabulary")
        layouts = {role: tuple(v if isinstance(v, list) else [v]) for role, v in data.get("parts", {}).items()}
        if wrong := [role for role in layouts if role.rpartition(".")[2] not in _FUSED or role not in patterns]:
            raise ValueError(f"{file.name}: {', '.join(wrong)} is no fused role of this architecture")
        for name in (data["model_type"], *data.get("aliases", ())):
            if name in found:
                raise ValueError(f"{file.name}: {name} already has the roles of {found[name].model_type}")
            found[name] = RoleMap(data["model_type"], patterns, layouts)
    return dict(sorted(found.items()))


@cache
def _by_tail(model_type: str) -> dict[str, list[tuple[str, Pattern]]]:
    """Group an architecture's globs by their last segment, so that a name meets only the few it may match."""
    found: dict[str, list[tuple[str, Pattern]]] = {}
    for role, globs in _role_maps()[model_type].patterns.items():
        for glob in globs:
            found.setdefault(glob.rpartition(".")[2], []).append((role, compile_glob(glob)))
    return found
