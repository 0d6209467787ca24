"""LoKr of PEFT: Kronecker products of a small matrix with a low-rank or full one."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from deltaspec.formats.incoming import IncomingSite
from deltaspec.formats.outgoing import Outgoing, Part
from deltaspec.formats.peft.convolutions import ignored_padding, refuse_ignored_padding
from deltaspec.formats.peft.single import Single, left_out
from deltaspec.formats.peft.sites import Found, differs, found_modules, lacks, misfits, overrides
from deltaspec.formats.peft.targets import alphas_of, by_pattern, ranks_of
from deltaspec.names.folding import shown

if TYPE_CHECKING:
    from torch import Tensor

    from deltaspec.formats.peft.adapter import Adapter

METHODS = frozenset({"lokr"})
"""Methods that are written so."""
_NAMES = {"lokr_w1": "small", "lokr_w1_a": "small_up", "lokr_w1_b": "small_down", "lokr_w2": "large",
          "lokr_w2_a": "large_up", "lokr_w2_b": "large_down", "lokr_t2": "large_core"}  # fmt: skip


def read(adapter: Adapter) -> None:
    """Add the delta of a LoKr adapter."""
    params = _params(adapter)
    rank, alpha = params["rank"], params["alpha"]
    ranks, alphas = ranks_of(adapter), alphas_of(adapter)
    sites, scrambled = [], []
    modules = list(found_modules(adapter, _NAMES, {"large": None, "large_core": 4}))
    refuse_ignored_padding(adapter, modules)
    for found in modules:
        own = {"rank": by_pattern(found.module, ranks, rank), "alpha": by_pattern(found.module, alphas, alpha)}
        if len(found.row.shape_of("weight")) == 3 and "large" in found.tensors:
            own["order"] = "peft_conv1d"
            scrambled.append(found.fqn)
        tensors = _tensors(adapter, found)
        if tensors is not None:
            sites.append(IncomingSite(found.fqn, tensors, overrides(params, own)))
    if scrambled:
        adapter.remark(
            f"PEFT puts the entries of the product on {shown(scrambled)} in an order that is no Kronecker product's; "
            "it is kept (order: peft_conv1d)"
        )
    adapter.add("lokr", params, sites)


def _params(adapter: Adapter) -> dict[str, Any]:
    params: dict[str, Any] = {"rank": adapter.options.whole("r", 8, 1), "alpha": adapter.options.number("alpha", 8)}
    for name in ("rank_dropout", "module_dropout"):
        if dropout := adapter.options.number(name, 0.0):
            params[name] = dropout
    if adapter.options.flag("rank_dropout_scale", False) and "rank_dropout" in params:
        params["rank_dropout_scale"] = True
    if adapter.options.flag("decompose_both", False):
        params["decompose_both"] = True
    if adapter.options.flag("use_effective_conv2d", False):
        params["tucker"] = True
    if (factor := adapter.options.whole("decompose_factor", -1, -1)) != -1:
        params["factor"] = factor
    if adapter.options.start("init_weights", True, ("lycoris",)) == "lycoris":
        params["init"] = "zero_large"
    return params


def _tensors(adapter: Adapter, found: Found) -> dict[str, Tensor] | None:
    """Return the tensors as they lie here; None, and a finding, where they are of another module."""
    tensors, kernel = dict(found.tensors), found.row.shape_of("weight")[2:]
    if "large_core" in tensors:
        core = tensors["large_core"]
        shape = (*core.shape[:2], *kernel, *(1,) * (2 - len(kernel)))
        if lacks(adapter, found, ("large_up", "large_down")) or misfits(adapter, found, {"large_core": shape}):
            return None
        tensors["large_core"] = core.reshape(*core.shape[:2], *kernel)
        tensors["large_up"] = tensors["large_up"].t()
    elif kernel and "large_down" in tensors:
        down, size = tensors["large_down"], prod(kernel)
        if differs(adapter, found, "a width", down.shape[1] // size * size, down.shape[1]):
            return None
        tensors["large_down"] = down.reshape(down.shape[0], -1, *kernel)
    return tensors


def write(out: Outgoing) -> None:
    """Write a LoKr adapter."""
    single = Single(out, "LOKR", "lokr", ("Linear", "Conv1d", "Conv2d"), biases=False)
    single.keep(lambda part: left_out(ignored_padding(out.base.model.get_submodule(part.fqn))))
    single.keep(_scrambled)
    core = single.agreed("use_effective_conv2d", lambda part: part.params.tucker, False)
    both = single.agreed("decompose_both", lambda part: part.params.decompose_both, False)
    factor = single.agreed("decompose_factor", lambda part: part.params.factor or -1, -1)
    for theirs, ours in _NAMES.items():
        single.put(theirs, partial(_tensor, name=ours))
    single.patterned("r", "rank_pattern", lambda part: part.params.rank, 8)
    single.patterned("alpha", "alpha_pattern", lambda part: part.params.alpha, 8.0)
    single.finish(
        use_effective_conv2d=core, decompose_both=both, decompose_factor=factor,
        rank_dropout=single.largest(lambda part: part.params.rank_dropout),
        rank_dropout_scale=any(part.params.rank_dropout_scale for part in single.parts.values()),
        module_dropout=single.largest(lambda part: part.params.module_dropout),
    )  # fmt: skip


def _scrambled(part: Part) -> str | None:
    """Return that PEFT puts the entries of a full large factor on a Conv1d in an order of its own."""
    full = any(spec.name == "large" for spec in part.at.tensors)
    if full and len(part.at.site.row.shape_of("weight")) == 3 and part.params.order == "kronecker":
        return "PEFT puts the entries of this product in an order that is no Kronecker product's"
    return None


def _tensor(part: Part, name: str) -> Tensor | None:
    names = {spec.name for spec in part.at.tensors}
    if name not in names:
        return None
    value: Tensor = getattr(part.own, name)
    if "large_core" in names and name == "large_up":
        return value.t()
    if name == "large_core":  # PEFT has one of two dimensions of the kernel, also for Conv1d
        return value.reshape(*value.shape, *(1,) * (4 - value.dim()))
    return value.flatten(1) if name == "large_down" else value
