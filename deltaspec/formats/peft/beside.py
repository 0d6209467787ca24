"""What PEFT saves beside the tensors of a type: whole modules, biases, embeddings and single tokens' rows."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from deltaspec.formats.incoming import IncomingSite
from deltaspec.formats.peft.adapter import CONFIG, Adapter
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
    tied = bool(adapter.option("ensure_weight_tying"))
    _whole_modules(adapter, tied)
    _tokens(adapter)
    bias = adapter.option("bias", "none")
    return lambda: _copies(adapter, bias)


def _whole_modules(adapter: Adapter, tied: bool) -> None:
    """Add a trained copy of each module that `modules_to_save` names."""
    names = adapter.option("modules_to_save") or []
    owners: dict[str, list[str]] = {}
    for key in adapter.weights:
        owner = key.rpartition(".")[0]
        segments = owner.split(".")
        if any(_ends(".".join(segments[:n]), name) for n in range(1, len(segments) + 1) for name in names):
            owners.setdefault(owner, []).append(key.rpartition(".")[2])
    sites = []
    for owner, fqn in adapter.places(owners).items():
        tensors = {}
        for name in owners[owner]:
            if (value := adapter.tensor_of(owner, name, f"{below(fqn, name)}, in full")) is not None:
                tensors[name] = value
        sites.append(IncomingSite(fqn, tensors))
    adapter.add("full", {"tied": "together" if tied else "alone"} if _tied(adapter, sites) else {}, sites, "saved")


def _ends(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}") or (not re.match(r"\w", name) and module.endswith(name))


def _tied(adapter: Adapter, sites: list[IncomingSite]) -> bool:
    return any(p.tied for site in sites for p in adapter.base.rows[site.fqn].parameters)


def _tokens(adapter: Adapter) -> None:
    """Add the rows of single tokens that an adapter of another type trains besides."""
    given = adapter.option(_INDEX)
    modules = adapter.modules(_TOKENS)
    if not modules:
        if given:
            adapter.find("DS543", f"has no rows for {_INDEX}", "save the adapter again", adapter.file)
        return
    for module, fqn in adapter.places(modules).items():
        ids = given if isinstance(given, list) else _of_module(given, module)
        if ids is None:
            message = f"has rows of tokens for {module}, and {_INDEX} names none"
            adapter.find("DS543", message, "save the adapter again", adapter.file)
            continue
        rows = adapter.tensor_of(module, _TOKENS, f"rows of {len(ids)} tokens of {fqn}")
        assert rows is not None
        add_tokens(adapter, fqn, ids, rows, "tokens" if len(modules) == 1 else f"tokens-{fqn.rpartition('.')[2]}")


def _of_module(given: Any, module: str) -> list[int] | None:
    """Return the token ids that a mapping from modules' names has for one."""
    found = (ids for name, ids in dict(given or {}).items() if _ends(module, name))
    return next(found, None)


def add_tokens(adapter: Adapter, fqn: str, ids: list[int], rows: Tensor, part: str) -> None:
    """Add trained rows of one table; a head that is tied to it is changed with it, as in PEFT."""
    site = IncomingSite(fqn, {"weight": rows})
    tied = {"tied": "together"} if _tied(adapter, [site]) else {}
    adapter.add("trainable_tokens", {"token_ids": list(ids), **tied}, [site], part)


def _copies(adapter: Adapter, bias: Any) -> None:
    """Add the biases that were trained, and the base's embeddings where the file has a copy of them that differs."""
    biases = [key for key in adapter.weights if key.rpartition(".")[2] == "bias"] if bias != "none" else []
    tables = [key for key in adapter.weights if key.rpartition(".")[2] == "weight" and _is_table(adapter, key)]
    if bias not in ("none", "all") and not str(bias).endswith("_only"):
        adapter.find("DS544", f"bias: {bias!r} is not known here", "it is none, all or lora_only", CONFIG)
    for keys, part in ((biases, "bias"), (tables, "embeddings")):
        places = adapter.places([key.rpartition(".")[0] for key in keys])
        sites = []
        for key in keys:
            owner, _, name = key.rpartition(".")
            fqn = places.get(owner)
            if fqn is None or not adapter.base.rows[fqn].has_parameter(name):
                continue
            value = adapter.take(key, f"{below(fqn, name)}, in full")
            assert value is not None
            if part == "embeddings" and _is_base(adapter, below(fqn, name), value):
                adapter.incoming.account[key] = "the base's own values: not needed"
                continue
            sites.append(IncomingSite(fqn, {name: value}, parameter=name))
        found = len(adapter.incoming.deltas)
        tied = {"tied": "together" if part == "bias" else "alone"} if _tied(adapter, sites) else {}
        adapter.add("full", tied, sites, part)
        if len(adapter.incoming.deltas) > found:  # before the type's own, which works on it
            adapter.incoming.deltas.insert(0, adapter.incoming.deltas.pop())


def _is_table(adapter: Adapter, key: str) -> bool:
    """Return whether a key names the weight of the model's own input or output embeddings."""
    model = adapter.base.model
    ways = (getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings"))
    try:
        tables = [way() for way in ways if callable(way)]
    except NotImplementedError:  # transformers: a model without embeddings says so thus
        return False
    owner = ".".join(s for s in key.rpartition(".")[0].split(".") if s != "base_layer")
    found = (name for name, module in model.named_modules() if any(module is table for table in tables))
    return any(name == owner or owner.endswith("." + name) or name.endswith("." + owner) for name in found)


def _is_base(adapter: Adapter, fqn: str, value: Tensor) -> bool:
    """Return whether a saved copy has the base's own values; True where the base has none to compare with.

    PEFT writes them beside every adapter of an embedding, trained or not: it trains none of them.
    """
    own = adapter.base.tensor(fqn)
    if own.shape != value.shape:
        message = f"holds {fqn} of shape {list(value.shape)}, and the model's is {list(own.shape)}"
        hint = f"model.resize_token_embeddings({value.shape[0]}) before the adapter is read"
        adapter.find("DS526", message, hint, adapter.file)
        return True
    if own.is_meta:
        adapter.remark(f"{shown([fqn])} of its file was taken for the base's own: there are no weights to compare with")
        return True
    return torch.equal(own.cpu().to(value.dtype), value)
