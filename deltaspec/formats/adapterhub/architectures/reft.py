"""AdapterHub's ReFT: edits of the hidden state behind layers, at the first and last positions.

Read in `reft.py` of adapters 1.3: x + (act(W x + b) - P x) P, or without the P x, which the file does not tell.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deltaspec.formats.adapterhub.adapter import CONFIG, Adapter
from deltaspec.formats.incoming import IncomingSite
from deltaspec.formats.options import Options
from deltaspec.methods.shared.positions import MASK

if TYPE_CHECKING:
    from torch import Tensor


def read(adapter: Adapter, options: Options, part: str) -> None:
    """Add the delta."""
    rank = options.whole("r", 1, least=1)
    first, last = options.whole("prefix_positions", 3), options.whole("suffix_positions", 0)
    tied, orthogonal = options.flag("tied_weights", False), options.flag("orthogonality", True)
    subtracts = options.get("subtract_projection")
    dropout = options.number("dropout", 0.05)
    activation = adapter.activation(options, "linear") if options.get("non_linearity") is not None else "identity"
    options.ignore("output_reft")
    everywhere = options.get("layers", "all") == "all"
    layers = [] if everywhere else options.items("layers", (), int)
    options.settle()
    kind = adapter.base.table.model_type
    if any(name == "encoder" for name, _ in adapter.arrangement.attentions.values()):
        why = f"AdapterHub chooses positions in the decoder of {kind} by the encoder's mask"
        adapter.unsupported("ReFT", why, "use another method there")
    if not orthogonal and not isinstance(subtracts, bool):
        message = "is a NoReFT or a DiReFT: AdapterHub saves no subtract_projection, by which the two differ"
        hint = f'add "subtract_projection": true (NoReFT) or false (DiReFT) to config in {CONFIG}'
        adapter.find("DS539", message, hint, CONFIG)
    subtract = subtracts if isinstance(subtracts, bool) else True
    if not first and not last:
        adapter.find("DS544", "prefix_positions and suffix_positions are both 0", "save it again", CONFIG)
    modules = {
        m.removesuffix(".reft_layer").removesuffix("reft_layer"): keys for m, keys in adapter.modules("refts").items()
    }
    numbers = adapter.arrangement.layers
    meant = [fqn for fqn, number in numbers.items() if everywhere or number in layers]
    places = adapter.places(modules)
    adapter.compare(set(places.values()), meant, "edits")
    taken = {}
    for module, fqn in places.items():
        units = [_unit(adapter, modules[module], n, fqn, rank, orthogonal) for n in range(1 if tied else 2)]
        if all(unit is not None for unit in units):
            taken[fqn] = _chosen(units, first, last, tied)
        if not tied and not (first and last):
            for rest, key in modules[module].items():
                if rest.startswith(f"units.{1 if first else 0}."):
                    adapter.incoming.account[key] = "edits nothing: it is for no position"
    if adapter.findings:
        return
    loreft = orthogonal and subtract and all(_is_orthonormal(u["rotation"]) for c in taken.values() for u in c.values())
    if subtract and not loreft:
        if activation != "identity":
            adapter.unsupported("ReFT", "NoReFT with an activation has no counterpart", "use a linear one")
            return
        adapter.remark("its (W x + b - P x) P is written as (W' x + b) P, which form: direft computes")
    sites = [
        IncomingSite(
            fqn, {e + name: value for e, u in ends.items() for name, value in _form(u, subtract and not loreft)}
        )
        for fqn, ends in taken.items()
    ]
    if adapter.findings or not sites:
        return
    params: dict[str, Any] = {"rank": rank, "form": "loreft" if loreft else "direft"}
    params |= {name: count for name, count in (("first", first), ("last", last)) if count}
    if not tied and first and last:
        params["tied"] = False
        adapter.remark(
            "in sequences of fewer positions than both edits take, the first ones are edited as such, and in "
            "AdapterHub as last ones"
        )
    if dropout:
        params["dropout"] = dropout
        adapter.remark("its dropout falls on the edit; in AdapterHub, on the edited hidden state")
    if activation != "identity":
        params["activation"] = activation
    if any(MASK not in adapter.base.rows[site.fqn].arguments for site in sites):
        params["padding"] = "none"
    adapter.add("reft", params, sites, part)


def _unit(
    adapter: Adapter, keys: dict[str, str], number: int, fqn: str, rank: int, orthogonal: bool
) -> dict[str, Tensor] | None:
    """Take the tensors of one edit."""
    lead = f"units.{number}."
    names = {rest.removeprefix(lead): key for rest, key in keys.items() if rest.startswith(lead)}
    source = _need(adapter, names, "learned_source.weight", f"source of {fqn}", (rank, None))
    bias = _need(adapter, names, "learned_source.bias", f"bias of {fqn}", (rank,))
    if source is None or bias is None:
        return None
    if not orthogonal:
        rotation = _need(adapter, names, "projection.weight", f"rotation of {fqn}", (rank, source.shape[1]))
        return None if rotation is None else {"rotation": rotation, "source": source, "bias": bias}
    start = "projection.parametrizations.weight."
    original = _need(adapter, names, f"{start}original", f"rotation of {fqn}, orthonormal", (rank, source.shape[1]))
    base = names.get(f"{start}0.base")
    turned = None if base is None else adapter.take(base, f"rotation of {fqn}, orthonormal", (source.shape[1],) * 2)
    if original is None or (base is not None and turned is None):
        return None
    return {"rotation": _orthonormal(original, turned), "source": source, "bias": bias}


def _need(
    adapter: Adapter, names: dict[str, str], name: str, became: str, shape: tuple[int | None, ...]
) -> Tensor | None:
    if name not in names:
        adapter.find("DS543", f"{became} has no {name}", "the file was cut: save the adapter again", adapter.file)
        return None
    return adapter.take(names[name], became, shape)


def _orthonormal(original: Tensor, base: Tensor | None) -> Tensor:
    """Return the matrix that torch's parametrisation makes of what it keeps."""
    state = {"parametrizations.weight.original": original}
    if base is not None:
        state["parametrizations.weight.0.base"] = base
    with torch.no_grad(), torch.random.fork_rng(devices=[]):  # a module starts with random values
        linear = nn.Linear(original.shape[1], original.shape[0], bias=False, dtype=original.dtype)
        made = nn.utils.parametrizations.orthogonal(linear, use_trivialization=base is not None)
        made.load_state_dict(state)
        weight = made.weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach().clone()


def _is_orthonormal(rotation: Tensor) -> bool:
    """Return whether its rows are: torch's parametrisation drops rows whose sign has left ±1 in training."""
    wanted = torch.eye(len(rotation), dtype=rotation.dtype)
    return torch.allclose(rotation @ rotation.t(), wanted, atol=1e-5)


def _form(unit: dict[str, Tensor], subtracted: bool) -> list[tuple[str, Tensor]]:
    """Return the tensors of one edit, with P taken from W where our form does not subtract P x itself."""
    source = unit["source"] - unit["rotation"] if subtracted else unit["source"]
    return list({**unit, "source": source}.items())


def _chosen(units: list[Any], first: int, last: int, tied: bool) -> dict[str, dict[str, Tensor]]:
    """Return the edits that act, by the beginning of their names."""
    if tied:
        return {"": units[0]}
    if first and last:
        return {"first_": units[0], "last_": units[1]}
    return {"": units[0] if first else units[1]}
