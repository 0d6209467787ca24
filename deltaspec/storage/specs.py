"""The specs of a saved set: cut to the deltas that are asked for; what they select under another prefix."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.diagnostics.progress import tracked
from deltaspec.language.model import DeltaSpec
from deltaspec.methods.registry import methods
from deltaspec.names.prefixes import Prefix
from deltaspec.storage.delta_set import DeltaSet


def specs_of(saved: DeltaSet, names: Iterable[str]) -> list[DeltaSpec]:
    """Read the specs of these deltas, cut to them and to what they are derived from; derived ones share one.

    Raises DeltaSpecError with the findings of all, a spec with deltas that the manifest does not list (DS535) included.
    """
    found: dict[DeltaSpec, set[str]] = {}
    findings: list[Diagnostic] = []
    waiting, seen = list(names), set[str]()
    for name in tracked(waiting, "reading specs", len(waiting)):
        if name in seen:
            continue
        seen.add(name)
        file, problems = saved.entry[name]["spec"], saved.read(name, "spec")[1]
        try:
            if problems:
                raise DeltaSpecError(problems)
            spec = saved.spec(name)
        except DeltaSpecError as error:
            findings += error.diagnostics
            continue
        entries = {entry.name: entry for entry in spec.deltas}
        for other in entries.keys() - saved.entry.keys():
            message = f"has the delta {other!r}, which the manifest does not list: its values are not here"
            findings.append(saved.finding("DS535", message, "save the deltas again, all of them", file))
        if name not in entries:
            findings.append(saved.finding("DS522", f"has no delta {name!r}", "save again", file))
            continue
        found.setdefault(spec, set()).add(name)
        waiting += [source for source in entries[name].sources if source in saved.entry]
    if findings:
        raise DeltaSpecError(dict.fromkeys(findings))
    return [_cut(spec, wanted) for spec, wanted in found.items()]


def _cut(spec: DeltaSpec, names: Collection[str]) -> DeltaSpec:
    kept = tuple(entry for entry in spec.deltas if entry.name in names)
    return spec if len(kept) == len(spec.deltas) else spec.model_copy(update={"deltas": kept})


def moved(saved: DeltaSet, data: Mapping[str, Any], prefixes: Mapping[str, Prefix], modules: Collection[str]) -> Any:
    """Return a spec's data with the sites named one by one, as they are called here, for deltas under another prefix.

    Raises DeltaSpecError where a lock cannot be read.
    """
    deltas = []
    for entry in data["deltas"]:
        name = entry["name"]
        prefix = prefixes.get(name)
        if prefix is None or not prefix.changes or "from" in entry:
            deltas.append(entry)
            continue
        overrides = []
        targets: list[Any] = []
        for sites, params in saved.groups(name):
            here = [_selector(prefix.to_here(site) or "", modules) for site in sites]
            targets += here
            if params:
                overrides.append({"match": {"any": here}, "params": params})
        chooser = methods()[entry["method"]].role_choice
        params = {key: value for key, value in entry.get("params", {}).items() if key != chooser}
        rest = {key: value for key, value in entry.items() if key not in ("overrides", "params", "target")}
        more = {"params": params, "target": {"any": targets}, "overrides": overrides}
        deltas.append(rest | {key: value for key, value in more.items() if value})
    return json.loads(json.dumps({**data, "deltas": deltas}))


def _selector(site: str, modules: Collection[str]) -> dict[str, str]:
    if site in modules:
        return {"path": site}
    module, _, parameter = site.rpartition(".")
    return {"path": module, "parameter": parameter}
