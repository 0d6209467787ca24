"""What PEFT saves beside the tensors of a type: whole modules, biases, embeddings and single tokens' rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch

from deltaspec.backbone.entrances import part_of
from deltaspec.formats.incoming import IncomingDelta, IncomingSite
from deltaspec.formats.peft.adapter import CONFIG, Adapter
from deltaspec.formats.peft.saved_modules import (
    check_saved,
    has_tied,
    rows_there,
    running,
    saved_names,
    whole_modules,
)
from deltaspec.formats.peft.tying import ties_embeddings
from deltaspec.names.folding import shown
from deltaspec.names.paths import below

if TYPE_CHECKING:
    from torch import Tensor

_TOKENS = "token_adapter.trainable_tokens_delta"
_INDEX = "trainable_token_indices"


def read_beside(adapter: Adapter) -> Callable[[], None]:
    """Add the deltas that come before the type's own, since they put other tensors in place of the base's.

    Return what is to be done when the type has taken its own keys: all that is left of biases and embeddings.
    """
    names = saved_names(adapter)
    saved = whole_modules(adapter, names)
    _tokens(adapter)
    bias = _trained_biases(adapter)
    before = len(adapter.incoming.deltas)

    def rest() -> None:
        check_saved(adapter, names, saved)
        _biases(adapter, bias, saved, adapter.incoming.deltas[before:])
        _embeddings(adapter)

    return rest


def _biased_heads(adapter: Adapter, fqn: str, together: bool) -> list[str]:
    """Return the heads that rows are trained of, with a table or by themselves, and that have a bias."""
    rows = adapter.base.rows
    twins = [name.rpartition(".")[0] for p in rows[fqn].parameters for name in p.tied if p.name == "weight"]
    return [
        name for name in (fqn, *twins * together) if rows[name].kind == "linear" and rows[name].has_parameter("bias")
    ]


def _trained_biases(adapter: Adapter) -> str:
    """Return which biases were trained. PEFT goes by the ending of `lora_only`, whatever type stands in front."""
    given = adapter.option("bias", "none")
    if isinstance(given, str) and given.endswith("_only"):
        return given
    return adapter.options.word("bias", "none", ("none", "all", f"{adapter.type.lower()}_only"))


def _tokens(adapter: Adapter) -> None:
    """Add the rows of single tokens that an adapter of another type trains besides."""
    given = adapter.option(_INDEX)
    modules = adapter.modules(_TOKENS)
    lists = list(given.values()) if isinstance(given, dict) else [given or []]
    if not all(isinstance(ids, list) and all(type(i) is int for i in ids) for ids in lists):
        hint = "write a list of token ids, or such a list for each module's name"
        adapter.find("DS544", f"{_INDEX}: {given!r} says no tokens", hint, CONFIG)
        return
    if not modules:
        if given:
            adapter.find("DS543", f"has no rows for {_INDEX}", "save the adapter again", adapter.file)
        return
    places = adapter.places(modules)
    for module, fqn in places.items():
        named = given if isinstance(given, dict) else {"": given}
        ids = next((ids for name, ids in named.items() if module.endswith(name)), None)
        if ids is None:
            message = f"has rows of tokens for {module}, and {_INDEX} names none"
            adapter.find("DS543", message, "save the adapter again", adapter.file)
            continue
        rows = adapter.tensor_of(module, _TOKENS, f"rows of {len(ids)} tokens of {fqn}")
        assert rows is not None
        part = "tokens" if len(modules) == 1 else f"tokens-{fqn.replace('.', '-')}"
        add_tokens(adapter, fqn, ids, rows, part, together=_ties_tokens(adapter, fqn, places.values()))
    _check_tokens(adapter, given if isinstance(given, dict) else {}, set(places.values()))


def _check_tokens(adapter: Adapter, names: Iterable[str], held: set[str]) -> None:
    """Refuse a file without rows of a module that is named; what is tied to another's rows has none of its own."""
    for name in names:
        for row, saved in rows_there(adapter):
            tied = {other.rpartition(".")[0] for p in row.parameters for other in p.tied}
            if saved.endswith(name) and held.isdisjoint({row.fqn, *tied}):
                message = f"has no rows of tokens for {row.fqn}, which {_INDEX} names"
                adapter.find("DS543", message, "the file was cut: save the adapter again", adapter.file)


def _ties_tokens(adapter: Adapter, fqn: str, others: Iterable[str]) -> bool:
    """Return whether PEFT ties the head to these rows: to those of the input embeddings, if it has none of its own."""
    row = adapter.base.rows[fqn]
    tied = {name.rpartition(".")[0] for p in row.parameters for name in p.tied}
    return row.vocabulary and tied.isdisjoint(others) and ties_embeddings(adapter.base, unsaid=False)


def add_tokens(adapter: Adapter, fqn: str, ids: list[int], rows: Tensor, part: str, *, together: bool = True) -> None:
    """Add trained rows of one table; a head that is tied to it is changed with it, as in PEFT."""
    is_tied = has_tied(adapter, [IncomingSite(fqn, {})])
    site = IncomingSite(running(adapter, fqn) if together and is_tied else fqn, {"weight": rows})
    option = _INDEX if _INDEX in adapter.config else "token_indices"
    if twice := sorted({i for i in ids if ids.count(i) > 1}):
        message = f"{option} has {', '.join(map(str, twice))} twice: which of its rows counts is undefined"
        adapter.find("DS544", message, "train it again with each token once", CONFIG)
    elif (row := adapter.base.rows[fqn]).kind == "linear" and not is_tied and "head" not in row.roles:
        message = f"{option} trains rows of {fqn}, a {row.type} that is no head, and tied to no table"
        hint = f"there is no method for it: train it as a whole (modules_to_save: [{fqn.rpartition('.')[2]!r}])"
        adapter.find("DS544", message, hint, CONFIG)
    elif biased := _biased_heads(adapter, fqn, together):
        message = f"{option} changes {shown(biased)}, too, and PEFT runs it without its bias then"
        hint = "merging takes the bias along: train it again with a copy of the whole head (modules_to_save)"
        adapter.find("DS548", message, hint, CONFIG)
    else:
        tied = {"tied": "together" if together else "alone"} if is_tied else {}
        adapter.add("trainable_tokens", {"token_ids": list(ids), **tied}, [site], part)


def _biases(adapter: Adapter, bias: str, saved: set[tuple[str, str]], own: list[IncomingDelta]) -> None:
    """Add the biases that were trained: all of the base (`all`), or those of the type's modules (`lora_only`)."""
    if bias == "none":
        return
    sites = _in_full(adapter, [key for key in adapter.weights if key.rpartition(".")[2] == "bias"])
    touched = {site.fqn for delta in own for site in delta.sites}
    shifted = {(site.fqn, "bias") for delta in own if delta.method == "bitfit" for site in delta.sites}
    held = {*saved, *shifted, *((site.fqn, "bias") for site in sites.values())}
    lacking = [
        below(row.fqn, "bias")
        for row, _ in rows_there(adapter)
        if row.has_parameter("bias") and (row.fqn, "bias") not in held and (bias == "all" or row.fqn in touched)
    ]
    if lacking:
        message = f"has no {shown(dict.fromkeys(lacking))}, which bias: {bias} trains"
        hint = 'save the adapter again; or with "bias": "none" the base\'s own stay, as in PEFT, where none is left'
        adapter.find("DS543", message, hint, adapter.file)
    _shifts(adapter, [sites.pop(key) for key, site in list(sites.items()) if _decomposes(adapter, own, site.fqn)])
    _put_first(adapter, sites, "bias")


def _decomposes(adapter: Adapter, own: list[IncomingDelta], fqn: str) -> bool:
    """Return whether the type's own delta scales what a module puts out, and takes the backbone's bias out for that."""
    there = (delta for delta in own if any(site.fqn == fqn for site in delta.sites))
    dora = any(delta.params.get("use_dora") for delta in there)
    return dora and adapter.base.rows[fqn].kind in ("linear", "conv1d", "conv")


def _shifts(adapter: Adapter, sites: list[IncomingSite]) -> None:
    """Add biases behind the type's own delta, as changes of what leaves it."""
    if sites and adapter.base.is_meta:
        message = f"bias of {sites[0].fqn} is read as a change of the base model's, and there are no weights"
        adapter.find("DS542", message, "name the folder of the base model with its weights", adapter.file)
        return
    changes = []
    for site in sites:
        value, own = site.tensors["bias"], adapter.base.tensor(below(site.fqn, "bias"))
        if value.shape != own.shape:
            message = f"bias of {site.fqn} is {list(value.shape)}, and must be {list(own.shape)} here"
            adapter.find("DS526", message, "the adapter is for a model of other widths", adapter.file)
            continue
        changes.append(IncomingSite(site.fqn, {"bias": value - own.to("cpu", value.dtype)}))
    adapter.add("bitfit", {}, changes, "shift")


def _embeddings(adapter: Adapter) -> None:
    """Add the base's embeddings where the file has a copy of them that differs: PEFT puts it in their place."""
    weights = [key for key in adapter.weights if key.rpartition(".")[2] == "weight"]
    tables = _tables(adapter) if weights else []
    keys = [key for key in weights if _is_of(key, tables)]
    sites = {}
    for key, site in _in_full(adapter, keys).items():
        if _is_base(adapter, below(site.fqn, "weight"), site.tensors["weight"]):
            adapter.incoming.account[key] = "the base's own values: not needed"
        else:
            sites[key] = site
    _put_first(adapter, sites, "embeddings")


def _in_full(adapter: Adapter, keys: list[str]) -> dict[str, IncomingSite]:
    """Take keys that name parameters of the base, and return the place of each."""
    places = adapter.places([key.rpartition(".")[0] for key in keys])
    sites = {}
    for key in keys:
        owner, _, name = key.rpartition(".")
        fqn = places.get(owner)
        if fqn is not None and adapter.base.rows[fqn].has_parameter(name):
            value = adapter.take(key, f"{below(fqn, name)}, in full")
            assert value is not None
            sites[key] = IncomingSite(fqn, {name: value}, parameter=name)
    return sites


def _put_first(adapter: Adapter, sites: dict[str, IncomingSite], part: str) -> None:
    """Add a delta before the type's own, which works on it; what is tied comes under each of its names."""
    once: dict[str, Tensor] = {}
    kept = []
    for key, site in sites.items():
        own = next(p for p in adapter.base.rows[site.fqn].parameters if p.name == site.parameter)
        first = once.setdefault(min((own.fqn, *own.tied)), site.tensors[own.name])
        if first is site.tensors[own.name]:
            kept.append(site)
        elif not torch.equal(first, site.tensors[own.name]):
            message = f"holds {key}, which is tied, with two values"
            adapter.find("DS539", message, "save it again from the model that it was trained in", adapter.file)
    found = len(adapter.incoming.deltas)
    adapter.add("full", {"tied": "together"} if has_tied(adapter, kept) else {}, kept, part)
    if len(adapter.incoming.deltas) > found:
        adapter.incoming.deltas.insert(0, adapter.incoming.deltas.pop())


def _tables(adapter: Adapter) -> list[str]:
    """Return the FQNs of the model's own input and output embeddings."""
    model = adapter.base.model
    tables = [part_of(model, name) for name in ("get_input_embeddings", "get_output_embeddings")]
    return [name for name, module in model.named_modules() if any(module is table for table in tables)]


def _is_of(key: str, tables: Iterable[str]) -> bool:
    """Return whether a key names the weight of one of these modules, under whatever prefix."""
    owner = ".".join(s for s in key.rpartition(".")[0].split(".") if s != "base_layer")
    return any(name == owner or owner.endswith("." + name) or name.endswith("." + owner) for name in tables)


def _is_base(adapter: Adapter, fqn: str, value: Tensor) -> bool:
    """Return whether a saved copy leaves the base's own values as they are; True where there is a finding.

    PEFT writes them beside every adapter of an embedding, trained or not, and loads them: it trains none of them.
    """
    own = adapter.base.tensor(fqn)
    if own.shape != value.shape or not value.is_floating_point():
        message = f"holds {fqn} of shape {list(value.shape)} and type {str(value.dtype).removeprefix('torch.')}, "
        message += f"and the model's is {list(own.shape)} and {str(own.dtype).removeprefix('torch.')}"
        resized = value.is_floating_point() and value.ndim == own.ndim
        hint = f"model.resize_token_embeddings({value.shape[0]}) before the adapter is read" if resized else None
        adapter.find("DS526", message, hint or "save the adapter again", adapter.file)
        return True
    if own.is_meta:
        adapter.remark(f"{shown([fqn])} of its file was taken for the base's own: there are no weights to compare with")
        return True
    if torch.equal(own.cpu(), value.to(own.dtype)):
        return True
    if torch.equal(own.cpu().to(value.dtype), value):
        kind = str(value.dtype).removeprefix("torch.")
        adapter.remark(
            f"{fqn} of its file is the base's own, rounded to {kind}: PEFT puts it in place, and so does this"
        )
    return False
