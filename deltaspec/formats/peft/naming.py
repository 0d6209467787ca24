"""Lists and patterns by which PEFT finds exactly these modules, and no others.

Read in `check_target_module_exists`, `get_pattern_key` and `_set_trainable` of PEFT 0.21.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from typing import TypeVar

from deltaspec.formats.peft.targets import by_pattern_below

Value = TypeVar("Value", bound=Hashable)


def target_list(wanted: Collection[str], others: Collection[str]) -> list[str] | str:
    """Return `target_modules` for these modules: short endings where they mean no others, else longer ones.

    A regular expression where a full name is the end of another module's, which no list can tell apart.
    """
    found = _endings(wanted, others)
    if found is not None:
        return found
    return _any_of(wanted)


def _any_of(names: Iterable[str]) -> str:
    """Return the regular expression that means these names alone."""
    return "(?:" + "|".join(map(re.escape, sorted(names))) + ")"


def parameter_list(wanted: Collection[str], others: Collection[str]) -> list[str] | None:
    """Return `target_parameters` for these, each with its module at least; None where no list means them alone."""
    found: dict[str, None] = {}
    for name in wanted:
        endings = [ending for ending in _all_endings(name) if "." in ending]
        fits = (e for e in endings if all(n in wanted for n in others if n == e or n.endswith(f".{e}")))
        ending = next(fits, None)
        if ending is None:
            return None
        found[ending] = None
    return sorted(found)


def _endings(wanted: Collection[str], others: Collection[str]) -> list[str] | None:
    """Return endings that all these names have, and none of the others; None where there are none."""
    taken = {ending for name in set(others) - set(wanted) for ending in _all_endings(name)}
    found: dict[str, None] = {}
    for name in wanted:
        ending = next((ending for ending in _all_endings(name) if ending not in taken), None)
        if ending is None:
            return None
        found[ending] = None
    return sorted(found)


def _all_endings(name: str) -> list[str]:
    """Return a name's endings at its dots, the shortest first."""
    segments = name.split(".")
    return [".".join(segments[start:]) for start in range(len(segments) - 1, -1, -1)]


def by_name(values: Mapping[str, Value], default: Value) -> dict[str, Value]:
    """Return `rank_pattern` or `alpha_pattern` that gives each module its value, where that is not the default.

    Its keys are regular expressions that fit at the end of a name; `^` in front lets one fit a whole name alone.
    """
    found: dict[str, Value] = {}
    for value, own in _but(values, default):
        endings = _endings(own, values)
        keys = [f"^{re.escape(name)}" for name in own] if endings is None else [re.escape(e) for e in endings]
        found |= dict.fromkeys(keys, value)
    return found


def _but(values: Mapping[str, Value], default: Value) -> Iterator[tuple[Value, list[str]]]:
    """Yield each value that is not the default, with the modules that have it."""
    for value in dict.fromkeys(values.values()):
        if value != default:
            yield value, [name for name, given in values.items() if given == value]


def by_name_below(values: Mapping[str, Value], default: Value) -> dict[str, Value] | None:
    """Return a pattern of FourierFT or C3A; None where theirs cannot tell the modules apart.

    Their keys are regular expressions that fit behind a dot, or whole names as they are.
    """
    found: dict[str, Value] = {}
    for value, own in _but(values, default):
        endings = _endings(own, values)
        if endings is None:
            return None
        found |= {ending if ending in values else re.escape(ending): value for ending in endings}
    fits = all(by_pattern_below(name, found, default) == value for name, value in values.items())
    return found if fits else None


def saved_list(wanted: Collection[str], names: Collection[str]) -> list[str] | None:
    """Return `modules_to_save` for these modules among all names; None where they cannot be told from others.

    PEFT takes whatever ends with one of these texts, also in the midst of a segment.
    """
    found: dict[str, None] = {}
    for name in wanted:
        fits = (e for e in _all_endings(name) if all(other in wanted for other in names if other.endswith(e)))
        ending = next(fits, None)
        if ending is None:
            return None
        found[ending] = None
    return sorted(found)


def saved_by(listed: Iterable[str], names: Iterable[str]) -> list[str]:
    """Return the modules among these names that PEFT saves for `modules_to_save`: `saved_list` the other way round."""
    endings = tuple(listed)
    return [name for name in names if name.endswith(endings)]


def hidden_by(saved: Iterable[str], targets: Iterable[str]) -> list[str]:
    """Return the modules that PEFT gives no adapter, since `modules_to_save` stands for them. Raises re.error."""
    patterns = [re.compile(rf"(^|.*\.){name}($|\..*)") for name in saved]
    return [target for target in targets if any(pattern.match(target) for pattern in patterns)]


def forward_lists(
    wanted: Collection[str], before: Collection[str], others: Collection[str]
) -> tuple[list[str] | str, list[str] | str]:
    """Return `target_modules` and `feedforward_modules` of (IA)³: the latter must be among the former, and mean
    whatever ends with one of their texts.
    """
    own = [name for name in wanted if name not in set(before)]
    first, second = _endings(own, others) if own else [], _endings(before, others) if before else []
    if first is not None and second is not None and not any(name.endswith(end) for name in own for end in second):
        return sorted({*first, *second}), second
    return _any_of(wanted), _any_of(before)
