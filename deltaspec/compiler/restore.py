"""`deltaspec.restore`: a compiled model from a plain one and saved deltas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from os import PathLike
from typing import Any

from torch import nn

from deltaspec.backbone.observations import Observations
from deltaspec.backbone.record import Present
from deltaspec.compiler.build import build
from deltaspec.compiler.compile import refuse_unusable
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic, require_known
from deltaspec.formats.base import Base
from deltaspec.formats.opening import open_set
from deltaspec.language.load import load as load_spec
from deltaspec.language.model import DeltaSpec
from deltaspec.planning.plan import Plan
from deltaspec.planning.resolve import plan
from deltaspec.storage.delta_set import DeltaSet
from deltaspec.storage.load import fill, remarked, settled
from deltaspec.storage.matching import Match, Matcher, Outcome, checked
from deltaspec.storage.specs import moved, specs_of


def restore(
    model: nn.Module,
    directory: str | PathLike[str],
    *names: str,
    capture: str = "auto",
    example_inputs: Any = None,
    match: Match = "weights",
) -> CompiledModel:
    """Compile the saved specs onto a model and load the saved tensors; the deltas that were attached when saving are
    attached, as strongly. `names` choose some of them.

    The model must be the one that they were saved for, in what they depend on: not in what they put in the place of it,
    nor in what its output does not use. Its weights may be a cast or a quantised form of those that there were, and its
    class another around the same modules. `match` lets more pass: `structure` other weights, `sites` all but that the
    deltas find their sites; the plan and the next lock say what was let pass.

    Raises DeltaSpecError with all findings; `model` is never changed.
    """
    refuse_unusable(model, capture)
    level = checked(match)
    base = cache(lambda: Base(model, example_inputs))
    return settled(
        lambda: open_set(directory, base), lambda saved: _restore(model, saved, names, capture, example_inputs, level)
    )


@dataclass(frozen=True, slots=True)
class Prepared:
    """Saved deltas on a model, before anything is built."""

    plan: Plan
    names: tuple[str, ...]
    """Deltas that are taken: those that were asked for, and what they are derived from."""
    outcomes: Mapping[str, Outcome]
    findings: list[Diagnostic]
    """What is wrong with the files; of the plan there is nothing."""


def prepared(model: nn.Module, saved: DeltaSet, names: tuple[str, ...], example_inputs: Any, match: Match) -> Prepared:
    """Compare saved deltas, by default all of a set, with a model, and plan them on it. Raises DeltaSpecError."""
    require_known(names, saved.names, saved.folder)
    chosen, findings = names or tuple(saved.names), list[Diagnostic]()
    observations = Observations(model, example_inputs)
    matcher = Matcher(Present(model, unused=observations.unused), match)
    try:
        specs = specs_of(saved, chosen)
    except DeltaSpecError as error:  # of which another backbone may be the cause
        matcher.outcomes(saved, chosen, findings)
        damaged = [finding for name in chosen for finding in saved.read(name, "file")[1]]
        raise DeltaSpecError(dict.fromkeys([*findings, *error.diagnostics, *damaged])) from error
    together = {entry.name for spec in specs for entry in spec.deltas}
    chosen = tuple(name for name in saved.names if name in together)
    outcomes = matcher.outcomes(saved, chosen, findings)
    try:
        planned = planned_on(model, saved, specs, outcomes, matcher.present, example_inputs)
    except DeltaSpecError as error:
        raise DeltaSpecError([*findings, *error.diagnostics]) from error
    return Prepared(remarked(planned, outcomes), chosen, outcomes, findings)


def _restore(
    model: nn.Module, saved: DeltaSet, names: tuple[str, ...], capture: str, example_inputs: Any, match: Match
) -> CompiledModel:
    ready = prepared(model, saved, names, example_inputs, match)
    # Every value comes from the files: no decomposition of a weight, no tokenizer of a text is needed.
    built, capture, reason = build(model, ready.plan, capture, drawn=False)
    fill(built.active, ready.plan, built.host.deltas, saved, ready.outcomes, ready.names, ready.findings)
    compiled = CompiledModel(built, capture, reason)
    compiled.only({name: strength for name, strength in saved.attached.items() if name in ready.names})
    return compiled


def planned_on(
    model: nn.Module,
    saved: DeltaSet,
    specs: Sequence[DeltaSpec],
    outcomes: Mapping[str, Outcome],
    present: Present,
    example_inputs: Any,
) -> Plan:
    """Plan the specs; where names have another prefix here and a selector means it, with the sites named one by one."""
    if (known := saved.whole_plan(tuple(outcomes))) is not None:
        return known
    prefixes = {name: outcome.prefix for name, outcome in outcomes.items() if outcome.prefix.changes}
    if not prefixes:
        return plan(model, *specs, example_inputs=example_inputs)
    sites = {name: [prefix.to_here(site) for site in saved.sites(name)[0]] for name, prefix in prefixes.items()}
    try:
        planned = plan(model, *specs, example_inputs=example_inputs)
        if all([site.fqn for site in planned[name].sites] == own for name, own in sites.items()):
            return planned
    except DeltaSpecError:  # so it does, or the plan below says the same
        pass
    renamed = [load_spec(moved(saved, spec.to_data(), prefixes, present.modules)) for spec in specs]
    return plan(model, *renamed, example_inputs=example_inputs)
