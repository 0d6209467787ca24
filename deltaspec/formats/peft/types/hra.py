"""HRA of PEFT: Householder reflections of the input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltaspec.formats.incoming import IncomingSite
from deltaspec.formats.outgoing import Outgoing
from deltaspec.formats.peft.convolutions import ignored_geometry, refuse_ignored_geometry
from deltaspec.formats.peft.single import Single, left_out
from deltaspec.formats.peft.sites import differs, found_modules

if TYPE_CHECKING:
    from deltaspec.formats.peft.adapter import Adapter

METHODS = frozenset({"hra"})
"""Methods that are written so."""


def read(adapter: Adapter) -> None:
    """Add the delta of an HRA adapter."""
    adapter.options.start("init_weights", True)
    params: dict[str, Any] = {"rank": adapter.options.whole("r", 8, 1)}
    if adapter.options.flag("apply_GS", False):
        params["orthogonal"] = True
    found = found_modules(adapter, {"hra_u": "directions"})
    refuse_ignored_geometry(adapter, found)
    adapter.add(
        "hra", params, [
            IncomingSite(at.fqn, at.tensors) for at in found
            if not differs(adapter, at, "r", params["rank"], at.tensors["directions"].shape[1])
        ],
    )  # fmt: skip


def write(out: Outgoing) -> None:
    """Write an HRA adapter."""
    single = Single(out, "HRA", "hra", ("Linear", "Conv2d"))
    single.keep(lambda part: left_out(ignored_geometry(out.base.model.get_submodule(part.fqn))))
    rank = single.agreed("r", lambda part: part.params.rank, 8)
    orthogonal = single.agreed("apply_GS", lambda part: part.params.orthogonal, False)
    single.put("hra_u", lambda part: part.own.directions)
    single.finish(r=rank, apply_GS=orthogonal)
