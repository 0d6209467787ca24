"""The options of a foreign configuration: each is asked for, with what it may be, or is a finding."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from deltaspec.formats.unread import Unread


class Options:
    """Reads a mapping of options; what is left over when all were asked for is a finding."""

    def __init__(self, unread: Unread, given: Mapping[str, Any], file: str) -> None:
        self._unread, self.given, self._file = unread, dict(given), file
        self._left = dict.fromkeys(self.given)

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
        if isinstance(value, int) and not isinstance(value, bool) and value >= least:
            return value
        self._wrong(name, value, f"a whole number from {least} on")
        return default

    def number(self, name: str, default: float) -> float:
        """Return a finite number."""
        value = self.get(name, default)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
        self._wrong(name, value, "a number")
        return default

    def flag(self, name: str, default: bool) -> bool:
        """Return a truth value; null counts as false, as in the original libraries."""
        value = self.get(name, default)
        if value is None or isinstance(value, bool):
            return bool(value)
        self._wrong(name, value, "true or false")
        return default

    def text(self, name: str, default: str) -> str:
        """Return a string."""
        value = self.get(name, default)
        if isinstance(value, str):
            return value
        self._wrong(name, value, "a string")
        return default

    def items(self, name: str, default: Iterable[Any], kind: type) -> list[Any]:
        """Return a list of strings, or of whole numbers."""
        value = self.get(name, list(default))
        if isinstance(value, list) and all(isinstance(item, kind) and not isinstance(item, bool) for item in value):
            return value
        self._wrong(name, value, "a list of strings" if kind is str else "a list of whole numbers")
        return list(default)

    def refuse(self, name: str, reason: str, suggestion: str, *, unless: Iterable[Any] = (None, False)) -> None:
        """Refuse an option that nothing here can do, unless it is off or has one of these values."""
        if (value := self.get(name)) not in (*unless, [], {}):
            self._unread.find("DS549", f"{name}: {value!r}: {reason}", suggestion, self._file)

    def finish(self, kind: str) -> None:
        """Add a finding for each option that nobody asked for and that says anything."""
        for name in self._left:
            if self.given[name] not in (None, False, [], {}, ""):
                message = f"{name}: {self.given[name]!r} is no option of {kind} that is known here"
                self._unread.find("DS544", message, "if it does not matter, delete it; else report it", self._file)

    def _wrong(self, name: str, value: Any, wanted: str) -> None:
        hint = "the configuration was changed by hand: save the adapter again"
        self._unread.find("DS544", f"{name}: {value!r} is not {wanted}", hint, self._file)
