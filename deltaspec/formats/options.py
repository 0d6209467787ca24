"""The options of a foreign configuration: each is asked for, with what it may be, or is a finding."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from deltaspec.diagnostics.wording import closest
from deltaspec.formats.unread import Unread

_MOST = (1 << 63) - 1
"""Largest whole number that torch takes."""
_LARGEST = 3.4028234663852886e38
"""Largest number of float32: tensors can be multiplied by it."""


class Options:
    """Reads a mapping of options; what is left over when all were asked for is a finding."""

    def __init__(self, unread: Unread, given: Mapping[str, Any], file: str) -> None:
        self._unread, self.given, self._file = unread, dict(given), file
        self._left = dict.fromkeys(self.given)
        self._all_right = True

    def get(self, name: str, default: Any = None) -> Any:
        """Return an option as it is; the default where it is left out."""
        self._left.pop(name, None)
        return self.given.get(name, default)

    def ignore(self, *names: str) -> None:
        """Take options that matter in training, for storage or to the original library alone."""
        for name in names:
            self._left.pop(name, None)

    def whole(self, name: str, default: int, least: int = 0) -> int:
        """Return an integer."""
        value = self.get(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if _is_whole(value, least):
            return int(value)
        self.wrong(name, value, f"a whole number from {least} on")
        return default

    def number(self, name: str, default: float) -> float:
        """Return a finite number."""
        value = self.get(name, default)
        if is_number(value):
            return float(value)
        self.wrong(name, value, "a number")
        return default

    def flag(self, name: str, default: bool) -> bool:
        """Return a truth value; null counts as false, as in the original libraries."""
        value = self.get(name, default)
        if value is None or isinstance(value, bool):
            return bool(value)
        self.wrong(name, value, "true or false")
        return default

    def text(self, name: str, default: str) -> str:
        """Return a string."""
        value = self.get(name, default)
        if isinstance(value, str):
            return value
        self.wrong(name, value, "a string")
        return default

    def mapping(self, name: str) -> dict[str, Any]:
        """Return a mapping; an empty one where it is left out."""
        value = self.get(name, {})
        if isinstance(value, dict):
            return value
        self.wrong(name, value, "a mapping")
        return {}

    def items(self, name: str, default: Iterable[Any], kind: type) -> list[Any]:
        """Return a list of strings, or of whole numbers."""
        value = self.get(name, list(default))
        if isinstance(value, list) and all(isinstance(item, kind) and not isinstance(item, bool) for item in value):
            return value
        self.wrong(name, value, "a list of strings" if kind is str else "a list of whole numbers")
        return list(default)

    def word(self, name: str, default: str, known: Iterable[str]) -> str:
        """Return one of the words that an option may be; null counts as the default."""
        value = self.get(name)
        return default if value is None else str(self._known(name, value, default, tuple(known)))

    def start(self, name: str, default: bool, known: Iterable[str] = (), *, any_case: bool = False) -> bool | str:
        """Return what the tensors started as, a truth value or one of these words; null counts as false."""
        value = self.get(name, default)
        if value is None or isinstance(value, bool):
            return value or False
        said = value.lower() if any_case and isinstance(value, str) else value
        return self._known(name, said, default, tuple(known))

    def numbers(self, name: str, form: str = "{}") -> dict[str, float]:
        """Return a mapping from regular expressions, which stand in `form`, to numbers; null counts as an empty one."""
        return {key: float(value) for key, value in self._pattern(name, is_number, "numbers", form).items()}

    def wholes(self, name: str, form: str = "{}", least: int = 0) -> dict[str, int]:
        """Return a mapping as `numbers` does, to integers."""
        wanted = f"whole numbers from {least} on"
        return {
            key: int(value) for key, value in self._pattern(name, lambda v: _is_whole(v, least), wanted, form).items()
        }

    def names(self, name: str, form: str | None = None) -> list[str] | str | None:
        """Return names: a list, or a regular expression that means them; None where there are none.

        `form` is where each of a list stands, if they are regular expressions, too.
        """
        value = self.get(name)
        if isinstance(value, str) and form is None:
            return value if self._compiles(name, value) else None
        listed = [value] if isinstance(value, str) else value
        if listed is None or (isinstance(listed, list) and all(isinstance(item, str) for item in listed)):
            right = form is None or all(self._compiles(name, form.format(word)) for word in listed or ())
            return value if right else None
        self.wrong(name, value, "a string or a list of strings")
        return None

    def listed(self, name: str, form: str = "") -> list[str]:
        """Return a list of strings, regular expressions where they stand in a `form`; null counts as an empty one."""
        found = [] if self.get(name) is None else self.items(name, (), str)
        return found if not form or all(self._compiles(name, form.format(word)) for word in found) else []

    def refuse(self, name: str, reason: str, suggestion: str, *, unless: Iterable[Any] = (None, False)) -> None:
        """Refuse an option that nothing here can do, unless it is off or has one of these values."""
        if (value := self.get(name)) not in (*unless, [], {}):
            self._unread.find("DS549", f"{name}: {value!r}: {reason}", suggestion, self._file)

    def settle(self) -> None:
        """Raise DeltaSpecError where an option is not what it may be: with its default, others would seem wrong."""
        if not self._all_right:
            self._unread.settle()

    def finish(self, kind: str) -> None:
        """Add a finding for each option that nobody asked for and that says anything."""
        for name in self._left:
            if self.given[name] not in (None, False, [], {}, ""):
                message = f"{name}: {self.given[name]!r} is no option of {kind} that is known here"
                self._unread.find("DS544", message, "if it does not matter, delete it; else report it", self._file)

    def _known(self, name: str, value: Any, default: bool | str, known: tuple[str, ...]) -> bool | str:
        if isinstance(value, str) and value in known:
            return value
        near = closest(value, known) if isinstance(value, str) else None
        words = [*["true", "false"] * isinstance(default, bool), *map(repr, known)]
        wanted = " or ".join((", ".join(words[:-1]), words[-1])) if len(words) > 1 else words[0]
        self.wrong(name, self.given[name], wanted, f"did you mean {near!r}?" if near else None)
        return default

    def _pattern(self, name: str, fits: Callable[[Any], bool], wanted: str, form: str) -> dict[str, Any]:
        value = self.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict) or not all(fits(item) for item in value.values()):
            self.wrong(name, value, f"a mapping of names to {wanted}")
            return {}
        return value if all(self._compiles(name, form.format(key)) for key in value) else {}

    def _compiles(self, name: str, pattern: str) -> bool:
        """Return whether a regular expression is one; if not, that is a finding."""
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            self.wrong(name, self.given.get(name), f"made of regular expressions: {error}")
            return False
        return True

    def wrong(self, name: str, value: Any, wanted: str, hint: str | None = None) -> None:
        """Add the finding that an option is not what it may be."""
        hint = hint or "the configuration was changed by hand: save the adapter again"
        self._all_right = False
        said = repr(value)
        said = said if len(said) <= 80 else f"{said[:79]}…"
        self._unread.find("DS544", f"{name}: {said} is not {wanted}", hint, self._file)


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= _MOST


def is_number(value: Any) -> bool:
    """Return whether a value is a number, no truth value, that float32 holds; whole ones may be of any length."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST
