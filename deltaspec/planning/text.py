"""The plan written out: as text a reviewer can approve, as Markdown for a pull request, as JSON data."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltaspec.diagnostics.clean import clean
from deltaspec.diagnostics.wording import counted, plural
from deltaspec.language.matrix import label
from deltaspec.names.folding import fold, unfold
from deltaspec.planning.passes import as_data, in_words
from deltaspec.planning.planned import PlannedDelta, PlannedDeltas, PlannedSite, count_trainable, fraction

if TYPE_CHECKING:
    from rich.text import Text

    from deltaspec.methods.declarations import MethodParams

WIDTH = 100
_GLUE = "\u00a0"
"""A space at which no line breaks."""


@dataclass(frozen=True, slots=True)
class Group:
    """Sites of one delta that get the same tensors from the same parameters."""

    patterns: tuple[tuple[str, int], ...]
    """Folded names, and for how many sites each stands."""
    tensors: tuple[tuple[str, tuple[int, ...], bool], ...]
    """Name and shape of each tensor, and whether it is a buffer."""
    params: dict[str, Any]
    """Parameters that an override changes."""
    bypassed: bool
    """Whether their host reads the weight without calling them, so that the delta works on the weight."""
    sites: int
    trainable: int


def groups(delta: PlannedDelta) -> list[Group]:
    """Put the sites of a delta together that differ in their names only, in the order of the first ones."""
    dumped: dict[int, dict[str, Any]] = {}
    found: dict[object, list[PlannedSite]] = {}
    for site in delta.sites:
        if id(site.params) not in dumped:
            dumped[id(site.params)] = _changed(site.params, delta.params)
        shapes = tuple((t.name, t.shape, t.buffer, t.key is not None) for t in site.tensors)
        found.setdefault((shapes, repr(dumped[id(site.params)]), site.site.host is not None), []).append(site)
    return [
        Group(
            patterns=tuple((pattern, len(unfold(pattern))) for pattern in fold(site.fqn for site in sites)),
            tensors=tuple((t.name, t.shape, t.buffer) for t in sites[0].tensors),
            params=dumped[id(sites[0].params)],
            bypassed=sites[0].site.host is not None,
            sites=len(sites),
            trainable=count_trainable(sites),
        )
        for sites in found.values()
    ]


def plain(plan: PlannedDeltas) -> str:
    """Write the plan as plain text, 100 columns wide."""
    return "\n".join(line for line, _ in _lines(plan))


def coloured(plan: PlannedDeltas) -> Text:
    """Write the plan for a terminal: the same text, with styles."""
    from rich.text import Text

    text = Text(no_wrap=True, overflow="ignore")
    for number, (line, style) in enumerate(_lines(plan)):
        text.append("\n" * (number > 0) + line, style or None)
    return text


def _lines(plan: PlannedDeltas) -> Iterator[tuple[str, str]]:
    """Return the lines of the plan, each with its style."""
    yield from _wrapped(f"Plan for {_model(plan)}", "bold")
    matrices = matrices_of(plan.deltas)
    for delta in plan.deltas:
        yield "", ""
        if delta.name in matrices:
            yield from _wrapped(matrices[delta.name], "bold magenta")
            yield "", ""
        start = "" if delta.attached else "  (starts detached)"
        yield from _wrapped(f"{delta.name}: {_made(delta)}{start}", "bold cyan")
        place = "" if delta.location == "<spec>" else f"  ({delta.location})"
        yield from _wrapped(f"  {_size(len(delta.sites), delta.trainable, plan)}{place}")
        if delta.train is not None:
            yield from _wrapped(f"  train: {_assignments(delta.train.to_data())}")
        for group in groups(delta):
            several = len(group.patterns) > 1
            for pattern, count in group.patterns:
                times = f"  ({count}{_GLUE}sites)" if several and count > 1 else ""
                yield from _wrapped(f"    {clean(pattern) or '(the model itself)'}{times}")
            yield from _wrapped(f"      {_content(group)}", "dim")
        yield from _remarks(delta.checks, (*delta.notes, *delta.let_pass))
    if len(plan.deltas) != 1 or plan.checks or plan.notes:
        yield "", ""
        number = f"{len(plan.deltas)} {plural(len(plan.deltas), 'delta')}"
        yield from _wrapped(f"Total: {number}, {_size(len(plan.sites), plan.trainable, plan)}", "bold")
        yield from _remarks(plan.checks, plan.notes)
    yield "", ""
    if passes := in_words(plan):
        yield from _wrapped(passes, "dim")
    yield f"Fingerprint: {plan.fingerprint}", "dim"


def matrices_of(deltas: Sequence[PlannedDelta]) -> dict[str, str]:
    """Say what each matrix comes to, by the name of its first delta."""
    found: dict[tuple[str, str, tuple[str, ...]], list[PlannedDelta]] = {}
    for delta in deltas:
        if delta.matrix:
            found.setdefault((delta.location, delta.name.partition("[")[0], tuple(delta.matrix)), []).append(delta)
    said = {}
    for (_, name, axes), members in found.items():
        values = ([label(member.matrix[axis]) for member in members] for axis in axes)
        listed = " × ".join(f"{axis} {', '.join(dict.fromkeys(v))}" for axis, v in zip(axes, values, strict=True))
        said[members[0].name] = f"{name}: a matrix of {counted(len(members), 'delta')}, {listed}"
    return said


def _remarks(checks: tuple[str, ...], notes: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for check in checks:
        yield from _wrapped(f"  ✓ {check}", "green")
    for note in notes:
        yield from _wrapped(f"  ! {note}", "yellow")


def _wrapped(line: str, style: str = "") -> Iterator[tuple[str, str]]:
    line = clean(line, keep=_GLUE)
    indent = len(line) - len(line.lstrip())
    for part in textwrap.wrap(
        line, WIDTH, subsequent_indent=" " * (indent + 4), break_on_hyphens=False, replace_whitespace=False
    ):
        yield part.replace(_GLUE, " "), style


def _content(group: Group) -> str:
    tensors = ", ".join(f"{name} {list(shape)}{' (buffer)' * buffer}" for name, shape, buffer in group.tensors)
    text = f"{group.sites} × {tensors} = {group.trainable:,}"
    if group.params:
        text += f"; override: {_assignments(group.params)}"
    return text + "; through the weight, not around a call" * group.bypassed


def _model(plan: PlannedDeltas) -> str:
    kind = f"{plan.model_type}, " if plan.model_type else ""
    return f"{plan.model_class} ({kind}{plan.base_parameters:,} parameters)"


def _size(sites: int, trainable: int, plan: PlannedDeltas) -> str:
    share = percent(fraction(trainable, plan.base_parameters))
    return f"{sites} {plural(sites, 'site')}, {trainable:,} trainable parameters, {share} of the base"


def percent(share: float) -> str:
    """Write a fraction as per cent: two decimals, more where it is tiny."""
    return f"{100 * share:.2f} %" if share >= 0.0001 or not share else f"{100 * share:.2g} %"


def _made(delta: PlannedDelta) -> str:
    """Write what a delta is: its method with the parameters, or what it is derived from."""
    if delta.derived is not None:
        return str(delta.derived)
    return f"{delta.method} {show_params(delta.params, delta.budget)}".rstrip()


def show_params(params: MethodParams, budget: tuple[str, str] | None = None) -> str:
    """Write the parameters that matter: all numbers, the others where they differ from the default.

    `budget` is the name of the one that was chosen for a budget, and the budget.
    """
    shown: dict[str, Any] = {}
    for name, field in type(params).model_fields.items():
        value = getattr(params, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number or value != field.get_default(call_default_factory=True):
            shown[name] = value
    if budget is not None:
        shown[budget[0]] = f"{shown[budget[0]]} (budget {budget[1]})"
    return _assignments(shown)


def _assignments(values: dict[str, Any]) -> str:
    return " ".join(f"{name}={_value(value)}" for name, value in values.items())


def _value(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower() if value is not None else "null"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _changed(params: MethodParams, base: MethodParams) -> dict[str, Any]:
    own, usual = params.model_dump(mode="json"), base.model_dump(mode="json")
    return {name: value for name, value in own.items() if value != usual[name]}


def model_data(plan: PlannedDeltas) -> dict[str, Any]:
    """Return what a plan's model is, as JSON data."""
    size, structure = plan.base_parameters, plan.structure
    return {"class": plan.model_class, "type": plan.model_type, "parameters": size, "structure": structure}


def plan_data(plan: PlannedDeltas) -> dict[str, Any]:
    """Return the plan as JSON data."""
    return {
        "model": model_data(plan),
        "specs": [{"name": spec.name, "digest": spec.digest} for spec in plan.specs],
        "deltas": [_delta_data(delta) for delta in plan.deltas],
        "sites": len(plan.sites),
        "trainable": plan.trainable,
        "fraction": plan.fraction,
        "checks": list(plan.checks),
        "notes": list(plan.notes),
        "passes": as_data(plan),
        "fingerprint": plan.fingerprint,
    }


def _delta_data(delta: PlannedDelta) -> dict[str, Any]:
    return {
        "name": delta.name,
        "method": delta.method,
        "attached": delta.attached,
        "seed": delta.seed,
        "params": delta.params.model_dump(mode="json"),
        "matrix": dict(delta.matrix),
        "train": delta.train and delta.train.to_data(),
        "derived": delta.derived and delta.derived.to_data(),
        "spec": delta.spec,
        "location": delta.location,
        "sites": len(delta.sites),
        "trainable": delta.trainable,
        "groups": [
            {
                "at": [pattern for pattern, _ in group.patterns],
                "sites": group.sites,
                "tensors": {name: list(shape) for name, shape, _ in group.tensors},
                "buffers": [name for name, _, buffer in group.tensors if buffer],
                "params": group.params,
                "bypassed": group.bypassed,
                "trainable": group.trainable,
            }
            for group in groups(delta)
        ],
        "checks": list(delta.checks),
        "notes": list(delta.notes),
        "let_pass": list(delta.let_pass),
    }


def markdown(plan: PlannedDeltas) -> str:
    """Write the plan for a comment in a pull request."""
    out = [f"### Plan for {_model(plan)}", ""]
    out += ["| delta | method | sites | trainable | of the base |", "|---|---|---:|---:|---:|"]
    rows = [(d.name, _made(d), len(d.sites), d.trainable) for d in plan.deltas]
    if len(rows) > 1:
        rows.append(("**total**", "", len(plan.sites), plan.trainable))
    for name, method, sites, trainable in rows:
        share = percent(fraction(trainable, plan.base_parameters))
        out.append(f"| {name} | {_cell(method)} | {sites:,} | {trainable:,} | {share} |")
    for delta in plan.deltas:
        start = "" if delta.attached else ", starts detached"
        out += ["", f"<details><summary>{delta.name}: {counted(len(delta.sites), 'site')}{start}</summary>", ""]
        out += ["| sites | tensors |", "|---|---|"]
        for group in groups(delta):
            names = "<br>".join(f"`{_cell(pattern or '(the model itself)')}`" for pattern, _ in group.patterns)
            out.append(f"| {names} | {_cell(_content(group))} |")
        out += ["", "</details>"]
    checks = [*(check for delta in plan.deltas for check in delta.checks), *plan.checks]
    notes = [*(note for delta in plan.deltas for note in delta.notes), *plan.notes]
    out += ["", *(f"- ✅ {check}" for check in checks), *(f"- ⚠️ {note}" for note in notes)]
    if passes := in_words(plan):
        out += ["", passes]
    out += ["", f"<sub>{plan.fingerprint}</sub>"]
    return "\n".join(map(clean, out))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
