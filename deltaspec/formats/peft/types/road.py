"""RoAd of PEFT: rotations of pairs of output features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltaspec.formats.incoming import IncomingSite
from deltaspec.formats.outgoing import Outgoing
from deltaspec.formats.peft.single import Single
from deltaspec.formats.peft.sites import found_modules, lacks

if TYPE_CHECKING:
    from deltaspec.formats.peft.adapter import Adapter

METHODS = frozenset({"road"})
"""Methods that are written so."""
_VARIANTS = {"road_1": 1, "road_2": 2, "road_4": 4}


def read(adapter: Adapter) -> None:
    """Add the delta of a RoAd adapter."""
    adapter.options.start("init_weights", True)
    variant = adapter.options.word("variant", "road_1", _VARIANTS)
    params: dict[str, Any] = {"variant": _VARIANTS[variant], "group_size": adapter.options.whole("group_size", 64, 1)}
    modules = found_modules(adapter, {"road_theta": "angle", "road_alpha": "scale"}, {"angle": 1, "scale": 1})
    adapter.add(
        "road", params,
        [IncomingSite(at.fqn, at.tensors) for at in modules if not lacks(adapter, at, ("angle", "scale"))],
    )  # fmt: skip


def write(out: Outgoing) -> None:
    """Write a RoAd adapter."""
    single = Single(out, "ROAD", "road", ("Linear",), biases=False)
    variant = single.agreed("variant", lambda part: f"road_{part.params.variant}", "road_1")
    size = single.agreed("group_size", lambda part: part.params.group_size, 64)
    single.put("road_theta", lambda part: part.own.angle)
    single.put("road_alpha", lambda part: part.own.scale)
    single.finish(variant=variant, group_size=size)
