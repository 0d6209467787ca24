"""A foreign adapter as a set of deltas, in memory: its spec, and each tensor where the plan of that spec has it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from mmap import mmap
from typing import Any

from torch import Tensor

from deltaspec.deltas.finite import is_finite, not_finite
from deltaspec.deltas.initial import build_delta
from deltaspec.deltas.modules import storage_key
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.diagnostics.wording import counted
from deltaspec.formats.base import Base
from deltaspec.formats.incoming import Incoming, IncomingDelta, IncomingSite
from deltaspec.formats.layout import laid_out
from deltaspec.language.load import load
from deltaspec.language.model import DeltaSpec
from deltaspec.methods.declarations import TensorSpec
from deltaspec.names.folding import shown
from deltaspec.names.paths import below
from deltaspec.planning.plan import Plan
from deltaspec.planning.planned import PlannedDelta, PlannedSite
from deltaspec.selection.generalise import selector_of
from deltaspec.storage.delta_set import DeltaSet

_PLACES = {"file": "safetensors", "spec": "deltaspec.json", "lock": "deltaspec.lock.json"}


class ForeignSet(DeltaSet):
    """Deltas that another library saved: it kept nothing of the backbone to compare with, and all is read at once."""

    compares = False

    def replaced(self) -> bool:
        """Return False: a file that is written later is another adapter."""
        return False

    def finding(self, code: str, message: str, suggestion: str | None = None, file: str = "") -> Diagnostic:
        """Make a finding about one of its files, or about all of it."""
        return Diagnostic(code, message, file=str(self.folder / file), suggestion=suggestion)


class ReceivedSet(ForeignSet):
    """What a reader found, as if it had been saved here. Raises DeltaSpecError where it does not fit the base."""

    def __init__(self, incoming: Incoming, base: Base) -> None:
        manifest = {
            "deltas": [{"name": delta.name, **dict.fromkeys(_PLACES, "")} for delta in incoming.deltas],
            "attached": [delta.name for delta in incoming.deltas if delta.attached],
            "strengths": {delta.name: delta.strength for delta in incoming.deltas},
        }
        super().__init__(incoming.folder, manifest)
        self.incoming, self.base = incoming, base
        self.notes = (f"was read from {incoming.kind}", *incoming.remarks)
        self._delta = {delta.name: delta for delta in incoming.deltas}
        self._values: dict[str, dict[str, Tensor]] = {}
        self._plans: dict[str, Plan] = {}
        findings: list[Diagnostic] = []
        for name in self.names:
            try:
                self._values[name] = self._placed(self._delta[name])
            except DeltaSpecError as error:
                findings += error.diagnostics
        if findings:
            raise DeltaSpecError(dict.fromkeys(findings))
        self.file: dict[str, str] = {}
        """The safetensors file that has every tensor of a delta as it is, by the delta's name."""
        self._renamed: dict[str, dict[str, str]] = {}
        self._find_unchanged()

    def way_in(self, name: str) -> str:
        """Return how a delta gets into a model that was compiled without it: there is no spec of it yet."""
        spec = f"deltaspec convert {self.folder} -o OUT makes a spec: c.add it, then load OUT"
        return f'{spec}; or c.library("{self.folder}"), to use it and not train it'

    def _find_unchanged(self) -> None:
        """Find the deltas whose tensors are all in one file as they are, and what they are called there."""
        for name, values in self._values.items():
            places = [self.incoming.origin.get(id(value), ("", "")) for value in values.values()]
            files = {file for file, _ in places}
            if len(files) == 1 and (file := files.pop()).endswith(".safetensors") and len({*places}) == len(places):
                self.file[name] = file
                self._renamed[name] = {theirs: key for (_, theirs), key in zip(places, values, strict=True)}
        self.incoming.held.clear()

    def document(self, *names: str) -> dict[str, Any]:
        """Return the spec of these deltas, by default of all, as a person would write it."""
        deltas = [self._entry(self._delta[name]) for name in names or self.names]
        model = {} if self.base.table.model_type is None else {"model": {"type": self.base.table.model_type}}
        return {"deltaspec": 1, **model, "deltas": deltas}

    def spec(self, name: str) -> DeltaSpec:
        """Return the spec of one delta."""
        return load(self.document(name))

    def plan(self) -> Plan:
        """Plan all of its deltas together. Raises DeltaSpecError."""
        return self.base.plan(self.document())

    def keys(self, name: str) -> set[str] | None:
        """Return the names of a delta's tensors."""
        return set(self._values[name])

    def tensors(self, name: str, findings: list[Diagnostic]) -> dict[str, Tensor] | None:
        """Return a delta's tensors."""
        return self._values[name]

    def read(self, name: str, field: str) -> tuple[bytes | None, list[Diagnostic]]:
        """Return one of a delta's contents as it would lie on disk; of the lock, which nothing here needs, none."""
        if field == "file":
            from safetensors.torch import save as to_bytes

            plain = {key: value.detach().cpu().contiguous().clone() for key, value in self._values[name].items()}
            return to_bytes(plain, {"format": "pt"}), []
        return (json.dumps(self._resolved(name)).encode() if field == "spec" else b""), []

    def renamed(self, name: str) -> Mapping[str, str]:
        """Return the storage keys of a delta's tensors by their names in the adapter's file, if that has them all."""
        return self._renamed.get(name, {})

    def whole_plan(self, names: tuple[str, ...]) -> Plan | None:
        """Plan these deltas together. Raises DeltaSpecError."""
        return self.base.plan(self.document(*names))

    def map(self, name: str) -> tuple[mmap | None, list[Diagnostic]]:
        """Return a delta's tensors as a mapped file holds them: the adapter's own, or one in memory."""
        if name in self._renamed:
            return map_file(self, self.file[name])
        return laid_out(self._values[name], self.base.headers), []

    def planned(self, name: str) -> PlannedDelta | None:
        """Plan one delta, under a name that adapters alike share."""
        return self._alone(name)["delta"]

    def _alone(self, name: str) -> Plan:
        if name not in self._plans:
            document = self.document(name)
            document["deltas"][0]["name"] = "delta"
            try:
                self._plans[name] = self.base.plan(document)
            except DeltaSpecError as error:
                raise DeltaSpecError(self._as_option(name, finding) for finding in error.diagnostics) from None
        return self._plans[name]

    def _as_option(self, name: str, found: Diagnostic) -> Diagnostic:
        """Return what is wrong with a value in the spec that was made, as a finding about the configuration."""
        if not found.code.startswith("DS2"):
            return found
        return self.finding("DS544", f"{name}: {found.message}", "the configuration was changed by hand: save it again")

    def _resolved(self, name: str) -> dict[str, Any]:
        """Return the spec of a delta with every parameter written out."""
        data = self._alone(name).document("delta")
        return {**data, "deltas": [{**data["deltas"][0], "name": name}]}

    def _entry(self, delta: IncomingDelta) -> dict[str, Any]:
        """Write one delta of the spec."""
        data: dict[str, Any] = {"name": delta.name, "method": delta.method}
        if delta.params:
            data["params"] = dict(delta.params)
        if delta.target is not None:
            data["target"] = delta.target
        elif not delta.default_target:
            data["target"] = self._selector(delta.sites, None)
        if overrides := self._overrides(delta.sites):
            data["overrides"] = overrides
        return data

    def _overrides(self, sites: tuple[IncomingSite, ...]) -> list[dict[str, Any]]:
        groups: dict[str, list[IncomingSite]] = {}
        for site in sites:
            if site.params:
                groups.setdefault(json.dumps(dict(site.params), sort_keys=True), []).append(site)
        return [{"match": self._selector(tuple(own), sites), "params": json.loads(key)} for key, own in groups.items()]

    def _wrong(self, delta: str, at: PlannedSite, spec: TensorSpec, value: Tensor) -> list[Diagnostic]:
        """Return what is wrong with the shape or the numbers of a tensor."""
        if tuple(value.shape) != spec.shape:
            message = f"{delta}: {spec.name} of {at.fqn} is {list(value.shape)}, and must be {list(spec.shape)} here"
            hint = "the adapter is for a model of other widths, or its configuration was changed"
            return [self.finding("DS526", message, hint)]
        if not is_finite(value):
            return [not_finite(delta, f"{at.fqn}.{spec.name}", str(self.folder))]
        return []

    def _selector(self, sites: Iterable[IncomingSite], among: Iterable[IncomingSite] | None) -> Any:
        places = frozenset((site.fqn, site.parameter) for site in sites)
        others = None if among is None else frozenset((site.fqn, site.parameter) for site in among)
        if (places, others) not in self.base.selectors:
            self.base.selectors[places, others] = selector_of(places, self.base.table, others)
        return self.base.selectors[places, others]

    def _placed(self, delta: IncomingDelta) -> dict[str, Tensor]:
        """Return a delta's tensors by storage key: those that came, and the buffers that follow from the base."""
        planned = self._alone(delta.name)["delta"]
        given = {(site.fqn, site.parameter): site for site in delta.sites}
        values: dict[str, Tensor] = {}
        lacking: list[tuple[PlannedSite, str, bool]] = []
        findings: list[Diagnostic] = []
        for at in planned.sites:
            own = given.pop((at.site.row.fqn, at.site.parameter), None)
            tensors: Mapping[str, Tensor] = own.tensors if own is not None else {}
            for spec in at.tensors:
                key = storage_key(at.site.row.fqn, spec)
                if spec.name in tensors:
                    values[key] = tensors[spec.name]
                    findings += self._wrong(delta.name, at, spec, values[key])
                else:
                    lacking.append((at, key, spec.buffer))
            if surplus := tensors.keys() - {spec.name for spec in at.tensors}:
                message = f"{delta.name}: {self.incoming.kind} has {', '.join(sorted(surplus))} for {at.fqn}, and "
                message += f"{delta.method} has none with these parameters"
                hint = "the configuration and the file are of two adapters"
                findings.append(self.finding("DS541", message, hint))
        if given:
            places = shown(below(fqn, parameter or "").rstrip(".") for fqn, parameter in given)
            message = f"{delta.name}: {self.incoming.kind} changes {places}, and {delta.method} cannot here"
            findings.append(self.finding("DS541", message, "report it, with the adapter's configuration"))
        missing = [at.fqn for at, key, buffer in lacking if key not in values and not buffer]
        if missing:
            message = f"{delta.name}: there are no values for {counted(len(missing), 'tensor')} of {shown(missing)}"
            findings.append(self.finding("DS541", message, "the adapter was cut, or is for another model"))
        buffers = {key for _, key, buffer in lacking if buffer and key not in values}
        if buffers and self.base.is_meta:
            message = f"{delta.name}: {delta.method} keeps {counted(len(buffers), 'tensor')} that follow from the "
            message += "base model's weights, and there are none"
            findings.append(self.finding("DS542", message, "name the folder of the base model with its weights"))
        if findings:
            raise DeltaSpecError(findings)
        if buffers:
            made = dict(build_delta(planned, planned.seed, self.base.model).tensors())
            values |= {key: made[key] for key in buffers}
        return values


def map_file(of: DeltaSet, file: str) -> tuple[mmap | None, list[Diagnostic]]:
    """Read a file of a set into memory as a mapped one.

    It is not mapped itself: other libraries write into files that are there, and one that is cut ends the process.
    """
    try:
        with (of.folder / file).open("rb") as stream:
            mapped = mmap(-1, os.fstat(stream.fileno()).st_size)
            if stream.readinto(mapped) != len(mapped):
                raise ValueError("it was cut meanwhile")
    except (OSError, ValueError) as error:  # an empty one has no length to map
        message = f"cannot be read: {getattr(error, 'strerror', None) or error}"
        return None, [of.finding("DS521", message, "restore the file", file)]
    return mapped, []
