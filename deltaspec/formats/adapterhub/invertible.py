"""AdapterHub's invertible adapters on embeddings (NICE), as two adapters in series.

Read in `modeling.py` of adapters 1.3: of the halves a | b of what enters the first layer, a + F(b) comes first, then
b + G(a + F(b)). Each is an adapter of the whole that reads one half and adds to the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from deltaspec.formats.adapterhub.adapter import Adapter
from deltaspec.formats.incoming import IncomingSite
from deltaspec.formats.options import Options

if TYPE_CHECKING:
    from torch import Tensor

EMBEDDINGS = "embeddings"
"""Domain of its two deltas."""


def read_invertible(adapter: Adapter, options: Options, activation: str, part: str) -> None:
    """Add the two adapters. Configurations of version 1 name invertible adapters where there are none."""
    options.ignore("inv_adapter_reduction_factor")
    kind, found = options.get("inv_adapter"), adapter.modules("invertible_adapters")
    if not found:
        if kind is not None and adapter.whole.get("type") != "text_task":
            adapter.find("DS543", "has no tensors of its invertible adapter", "the file was cut", adapter.file)
        return
    keys = {rest: key for own in found.values() for rest, key in own.items()}
    site = adapter.arrangement.embeddings
    if kind not in (None, "nice") or site is None:
        why = f"AdapterHub itself cannot run it on {adapter.base.table.model_class}"
        adapter.unsupported(f"invertible adapter ({kind})", why, "train it with inv_adapter: nice")
        return
    if kind is None:
        adapter.find("DS543", "has an invertible adapter, and inv_adapter is off", "save it again", adapter.file)
        return
    lead = f"{part}-" if part else ""
    for number, name in enumerate("FG", 1):
        tensors = _half(adapter, keys, name, site)
        if tensors is None:
            return
        params = {"width": len(tensors["down"]), "activation": activation}
        adapter.add("adapter", params, [IncomingSite(site, tensors)], f"{lead}invertible-{number}")
        adapter.domains[adapter.incoming.deltas[-1].name] = EMBEDDINGS
    adapter.remark(
        "its invertible adapter is two adapters in series, whose zeros further training would train: it would not stay "
        "invertible"
    )


def read_inverse(adapter: Adapter, site: str | None, kind: str) -> None:
    """Add its inverse, which flexible heads of language models run on what enters their last layer."""
    if site is None:
        why = f"in AdapterHub its inverse runs before the last layer of the head, which {kind} has no place for"
        adapter.unsupported("invertible adapter", why, "merge it, or train it anew without inv_adapter")
        return
    forward = [d for d in adapter.incoming.deltas if adapter.domains.get(d.name) == EMBEDDINGS]
    for delta in reversed(forward):
        tensors = {own: -value if own.startswith("up") else value for own, value in delta.sites[0].tensors.items()}
        part = delta.name.removeprefix(f"{adapter.name}-").replace("invertible", "inverse")
        adapter.add("adapter", delta.params, [IncomingSite(site, tensors)], part)
        adapter.domains[adapter.incoming.deltas[-1].name] = EMBEDDINGS


def _half(adapter: Adapter, keys: dict[str, str], name: str, site: str) -> dict[str, Tensor] | None:
    """Take one of the two networks, as an adapter of both halves."""
    taken: list[Tensor] = []
    for rest in (f"{name}.0.weight", f"{name}.0.bias", f"{name}.2.weight", f"{name}.2.bias"):
        if rest not in keys:
            adapter.find("DS543", f"has no {rest} of its invertible adapter", "the file was cut", adapter.file)
            return None
        wide = (None,) if rest.endswith("bias") else (None, None)
        value = adapter.take(keys[rest], f"half of an adapter on {site}", wide)
        if value is None:
            return None
        taken.append(value)
    down, down_bias, up, up_bias = taken
    if up.shape[1] != len(down) or len(down_bias) != len(down) or len(up_bias) != len(up):
        message = f"the layers of its invertible network {name} do not fit one another"
        adapter.find("DS526", message, "save the adapter again", adapter.file)
        return None
    seen, changed = down.shape[1], len(up)
    first = name == "F"  # reads the second half and changes the first
    reads, adds = torch.zeros(len(down), changed, dtype=down.dtype), torch.zeros(seen, up.shape[1], dtype=up.dtype)
    still = torch.zeros(seen, dtype=up.dtype)
    return {
        "down": torch.cat([reads, down] if first else [down, reads], 1),
        "down_bias": down_bias,
        "up": torch.cat([up, adds] if first else [adds, up]),
        "up_bias": torch.cat([up_bias, still] if first else [still, up_bias]),
    }
