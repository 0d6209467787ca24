"""LoRAs of a Stack on one module: the second works on what the first adds, and its result alone is added."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from deltaspec.formats.incoming import IncomingDelta, IncomingSite

_PAIR = {"down", "up"}


def chains(before: list[IncomingDelta], delta: IncomingDelta) -> bool:
    """Return whether a LoRA shares modules with those before it, and all of these are plain pairs that fit."""
    twice = _met(before, delta)
    firsts = {site.fqn: site for _, site in twice}
    plain = all(other.method == "lora" and not other.params.get("use_dora") for other, _ in twice)
    if not twice or not plain or delta.params.get("use_dora"):
        return False
    return all(
        site.tensors.keys() == firsts[site.fqn].tensors.keys() == _PAIR
        and site.tensors["down"].shape[1] == firsts[site.fqn].tensors["up"].shape[0]
        for site in delta.sites
        if site.fqn in firsts
    )


def chained(before: list[IncomingDelta], delta: IncomingDelta) -> IncomingDelta:
    """Return a LoRA with B₂A₂·B₁A₁ where one before it was, and take that away there."""
    firsts = {site.fqn: (other, site) for other, site in _met(before, delta)}
    sites = [_product(*firsts[s.fqn], delta, s) if s.fqn in firsts else s for s in delta.sites]
    for index, other in reversed(list(enumerate(before))):
        left = tuple(site for site in other.sites if firsts.get(site.fqn, (None,))[0] is not other)
        if left:
            before[index] = replace(other, sites=left)
        elif other.sites:
            del before[index]
    return replace(delta, sites=tuple(sites))


def _met(before: list[IncomingDelta], delta: IncomingDelta) -> list[tuple[IncomingDelta, IncomingSite]]:
    own = {site.fqn for site in delta.sites}
    return [(other, s) for other in before if other.method in ("lora", "ia3") for s in other.sites if s.fqn in own]


def _product(one: IncomingDelta, first: IncomingSite, two: IncomingDelta, second: IncomingSite) -> IncomingSite:
    """Return the site with A₁ and all else multiplied into B, its scales as well."""
    (down, up), (inner, outer) = ([site.tensors[name] for name in ("down", "up")] for site in (first, second))
    rank = len(down)
    scale = _scale({**one.params, **first.params}) * _scale({**two.params, **second.params})
    params = {name: value for name, value in {"rank": rank, "alpha": float(rank)}.items() if two.params[name] != value}
    return IncomingSite(second.fqn, {"down": down, "up": outer @ (inner @ up) * scale}, params)


def _scale(params: dict[str, Any]) -> float:
    return float(params["alpha"] / params["rank"])
