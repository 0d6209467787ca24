"""What the deltas of jobs are to their training: trained by one job, or frozen under the rows of any number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic

if TYPE_CHECKING:
    from deltaspec.compiler.compiled import CompiledModel


def trained_of(c: CompiledModel, names: Sequence[str]) -> tuple[str, ...]:
    """Return those of these deltas that training changes: not frozen, not derived from others, not of a library."""
    own = {delta.name for delta in c.plan.deltas if delta.derived is None}
    return tuple(n for n in names if n in own and any(p.requires_grad for p in c.deltas[n].parameters()))


def refusals(c: CompiledModel, jobs: Iterable[tuple[str, Sequence[str]]]) -> list[list[Diagnostic]]:
    """Return, job by job, why its deltas cannot be trained beside those of the others (DS434, DS381, DS382).

    A delta that two jobs train, or that one trains and another stands on, would learn what neither learns alone.
    """
    given, trainer, found = list(jobs), dict[str, str](), list[list[Diagnostic]]()
    for name, deltas in given:
        own: list[Diagnostic] = []
        try:
            c.trainable_parameters(*deltas)  # raises for unknown names
            trained = trained_of(c, deltas)
            c.parameter_groups(*(trained or deltas))  # raises where there is nothing to train
        except DeltaSpecError as error:
            trained, own = (), list(error.diagnostics)
        for delta in trained:
            if delta in trainer:
                message = f"the delta {delta!r} is trained by the jobs {trainer[delta]!r} and {name!r}"
                hint = "each job trains deltas of its own; what several stand on is frozen: "
                hint += f"c.deltas[{delta!r}].requires_grad_(False)"
                own.append(Diagnostic("DS382", message, "<jobs>", suggestion=hint))
            trainer.setdefault(delta, name)
        found.append(own)
    for (name, deltas), own in zip(given, found, strict=True):
        for delta in deltas:
            moving = next((source for source in _sources(c, delta) if source in trainer), None)
            if moving is not None:
                message = f"the job {name!r} stands on {delta!r}, which is derived from {moving!r}, which the job "
                message += f"{trainer[moving]!r} trains"
                hint = f"train {moving!r} first, or freeze it: c.deltas[{moving!r}].requires_grad_(False)"
                own.append(Diagnostic("DS382", message, "<jobs>", suggestion=hint))
    return found


def _sources(c: CompiledModel, name: str) -> Iterator[str]:
    """Yield all deltas that a derived one is computed from, those behind other derived ones included."""
    derived = {delta.name: delta.derived for delta in c.plan.deltas if delta.derived is not None}
    for source, _ in derived[name].sources if name in derived else ():
        yield source
        yield from _sources(c, source)
