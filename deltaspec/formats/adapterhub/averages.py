"""An Average of LoRAs: each comes in at its weight, divided by the number of members.

Read in `lora.py` of adapters 1.3, whose mean of outputs is taken of outputs times weights; where one member alone is,
its output is taken times the mean of all weights, and where some but not all are, it fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isclose
from typing import Any

from deltaspec.formats.adapterhub.adapter import Adapter
from deltaspec.formats.incoming import IncomingDelta, IncomingSite
from deltaspec.formats.options import is_number
from deltaspec.formats.unread import Unread
from deltaspec.names.folding import shown

_KIND = "AdapterHub lora"
"""What directories of nothing but LoRAs are."""
_WHY = "takes the mean of outputs, residuals included, and divides by the number of members once more"


def weights_of(unread: Unread, setup: Mapping[str, Any], members: int, file: str) -> list[float]:
    """Return the weights of an Average; those that are not parts of one can be read in two ways."""
    given = setup.get("kwargs") or {}
    weights = given.get("weights", [1 / members] * members) if isinstance(given, dict) else None
    if not isinstance(weights, list) or len(weights) != members or not all(map(is_number, weights)):
        message = f"adapter_setup: the weights of its Average, {str(weights)[:80]}, are not {members} numbers"
        unread.find("DS544", message, "save the setup again", file)
        return [0.0] * members
    if not isclose(sum(weights), 1, rel_tol=1e-5):
        message = (
            f"the weights of its Average sum to {sum(weights):g}: in the model that saved them they acted as they "
        )
        message += "are, and AdapterHub loads them as parts of one"
        unread.find("DS539", message, "write the weights that are meant into the file, as parts of one", file)
    return [float(weight) for weight in weights]


def averaged(
    unread: Unread, adapters: list[Adapter], weights: list[float], suggestion: str, file: str
) -> list[IncomingDelta]:
    """Return the LoRAs of an Average, at strengths; what else its members hold is a finding."""
    found: list[IncomingDelta] = []
    present: dict[str, list[int]] = {}
    others = [adapter.folder.name for adapter in adapters if not _adds(adapter)]
    if others:
        message = f"its setup has an Average of more than plain LoRAs ({', '.join(others)}), which {_WHY}"
        unread.find("DS549", message, suggestion, file)
        return []
    for number, adapter in enumerate(adapters):
        for site in (site for delta in adapter.incoming.deltas for site in delta.sites):
            present.setdefault(site.fqn, []).append(number)
    linears = adapters[0].arrangement.linears
    if failing := [fqn for fqn, own in present.items() if 1 < len(own) < len(adapters) or linears[fqn][0] == "qkv"]:
        message = f"AdapterHub itself cannot run its Average at {shown(failing)}"
        why = ", a fused projection" if linears[failing[0]][0] == "qkv" else ", where some of its members are"
        unread.find("DS549", message + why, suggestion, file)
    if unread.findings:
        return []
    for adapter, weight in zip(adapters, weights, strict=True):
        for delta in adapter.incoming.deltas:
            sites = tuple(_times(s, weight, len(present[s.fqn]) < len(adapters)) for s in delta.sites)
            found.append(replace(delta, sites=sites, strength=(weight or 1.0) / len(adapters)))
    adapters[0].remark(
        "its members are at their weights divided by their number: AdapterHub takes the mean of outputs times weights"
    )
    return found


def _adds(adapter: Adapter) -> bool:
    """Return whether all that an adapter does is to add what does not depend on the others."""
    alike = all(d.method != "ia3" and not d.params.get("use_dora") for d in adapter.incoming.deltas)
    return adapter.incoming.kind == _KIND and alike


def _times(site: IncomingSite, weight: float, alone: bool) -> IncomingSite:
    """Return a site for a strength of the weight; where a member is alone, the sum of all, one, is in its place."""
    factor = (1.0 if alone else weight) / (weight or 1.0)
    return site if factor == 1 else replace(site, tensors={**site.tensors, "up": site.tensors["up"] * factor})
