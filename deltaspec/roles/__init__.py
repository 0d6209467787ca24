"""Roles: architecture-independent names for the parts of a transformer, one data file per architecture.

`<model_type>.json` holds `{"model_type": str, "aliases": [str, ...], "roles": {role: [glob, ...]}}`. `aliases` are
further `config.model_type`s laid out the same. A glob is matched against a module's fully qualified name (`*` is
one segment, `**` any number of them, none included), so `**.layers.*.self_attn.q_proj` serves the bare model and
every headed one. `norm.attn` implies `norm`; `attn.q` does not imply `attn`. A role that an architecture fuses is
named as such (`attn.qkv`). Adding an architecture is adding its file. Nothing here imports torch.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files

_PROJECTIONS = ("q", "k", "v", "o", "kv", "qkv")
ROLES: tuple[str, ...] = (
    "embed",
    "block",
    "attn",
    *(f"attn.{part}" for part in _PROJECTIONS),
    "cross_attn",
    *(f"cross_attn.{part}" for part in _PROJECTIONS),
    "mlp",
    "mlp.up",
    "mlp.gate",
    "mlp.gate_up",
    "mlp.down",
    "norm",
    "norm.attn",
    "norm.mlp",
    "norm.final",
    "expert",
    "head",
)
"""The closed vocabulary: `embed` are embedding tables and patch projections, `block` one layer, `attn` the whole
attention module, `mlp` the feed-forward module or, where a model has none, its output projection, `expert` a module
holding experts, `head` the outermost modules after the backbone."""

_FUSED = {
    **{"q": ("qkv",), "k": ("kv", "qkv"), "v": ("kv", "qkv"), "kv": ("qkv",)},
    **{"up": ("gate_up",), "gate": ("gate_up",)},
}


@dataclass(frozen=True, slots=True)
class RoleMap:
    """The roles of one architecture."""

    model_type: str
    patterns: dict[str, tuple[str, ...]]
    """Role -> globs."""
    _by_tail: dict[str, list[tuple[str, re.Pattern[str]]]] = field(repr=False, compare=False)
    """Last segment -> (role, compiled glob); `*` for globs that end in a wildcard."""

    def roles_of(self, fqn: str) -> tuple[str, ...]:
        """Give the roles of a module by its name, in the vocabulary's order."""
        found = set()
        for tail in (fqn.rpartition(".")[2], "*"):
            for role, pattern in self._by_tail.get(tail, ()):
                if pattern.fullmatch(fqn):
                    found.add(role)
                    if role.startswith("norm."):
                        found.add("norm")
        return tuple(sorted(found, key=ROLES.index)) if len(found) > 1 else tuple(found)


@cache
def role_maps() -> dict[str, RoleMap]:
    """Give every role map by model type, aliases included, sorted."""
    found: dict[str, RoleMap] = {}
    for file in files(__package__).iterdir():
        if not file.name.endswith(".json"):
            continue
        data = json.loads(file.read_text(encoding="utf-8"))
        patterns = {role: tuple(globs) for role, globs in data["roles"].items()}
        if unknown := set(patterns).difference(ROLES):
            raise ValueError(f"{file.name}: {', '.join(sorted(unknown))} is no role of the vocabulary")
        by_tail: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
        for role, globs in patterns.items():
            for glob in globs:
                by_tail.setdefault(glob.rpartition(".")[2], []).append((role, _compile(glob)))
        role_map = RoleMap(data["model_type"], patterns, by_tail)
        for name in (data["model_type"], *data.get("aliases", ())):
            if name in found:
                raise ValueError(f"{file.name}: {name} already has the roles of {found[name].model_type}")
            found[name] = role_map
    return dict(sorted(found.items()))


def fused_role(role: str, present: set[str]) -> str | None:
    """Give the present role in which a model fuses this one (`attn.q` -> `attn.qkv`); None where it does not."""
    family, _, part = role.rpartition(".")
    return next((f"{family}.{whole}" for whole in _FUSED.get(part, ()) if f"{family}.{whole}" in present), None)


def _compile(glob: str) -> re.Pattern[str]:
    # These globs are our own data, so plain `re` without a time budget is safe and fast.
    pieces = []
    for segment in glob.split("."):
        pieces.append(r"(?:[^.]+\.)*" if segment == "**" else re.escape(segment).replace(r"\*", "[^.]*") + r"\.")
    return re.compile("".join(pieces).removesuffix(r"\."))
