"""OpenDelta's adapter: h + U act(D h + b) + b' on what leaves a module."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltaspec.formats.incoming import IncomingSite
from deltaspec.formats.opendelta.saved import Saved
from deltaspec.formats.options import Options

if TYPE_CHECKING:
    from torch import Tensor

INFIXES = ("adapter",)
NEEDS = "its non_linearity"


def read(saved: Saved, options: Options, part: str) -> None:
    """Add the delta."""
    width = options.whole("bottleneck_dim", 24, least=1)
    params = {"width": width, "activation": saved.activation(options)}
    options.settle()
    sites = []
    for module, fqn in saved.sites("adapter", options).items():
        tensors = bottleneck(saved, f"{module}.adapter.modulelist", fqn, width)
        if tensors:
            sites.append(IncomingSite(fqn, tensors))
    saved.add("adapter", params, sites, part)


def bottleneck(saved: Saved, lead: str, fqn: str, width: int) -> dict[str, Tensor]:
    """Take the tensors of one bottleneck; nothing where one is missing."""
    taken = {
        "down": saved.need(f"{lead}.down_proj.weight", f"down of {fqn}", (width, None)),
        "down_bias": saved.need(f"{lead}.down_proj.bias", f"down_bias of {fqn}", (width,)),
        "up": saved.need(f"{lead}.up_proj.weight", f"up of {fqn}", (None, width)),
        "up_bias": saved.need(f"{lead}.up_proj.bias", f"up_bias of {fqn}", (None,)),
    }
    found = {name: value for name, value in taken.items() if value is not None}
    return found if len(found) == len(taken) else {}
