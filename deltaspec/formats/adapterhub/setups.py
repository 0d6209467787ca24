"""Setups of several AdapterHub adapters: those come in whose members can be deltas of their own.

Read in `adapter_layer_base.py` and `bottleneck.py` of adapters 1.3: in a Stack, each bottleneck's h is what the one
before made of it, the residual stream is added for each anew, and what is behind the last one is as that one says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.formats.adapterhub.adapter import Adapter
from deltaspec.formats.adapterhub.averages import averaged, weights_of
from deltaspec.formats.adapterhub.chains import chained, chains
from deltaspec.formats.adapterhub.invertible import EMBEDDINGS
from deltaspec.formats.base import Base
from deltaspec.formats.incoming import Incoming, IncomingDelta
from deltaspec.formats.unread import Unread
from deltaspec.names.folding import shown

SETUP = "adapter_setup.json"
_SETUPS = ("Stack", "Average")
"""Types that are read."""
_ORDER = "hsy"
"""Domains of bottlenecks (see `forms.py`): each leaves those before it to come."""
_WHY = {
    "Average": "which takes the mean of outputs, residuals included, and divides by the number of members once more",
    "Fuse": "which weighs its members by attention over what they give, at each position",
}
"""What compositions compute that no deltas here come to."""
_WAYS = {
    "Average": "read the folders by themselves, and attach them at strengths: c.attach({name: 0.5, …}); or save the "
    "mean of their weights, with adapters: model.average_adapter(…)",
    "BatchSplit": "give each row its own delta: read the folders by themselves, and pass deltas=[…] to the forward",
    "Parallel": "read the folders by themselves, and run the model once for each",
}


def read_setup(folder: Path, base: Base, name: str, read: Callable[[Path, Base, str], Adapter]) -> Incoming:
    """Read the adapters of a setup, in order of application. Raises DeltaSpecError with all findings."""
    unread = Unread(folder)
    data = unread.json(SETUP)
    members = _members(unread, data)
    setup = data.get("adapter_setup")
    setup = setup if isinstance(setup, dict) and setup.get("type") in _SETUPS else {"type": "Stack"}
    kind = str(setup["type"])
    weights = weights_of(unread, setup, len(members), SETUP) if kind == "Average" and not unread.findings else []
    unread.settle()
    adapters, findings = list[Adapter](), list[Diagnostic]()
    for member in members:
        try:
            adapters.append(read(folder / member, base, name if len(members) == 1 else f"{name}-{member}"))
        except DeltaSpecError as error:
            findings += error.diagnostics
    if findings:
        raise DeltaSpecError(findings)
    incoming = Incoming(folder, f"AdapterHub {kind} of {', '.join(members)}")
    incoming.base = adapters[0].incoming.base
    if weights:
        heads = _heads(unread, name, adapters)
        incoming.deltas = [*heads, *averaged(unread, adapters, weights, _WAYS[kind], SETUP)]
    else:
        incoming.deltas = _stacked(unread, name, adapters)
    for member, adapter in zip(members, adapters, strict=True):
        incoming.account |= {f"{member}: {key}": became for key, became in adapter.incoming.account.items()}
        incoming.remarks += [remark for remark in adapter.incoming.remarks if remark not in incoming.remarks]
    unread.settle()
    return incoming


def _members(unread: Unread, data: dict[str, Any]) -> list[str]:
    """Return the names of the adapters of a setup of single ones; anything else is a finding."""
    if data.get("head_setup") is not None:
        message = "has a setup of flexible heads, which models here have no place for"
        unread.find("DS549", message, "read the adapters by themselves, by the names of their folders", SETUP)
    setup = data.get("adapter_setup")
    nodes = [setup] if not isinstance(setup, dict) or setup.get("type") not in _SETUPS else setup.get("children")
    found: list[str] = []
    for node in nodes if isinstance(nodes, list) else []:
        kind = node.get("type") if isinstance(node, dict) else None
        children = node.get("children") if isinstance(node, dict) else None
        if kind == "single" and isinstance(children, list) and len(children) == 1 and _is_folder(unread, children[0]):
            found.append(children[0])
        elif kind in (None, "single"):
            unread.find("DS544", "adapter_setup names no adapters that are here", "save the setup again", SETUP)
        else:
            hint = _WAYS.get(str(kind), "read the adapters by themselves, by the names of their folders")
            why = _WHY.get(str(kind), "which no deltas here come to")
            unread.find("DS549", f"its setup has a {kind}, {why}", hint, SETUP)
    for twice in sorted({member for member in found if found.count(member) > 1}):
        message = f"its setup has {twice} twice, and two deltas of one name cannot be had"
        unread.find("DS549", message, "give the second one another folder", SETUP)
    if not found and not unread.findings:
        unread.find("DS544", "adapter_setup names no adapters", "save the setup again", SETUP)
    return found


def _is_folder(unread: Unread, name: Any) -> bool:
    """Return whether an adapter's folder is in the setup's own."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not set(name) & set("/\\")
        and (unread.folder / name).is_dir()
    )


def _stacked(unread: Unread, name: str, adapters: list[Adapter]) -> list[IncomingDelta]:
    """Return the deltas of a Stack's members in the order in which they come to the same."""
    first, before = list[IncomingDelta](), list[IncomingDelta]()
    seen: dict[str, tuple[str, str]] = {}
    heads = _heads(unread, name, adapters)
    for adapter in adapters:
        own: dict[str, str] = {}
        for delta in adapter.incoming.deltas:
            domain = adapter.domains.get(delta.name)
            if delta.method == "lora" and chains(first, delta):
                delta = chained(first, delta)
                adapter.remark("LoRAs in a Stack, of which the second sees what the first adds, are multiplied to one")
            elif domain is None and delta.method in ("lora", "ia3") and (twice := _shared(first, delta)):
                message = (
                    f"two members of its Stack are LoRA or (IA)³ at {shown(twice)}, where the second sees what the "
                )
                unread.find("DS549", message + "first adds", "merge one of them", SETUP)
            if adapter is not adapters[0] and (delta.method == "reft" or domain == EMBEDDINGS):
                what = "ReFT" if delta.method == "reft" else "invertible adapter"
                adapter.remark(
                    f"the {what} of {adapter.folder.name} is left out: of a Stack, the first member's alone acts"
                )
                continue
            own |= dict.fromkeys(adapter.occupied.get(delta.name, ()), domain or "")
            (before if delta.params.get("position") == "before" else first).append(delta)
        for place, domain in own.items():
            last = seen.get(place)
            if last is not None and not _may_follow(last[1], domain):
                message = (
                    f"its Stack puts {adapter.folder.name} behind {last[0]} at {place}, where one sees what the other "
                )
                hint = "read the adapters by themselves, by the names of their folders"
                unread.find("DS549", message + "changes in another place", hint, SETUP)
            seen[place] = (adapter.folder.name, domain)
    # What is before a module is run through from the last delta to the first.
    return [*heads, *first, *reversed(before)]


def _may_follow(last: str, domain: str) -> bool:
    """Return whether a bottleneck may come behind another at one place: it sees all that the other changed."""
    if last not in _ORDER or domain not in _ORDER or last == "y":
        return False
    return _ORDER.index(last) <= _ORDER.index(domain)


def _shared(deltas: list[IncomingDelta], delta: IncomingDelta) -> list[str]:
    places = {site.fqn for other in deltas if other.method in ("lora", "ia3") for site in other.sites}
    return [site.fqn for site in delta.sites if site.fqn in places]


def _heads(unread: Unread, name: str, adapters: list[Adapter]) -> list[IncomingDelta]:
    """Take the head of all members, which is one, out of each."""
    heads: list[IncomingDelta] = []
    for adapter in adapters:
        for delta in adapter.incoming.deltas:
            if delta.method == "full":
                _same_head(unread, heads, delta, name)
        adapter.incoming.deltas = [delta for delta in adapter.incoming.deltas if delta.method != "full"]
    return heads


def _same_head(unread: Unread, heads: list[IncomingDelta], delta: IncomingDelta, name: str) -> None:
    """Keep one of the heads that all members were saved with; two values are a finding."""
    if not heads:
        heads.append(replace(delta, name=f"{name}-head"))
        return
    values = [{(s.fqn, key): value for s in d.sites for key, value in s.tensors.items()} for d in (heads[0], delta)]
    if values[0].keys() != values[1].keys() or any(not values[0][k].equal(values[1][k]) for k in values[0]):
        message = (
            "its members were saved with heads of different values, and a setup says nothing of which one is meant"
        )
        unread.find("DS539", message, "read the adapters by themselves, by the names of their folders", SETUP)
