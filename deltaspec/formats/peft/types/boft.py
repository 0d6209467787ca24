"""BOFT of PEFT: butterfly products of rotations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltaspec.formats.incoming import IncomingSite
from deltaspec.formats.outgoing import Outgoing
from deltaspec.formats.peft.convolutions import ignored_geometry, refuse_ignored_geometry
from deltaspec.formats.peft.single import Single, left_out
from deltaspec.formats.peft.sites import Found, found_modules, lacks, overrides
from deltaspec.names.paths import below

if TYPE_CHECKING:
    from deltaspec.formats.peft.adapter import Adapter

METHODS = frozenset({"boft"})
"""Methods that are written so."""


def read(adapter: Adapter) -> None:
    """Add the delta of a BOFT adapter. The blocks and factors are those of the file.

    PEFT takes one factor where it finds no CUDA, whatever its configuration says, and saves what it took.
    """
    adapter.ignore("fan_in_fan_out", "boft_block_num")
    adapter.options.start("init_weights", True)
    size, factors = adapter.options.whole("boft_block_size", 4), adapter.options.whole("boft_n_butterfly_factor", 1)
    dropout = adapter.options.number("boft_dropout", 0.0)
    modules = [
        found for found in found_modules(adapter, {"boft_R": "rotation", "boft_s": "output_scale"}, {"rotation": 4})
        if not lacks(adapter, found, ("rotation", "output_scale"))
    ]  # fmt: skip
    refuse_ignored_geometry(adapter, modules)
    shapes = [found.tensors["rotation"].shape for found in modules]
    if not modules:
        return
    params: dict[str, Any] = {"block_size": size or shapes[0][-1], "factors": shapes[0][0]}
    if dropout:
        params["block_dropout"] = dropout
    if any(shape[0] != factors for shape in shapes):
        adapter.remark(
            f"boft_n_butterfly_factor is {factors}, and its file has {shapes[0][0]}: PEFT takes one where it finds no "
            "CUDA"
        )
    sites = []
    for found, shape in zip(modules, shapes, strict=True):
        own: dict[str, Any] = {"block_size": shape[-1], "factors": shape[0]}
        if dropout and found.row.kind == "conv":
            own["block_dropout"] = 0.0
            adapter.remark(
                f"boft_dropout {dropout} on {found.fqn} was left out: a convolution's blocks turn its weight"
            )
        tensors = {"rotation": found.tensors["rotation"], "output_scale": found.tensors["output_scale"].flatten()}
        sites.append(IncomingSite(found.fqn, tensors, overrides(params, own)))
    adapter.add("boft", params, sites)
    _biases(adapter, modules)


def _biases(adapter: Adapter, modules: list[Found]) -> None:
    """Add the trained biases of the same modules, as changes of what leaves BOFT: it scales all but the bias."""
    sites = []
    for found in modules:
        keys = (below(found.module, name) for name in ("base_layer.bias", "bias"))
        key = next((key for key in keys if key in adapter.weights), None)
        if key is None or not found.row.has_parameter("bias"):
            continue
        if adapter.base.is_meta:
            message = f"bias of {found.fqn} is read as a change of the base model's, and there are no weights"
            adapter.find("DS542", message, "name the folder of the base model with its weights", adapter.file)
            return
        own = adapter.base.tensor(below(found.fqn, "bias"))
        value = adapter.take(key, f"bias of {found.fqn}, less the base's own", tuple(own.shape))
        if value is not None:
            sites.append(IncomingSite(found.fqn, {"bias": value - own.to("cpu", value.dtype)}))
    adapter.add("bitfit", {}, sites, "shift")


def write(out: Outgoing) -> None:
    """Write a BOFT adapter."""
    single = Single(out, "BOFT", "boft", ("Linear", "Conv2d"))
    single.keep(lambda part: left_out(ignored_geometry(out.base.model.get_submodule(part.fqn))))
    size = single.agreed("boft_block_size", lambda part: part.params.block_size, 4)
    factors = single.agreed("boft_n_butterfly_factor", lambda part: part.params.factors, 1)
    if factors > 1:
        out.remarks.append(f"PEFT reads {factors} butterfly factors only where it finds CUDA; elsewhere it makes one")
    single.put("boft_R", lambda part: part.own.rotation)
    single.put(
        "boft_s",
        lambda part: part.own.output_scale[None] if part.at.site.kind == "conv" else part.own.output_scale[:, None],
    )
    dropout = single.largest(lambda part: part.params.block_dropout)
    single.finish(boft_block_size=size, boft_block_num=0, boft_n_butterfly_factor=factors, boft_dropout=dropout)
