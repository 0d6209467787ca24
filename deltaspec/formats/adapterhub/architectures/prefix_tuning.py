"""AdapterHub's prefix tuning: keys and values in front, flat or computed by a small network."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from deltaspec.formats.adapterhub.adapter import Adapter
from deltaspec.formats.incoming import IncomingSite
from deltaspec.formats.options import Options
from deltaspec.methods.shared.activations import Activation, activate

if TYPE_CHECKING:
    from torch import Tensor

_POOL = "pool"


def read(adapter: Adapter, options: Options, part: str) -> None:
    """Add the delta."""
    options.ignore("flat", "bottleneck_size", "dropout", "shared_gating")
    options.refuse("use_gating", "a gate that depends on the input scales the prefix", "train it without")
    tokens = options.whole("prefix_length", 30, least=1)
    activation = adapter.activation(options, "tanh")
    out = adapter.left_out(options)
    switches = {"encoder": options.flag("encoder_prefix", True), "cross": options.flag("cross_prefix", True)}
    options.settle()
    kind = adapter.base.table.model_type
    if kind in ("t5", "mt5"):
        why = f"they shift the relative positions of {kind} by their number, and ours have none"
        adapter.unsupported("prefixes", why, "use lora or bottlenecks there")
    if gates := adapter.modules("prefix_gates"):
        if not options.get("use_gating"):
            adapter.find("DS543", "has gates, and use_gating is off", "save the adapter again", adapter.file)
        for keys in gates.values():
            for key in keys.values():
                adapter.take(key, "refused")
    by_name: dict[str, list[str]] = {}
    for fqn, (name, layer) in adapter.arrangement.attentions.items():
        if layer not in out and switches.get(name, True):
            by_name.setdefault(f"{name}_prefix", []).append(fqn)
    tensors = _once(adapter)
    if adapter.findings:
        return
    own = {rest.partition(".")[0] for rest in tensors}
    adapter.compare(own, by_name.keys(), "prefixes")
    if adapter.findings:
        return
    sites = []
    for name, attentions in by_name.items():
        mine = {rest.partition(".")[2]: value for rest, value in tensors.items() if rest.startswith(f"{name}.")}
        rows = _rows(adapter, name, mine, tokens, len(attentions), activation)
        if rows is not None:
            pairs = zip(attentions, rows.unbind(1)[::2], rows.unbind(1)[1::2], strict=True)
            sites += [IncomingSite(f, {"key": k.contiguous(), "value": v.contiguous()}) for f, k, v in pairs]
    adapter.add("prefix", {"tokens": tokens}, sites, part)
    adapter.remark("its prefixes act as under eager attention, where AdapterHub computes them right")


def _once(adapter: Adapter) -> dict[str, Tensor]:
    """Take the tensors of the model's own pool; each layer's copies must have the same values."""
    found: dict[str, Tensor] = {}
    pools = adapter.modules("prefix_tunings")
    for module in sorted(pools, key=lambda module: module.rpartition(".")[2] == _POOL):
        for rest, key in pools[module].items():
            dims = adapter.weights[key].dim()
            value = adapter.take(key, f"keys and values in front ({rest.partition('.')[0]})", (None,) * dims)
            if value is None:
                continue
            if rest not in found:
                found[rest] = value
            elif not torch.equal(found[rest], value):
                message = f"{key} differs from the same tensor elsewhere in the file"
                adapter.find("DS543", message, "save the adapter again", adapter.file)
            else:
                adapter.incoming.account[key] = "the same tensor once more"
    return found


def _rows(
    adapter: Adapter, name: str, tensors: dict[str, Tensor], tokens: int, count: int, activation: Activation
) -> Tensor | None:
    """Return keys and values by turns, `[tokens, 2 · layers, heads · width]`; None where the tensors give none."""
    if tensors.keys() == {"control_trans"}:  # which `flat` need not say: ejected ones are so as well
        numbers = tensors["control_trans"].reshape(-1)
    elif tensors.keys() == {"wte.weight", *(f"control_trans.{n}.{t}" for n in "02" for t in ("weight", "bias"))}:
        wte, inner, outer = (tensors[f"{n}.weight"] for n in ("wte", "control_trans.0", "control_trans.2"))
        biases = [tensors[f"control_trans.{n}.bias"] for n in "02"]
        fits = wte.dim() == inner.dim() == outer.dim() == 2 and inner.shape[1] == wte.shape[1]
        fits = fits and all(b.shape == weight.shape[:1] for b, weight in zip(biases, (inner, outer), strict=True))
        if not fits or len(wte) != tokens or outer.shape[1] != len(inner):
            message = f"the layers of {name} do not fit one another, or the {tokens} rows of prefix_length"
            adapter.find("DS526", message, "the file and the configuration are of two adapters", adapter.file)
            return None
        hidden = F.linear(wte, inner, biases[0])
        numbers = F.linear(activate(activation, hidden), outer, biases[1]).reshape(-1)
        adapter.remark("its network is multiplied out: what is trained further are the keys and values themselves")
    else:
        message = (
            f"{name} has {', '.join(sorted(tensors)) or 'no tensors'}, which is neither a flat prefix nor a network"
        )
        adapter.find("DS543", message, "the file was cut: save the adapter again", adapter.file)
        return None
    if numbers.numel() % (tokens * 2 * count):
        message = f"{name} has {numbers.numel()} numbers, which {count} layers cannot share in {tokens} keys and values"
        adapter.find("DS526", message, "it is for a model with another number of layers", adapter.file)
        return None
    return numbers.reshape(tokens, 2 * count, -1)
