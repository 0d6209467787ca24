"""C3A of PEFT: circulant blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltaspec.formats.incoming import IncomingSite
from deltaspec.formats.outgoing import Outgoing
from deltaspec.formats.peft.single import Single
from deltaspec.formats.peft.sites import differs, found_modules, overrides
from deltaspec.formats.peft.targets import BELOW_ANY, by_pattern_below

if TYPE_CHECKING:
    from deltaspec.formats.peft.adapter import Adapter

METHODS = frozenset({"c3a"})
"""Methods that are written so."""
_STARTS = {True: "zeros", "gaussian": "normal", "kaiming_uniform": "kaiming_uniform"}
_WORDS = ("gaussian", "kaiming_uniform", "xavier_uniform")


def read(adapter: Adapter) -> None:
    """Add the delta of a C3A adapter."""
    size, sizes = (
        adapter.options.whole("block_size", 256, 1),
        adapter.options.wholes("block_size_pattern", BELOW_ANY, 1),
    )
    params: dict[str, Any] = {"block_size": size}
    if (start := adapter.options.start("init_weights", False, _WORDS)) in _STARTS:
        params["init"] = _STARTS[start]
    sites = []
    for found in found_modules(adapter, {"c3a_kernel": "kernels"}, {"kernels": 3}):
        own = {"block_size": by_pattern_below(found.module, sizes, size)}
        if differs(adapter, found, "block_size", own["block_size"], found.tensors["kernels"].shape[-1]):
            continue
        sites.append(IncomingSite(found.fqn, found.tensors, overrides(params, own)))
    if sites:
        adapter.remark(
            "PEFT's own backward of C3A is not the gradient of its formula: outputs are equal, and further training "
            "follows the formula here"
        )
    adapter.add("c3a", params, sites)


def write(out: Outgoing) -> None:
    """Write a C3A adapter."""
    single = Single(out, "C3A", "c3a", ("Linear",))
    single.put("c3a_kernel", lambda part: part.own.kernels)
    single.patterned("block_size", "block_size_pattern", lambda part: part.params.block_size, 256, below=True)
    single.finish()
