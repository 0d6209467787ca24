"""AdapterHub's LoRA family: LoRA, DoRA, VeRA and (IA)³.

Read in `lora.py` of adapters 1.3: a fused projection has a pair of factors for each of q, k and v that is enabled,
always in this order; DoRA's norm is of W + BA without alpha / r, and it scales the bias, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch

from deltaspec.formats.adapterhub.adapter import CONFIG, Adapter
from deltaspec.formats.incoming import IncomingSite
from deltaspec.formats.options import Options
from deltaspec.methods.shared.parts import whole

if TYPE_CHECKING:
    from torch import Tensor

_FUSED = ("q", "k", "v")


def read(adapter: Adapter, options: Options, part: str) -> None:
    """Add the delta, or the two that a DoRA comes to."""
    gated = options.flag("use_gating", False)
    enabled = options.items("attn_matrices", ["q", "v"], str)
    chosen = enabled if options.flag("selfattn_lora", True) else []
    wanted = set(chosen) | ({"qkv"} if set(chosen) & set(_FUSED) else set())
    wanted |= {name for name in ("intermediate", "output") if options.flag(f"{name}_lora", False)}
    out = adapter.left_out(options)
    said = _said(adapter, options)
    options.settle()
    linears = adapter.arrangement.linears
    meant = [fqn for fqn, (name, layer) in linears.items() if name in wanted and layer not in out]
    modules = adapter.modules("loras")
    places = adapter.places(modules)
    if set(places.values()) <= linears.keys():
        adapter.compare(set(places.values()), meant, "factors")
    else:
        adapter.find("DS543", "is on modules that AdapterHub never puts it on", "save it again", adapter.file)
    if adapter.findings:
        return
    parts = [name for name in _FUSED if name in chosen]
    fused = {fqn: parts for fqn, (name, _) in linears.items() if name == "qkv"}
    if gated and (said.scales or said.dora or any(fqn in places.values() for fqn in fused)):
        why = "a gate that the input opens has a counterpart for LoRA on one projection alone"
        adapter.unsupported("use_gating", why, "train it without")
        return
    if said.scales:
        _scales(adapter, said.alpha, part, places, fused)
    else:
        _updates(adapter, said, part, places, fused, gated)


class _Said(NamedTuple):
    """What a configuration says of the factors."""

    scales: bool
    """Whether they multiply, as in (IA)³."""
    alpha: float
    rank: int = 1
    dropout: float = 0.0
    dora: bool = False
    vera: bool = False


def _said(adapter: Adapter, options: Options) -> _Said:
    mode = options.text("composition_mode", "add")
    if mode not in ("add", "scale"):
        adapter.find("DS544", f"composition_mode: {mode!r} is neither add nor scale", "save the adapter again", CONFIG)
    if mode == "scale":
        options.ignore("r", "dropout", "use_dora", "vera_d", "vera_b")
        return _Said(True, options.number("alpha", 1.0))
    vera = any(isinstance(options.get(name), float) for name in ("vera_d", "vera_b"))
    rank, alpha = options.whole("r", 8, least=1), options.number("alpha", 8.0)
    return _Said(False, alpha, rank, options.number("dropout", 0.0), options.flag("use_dora", False), vera)


def _scales(adapter: Adapter, alpha: float, part: str, places: dict[str, str], fused: dict[str, list[str]]) -> None:
    """Add (IA)³: y = (Wx + b) · l · alpha, where l is one for what is not enabled."""
    keys = adapter.modules("loras")
    sites = []
    for module, fqn in places.items():
        row = adapter.base.rows[fqn]
        names = fused.get(fqn)
        wide = row.out_features if names is None or row.parts is None else sum(map(row.parts.rows, names))
        became = f"scale of {fqn}" + (f", times {alpha:g}" if alpha != 1 else "")
        scale = adapter.need(f"{_lead(keys[module])}lora_B", became, (wide, 1))
        if scale is None:
            continue
        vector = scale[:, 0] * alpha
        if names is None or alpha == 1:
            params = {} if names is None else {"parts": names}
        else:  # what has no scale is multiplied by alpha, too
            params, vector = {}, whole(vector, row.parts, tuple(names), alpha)
        sites.append(IncomingSite(fqn, {"scale_out": vector}, params))
    adapter.add("ia3", {"position": "after"}, sites, part)


def _updates(
    adapter: Adapter, said: _Said, part: str, places: dict[str, str], fused: dict[str, list[str]], gated: bool
) -> None:
    """Add LoRA: y = Wx + b + alpha / r · BAx; VeRA's four factors are two here."""
    _, alpha, rank, dropout, dora, vera = said
    keys = adapter.modules("loras")
    shared = _shared(adapter, rank) if vera else None
    if vera and shared is None:
        adapter.lost("VeRA", "has no shared_parameters (lora_A and lora_B, drawn at random once): AdapterHub saves "
                     "them for some models only")  # fmt: skip
        return
    sites: list[IncomingSite] = []
    magnitudes: dict[str, Tensor] = {}
    for module, fqn in places.items():
        lead, names = _lead(keys[module]), fused.get(fqn)
        pair = _vera(adapter, lead, fqn, rank, shared) if shared else _pair(adapter, lead, fqn, rank, names)
        if pair is None:
            continue
        down, up = pair
        if dora:
            m = adapter.need(f"{lead}m.weight", f"magnitude of {fqn}", (up.shape[0], 1))
            if m is not None:
                magnitudes[fqn] = m[:, 0]
        if gated:
            sites += _gated(adapter, lead, fqn, down, up)
            continue
        if alpha <= 0:  # which no spec can say
            up = up * (alpha / rank)
        sites.append(_site(adapter, fqn, down, up, names, rank))
    if gated:
        adapter.remark("its gate is in the place of alpha / r: it is a parallel_adapter without activation, whose "
                       "biases are zero and would train")  # fmt: skip
        plain = {"width": rank, "activation": "identity", "scale": 1.0, "gate": True}
        adapter.add("parallel_adapter", plain | ({"dropout": dropout} if dropout else {}), sites, part)
        return
    params = {"rank": rank, "alpha": alpha if alpha > 0 else float(rank)} | ({"dropout": dropout} if dropout else {})
    if alpha <= 0:
        adapter.remark(f"its scale {alpha:g} / {rank} is in its factors up: no spec has one that is not positive")
    if shared:
        adapter.remark("its four factors are multiplied to two, all of which train further: the random ones as well")
    if magnitudes:
        _decomposed(adapter, params, part, sites, magnitudes)
    else:
        adapter.add("lora", params, sites, part)


def _lead(keys: dict[str, str]) -> str:
    """Return what is before a module's own names."""
    rest, key = next(iter(keys.items()))
    return key.removesuffix(rest)


def _pair(adapter: Adapter, lead: str, fqn: str, rank: int, names: list[str] | None) -> tuple[Tensor, Tensor] | None:
    rows = rank * (1 if names is None else len(names))
    down = adapter.need(f"{lead}lora_A", f"down of {fqn}", (rows, None))
    up = adapter.need(f"{lead}lora_B", f"up of {fqn}", (None, rank))
    return None if down is None or up is None else (down, up)


def _gated(adapter: Adapter, lead: str, fqn: str, down: Tensor, up: Tensor) -> list[IncomingSite]:
    """Return the site of a pair with a gate: nothing where it has none, which is a finding."""
    gate = adapter.need(f"{lead}gate.weight", f"gate of {fqn}", (1, down.shape[1]))
    bias = adapter.need(f"{lead}gate.bias", f"gate_bias of {fqn}", (1,))
    if gate is None or bias is None:
        return []
    zeros = {"down_bias": down.new_zeros(len(down)), "up_bias": up.new_zeros(len(up))}
    return [IncomingSite(fqn, {"down": down, "up": up, **zeros, "gate": gate, "gate_bias": bias})]


def _site(adapter: Adapter, fqn: str, down: Tensor, up: Tensor, names: list[str] | None, rank: int) -> IncomingSite:
    parts = adapter.base.rows[fqn].parts
    if names is None or parts is None:
        return IncomingSite(fqn, {"down": down, "up": up})
    tensors: dict[str, Tensor] = {}
    for index, (name, own) in enumerate(zip(names, torch.split(up, [parts.rows(n) for n in names]), strict=True)):
        tensors |= {
            f"{name}_down": down[index * rank : (index + 1) * rank].contiguous(),
            f"{name}_up": own.contiguous(),
        }
    return IncomingSite(fqn, tensors, {"parts": names})


def _shared(adapter: Adapter, rank: int) -> tuple[Tensor, Tensor] | None:
    found = next(iter(adapter.modules("shared_parameters").values()), None)
    if found is None or not {"lora_A", "lora_B"} <= found.keys():
        return None
    down = adapter.take(found["lora_A"], "multiplied into down", (rank, None))
    up = adapter.take(found["lora_B"], "multiplied into up", (None, rank))
    return None if down is None or up is None else (down, up)


def _vera(
    adapter: Adapter, lead: str, fqn: str, rank: int, shared: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor] | None:
    """Return VeRA's factors: A times the matrix D, and B times the matrix in front of it."""
    down, up = shared
    d = adapter.need(f"{lead}vera_D", f"down of {fqn}, times lora_A", (rank, rank))
    b = adapter.need(f"{lead}vera_B", f"up of {fqn}, times lora_B", (up.shape[0], up.shape[0]))
    return None if d is None or b is None else (d @ down, b @ up)


def _decomposed(
    adapter: Adapter, params: Mapping[str, float], part: str, sites: list[IncomingSite], magnitudes: dict[str, Tensor]
) -> None:
    """Add a DoRA: as ours where the two agree, else as LoRA and a scale of what leaves, m / ‖W + BA‖."""
    rows = adapter.base.rows
    if params["alpha"] == params["rank"] and not any(rows[site.fqn].has_parameter("bias") for site in sites):
        whole_sites = [IncomingSite(s.fqn, {**s.tensors, "magnitude": magnitudes[s.fqn]}, s.params) for s in sites]
        adapter.add("lora", {**params, "use_dora": True}, whole_sites, part)
        return
    if adapter.base.is_meta or any(rows[site.fqn].packed for site in sites):
        message = "its magnitudes are divided by norms of the base model's weights, and there are none to read"
        adapter.find("DS542", message, "load the base model with its weights, as they were when it was trained")
        return
    scales = []
    for site in sites:
        weight = adapter.base.tensor(f"{site.fqn}.weight").cpu().float()
        update = site.tensors["up"].float() @ site.tensors["down"].float()
        norms = torch.linalg.norm(weight + update, dim=1)
        scales.append(IncomingSite(site.fqn, {"scale_out": magnitudes[site.fqn] / norms}))
    adapter.add("lora", params, sites, part)
    adapter.add("ia3", {"position": "after"}, scales, f"{part}-magnitude".lstrip("-"))
    adapter.remark(
        "AdapterHub's DoRA scales biases and leaves alpha / r out of the norm, unlike the paper and PEFT: it came in "
        "as lora, and as ia3 with what it multiplies outputs by"
    )
