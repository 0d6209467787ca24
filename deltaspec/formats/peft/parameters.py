"""LoRA of PEFT on parameters: `target_parameters`, and the packed projections of `nn.MultiheadAttention`.

Read in `ParamWrapper`, `MultiheadAttention` and `_inject_parameters` of PEFT 0.21. A module whose parameters are
targeted is wrapped once for each, in the order in which it registered them, so the last one has the plain name:
`experts.lora_A` is the second parameter's, and `experts.base_layer.lora_A` the first one's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltaspec.backbone.table import Row
from deltaspec.diagnostics.wording import counted
from deltaspec.formats.peft.saved_modules import rows_there
from deltaspec.names.folding import shown
from deltaspec.names.paths import below

if TYPE_CHECKING:
    from torch import Tensor

    from deltaspec.formats.peft.adapter import Adapter

_WRAPPED = ".base_layer"
_PACKED = "MultiheadAttention"


@dataclass(frozen=True, slots=True)
class Place:
    """What one pair of factors changes."""

    fqn: str
    name: str
    """What PEFT matches its patterns with."""
    parameter: str | None = None
    """Own name of the parameter, where the module's own weight is not what is meant."""
    doubled: bool = False
    """PEFT adds the update twice."""
    bypassed: bool = False
    """PEFT changes the weight, and drops nothing."""
    idle: bool = False
    """PEFT's layer is there, and is never called."""


def places_of(adapter: Adapter, places: Mapping[str, str]) -> dict[str, Place]:
    """Return what each module that has keys, with its FQN here, stands for; what stands for nothing is a finding."""
    targets = adapter.options.listed("target_parameters")
    adapter.options.settle()
    found = {module: Place(fqn, module) for module, fqn in places.items()}
    rows = adapter.base.rows
    for module, fqn in places.items():
        if _PACKED in rows[fqn].bases and not targets:
            found[module] = Place(fqn, module, "in_proj_weight", bypassed=True)
        elif module.endswith(f"{_WRAPPED}.out_proj") and _PACKED in rows[fqn.rpartition(".")[0]].bases:
            owner = module.removesuffix(f"{_WRAPPED}.out_proj")
            found[module] = Place(fqn, owner, doubled=True, bypassed=True)
        elif not targets and fqn.rpartition(".")[2] == "out_proj" and _PACKED in rows[fqn.rpartition(".")[0]].bases:
            found[module] = Place(fqn, module, idle=True)
    if targets:
        found |= _by_parameter(adapter, places, targets)
    return found


def _by_parameter(adapter: Adapter, places: Mapping[str, str], targets: Iterable[str]) -> dict[str, Place]:
    wrappers: dict[str, list[str]] = {}
    for module in places:
        plain = module
        while plain.endswith(_WRAPPED):
            plain = plain.removesuffix(_WRAPPED)
        wrappers.setdefault(plain, []).append(module)
    found = {}
    for plain, modules in wrappers.items():
        row = adapter.base.rows[places[modules[0]]]
        meant = [p for p in row.parameters if _is_meant(below(plain, p.name), targets)]
        if meant and len(meant) != len(modules):
            message = f"has {counted(len(modules), 'pair')} of factors for {plain}, and target_parameters means "
            message += counted(len(meant), "parameter") + f" of it: {', '.join(p.name for p in meant)}"
            adapter.find("DS543", message, "the file and the configuration are of two adapters", adapter.file)
            continue
        for parameter, module in zip(meant, sorted(modules, key=len, reverse=True), strict=False):
            layer = row.kind in ("linear", "conv1d", "embedding") and parameter.name == "weight"
            name = below(plain, parameter.name)
            found[module] = Place(row.fqn, name, None if layer else parameter.name, bypassed=True)
    held = {place.name for place in found.values()}
    named = (below(name, p.name) for row, name in rows_there(adapter) if name for p in row.parameters)
    lost = [name for name in named if _is_meant(name, targets) and name not in held]
    if lost and not adapter.findings:
        message = f"has no factors for {shown(lost)}, which target_parameters means"
        adapter.find("DS543", message, "the file was cut: save the adapter again", adapter.file)
    return found


def _is_meant(name: str, targets: Iterable[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def matrices_of(row: Row, place: Place) -> int:
    """Return how many matrices a place stacks: each has factors of the rank."""
    shape = row.shape_of(place.parameter) if place.parameter else ()
    return shape[0] if len(shape) == 3 else 1


def factors(adapter: Adapter, place: Place, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `down` and `up` as this site has them, of the pair by which PEFT changes a parameter as it is stored."""
    row = adapter.base.rows[place.fqn]
    name = place.parameter or "weight"
    shape = row.shape_of(name)
    down, up = tensors["down"], tensors["up"]
    turned = row.kind in ("conv1d", "embedding")
    if len(shape) == 3 and up.shape[1] % shape[0]:
        message = f"{place.name}: its up is of shape {list(up.shape)}, for {shape[0]} experts"
        adapter.find("DS543", message, "the file was changed, or is for another model", adapter.file)
    elif len(shape) == 3:
        experts = shape[0]
        down = down.reshape(experts, -1, down.shape[-1])
        up = up.reshape(up.shape[0], -1, experts).permute(2, 0, 1)
        # Its layout is PEFT's own guess; with one expert it adds B A as it is.
        theirs = experts > 1 and getattr(adapter.base.model.get_submodule(place.fqn), "is_transposed", False)
        turned = row.transposed != bool(theirs)
    if turned:  # B A is the stored parameter's, and here of its transpose
        down, up = up.transpose(-2, -1), down.transpose(-2, -1)
    return {**tensors, "down": down.contiguous(), "up": up.contiguous()}
