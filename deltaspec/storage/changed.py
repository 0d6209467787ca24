"""A backbone that was changed after it was compiled: what is saved must be restorable onto a model as it is now."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from deltaspec.backbone.observations import Observations
from deltaspec.backbone.record import Present
from deltaspec.backbone.tabulate import tabulate
from deltaspec.deltas.modules import Deltas, storage_key
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.language.load import load
from deltaspec.names.folding import shown
from deltaspec.planning.plan import Plan
from deltaspec.planning.resolve import resolve
from deltaspec.runtime.copies import without_deltas
from deltaspec.runtime.host import Host


def as_it_is(plan: Plan, names: Iterable[str], present: Present, host: Host, deltas: Deltas) -> Plan:
    """Return the plan of these deltas on the backbone as it is; the plan itself where nothing was changed.

    Raises DeltaSpecError (DS536) where a delta no longer fits.
    """
    if present.structure == plan.structure:
        return plan
    names = tuple(names)
    plain = without_deltas(host)
    table, observations = tabulate(plain), Observations(plain)
    specs = dict.fromkeys(load(plan.document(name, names)) for name in names)
    findings: list[Diagnostic] = []
    parts: list[Plan] = []
    for spec in specs:
        try:
            parts.append(resolve((spec,), table, observations))
        except DeltaSpecError as error:
            findings.append(_lost([d.name for d in spec.deltas], error.diagnostics[0].message))
    now = {delta.name: delta for part in parts for delta in part.deltas}
    for name in [name for name in names if name in now]:
        own = {key: tuple(tensor.shape) for key, tensor in deltas[name].tensors()}
        planned = {storage_key(s.site.row.fqn, t): t.shape for s in now[name].sites for t in s.tensors}
        if other := [key for key in {**own, **planned} if own.get(key) != planned.get(key)]:
            findings.append(_lost([name], f"its tensors do not fit there any more: {shown(other)}"))
    if findings:
        raise DeltaSpecError(findings)
    order = [delta.name for delta in plan.deltas if delta.name in now]
    made = tuple(replace(now[n], attached=plan[n].attached, let_pass=plan[n].let_pass) for n in order)
    return Plan(made, tuple(spec for part in parts for spec in part.specs), table, unused=plan.unused)


def changed_since(plan: Plan, present: Present, host: Host) -> dict[str, frozenset[int] | None]:
    """Return the tensors, or rows of them, that came after the model was compiled, such as those of a new head.

    Who restores the deltas makes the same change again, and draws them anew.
    """
    came = host.came_later()
    if present.structure == plan.structure and not came:
        return {}
    before = {p.fqn: p.shape for row in plan.table.rows for p in (*row.parameters, *row.buffers)}
    found: dict[str, frozenset[int] | None] = {}
    for name in present.tensors:
        shape, old = present.shape(name), before.get(name)
        if old is not None and present.is_turned(name):
            old = old[::-1]
        if name.rpartition(".")[0] not in came and old is not None and shape[1:] == old[1:]:
            rows = range(old[0], shape[0]) if shape else range(0)
            if rows:
                found[name] = frozenset(rows)
        else:
            found[name] = None
    return found


def _lost(names: Iterable[str], reason: str) -> Diagnostic:
    message = f"{', '.join(names)}: the model was changed after it was compiled, and could not take this back: {reason}"
    hint = "take back the change before you save, or compile onto the changed model and train there"
    return Diagnostic("DS536", message, file="<model>", suggestion=hint)
