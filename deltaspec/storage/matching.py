"""Whether saved deltas may be read onto a backbone: how much of it must be as it was, and what was let pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from deltaspec.backbone.fingerprint import weights_fingerprint
from deltaspec.backbone.observations import Observations
from deltaspec.backbone.record import Present
from deltaspec.diagnostics.findings import Diagnostic
from deltaspec.names.folding import shown
from deltaspec.names.prefixes import Prefix
from deltaspec.planning.plan import Plan
from deltaspec.runtime.copies import without_deltas
from deltaspec.runtime.ports import View
from deltaspec.storage.delta_set import DeltaSet
from deltaspec.storage.fit import Fit, Fitter

Match: TypeAlias = Literal["weights", "structure", "sites"]
"""How much of the backbone must be as it was when the deltas were saved: the values of its weights, too; modules, names
and shapes alone; or no more than that the deltas find their sites."""
_MOST = 3
"""Differences that a message names."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of comparing what one saved delta depends on with a backbone."""

    prefix: Prefix = Prefix()  # noqa: RUF009  (frozen)
    notes: tuple[str, ...] = ()
    let_pass: tuple[str, ...] = ()
    """Differences that `match` let pass."""


def checked(match: str) -> Match:
    """Refuse a level of `match` that there is not."""
    for level in get_args(Match):
        if level == match:
            found: Match = level
            return found
    raise ValueError(f"match is 'weights', 'structure' or 'sites', not {match!r}")


def present_of(view: View, plan: Plan, inputs: Any = None) -> Present:
    """Return a view's backbone as it is without any delta; a forward with these inputs tells what is used of it."""

    def unused() -> frozenset[str]:
        return plan.unused | Observations(without_deltas(view.host), inputs).unused()

    return Present(view.host.backbone, view.kept(), unused)


class Matcher:
    """Compares saved sets with one backbone; those that were saved for one record are compared once."""

    def __init__(self, present: Present, match: Match) -> None:
        self.present, self.match = present, match
        self._fitters: list[tuple[Any, Fitter]] = []
        self._weights: list[str | None] = []

    def outcomes(self, saved: DeltaSet, names: Iterable[str], findings: list[Diagnostic]) -> dict[str, Outcome]:
        """Return what came of each delta; a finding (DS523, DS537) for those that may not be read."""
        if not saved.compares:
            return {name: Outcome(notes=saved.notes) for name in names}
        if not saved.has_record:
            passed, problems = self._by_digest(saved)
            findings += problems
            return {name: Outcome(let_pass=passed) for name in names}
        fitter = self._fitter(saved)
        whole = fitter.whole()
        found: dict[str, Outcome] = {}
        refused: dict[tuple[tuple[str, ...], tuple[str, ...]], tuple[Fit, list[str]]] = {}
        lost: dict[str, list[str]] = {}
        for name in names:
            reads = saved.entry[name].get("reads", [])
            fits = [whole] if whole is not None and whole.is_clean and not reads else None
            if fits is None:
                sites, problems = saved.sites(name)
                findings += problems
                if problems:
                    continue
                fits = fitter.fit(sites, reads)
            if not fits:
                lost[name] = [site for site in sites if site not in self.present.modules] or sites
                continue
            fit = fits[0]
            found[name] = Outcome(fit.prefix, tuple(fit.notes), self._let_pass(fit))
            if len(fits) > 1 and len({tuple(map(one.prefix.to_here, sites)) for one in fits}) > 1:
                findings.append(_ambiguous(saved, name, fits))
            elif not (fit.is_clean or self.match == "sites" or (self.match == "structure" and not fit.structure)):
                refused.setdefault((tuple(fit.structure), tuple(fit.weights)), (fit, []))[1].append(name)
        if lost:
            sites = list(dict.fromkeys(site for own in lost.values() for site in own))
            nowhere = Fit(Prefix(), [f"{shown(sites)} {'is' if len(sites) == 1 else 'are'} not here, under any prefix"])
            findings.append(self._refusal(saved, nowhere, list(lost)))
        findings += [self._refusal(saved, fit, of) for fit, of in refused.values()]
        return found

    def _fitter(self, saved: DeltaSet) -> Fitter:
        data = saved.manifest["backbone"]["record"]
        for known, fitter in self._fitters:
            if known == data:
                return fitter
        self._fitters.append((data, Fitter(saved.record(), self.present)))
        return self._fitters[-1][1]

    def _by_digest(self, saved: DeltaSet) -> tuple[tuple[str, ...], list[Diagnostic]]:
        """Compare a set of an earlier version, which kept two digests of the backbone and nothing else."""
        before, passed = saved.manifest["backbone"], list[str]()
        if before["structure"] != self.present.structure:
            kinds = f"{before['class']}, whose structure differs from this {self.present.modules['']}"
            if self.match != "sites":
                message = f"was saved for another backbone: {kinds}"
                return (), [saved.finding("DS523", message, self._way_out("sites"))]
            passed.append(f'match="sites" let pass that it was saved for {kinds}')
        if not self._weights:
            self._weights.append(weights_fingerprint(self.present.backbone, self.present.kept))
        if before["weights"] is not None and None is not self._weights[0] != before["weights"]:
            if self.match == "weights":
                message = "was saved for a backbone of this structure with other weights (an earlier version kept one "
                message += "digest of them all, in their dtype, which tells no more)"
                return (), [saved.finding("DS523", message, self._way_out("structure") + ", and save it again")]
            passed.append(f'match="{self.match}" let pass weights of another digest')
        return tuple(passed), []

    @staticmethod
    def _way_out(match: str) -> str:
        return f"load the model that the deltas were trained on; {_taking(match)}"

    def _refusal(self, saved: DeltaSet, fit: Fit, names: list[str]) -> Diagnostic:
        who = "" if len(names) == len(saved.names) else f"{', '.join(names[:8])}{' …' * (len(names) > 8)}: "
        if fit.structure:
            was, now = saved.manifest["backbone"]["class"], self.present.modules[""]
            more = f"; and {len(fit.structure) - _MOST} more" if len(fit.structure) > _MOST else ""
            message = f"{who}was saved for another backbone: {was}, whose structure differs from this {now}: "
            message += "; ".join(fit.structure[:_MOST]) + more
            return saved.finding("DS523", message, self._way_out("sites"))
        message = f"{who}was saved for a backbone of this structure with other weights: {_listed(fit)}"
        hint = "load the checkpoint that the deltas were trained on (a part that is drawn anew at each load, such as a "
        hint += "head, is to be saved with them: method full); " + _taking("structure")
        return saved.finding("DS523", message, hint)

    def _let_pass(self, fit: Fit) -> tuple[str, ...]:
        said = f'match="{self.match}" let pass'
        other = [f"{said} another structure: {text}" for text in fit.structure]
        return (*other, f"{said} other weights: {_listed(fit)}") if fit.weights else tuple(other)


def _taking(match: str) -> str:
    return f'match="{match}" (--match {match}) lets it pass'


def _listed(fit: Fit) -> str:
    names = fit.weights
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    verb = "differs" if len(names) == 1 else "differ"
    return f"{', '.join(names[:_MOST])}{more} {verb} ({len(names)} of the {fit.compared} tensors that it depends on)"


def _ambiguous(saved: DeltaSet, name: str, fits: list[Fit]) -> Diagnostic:
    places = ", ".join(repr(fit.prefix.here) for fit in fits[:8])
    message = f"{name}: the modules that it was trained on are here several times with the same weights: under {places}"
    return saved.finding("DS537", message, f"read it onto one of them, such as model.{fits[0].prefix.here}")
