"""Findings: what is wrong, where, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One finding. `line` and `column` count from 1; 0 where there is no place."""

    code: str
    message: str
    file: str = "<spec>"
    line: int = 0
    column: int = 0
    suggestion: str | None = None


class DeltaSpecError(ValueError):
    """One or more findings, all at once."""

    def __init__(self, diagnostics: tuple[Diagnostic, ...] | list[Diagnostic]) -> None:
        self.diagnostics = tuple(diagnostics)
        super().__init__("\n".join(f"{d.file}:{d.line}:{d.column}: error[{d.code}] {d.message}" for d in self.diagnostics))
