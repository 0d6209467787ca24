"""The rank that a delta's budget pays for: the largest one, over all its sites."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from deltaspec.diagnostics.wording import counted
from deltaspec.methods.base import Method
from deltaspec.methods.declarations import MethodParams, Site
from deltaspec.methods.matrices import site_tensors
from deltaspec.methods.shared.rank import MAX_RANK, Budget
from deltaspec.planning.planned import PlannedSite, count_trainable

Params = TypeVar("Params", bound=MethodParams)
Total = Callable[[int], int | None]
"""Trainable parameters of a delta under a rank; None where a site refuses it."""
_PATIENCE = 4096
"""Ranks refused in a row (one that must divide a width, say) after which larger ones are taken to be refused, too."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The rank that was chosen for a budget."""

    name: str
    """Name of the parameter that is a budget."""
    budget: Budget
    rank: int
    problem: str | None = None
    """Reason why the budget cannot be kept; None: it can."""
    suggestion: str | None = None

    def put(self, params: Params) -> Params:
        """Return the parameters with the rank in place of the budget; an override's own rank stays."""
        if not isinstance(getattr(params, self.name), Budget):
            return params
        return params.model_copy(update={self.name: self.rank})


def choose_rank(
    method: Method, params: MethodParams, sites: Sequence[tuple[Site, MethodParams, int | None]], parameters: int
) -> Choice | None:
    """Choose the rank for a delta whose params hold a budget; None where they hold none.

    `sites` come with their own params and override; `parameters` is the size of the backbone. Where ranks above some
    point change nothing, the smallest of them is taken. Where sites refuse every rank, the default stands in: the plan
    then says why.
    """
    found = [(name, value) for name in type(params).model_fields if isinstance(value := getattr(params, name), Budget)]
    if not found:
        return None
    [(name, budget)] = found
    limit = budget.limit(parameters)
    chosen = largest(_total(method, name, budget, sites), limit)
    if chosen is None:
        return Choice(name, budget, type(params).model_fields[name].default)
    rank, count = chosen
    if count <= limit:
        return Choice(name, budget, rank)
    share = "" if isinstance(budget.budget, int) else f" ({budget} of {parameters:,})"
    needed = f"{name} {rank} on {counted(len(sites), 'site')} takes {count:,}"
    problem = f"a budget of {limit:,} trainable parameters{share} is too small: {needed}"
    return Choice(name, budget, rank, problem, f"write budget: {count} or more, or choose fewer sites")


def largest(total: Total, limit: int) -> tuple[int, int] | None:
    """Return the rank with the largest total within the limit, the smallest such rank, and that total.

    Returns the smallest accepted rank where none is within it; None where no rank is accepted.
    """
    best = low = _next(total, 1, MAX_RANK + 1)
    if low is None or low[1] > limit:
        return low
    high = MAX_RANK + 1
    while best is not None:  # in doublings first: large ranks are the slow ones to count
        best = _next(total, 2 * low[0], high)
        if best is None or best[1] > limit:
            high = min(2 * low[0], high)
            break
        low = best
    while low[0] + 1 < high:
        middle = (low[0] + high) // 2
        step = _next(total, middle, high)
        if step is None or step[1] > limit:
            high = middle
        else:
            low = step
    return _first(total, low)


def _first(total: Total, best: tuple[int, int]) -> tuple[int, int]:
    """Return the smallest rank that comes to the same total as the best one."""
    low, high = 0, best[0]
    while low + 1 < high:
        middle = (low + high) // 2
        step = _next(total, middle, high)
        if step is None or step[1] == best[1]:
            high = middle
        else:
            low = step[0]
    return _next(total, high, best[0]) or best


def _next(total: Total, start: int, stop: int) -> tuple[int, int] | None:
    """Return the first accepted rank from `start` on, below `stop`, with its total; soon gives up where none is."""
    ranks = range(start, min(stop, start + _PATIENCE))
    return next(((rank, count) for rank in ranks if (count := total(rank)) is not None), None)


def _total(method: Method, name: str, budget: Budget, sites: Sequence[tuple[Site, MethodParams, int | None]]) -> Total:
    pending = [(site, params) for site, params, _ in sites]

    def total(rank: int) -> int | None:
        choice = Choice(name, budget, rank)
        made: dict[int, MethodParams] = {}  # sites share a few params objects
        counted = []
        for place, (site, given) in enumerate(pending):
            if id(given) not in made:
                made[id(given)] = choice.put(given)
            params = made[id(given)]
            if method.refuse(site, params) is not None:
                pending.insert(0, pending.pop(place))  # it may well refuse the next ranks, too
                return None
            counted.append(PlannedSite(site, params, site_tensors(method, site, params)))
        return count_trainable(counted)

    return total
