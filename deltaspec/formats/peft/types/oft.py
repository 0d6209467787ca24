"""OFT of PEFT: rotations of blocks of the input, constrained or not."""

from __future__ import annotations

from math import isqrt
from typing import TYPE_CHECKING, Any

from deltaspec.formats.incoming import IncomingSite
from deltaspec.formats.outgoing import Outgoing, Part
from deltaspec.formats.peft.adapter import CONFIG
from deltaspec.formats.peft.single import Single
from deltaspec.formats.peft.sites import found_modules, overrides
from deltaspec.names.folding import shown

if TYPE_CHECKING:
    from deltaspec.formats.peft.adapter import Adapter

METHODS = frozenset({"oft"})
"""Methods that are written so."""
_NAMES = {"oft_R.weight": "rotation", "oft_embedding_R.weight": "rotation"}


def read(adapter: Adapter) -> None:
    """Add the delta of an OFT adapter. The width of the blocks is that of the file: PEFT moves it to what divides."""
    adapter.ignore("fan_in_fan_out", "r")
    adapter.options.start("init_weights", True)
    adapter.options.whole("oft_block_size", 32)
    params = _params(adapter)
    modules = found_modules(adapter, _NAMES)
    if not modules:
        return
    sizes = [(1 + isqrt(1 + 8 * found.tensors["rotation"].shape[-1])) // 2 for found in modules]
    params["block_size"] = sizes[0]
    sites = []
    for found, size in zip(modules, sizes, strict=True):
        own: dict[str, Any] = {"block_size": size}
        if found.row.kind == "conv":
            own["patches"] = list(found.row.shape_of("weight")[2:])
        sites.append(IncomingSite(found.fqn, found.tensors, overrides(params, own)))
    if turned := [found.fqn for found in modules if found.row.kind == "conv"]:
        adapter.remark(
            f"PEFT turns patches of what enters {shown(turned)} and adds them up in an order that is not that of their "
            "places, which its own merging does not: here it is as in its forward (patches), and cannot be merged"
        )
    adapter.add("oft", params, sites)


def _params(adapter: Adapter) -> dict[str, Any]:
    params: dict[str, Any] = {}
    if adapter.options.flag("block_share", False):
        params["shared_blocks"] = True
    eps = adapter.options.number("eps", 6e-5)
    if adapter.options.flag("coft", False):
        params["constraint"] = eps
    terms = adapter.options.whole("num_cayley_neumann_terms", 5)
    if not adapter.options.flag("use_cayley_neumann", True):
        params["transform"] = "cayley"
    elif terms < 2:
        message = f"num_cayley_neumann_terms: {terms} turns nothing"
        adapter.find("DS544", message, "train it again with 5 terms", CONFIG)
    else:
        params["terms"] = 4 if terms == 3 else terms  # PEFT's series has the same four at three
    if dropout := adapter.options.number("module_dropout", 0.0):
        adapter.remark(f"module_dropout {dropout} was left out: PEFT makes it for OFT and never calls it")
    return params


def write(out: Outgoing) -> None:
    """Write an OFT adapter."""
    single = Single(out, "OFT", "oft", ("Linear", "Conv2d", "Embedding"))
    single.keep(lambda part: "PEFT's series of three terms has four" if _terms(part) == 3 else None)
    single.keep(_whole_kernel)
    size = single.agreed("oft_block_size", lambda part: part.params.block_size, 32)
    shared = single.agreed("block_share", lambda part: part.params.shared_blocks, False)
    series = single.agreed("use_cayley_neumann", lambda part: part.params.transform == "cayley_neumann", True)
    terms = single.agreed("num_cayley_neumann_terms", _terms, 5)
    bound = single.agreed("eps", lambda part: part.params.constraint, None)
    single.put("oft_R.weight", lambda part: None if part.at.site.kind == "embedding" else part.own.rotation)
    single.put("oft_embedding_R.weight", lambda part: part.own.rotation if part.at.site.kind == "embedding" else None)
    if any(part.params.block_dropout for part in single.parts.values()):
        out.remarks.append("block_dropout was left out: PEFT has none in OFT")
    single.finish(
        r=0, oft_block_size=size, block_share=shared, use_cayley_neumann=series, num_cayley_neumann_terms=terms,
        coft=bound is not None, **({} if bound is None else {"eps": bound}),
    )  # fmt: skip


def _whole_kernel(part: Part) -> str | None:
    """Return why PEFT's layer around a convolution computes something else: it turns patches of what enters."""
    row = part.at.site.row
    if row.kind != "conv" or tuple(part.params.patches or ()) == row.shape_of("weight")[2:]:
        return None
    kernel = "x".join(map(str, row.shape_of("weight")[2:]))
    return (
        f"PEFT's OFT turns {kernel} patches of what enters, in an order of its own (patches), and this one the weight"
    )


def _terms(part: Part) -> int:
    return int(part.params.terms) if part.params.transform == "cayley_neumann" else 5
