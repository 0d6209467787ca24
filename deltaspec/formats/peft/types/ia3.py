"""(IA)³ of PEFT: scales of what leaves a module, or of what enters those that `feedforward_modules` names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltaspec.formats.incoming import IncomingSite
from deltaspec.formats.outgoing import Outgoing, Part
from deltaspec.formats.peft.adapter import CONFIG
from deltaspec.formats.peft.naming import forward_lists
from deltaspec.formats.peft.single import Single
from deltaspec.formats.peft.sites import Found, differs, found_modules
from deltaspec.names.patterns import matched

if TYPE_CHECKING:
    from torch import Tensor

    from deltaspec.formats.peft.adapter import Adapter

METHODS = frozenset({"ia3"})
"""Methods that are written so."""


def read(adapter: Adapter) -> None:
    """Add the delta of an (IA)³ adapter."""
    adapter.ignore("fan_in_fan_out")
    adapter.options.start("init_ia3_weights", True)
    modules = adapter.options.names("feedforward_modules")
    placed = []
    for found in found_modules(adapter, {"ia3_l": "scale"}, {"scale": None}):
        before = _is_before(adapter, found, modules)
        if before is not None:
            placed.append((found, before))
    usual = all(before == ("mlp.down" in found.row.roles) for found, before in placed)
    sites = []
    for found, before in placed:
        name = "scale_in" if before else "scale_out"
        own = {} if usual or not before else {"position": "before"}
        sites.append(IncomingSite(found.fqn, {name: found.tensors["scale"].flatten()}, own))
    params: dict[str, Any] = {} if usual else {"position": "after"}
    if not usual and all(site.params for site in sites):
        params, sites = {"position": "before"}, [IncomingSite(site.fqn, site.tensors) for site in sites]
    adapter.add("ia3", params, sites)


def _is_before(adapter: Adapter, found: Found, modules: Any) -> bool | None:
    """Return whether what enters is scaled; None, and a finding, where the file and the configuration differ."""
    scale = found.tensors["scale"]
    if modules is None:  # the model's own default, which the shapes show but for convolutions
        if scale.dim() > 2:
            message = f"feedforward_modules is missing, and {found.module} is a convolution"
            adapter.find("DS543", message, "save the adapter again", CONFIG)
            return None
        return scale.shape[0] == 1
    before = matched("fullmatch", modules, found.module) is not None if isinstance(modules, str) else any(
        found.module.endswith(name) for name in modules
    )  # fmt: skip
    width = found.row.in_features if before else found.row.out_features
    shape = (1, width, *(1,) * (scale.dim() - 2)) if before or scale.dim() > 2 else (width, 1)
    return None if differs(adapter, found, "the scale's shape", list(shape), list(scale.shape)) else before


def write(out: Outgoing) -> None:
    """Write an (IA)³ adapter."""
    single = Single(out, "IA3", "ia3", ("Linear", "Conv1D", "Conv2d", "Conv3d"), biases=False)
    single.put("ia3_l", _scale)
    before = [fqn for fqn, part in single.parts.items() if _enters(part)]
    single.finish()
    names = [name for name, _ in out.base.model.named_modules() if name]
    targets, feedforward = forward_lists(list(single.parts), before, names)
    out.config |= {"target_modules": targets, "feedforward_modules": feedforward}


def _enters(part: Part) -> bool:
    return part.at.tensors[0].name == "scale_in"


def _scale(part: Part) -> Tensor:
    value: Tensor = part.own.scale_in if _enters(part) else part.own.scale_out
    if part.at.site.kind == "conv":
        return value.reshape(1, -1, *(1,) * (len(part.at.site.row.shape_of("weight")) - 2))
    return value[None] if _enters(part) else value[:, None]
