"""The rules of engines: YAML, one file an engine, read with positions and checked against the vocabulary.

Every file decides every fact: by rules, or by `serves`, the list of those that the engine computes as PEFT does. So an
engine that nobody looked at in some respect cannot pass for one that is right there.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.diagnostics.wording import closest, show_path
from deltaspec.documents.document import Document, from_bytes, read
from deltaspec.engines.vocabulary import FACTS, REWRITES

_ENDING = ".yaml"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Limit(_Part):
    """Ranks that an engine takes."""

    default: int | None = Field(None, ge=1)
    """Limit where none is asked for at the start; None: there is none."""
    most: int | None = Field(None, ge=1)
    """Limit that no flag lifts."""
    choices: tuple[int, ...] = ()
    """Limits that the flag takes; empty: any."""
    flag: str | None = None
    """What raises the limit at the start, such as `--max-lora-rank`."""

    @property
    def greatest(self) -> int | None:
        """Greatest rank that some start takes; None where there is no limit."""
        return max(self.choices, default=self.most)

    def enough(self, rank: int) -> int:
        """Return the smallest limit that takes a rank."""
        return min((choice for choice in self.choices if choice >= rank), default=rank)


class Rule(_Part):
    """What an engine does about a fact, for some of its values."""

    fact: str
    outcome: Literal["rejected", "ignored", "wrong"]
    happens: str = Field(min_length=1)
    """What happens there, as a clause."""
    only: tuple[str, ...] = ()
    """Globs of the values that it is about; empty: all."""
    beside: tuple[str, ...] = ()
    """Globs of values that it is not about."""
    rewrite: str | None = None
    """What an export does about it, without loss."""
    hint: str | None = None
    """Way out, in place of the usual one."""

    @field_validator("fact")
    @classmethod
    def _is_fact(cls, name: str) -> str:
        return _one_of(name, FACTS, "fact")

    @field_validator("rewrite")
    @classmethod
    def _is_rewrite(cls, name: str | None) -> str | None:
        return name if name is None else _one_of(name, REWRITES, "rewrite")

    def concerns(self, value: str) -> bool:
        """Return whether the rule is about a fact of this value."""
        taken = not self.only or any(fnmatchcase(value, glob) for glob in self.only)
        return taken and not any(fnmatchcase(value, glob) for glob in self.beside)


class Rules(_Part):
    """All that is known of one engine."""

    engine: str
    """Name, as `--for` takes it; the file is called so, too."""
    title: str
    """Name for people."""
    versions: str
    """Versions that the rules hold for."""
    checked: str
    """Day on which they were read or measured, `2026-11-29`."""
    sources: tuple[str, ...] = Field(min_length=1)
    """Where they come from: files of the engine, issues, runs."""
    reads: str
    """What it reads, for people."""
    rank: Limit = Field(default_factory=lambda: Limit.model_validate({}))
    rules: tuple[Rule, ...]
    serves: tuple[str, ...] = ()
    """Facts that it computes as PEFT does."""
    writes: tuple[str, ...] = ()
    """Rewrites that every export for it needs, whatever the adapter."""
    notes: tuple[str, ...] = ()
    """What whoever starts it must know, whatever the adapter."""

    @field_validator("checked")
    @classmethod
    def _is_day(cls, text: str) -> str:
        date.fromisoformat(text)
        return text

    @field_validator("serves")
    @classmethod
    def _are_facts(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_one_of(name, FACTS, "fact") for name in names)

    @field_validator("writes")
    @classmethod
    def _are_rewrites(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_one_of(name, REWRITES, "rewrite") for name in names)

    @model_validator(mode="after")
    def _decides_every_fact(self) -> Rules:
        ruled = {rule.fact for rule in self.rules} | {"rank"}
        if twice := sorted(ruled & set(self.serves)):
            raise ValueError(f"{', '.join(twice)}: both under rules and under serves")
        if missing := [fact for fact in FACTS if fact not in ruled and fact not in self.serves]:
            raise ValueError(f"undecided: {', '.join(missing)}; write a rule for each, or list it under serves")
        return self

    @property
    def rewrites(self) -> frozenset[str]:
        """Rewrites by which an export fits."""
        return frozenset(self.writes) | {rule.rewrite for rule in self.rules if rule.rewrite is not None}

    def about(self, fact: str, value: str) -> Iterator[Rule]:
        """Yield the rules about a fact of this value."""
        yield from (rule for rule in self.rules if rule.fact == fact and rule.concerns(value))


def _one_of(name: str, known: Any, noun: str) -> str:
    if name not in known:
        near = closest(name, known)
        raise ValueError(f"{name!r} is no {noun}" + (f"; did you mean {near!r}?" if near else ""))
    return name


def names() -> tuple[str, ...]:
    """Return the names of the engines that have a file here, sorted."""
    found = (file.name for file in files(__package__).iterdir())
    return tuple(sorted(name.removesuffix(_ENDING) for name in found if name.endswith(_ENDING)))


def is_file_of_rules(engine: str) -> bool:
    """Return whether an engine is named by a file of rules, not by its name."""
    return engine not in names() and engine.endswith((_ENDING, ".yml", ".json"))


def rules_of(engine: str) -> Rules:
    """Return an engine's rules: by its name, or from a file of them.

    Raises DeltaSpecError where the file cannot be read or holds no rules (DS626), or no engine is called so (DS627).
    """
    if engine in names():
        return _own(engine)
    if is_file_of_rules(engine):
        return parse(read(engine))
    near = closest(engine, names())
    hint = f"did you mean {near}? " if near else ""
    hint += f"known: {', '.join(names())}; or name a file of rules that ends in {_ENDING}"
    message, place = f"no engine is named {engine!r}", engine or "(no engine)"
    raise DeltaSpecError([Diagnostic("DS627", message, place, suggestion=hint)])


@cache
def _own(engine: str) -> Rules:
    file = files(__package__) / f"{engine}{_ENDING}"
    rules = parse(from_bytes(file.read_bytes(), file.name))
    assert rules.engine == engine, f"{file.name} holds the rules of {rules.engine}"
    return rules


def parse(document: Document) -> Rules:
    """Check a document against the form of rules. Raises DeltaSpecError with all findings (DS626)."""
    try:
        return Rules.model_validate(_tuples(document.data))
    except ValidationError as error:
        raise DeltaSpecError([_finding(document, found) for found in error.errors(include_url=False)]) from None


def _tuples(value: Any) -> Any:
    """Return a document's data with tuples in the place of lists, as frozen parts hold them."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _finding(document: Document, found: Any) -> Diagnostic:
    raised = found.get("ctx", {}).get("error")
    text = str(raised) if isinstance(raised, Exception) else found["msg"]
    path = tuple(found["loc"])
    label = show_path(path)
    message = f"{label}: {text[:1].lower()}{text[1:]}" if label else text
    return document.diagnostic("DS626", message, path, "docs/engines.md says what a file of rules holds")
