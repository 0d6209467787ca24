"""Changing only some parts of a fused projection (`parts: [q, v]` at role attn.qkv)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from deltaspec.methods.declarations import Refusal, Site
from deltaspec.methods.shared.weights import reader
from deltaspec.roles.parts import Parts


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError(f"each part once, not {', '.join(names)}")
    return names


PartNames = Annotated[
    tuple[Literal["q", "k", "v", "gate", "up"], ...], Field(min_length=1, max_length=5), AfterValidator(_distinct)
]
"""Names of parts, as a parameter of a method."""

FUSED_ROLES: Mapping[str, frozenset[str]] = {
    "attn.qkv": frozenset("qkv"),
    "cross_attn.qkv": frozenset("qkv"),
    "cross_attn.kv": frozenset("kv"),
    "mlp.gate_up": frozenset(("gate", "up")),
}
"""Roles of fused projections, and the parts that they hold."""


def fused_roles_of(roles: tuple[str, ...], parts: tuple[str, ...]) -> tuple[str, ...]:
    """Keep, of a method's default roles, those that hold one of these parts."""
    return tuple(role for role in roles if not FUSED_ROLES.get(role, frozenset()).isdisjoint(parts))


def refuse_parts(site: Site, parts: tuple[str, ...]) -> Refusal | None:
    """Return why these parts are not to be had at a site; None where they are."""
    row = site.row
    if row.parts is None:
        fused = next((role for role in row.roles if role in FUSED_ROLES), None)
        reason = (
            f"how {fused} of this {row.type} is laid out is not known"
            if fused
            else f"this {row.type} is no fused projection, so it has no parts {', '.join(parts)}"
        )
        return Refusal(reason, "leave `parts` out for this site (overrides), or select a fused role such as attn.qkv")
    if missing := [part for part in parts if part not in row.parts.names]:
        return Refusal(
            f"this {row.type} has the parts {', '.join(row.parts.names)}, and not {', '.join(missing)}",
            f"choose from parts: [{', '.join(row.parts.names)}], in overrides for this site",
        )
    if site.host is not None:
        return Refusal(f"{reader(site)} reads this weight by itself", "leave `parts` out for this site")
    return None


def add_to_parts(y: Any, parts: Parts, updates: Mapping[str, Any], scale: float) -> Any:
    """Add scale · update to the parts of an output `[…, out]`; the others keep their bits.

    An update is as wide as all rows of its part.
    """
    import torch

    grouped = y if parts.repeats == 1 else y.unflatten(-1, (parts.repeats, -1))
    pieces, start = [], 0
    for name, width in parts.widths:
        piece = grouped[..., start : start + width]
        start += width
        if name in updates:
            update = updates[name] if parts.repeats == 1 else updates[name].unflatten(-1, (parts.repeats, width))
            piece = torch.add(piece, update, alpha=scale)
        pieces.append(piece)
    joined = torch.cat(pieces, -1)
    return joined if parts.repeats == 1 else joined.flatten(-2)


def spread(parts: Parts, pieces: Mapping[str, Any], fill: float, trailing: tuple[int, ...] = ()) -> Any:
    """Lay out pieces `[rows of the part, *trailing]` as `[out, *trailing]`, with `fill` in the other parts."""
    import torch

    like = next(iter(pieces.values()))
    rows = [
        pieces[name].unflatten(0, (parts.repeats, width))
        if name in pieces
        else like.new_full((parts.repeats, width, *trailing), fill)
        for name, width in parts.widths
    ]
    return torch.cat(rows, 1).flatten(0, 1)


def whole(vector: Any, parts: Parts | None, names: tuple[str, ...] | None, fill: float) -> Any:
    """Lay out `[rows of all named parts]`, one part after the other, as `[out]`; as it is where no parts are named."""
    if names is None or parts is None:
        return vector
    pieces, start = {}, 0
    for name in names:
        pieces[name] = vector[start : start + parts.rows(name)]
        start += parts.rows(name)
    return spread(parts, pieces, fill)
