"""Groups of an optimizer: the parameters of deltas, with what the hints of their specs say of each (`train:`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from deltaspec.deltas.modules import Delta, attribute_name, storage_key
from deltaspec.methods.registry import methods
from deltaspec.names.escaping import dotted
from deltaspec.planning.planned import PlannedDelta

_COMPUTED = "parametrizations."
"""How the names of parameters begin that torch's parametrizations compute a tensor from."""
_PRUNED = "_orig"


def own_parameters(delta: Delta) -> dict[str, nn.Parameter]:
    """Return a delta's parameters as they are now, by storage key: what torch computes one from under its key, too."""
    found = {}
    for name, parameter in delta.named_parameters():
        attribute, _, rest = name.removeprefix(_COMPUTED).partition(".")
        key = dotted(attribute if name.startswith(_COMPUTED) else name.removesuffix(_PRUNED))
        found[f"{key} ({rest})" if rest else key] = parameter
    return found


def parameter_groups(planned: PlannedDelta, delta: Delta) -> Iterator[dict[str, Any]]:
    """Yield the groups of one delta: one, or with `lr_ratio` one for each factor (LoRA+, arXiv:2402.12354).

    None where no parameter of it requires gradients.
    """
    hints = {} if planned.train is None else planned.train.to_data()
    ratio, faster = hints.pop("lr_ratio", None), set[str]()
    hints.pop("seed", None)  # that of its data
    if ratio is not None:
        begins = methods()[planned.method].faster
        specs = ((site.fqn, spec) for site in planned.sites for spec in site.tensors if spec.name.startswith(begins))
        faster = {dotted(attribute_name(storage_key(fqn, spec))) for fqn, spec in specs}
    parameters = {key: p for key, p in own_parameters(delta).items() if p.requires_grad}
    second = [p for key, p in parameters.items() if key.partition(" ")[0] in faster]
    first = [p for key, p in parameters.items() if key.partition(" ")[0] not in faster]
    yield from _group(planned.name, "A" if ratio else "", first, hints)
    yield from _group(planned.name, "B", second, hints | ({"lr": hints["lr"] * ratio} if ratio else {}))


def _group(
    delta: str, factor: str, parameters: list[nn.Parameter], hints: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    if parameters:
        yield {"params": parameters, "name": f"{delta} {factor}".rstrip(), "delta": delta, **hints}
