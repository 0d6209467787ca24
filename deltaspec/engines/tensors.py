"""Facts that stand in the names and shapes of an adapter's tensors, held against its configuration and its base."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import isclose, sqrt
from pathlib import PurePath

from deltaspec.backbone.table import Row
from deltaspec.engines.adapters import Adapter
from deltaspec.engines.base import Base, is_tied
from deltaspec.engines.configuration import patterned
from deltaspec.engines.keys import LORA, PREFIX, Key
from deltaspec.engines.observation import Observation
from deltaspec.formats.unread import Header

_WIDE = ("linear", "conv1d", "embedding", "conv")
"""Kinds of modules whose widths are known."""


@dataclass(slots=True)
class _Update:
    """The low-rank update of one module, as the file has it."""

    parts: dict[str, Header] = field(default_factory=dict)

    @property
    def down(self) -> Header | None:
        return self.parts.get("A") or self.parts.get("embedding_A")

    @property
    def up(self) -> Header | None:
        return self.parts.get("B") or self.parts.get("embedding_B")


def observed(adapter: Adapter, base: Base) -> Iterator[Observation]:
    """Yield what the tensors of an adapter hold that some engine does not read as PEFT does."""
    ending = PurePath(adapter.file).suffix.removeprefix(".")
    if ending != "safetensors":
        yield Observation("file", f"weights in {PurePath(adapter.file).name}", ending)
    yield from _dtypes(adapter)
    if not adapter.is_lora:
        lost = tuple(key.name for key in adapter.keys if base.stops_above(key.name))
        if lost:
            yield Observation("path", "keys that fit no module of the base", sites=lost)
        return
    if not adapter.keys:
        yield Observation("empty", "no low-rank update in the file")
    yield from _names(adapter, base)
    yield from _others(adapter, base)
    yield from _updates(adapter, base)


def _dtypes(adapter: Adapter) -> Iterator[Observation]:
    by_dtype: dict[str, list[str]] = {}
    for name, header in adapter.tensors.items():
        by_dtype.setdefault(header.dtype, []).append(name)
    for dtype, names in by_dtype.items():
        yield Observation("dtype", f"tensors of dtype {dtype}", dtype, tuple(names))


def _names(adapter: Adapter, base: Base) -> Iterator[Observation]:
    """Yield keys that lead to no module of the base, or that are none of PEFT's."""
    unknown = tuple(key.name for key in adapter.keys if not key.part)
    odd = tuple(key.name for key in adapter.keys if key.part == "weight" and key.name.rpartition(".")[2] != "weight")
    if unknown or odd:
        yield Observation("key", "keys that are none of PEFT's LoRA", sites=(*unknown, *odd))
    if named := tuple(key.name for key in adapter.keys if key.named):
        yield Observation("adapter_name", "the adapter's name in keys", sites=named)
    placed = [key for key in adapter.keys if key.part and key.name not in odd]
    if bare := _modules(key for key in placed if not key.prefixed):
        yield Observation("prefix", f"keys without {PREFIX}", sites=bare)
    lost = [key for key in placed if base.row(key.site) is None]
    if experts := _modules(key for key in lost if base.has_stacked(key.site)):
        says = "updates of single experts, which this base holds as one stack"
        yield Observation("parameters", says, "single", experts)
        lost = [key for key in lost if not base.has_stacked(key.site)]
    layers = _modules(key for key in lost if base.has_layout(key.site))
    if layers:
        yield Observation("layer", "layers that the base does not have", sites=layers)
    paths = _modules(key for key in lost if not base.has_layout(key.site))
    if paths:
        hint = None
        if all(base.row(key.unwrapped) is not None for key in lost):
            hint = "read it with deltaspec convert, or take the segments that wrappers put in out of the keys"
        elif (moved := base.elsewhere(paths)) is not None:
            hint = f"rename the keys: {moved}"
        for known in (True, False):
            if sites := tuple(path for path in paths if base.has_own_name(path) == known):
                says = f"modules that the base does not have{' under this path' if known else ''}"
                yield Observation("path", says, "known" if known else "unknown", sites, hint=hint)


def _modules(keys: Iterable[Key]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(key.site for key in keys))


def _others(adapter: Adapter, base: Base) -> Iterator[Observation]:
    """Yield what is in the file besides low-rank updates."""
    by_part: dict[str, list[str]] = {}
    for key in adapter.keys:
        by_part.setdefault(key.part, []).append(key.site)
    for part, (fact, says, flag) in _BESIDE.items():
        if part in by_part and not adapter.data.get(flag):
            yield Observation(fact, says, sites=tuple(dict.fromkeys(by_part[part])))
    saved = [str(name) for name in adapter.data.get("modules_to_save") or ()]
    trains_biases = adapter.data.get("bias") not in (None, "none")
    extra: dict[str, list[str]] = {}
    for key in adapter.keys:
        whole = (key.part == "weight" and key.name.endswith(".weight")) or (key.part == "bias" and not trains_biases)
        if whole and base.row(key.module) is not None and not any(name in saved for name in _tails(key.module)):
            extra.setdefault(key.module.rpartition(".")[2], []).append(key.module)
    for name, modules in extra.items():
        yield Observation("extra_weight", "whole weights", name, tuple(dict.fromkeys(modules)))
    yield from _base_weights(adapter, base)


def _base_weights(adapter: Adapter, base: Base) -> Iterator[Observation]:
    """Yield the base's own weights, as PEFT saves them beside a LoRA of the embeddings, where they were resized."""
    for key in adapter.keys:
        row = base.row(key.site)
        if key.part != "base" or row is None or not row.has_parameter("weight"):
            continue
        header, shape = adapter.tensors[key.name], row.shape_of("weight")
        if key.name.endswith(".weight") and header.shape != shape:
            says = f"the base's own weights, {_shown(header)} where the base here has {_shown(Header(shape, ''))},"
            yield Observation("base_weight", says, sites=(key.site,))


_BESIDE: Mapping[str, tuple[str, str, str]] = {
    "magnitude": ("dora", "magnitudes of DoRA", "use_dora"),
    "lora_bias": ("lora_bias", "biases of lora_B", "lora_bias"),
    "tokens": ("tokens", "trained tokens", "trainable_token_indices"),
}
"""Parts of a file that say a fact by themselves, and the key that says it, too."""


def _tails(module: str) -> Iterator[str]:
    parts = module.split(".")
    yield from (".".join(parts[start:]) for start in range(len(parts)))


def _updates(adapter: Adapter, base: Base) -> Iterator[Observation]:
    updates: dict[str, _Update] = {}
    for key in adapter.keys:
        if key.part in LORA:
            update = updates.setdefault(key.module, _Update())
            update.parts[key.part] = adapter.tensors[key.name]
    yield from _unpaired(updates)
    stacked = adapter.data.get("target_parameters")
    pairs = {
        key_module: (update.down, update.up, base.row(_site(key_module)))
        for key_module, update in updates.items()
        if update.down is not None and update.up is not None
    }
    plain = {
        _site(module): (down, up, row)
        for module, (down, up, row) in pairs.items()
        if not (stacked and row is not None and row.kind not in _WIDE)
    }
    yield from _kinds(plain, base)
    if some := base.on_some_layers(plain):
        yield Observation("some_layers", "updates on some layers alone", sites=some)
    yield from _shapes(plain)
    ranks = {module: down.shape[0] if down.shape else 0 for module, (down, _, _) in plain.items()}
    yield from _ranks(adapter, base, ranks)


def _site(module: str) -> str:
    return module.replace(".base_layer", "")


def _unpaired(updates: Mapping[str, _Update]) -> Iterator[Observation]:
    for there, missing in (("down", "lora_B"), ("up", "lora_A")):
        other = "up" if there == "down" else "down"
        alone = [m for m, u in updates.items() if getattr(u, there) is not None and getattr(u, other) is None]
        if alone:
            yield Observation("unpaired", f"no {missing}", missing, tuple(map(_site, alone)))


_Pairs = Mapping[str, tuple[Header, Header, Row | None]]


def _kinds(pairs: _Pairs, base: Base) -> Iterator[Observation]:
    """Yield what the modules are that have updates: their kinds, their own names, tables and heads."""
    kinds: dict[str, list[str]] = {}
    names: dict[str, list[str]] = {}
    heads: dict[str, list[str]] = {}
    tables: list[str] = []
    for module, (_, _, row) in pairs.items():
        if row is None:
            continue
        if row.kind == "embedding":
            tables.append(module)
        elif base.is_head(row):
            heads.setdefault("tied" if is_tied(row) else base.model_type, []).append(module)
        else:
            kinds.setdefault("multihead" if "MultiheadAttention" in row.bases else row.kind, []).append(module)
            names.setdefault(module.rpartition(".")[2], []).append(module)
    if tables:
        yield Observation("embedding", "a LoRA of the embeddings", base.model_type, tuple(tables))
    for value, sites in heads.items():
        tied = " that is tied to the embeddings" if value == "tied" else ""
        yield Observation("head", f"a LoRA of the output head{tied}", value, tuple(sites))
    for kind, sites in kinds.items():
        yield Observation("kind", f"a LoRA of modules of kind {kind}", kind, tuple(sites))
    for name, sites in names.items():
        yield Observation("module", f"a LoRA of modules called {name}", name, tuple(sites))


def _shapes(pairs: _Pairs) -> Iterator[Observation]:
    wrong: dict[tuple[str, str], list[str]] = {}
    for module, (down, up, row) in pairs.items():
        for value, says in _misfits(down, up, row):
            wrong.setdefault((value, says), []).append(module)
    for (value, says), modules in wrong.items():
        yield Observation("shape", says, value, tuple(modules))


def _misfits(down: Header, up: Header, row: Row | None) -> Iterator[tuple[str, str]]:
    """Yield which factor of an update does not fit the base's module, or the other factor, and how."""
    if len(down.shape) < 2 or len(up.shape) < 2:
        yield "rank", f"lora_A {_shown(down)} and lora_B {_shown(up)}, which are no matrices"
        return
    groups = row.conv_groups if row is not None else 1
    if row is not None and row.kind in _WIDE and row.in_features is not None and row.out_features is not None:
        if down.shape[1] not in (row.in_features, row.in_features // groups):
            yield "lora_A", f"lora_A {_shown(down)}, where the base's module takes {row.in_features:,}"
        if up.shape[0] != row.out_features:
            yield "lora_B", f"lora_B {_shown(up)}, where the base's module gives {row.out_features:,}"
    if up.shape[1] * groups != down.shape[0] and up.shape[1] != down.shape[0]:
        yield "rank", f"lora_A {_shown(down)} beside lora_B {_shown(up)}"


def _shown(header: Header) -> str:
    return " × ".join(f"{size:,}" for size in header.shape) or "of a single number"


def _ranks(adapter: Adapter, base: Base, ranks: Mapping[str, int]) -> Iterator[Observation]:
    """Yield ranks and factors of the modules, where the tensors or the configuration have several."""
    data = adapter.data
    usual, alpha, rslora = data.get("r"), data.get("lora_alpha"), bool(data.get("use_rslora"))
    said = (n for n in (usual, *(data.get("rank_pattern") or {}).values()) if n is not None)
    number = max((*ranks.values(), *said), default=0)
    at = tuple(module for module, rank in ranks.items() if rank == number)
    yield Observation("rank", f"rank {number}", sites=at, path=("r",), number=number)
    if usual is None or usual <= 0 or alpha is None:
        return
    expected = {module: patterned(data.get("rank_pattern"), module, usual) for module in ranks}
    other = {module: rank for module, rank in ranks.items() if rank != expected[module]}
    for rank in dict.fromkeys(other.values()):
        sites = tuple(module for module, found in other.items() if found == rank)
        says = f"tensors of rank {rank}, where the configuration says {_listed(expected[m] for m in sites)}"
        yield Observation("other_rank", says, sites=sites)
    if uneven := tuple(module for module, rank in expected.items() if rank != usual):
        says = f"ranks {_listed(expected[m] for m in uneven)} beside {usual}"
        value = "in a name" if base.differ_by_layer(expected) else "by name"
        yield Observation("rank_pattern", says, value, uneven, ("rank_pattern",))
    alphas = {module: patterned(data.get("alpha_pattern"), module, alpha) for module in ranks}
    if uneven := tuple(module for module, value in alphas.items() if value != alpha):
        says = f"alphas {_listed(alphas[m] for m in uneven)} beside {alpha:g}"
        yield Observation("alpha_pattern", says, sites=uneven, path=("alpha_pattern",))
    factors = {m: alphas[m] / (sqrt(expected[m]) if rslora else expected[m]) for m in ranks if expected[m] > 0}
    plain = alpha / (sqrt(usual) if rslora else usual)
    if uneven := tuple(module for module, factor in factors.items() if not isclose(factor, plain, rel_tol=1e-9)):
        says = f"factors {_listed(round(factors[m], 6) for m in uneven)} beside {plain:.6g}"
        path = "rank_pattern" if data.get("rank_pattern") else "alpha_pattern"
        yield Observation("factors", says, sites=uneven, path=(path,))


def _listed(numbers: Iterable[float]) -> str:
    found = sorted(dict.fromkeys(numbers))
    return ", ".join(f"{n:g}" for n in found[:6]) + (" …" if len(found) > 6 else "")
