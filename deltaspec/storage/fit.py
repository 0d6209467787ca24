"""Whether a backbone is the one that saved deltas depend on, in the parts that count, under whatever prefix."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from deltaspec.backbone.record import Present, Record
from deltaspec.backbone.sample import Sampled, Types, again
from deltaspec.names.folding import shown
from deltaspec.names.paths import is_inside
from deltaspec.names.prefixes import Prefix, prefixes

_WRAPPERS = frozenset({"_orig_mod", "module"})
"""Names under which torch.compile and data parallelism hold the whole model."""
Pair = tuple[str, str]
"""A name in the saved model, and the same here."""


@dataclass(slots=True)
class Fit:
    """The differences between what deltas were saved for and a backbone."""

    prefix: Prefix
    structure: list[str] = field(default_factory=list)
    """What differs of modules and shapes, in words."""
    weights: list[str] = field(default_factory=list)
    """FQNs here of tensors with other values."""
    compared: int = 0
    """Number of tensors whose values were compared."""
    notes: list[str] = field(default_factory=list)
    types: Types = Types({})  # noqa: RUF009  (frozen)
    """How exact the values here are."""

    @property
    def is_clean(self) -> bool:
        """Whether nothing differs."""
        return not (self.structure or self.weights)


class Fitter:
    """Compares a record with a backbone, once for all deltas that depend on the same parts of it."""

    def __init__(self, record: Record, present: Present) -> None:
        self._record, self._present = record, present
        self._known: dict[tuple[Prefix, frozenset[str] | None], Fit] = {}
        self._sampled: dict[tuple[Pair, bool], tuple[Sampled | None, int | None]] = {}

    def whole(self) -> Fit | None:
        """Compare all of it, where this is a model of the same class: then it does not matter where the sites are."""
        if self._record.model_class != self._present.modules[""]:
            return None
        return self._fit(Prefix(), None)

    def fit(self, sites: Collection[str], reads: Iterable[str] = ()) -> list[Fit]:
        """Compare what a delta with these sites depends on: the best fit, or all that are equally clean.

        `reads` are tensors that the saved deltas stand for, and this one works on. Empty where no name fits.
        """
        modules = [site if site in self._record.modules else site.rpartition(".")[0] for site in sites]
        found: list[Fit] = []
        whole = self.whole()
        if whole is not None and all(name in self._present.modules for name in modules):
            found.append(self._with(whole, reads))
        if whole is None or not whole.is_clean:
            wanted = [one for one in prefixes(modules, self._present.modules) if one.changes or whole is None]
            found += [self._with(self._fit(prefix, self._parts(prefix, modules)), reads) for prefix in wanted]
        clean = [fit for fit in found if fit.is_clean]
        return clean or sorted(found, key=lambda fit: (len(fit.structure), len(fit.weights)))[:1]

    @staticmethod
    def _parts(prefix: Prefix, modules: Collection[str]) -> frozenset[str] | None:
        """Return the children of the common module that hold sites; None where all of the model counts."""
        wrapped = prefix.changes and not prefix.saved and set(prefix.here.split(".")) <= _WRAPPERS
        if wrapped or "" in modules:
            return None
        depth = len(prefix.saved.split(".")) if prefix.saved else 0
        if not prefix.changes and len({name.partition(".")[0] for name in modules}) == 1:
            depth = 1  # both models, of two classes, have a child in common
        return frozenset(".".join(name.split(".")[: depth + 1]) for name in modules)

    def _with(self, fit: Fit, reads: Iterable[str]) -> Fit:
        """Add what one delta alone depends on."""
        own = Fit(fit.prefix, [*fit.structure], [*fit.weights], fit.compared, fit.notes, fit.types)
        pairs = ((name, fit.prefix.to_here(name)) for name in reads if name in self._record.tensors)
        self._compare(own, [(name, here) for name, here in pairs if here is not None], all_rows=True)
        return own

    def _fit(self, prefix: Prefix, parts: frozenset[str] | None) -> Fit:
        found = self._known.get((prefix, parts))
        if found is None:
            found = self._known[prefix, parts] = Fit(prefix)
            names = list(self._record.tensors)
            within = [i for i, n in enumerate(names) if parts is None or any(is_inside(n, part) for part in parts)]
            needed = names[: within[-1] + 1] if within else []
            pairs = [(name, self._here(prefix, name)) for name in needed]
            sampled = [self._sample(pair)[0] for pair in pairs if pair[1] in self._present.tensors]
            found.types = Types.of(None if one is None else one.now for one in sampled)
            found.structure += self._modules(prefix, parts, needed)
            self._compare(found, pairs)
            owners, recorded = {_owner(here) for _, here in pairs}, {here for _, here in pairs}
            if new := [n for n in self._present.tensors if _owner(n) in owners and n not in recorded]:
                found.structure.append(f"{shown(new)} {'is' if len(new) == 1 else 'are'} new")
            if left := dict.fromkeys(_owner(name) for name in names[len(needed) :]):
                found.notes.append(f"not compared, since this is no {self._record.model_class}: {shown(left)}")
            if prefix.changes:
                found.notes.append(str(prefix))
            found.notes += self._forms(pairs, found.types)
        return found

    @staticmethod
    def _here(prefix: Prefix, name: str) -> str:
        here = prefix.to_here(name)
        return name if here is None else here

    def _sample(self, pair: Pair, all_rows: bool = False) -> tuple[Sampled | None, int | None]:
        """Return the values of both, and how many bits those have that are quantised."""
        found = self._sampled.get((pair, all_rows))
        if found is None:
            name, here = pair
            sample, rows = self._record.tensors[name], self._record.replaced.get(name, frozenset())
            values = self._present.values(here)
            bits = min((bits for bits in (sample.bits, values.bits) if bits is not None), default=None)
            both = None
            if self._alike(sample.shape, self._present.shape(here)) and (all_rows or rows is not None):
                both = again(sample, values, None if all_rows else rows)
            found = self._sampled[pair, all_rows] = both, bits
        return found

    def _alike(self, shape: tuple[int, ...], now: tuple[int, ...]) -> bool:
        """Return whether two shapes are equal, but for a vocabulary that was resized."""
        if shape == now:
            return True
        sizes = self._record.vocabulary, self._present.vocabulary
        return bool(shape and now) and (shape[0], now[0]) == sizes and shape[1:] == now[1:]

    def _compare(self, fit: Fit, pairs: list[Pair], *, all_rows: bool = False) -> None:
        """Compare shapes and values."""
        record, present, unknown, idle = self._record, self._present, list[str](), list[str]()
        for pair in pairs:
            name, here = pair
            if not all_rows and record.replaced.get(name, frozenset()) is None:
                continue
            if here not in present.tensors:
                if _owner(here) in present.modules and not self._is_unused(name, here):
                    fit.structure.append(f"{here} is missing")
                continue
            was, now = record.tensors[name].shape, present.shape(here)
            both, _ = self._sample(pair, all_rows)
            if not self._alike(was, now):
                if not self._is_unused(name, here):
                    fit.structure.append(f"{here} is {list(now)}, was {list(was)}")
            elif both is None:
                unknown.append(here)
            else:
                fit.compared += 1
                if not both.agree(record.types, fit.types):
                    (idle if self._is_unused(name, here) else fit.weights).append(here)
        if unknown:
            fit.notes.append(f"without values that could be compared: {shown(unknown)}")
        if idle:
            fit.notes.append(f"other weights, which nothing that the model gives depends on: {shown(idle)}")

    def _is_unused(self, name: str, here: str) -> bool:
        """Return whether a tensor belongs to a module that the output does not use; asked only where it differs."""
        return _owner(name) in self._record.unused or _owner(here) in self._present.unused

    def _modules(self, prefix: Prefix, parts: frozenset[str] | None, needed: list[str]) -> Iterator[str]:
        """Return which modules are missing, new, or of another class."""
        record, present = self._record, self._present
        owners = {_owner(name) for name in needed}
        missing: list[str] = []
        others: dict[str, list[str]] = {}
        stood_for = self._stood_for()
        for name, kind in record.modules.items():
            if name in stood_for:
                continue
            if parts is not None and name not in owners and not any(is_inside(name, part) for part in parts):
                continue
            here = self._here(prefix, name)
            if here not in present.modules:
                if not self._is_unused(name + ".", here + "."):
                    missing.append(here)
            elif _kind(now := present.modules[here]) != _kind(kind):
                others.setdefault(f"a {now}, was a {kind}", []).append(here)
        recorded = {self._here(prefix, name) for name in record.modules}
        within = [prefix.here] if parts is None else [self._here(prefix, part) for part in parts]
        new = [n for n in present.modules if n not in recorded and any(is_inside(n, part) for part in within)]
        if parts is None:  # a head beside what there was changes nothing of it
            new = [name for name in new if _top(name, new) and _owner(name) != prefix.here]
        for names, what in ((missing, "missing"), (new, "new")):
            if tops := [name for name in names if _top(name, names)]:
                yield f"{shown(tops)} {'is' if len(tops) == 1 else 'are'} {what}"
        yield from (f"{shown(names)} {'is' if len(names) == 1 else 'are'} {what}" for what, names in others.items())
        roots = {prefix.saved} if prefix.changes else {_owner(part) for part in parts or ()} - {""}
        for root in roots:
            was, here = record.modules.get(root), self._here(prefix, root)
            if was is not None and present.modules.get(here, was) != was:
                yield f"{here or 'the model'} is a {present.modules[here]}, was a {was}"

    def _stood_for(self) -> set[str]:
        """Return the modules all of whose tensors deltas stand for."""
        whole: dict[str, bool] = {}
        for name in self._record.tensors:
            gone = self._record.replaced.get(name, frozenset()) is None
            whole[_owner(name)] = whole.get(_owner(name), True) and gone
        return {name for name, gone in whole.items() if gone}

    def _forms(self, pairs: Iterable[Pair], types: Types) -> Iterator[str]:
        """Return in which form the weights are, where it is another than when the deltas were saved."""
        known = [(pair[1], *self._sample(pair)) for pair in pairs if pair[1] in self._present.tensors]
        quantised = [here for here, both, bits in known if both is not None and bits is not None]
        if quantised:
            yield f"compared as far as quantised values allow it: {shown(quantised)}"
        before, now = set(self._record.types.coarsest.values()), set(types.coarsest.values())
        if before != now and before and now:
            yield f"the weights are {_dtypes(now)}, and were {_dtypes(before)} when the deltas were saved"


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _top(name: str, names: Collection[str]) -> bool:
    """Return whether no module that holds this one is among the names."""
    return not any(other != name and is_inside(name, other) for other in names)


def _kind(kind: str) -> str:
    """Return a class's name; batch norms that are synchronised between processes are the same as others."""
    return "BatchNorm" if kind == "SyncBatchNorm" or kind.startswith("BatchNorm") else kind


def _dtypes(dtypes: Iterable[object]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
