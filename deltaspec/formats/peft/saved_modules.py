"""Modules that PEFT saves whole beside a type's tensors (`modules_to_save`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from deltaspec.backbone.table import Row
from deltaspec.formats.incoming import IncomingSite
from deltaspec.formats.peft.adapter import CONFIG, Adapter
from deltaspec.formats.peft.tying import ties_embeddings
from deltaspec.names.folding import shown
from deltaspec.names.paths import below

if TYPE_CHECKING:
    from torch import Tensor

_SAVED = "modules_to_save"
_ORIGINAL = "original_module"
_TIED_NAMES = ("embed_tokens", "lm_head")
"""PEFT's EMBEDDING_LAYER_NAMES: what its `ensure_weight_tying` goes by."""


def saved_names(adapter: Adapter) -> tuple[str, ...]:
    """Return what `modules_to_save` lists."""
    names = adapter.option(_SAVED) or []
    if isinstance(names, list) and all(isinstance(name, str) and name for name in names):
        return tuple(names)
    adapter.find("DS544", f"{_SAVED}: {names!r} is no list of names", f'write it as a list: ["{names}"]', CONFIG)
    return ()


def _is_saved(owner: str, names: tuple[str, ...]) -> bool:
    """Return whether a module is, or lies in, one that PEFT takes for one of these names: whatever ends with it."""
    segments = owner.split(".")
    return any(".".join(segments[:n]).endswith(names) for n in range(1, len(segments) + 1))


def whole_modules(adapter: Adapter, names: tuple[str, ...]) -> set[tuple[str, str]]:
    """Add a trained copy of each module that `modules_to_save` names; return its tensors, as modules and own names."""
    owners: dict[str, list[str]] = {}
    wrapped = []
    for key in adapter.weights:
        owner, _, own = key.rpartition(".")
        if not _is_saved(owner, names):
            continue
        if {_ORIGINAL, _SAVED}.isdisjoint(owner.split(".")):
            owners.setdefault(owner, []).append(own)
        else:  # `bias: all` finds the biases of the module again in both parts of PEFT's wrapper
            wrapped.append(key)
    _drop_wrapped(adapter, wrapped)
    sites = []
    for owner, fqn in adapter.places(owners).items():
        tensors = {}
        for name in owners[owner]:
            if (value := adapter.tensor_of(owner, name, f"{below(fqn, name)}, in full")) is not None:
                tensors[name] = value
        sites.append(IncomingSite(fqn, tensors))
    held = {(site.fqn, name) for site in sites for name in site.tensors}
    sites = _called(adapter, sites)
    together = bool(adapter.option("ensure_weight_tying")) and _drop_twins(adapter, names, sites)
    adapter.add(
        "full", {"tied": "together" if together else "alone"} if has_tied(adapter, sites) else {}, sites, "saved"
    )
    return held


def _called(adapter: Adapter, sites: list[IncomingSite]) -> list[IncomingSite]:
    """Return the places without those that only lend their weight to others, whose copies PEFT never calls either."""
    idle = [site.fqn for site in sites if running(adapter, site.fqn) != site.fqn]
    if idle:
        adapter.remark(f"the copies of {shown(idle)} are left out: no forward calls these, and PEFT unties what does")
    return [site for site in sites if site.fqn not in idle]


def running(adapter: Adapter, fqn: str) -> str:
    """Return the module itself, or, where no forward calls it, one that is tied to it and runs."""
    tied = [name.rpartition(".")[0] for p in adapter.base.rows[fqn].parameters for name in p.tied]
    unused = adapter.base.observations.unused() if tied else frozenset[str]()
    return next((name for name in tied if name not in unused), fqn) if fqn in unused else fqn


def _drop_wrapped(adapter: Adapter, keys: Iterable[str]) -> None:
    """Take the biases that a saved module has a second time, under the names in PEFT's wrapper."""
    for key in keys:
        segments = key.split(".")
        if _ORIGINAL in segments:
            adapter.take(key, "what the saved module stands in place of: not needed")
            continue
        at = segments.index(_SAVED)  # the adapter's name may be left behind it
        plain = (".".join(segments[:at] + segments[rest:]) for rest in (at + 1, at + 2))
        twin = next((adapter.weights[name] for name in plain if name in adapter.weights), None)
        if twin is not None:
            _drop_equal(adapter, key, twin)


def _drop_equal(adapter: Adapter, key: str, twin: Tensor) -> None:
    """Take a tensor that the file has under another name already; that it has another value is a finding."""
    value = adapter.take(key, "the same tensor under another name: not needed")
    if value is not None and not torch.equal(value, twin):
        message = f"holds {key}, which is the same parameter as another, with two values"
        adapter.find("DS539", message, "save it again from the model that it was trained in", adapter.file)


def _drop_twins(adapter: Adapter, names: tuple[str, ...], sites: list[IncomingSite]) -> bool:
    """Take the copies of what is tied to a saved module; return whether there are any: PEFT's LoRA alone ties."""
    rows = adapter.base.rows
    pairs = ((site, p) for site in sites for p in rows[site.fqn].parameters if p.name in site.tensors)
    twins = {name: site.tensors[p.name] for site, p in pairs for name in p.tied}
    found = False
    for key in list(adapter.weights):
        owner, _, own = key.rpartition(".")
        fqn = below(adapter.prefix.to_here(adapter.called(owner)) or "", own)
        if fqn in twins:
            _drop_equal(adapter, key, twins[fqn])
            found = True
    if not {below(site.fqn, name) for site in sites for name in site.tensors}.isdisjoint(twins):
        return False  # each has a copy of its own
    named = any(name.rpartition(".")[2] in _TIED_NAMES for name in names)
    ties = adapter.type == "LORA" and named and ties_embeddings(adapter.base, unsaid=True)
    if twins and ties and not found:
        message = f"has no {shown(twins)}, which ensure_weight_tying ties to a saved module"
        adapter.find("DS543", message, "the file was cut: save the adapter again", adapter.file)
    return found


def check_saved(adapter: Adapter, names: tuple[str, ...], held: set[tuple[str, str]]) -> None:
    """Refuse a file without a tensor of a module that `modules_to_save` names; a name may mean none of the base."""
    lacking = [
        below(row.fqn, tensor.name)
        for row, name in rows_there(adapter)
        if _is_saved(name, names)
        for tensor in (*row.parameters, *row.buffers)
        if (row.fqn, tensor.name) not in held
    ]
    if lacking:
        message = f"has no {shown(dict.fromkeys(lacking))}, which {_SAVED} names"
        adapter.find("DS543", message, "the file was cut: save the adapter again", adapter.file)


def rows_there(adapter: Adapter) -> Iterator[tuple[Row, str]]:
    """Return the base's modules that the saved model had, and their names there."""
    for name, row in adapter.base.rows.items():
        if (saved := adapter.prefix.to_saved(name)) is not None:
            yield row, saved


def has_tied(adapter: Adapter, sites: Iterable[IncomingSite]) -> bool:
    """Return whether some of these places have a parameter that is tied to another place."""
    return any(p.tied for site in sites for p in adapter.base.rows[site.fqn].parameters)
