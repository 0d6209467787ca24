"""LoHa of PEFT: Hadamard products of two low-rank updates, around a core on convolutions if so wanted."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from deltaspec.formats.incoming import IncomingSite
from deltaspec.formats.outgoing import Outgoing, Part
from deltaspec.formats.peft.convolutions import ignored_padding, refuse_ignored_padding
from deltaspec.formats.peft.single import Single, left_out
from deltaspec.formats.peft.sites import Found, found_modules, lacks, misfits, overrides
from deltaspec.formats.peft.targets import alphas_of, by_pattern, ranks_of

if TYPE_CHECKING:
    from torch import Tensor

    from deltaspec.formats.peft.adapter import Adapter

METHODS = frozenset({"loha"})
"""Methods that are written so."""
_NAMES = {"hada_w1_a": "up_1", "hada_w1_b": "down_1", "hada_w2_a": "up_2", "hada_w2_b": "down_2", "hada_t1": "core_1",
          "hada_t2": "core_2"}  # fmt: skip


def read(adapter: Adapter) -> None:
    """Add the delta of a LoHa adapter."""
    adapter.options.start("init_weights", True)
    rank, alpha = adapter.options.whole("r", 8, 1), adapter.options.number("alpha", 8)
    ranks, alphas = ranks_of(adapter), alphas_of(adapter)
    params: dict[str, Any] = {"rank": rank, "alpha": alpha}
    for name in ("rank_dropout", "module_dropout"):
        if dropout := adapter.options.number(name, 0.0):
            params[name] = dropout
    if adapter.options.flag("use_effective_conv2d", False):
        params["tucker"] = True
    sites = []
    modules = list(found_modules(adapter, _NAMES, {"core_1": 4, "core_2": 4}))
    refuse_ignored_padding(adapter, modules)
    for found in modules:
        if lacks(adapter, found, ("up_1", "down_1", "up_2", "down_2")):
            continue
        own = {"rank": by_pattern(found.module, ranks, rank), "alpha": by_pattern(found.module, alphas, alpha)}
        tensors = _tensors(adapter, found, own["rank"])
        if tensors is not None:
            sites.append(IncomingSite(found.fqn, tensors, overrides(params, own)))
    if any("core_1" in site.tensors for site in sites):
        adapter.remark(
            "PEFT's own backward of LoHa with a core is not the gradient of its formula: outputs are equal, and "
            "further training follows the formula here"
        )
    adapter.add("loha", params, sites)


def _tensors(adapter: Adapter, found: Found, rank: int) -> dict[str, Tensor] | None:
    """Return the tensors as they lie here; None, and a finding, where they are of another rank or module."""
    (out, *inner), tensors = found.row.shape_of("weight"), dict(found.tensors)
    if found.row.kind == "conv1d":
        out, inner = inner[0], [out]
    kernel = inner[1:]
    core = "core_1" in tensors or "core_2" in tensors
    if core and lacks(adapter, found, ("core_1", "core_2")):
        return None
    shapes: dict[str, tuple[int, ...]]
    shapes = {"up": (rank, out) if core else (out, rank), "down": (rank, inner[0]) if core else (rank, prod(inner))}
    if core:
        shapes["core"] = (rank, rank, *kernel, *(1,) * (2 - len(kernel)))
    if misfits(adapter, found, {f"{name}_{i}": shape for name, shape in shapes.items() for i in (1, 2)}):
        return None
    for index in (1, 2):
        up, down = f"up_{index}", f"down_{index}"
        if core:
            tensors[up] = tensors[up].t()
            tensors[f"core_{index}"] = tensors[f"core_{index}"].reshape(rank, rank, *kernel)
        elif kernel:
            tensors[down] = tensors[down].reshape(rank, inner[0], *kernel)
    return tensors


def write(out: Outgoing) -> None:
    """Write a LoHa adapter."""
    single = Single(out, "LOHA", "loha", ("Linear", "Conv1d", "Conv2d"), biases=False)
    single.keep(lambda part: left_out(ignored_padding(out.base.model.get_submodule(part.fqn))))
    core = single.agreed("use_effective_conv2d", lambda part: part.params.tucker, False)
    for theirs, ours in _NAMES.items():
        single.put(theirs, partial(_tensor, name=ours))
    single.patterned("r", "rank_pattern", lambda part: part.params.rank, 8)
    single.patterned("alpha", "alpha_pattern", lambda part: part.params.alpha, 8.0)
    single.finish(
        use_effective_conv2d=core,
        rank_dropout=single.largest(lambda part: part.params.rank_dropout),
        module_dropout=single.largest(lambda part: part.params.module_dropout),
    )


def _tensor(part: Part, name: str) -> Tensor | None:
    names = {spec.name for spec in part.at.tensors}
    if name not in names:
        return None
    value: Tensor = getattr(part.own, name)
    if "core_1" in names:
        if name.startswith("core"):  # PEFT has one of two dimensions of the kernel, also for Conv1d
            return value.reshape(*value.shape, *(1,) * (4 - value.dim()))
        return value.t() if name.startswith("up") else value
    return value.flatten(1)
