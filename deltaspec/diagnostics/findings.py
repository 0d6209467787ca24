"""Findings: what is wrong, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from deltaspec.diagnostics.clean import clean
from deltaspec.diagnostics.wording import closest_delta

_COMMANDS = ("::", "##[")
"""What begins a command to the CI that reads the log: a file's name must not."""

Path = tuple[str | int, ...]
"""Path of a value in a document: keys and indices from the root."""


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One finding. `line` and `column` count from 1; 0 where there is no place.

    Its texts are clean (`clean`) from the start, so whoever prints them, in whatever form, prints nothing that acts.
    """

    code: str
    message: str
    file: str = "<spec>"
    line: int = 0
    column: int = 0
    suggestion: str | None = None
    where: str = ""
    """Path inside the document (`deltas[0].target.path`); printed where there is no line."""

    def __post_init__(self) -> None:
        for name in ("message", "file", "suggestion", "where"):
            if (text := getattr(self, name)) is not None:
                object.__setattr__(self, name, clean(text))

    def __str__(self) -> str:
        return written(self)


def written(d: Diagnostic, place: str = "{}", code: str = "{}", hint: str = "{}") -> str:
    """Write a finding as text, its three marked parts in the forms given: `{}` stands for the part."""
    file = f"./{d.file}" if d.file.startswith(_COMMANDS) else d.file
    where = f"{file}:{d.line}:{d.column}" if d.line else f"{file}:{d.where}" if d.where else file
    text = f"{place.format(f'{where}:')} {code.format(f'error[{d.code}]')} {d.message}"
    return f"{text}\n  {hint.format('= help:')} {d.suggestion}" if d.suggestion else text


class DeltaSpecError(ValueError):
    """One or more findings, all at once, as `.diagnostics`; its text is the one the command line prints."""

    def __init__(self, diagnostics: Iterable[Diagnostic]) -> None:
        self.diagnostics = tuple(diagnostics)
        super().__init__("\n".join(str(d) for d in self.diagnostics))

    def __reduce__(self) -> tuple[type[DeltaSpecError], tuple[tuple[Diagnostic, ...]]]:
        return type(self), (self.diagnostics,)


def in_order(diagnostics: Iterable[Diagnostic]) -> list[Diagnostic]:
    """Sort findings by place, once each; those of one place keep the order in which they were found."""
    return sorted(dict.fromkeys(diagnostics), key=lambda d: (d.file, d.line, d.column))


class UnknownDeltaError(DeltaSpecError, KeyError):
    """A name that is not the name of a delta of this model."""

    # KeyError's own would quote the text.
    __str__ = Exception.__str__


def require_known(names: Iterable[str], known: Iterable[str], place: object = "<spec>") -> None:
    """Raise UnknownDeltaError, with all findings, for names that no delta has; `place` is what should have them."""
    among = known if isinstance(known, Mapping) else tuple(known)
    if unknown := [name for name in names if name not in among]:
        raise UnknownDeltaError([_unknown_delta(name, tuple(among), str(place)) for name in unknown])


def _unknown_delta(name: str, known: tuple[str, ...], place: str) -> Diagnostic:
    near = closest_delta(name, known)
    hint = f"did you mean {near!r}? " if near else ""
    some = ", ".join(known[:20]) + (f" … ({len(known):,} in all)" if len(known) > 20 else "")
    return Diagnostic("DS434", f"no delta is named {name!r}", place, suggestion=f"{hint}known: {some or 'none'}")
