"""The DeltaSpec: a validated document as immutable data."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from hashlib import sha256
from json import dumps
from typing import Any

from pydantic import Field, PrivateAttr, SerializeAsAny
from pydantic.json_schema import SkipJsonSchema

from deltaspec.diagnostics import DeltaSpecError, Diagnostic, Path
from deltaspec.methods._base import MethodParams
from deltaspec.selectors import Part, Selector, canonical
from deltaspec.source import Document, from_data, read

VERSION = 1


class ModelContract(Part):
    """What the backbone must be; another one is an error."""

    type: str | None = None
    """`model_type` of the transformers configuration, such as `bert`."""
    architecture: str | None = None
    """Class name of the model, such as `BertForSequenceClassification`."""


class Count(Part):
    """Bounds of a count, both included."""

    min: int | None = Field(None, ge=0)
    """At least this many."""
    max: int | None = Field(None, ge=0)
    """At most this many."""


class Trainable(Count):
    """Bounds of the number of trainable values."""

    max_fraction: float | None = Field(None, gt=0, le=1)
    """At most this part of the backbone's parameters."""


class DeltaExpect(Part):
    """What the plan of one delta must come to."""

    sites: Count | None = None
    """Number of sites: a number, or bounds."""
    trainable: Count | None = None
    """Number of trainable values: a number, or bounds."""


class Expect(Part):
    """What the plan of the whole spec must come to."""

    trainable: Trainable | None = None
    """Number of trainable values of all deltas: a number, or bounds."""
    untouched: tuple[Selector, ...] = ()
    """Selectors of modules that no delta may change."""


class Override(Part):
    """Other parameters for some of a delta's sites."""

    match: Selector
    """The sites; the first override that matches a site wins."""
    params: dict[str, Any]
    """Parameters of the method that differ here; the others stay as the delta has them."""


class DeltaEntry(Part):
    """One delta of a spec."""

    name: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,63}$")
    """Name of the delta: letters, digits, `-` and `_`, the first one a letter."""
    method: str
    """Delta-tuning method."""
    params: SerializeAsAny[MethodParams]
    """Parameters of the method."""
    target: Selector | None = None
    """Where it goes; left out, the method's own default roles."""
    overrides: tuple[Override, ...] = ()
    """Other parameters for some of the sites; the first match wins."""
    expect: DeltaExpect | None = None
    """What its plan must come to."""
    attached: bool = True
    """Whether it starts attached."""

    def params_with(self, override: Override) -> MethodParams:
        """Give the method's parameters with an override's in place of the delta's."""
        given = self.params.model_dump(exclude_unset=True)
        return type(self.params).model_validate(given | override.params)


class DeltaSpec(Part):
    """A set of deltas for one backbone."""

    version: int = Field(VERSION, alias="deltaspec")
    """Version of the format."""
    model: ModelContract | None = None
    """What the backbone must be."""
    seed: int = Field(0, ge=0, lt=1 << 63)
    """Seed of the initial delta weights."""
    selectors: dict[str, Selector] = Field(default_factory=dict)
    """Named selectors, used with `ref`."""
    deltas: tuple[DeltaEntry, ...]
    """The deltas, in the order in which they apply."""
    expect: Expect | None = None
    """What the plan must come to."""
    _document: Document = PrivateAttr()

    @property
    def name(self) -> str:
        """File name, or `<spec>`."""
        return self._document.name

    def locate(self, path: Path, key: bool = False) -> tuple[int, int]:
        """Give line and column of the value at a document path, or of its key; 0, 0 where there is no file."""
        return self._document.position(path, key)

    def diagnostic(
        self, code: str, message: str, path: Path = (), suggestion: str | None = None, key: bool = False
    ) -> Diagnostic:
        """Make a finding about the value at a document path, or about its key."""
        return self._document.diagnostic(code, message, path, suggestion, key)

    def to_data(self) -> dict[str, Any]:
        """Give the resolved spec as a document: every method parameter written out, places and comments gone."""
        return _compact(
            {
                "deltaspec": self.version,
                "model": self.model and self.model.model_dump(),
                "seed": self.seed,
                "selectors": {name: selector.to_data() for name, selector in self.selectors.items()},
                "deltas": [_delta_data(delta) for delta in self.deltas],
                "expect": self.expect
                and {
                    "trainable": self.expect.trainable and self.expect.trainable.model_dump(),
                    "untouched": [selector.to_data() for selector in self.expect.untouched],
                },
            }
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the resolved spec as canonical JSON, in hexadecimal."""
        return sha256(dumps(self.to_data(), sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, DeltaSpec) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)


def load(spec: str | os.PathLike[str] | Mapping[str, Any] | DeltaSpec) -> DeltaSpec:
    """Read and validate a spec: a file's path, or its content as a dict. Raises DeltaSpecError with all findings.

    >>> load({"deltaspec": 1, "deltas": [{"name": "d", "method": "lora", "target": "**.q"}]}).deltas[0].params.rank
    8
    """
    return spec if isinstance(spec, DeltaSpec) else parse(_document(spec))


def validate(spec: str | os.PathLike[str] | Mapping[str, Any] | DeltaSpec) -> list[Diagnostic]:
    """Give all findings about a spec: a file's path, or its content as a dict. Empty where it is valid."""
    try:
        load(spec)
    except DeltaSpecError as error:
        return list(error.diagnostics)
    return []


def parse(document: Document) -> DeltaSpec:
    """Validate a document. Raises DeltaSpecError with all findings."""
    from deltaspec.methods import methods

    data = document.data
    fields: dict[str, Any] = {k: v for k, v in data.items() if k not in ("selectors", "deltas", "expect")}
    fields["selectors"] = {n: canonical(s, ("selectors", n)) for n, s in data.get("selectors", {}).items()}
    fields["deltas"] = tuple(
        _delta_fields(delta, ("deltas", index), methods()[delta["method"]].Params)
        for index, delta in enumerate(data["deltas"])
    )
    if "expect" in data:
        fields["expect"] = _expect_fields(data["expect"])
    spec = DeltaSpec.model_validate(fields)
    spec._document = document
    return spec


def _document(spec: str | os.PathLike[str] | Mapping[str, Any]) -> Document:
    return from_data(spec) if isinstance(spec, Mapping) else read(spec)


def _delta_fields(delta: dict[str, Any], path: Path, params: type[MethodParams]) -> dict[str, Any]:
    fields = {**delta, "params": params.model_validate(delta.get("params", {}))}
    if "target" in delta:
        fields["target"] = canonical(delta["target"], (*path, "target"))
    fields["overrides"] = tuple(
        {**override, "match": canonical(override["match"], (*path, "overrides", index, "match"))}
        for index, override in enumerate(delta.get("overrides", ()))
    )
    if "expect" in delta:
        fields["expect"] = {key: _bounds(value) for key, value in delta["expect"].items()}
    return fields


def _expect_fields(expect: dict[str, Any]) -> dict[str, Any]:
    fields = dict(expect)
    if "trainable" in expect:
        fields["trainable"] = _bounds(expect["trainable"])
    untouched = expect.get("untouched", [])
    if isinstance(untouched, list):
        fields["untouched"] = tuple(canonical(s, ("expect", "untouched", i)) for i, s in enumerate(untouched))
    else:
        fields["untouched"] = (canonical(untouched, ("expect", "untouched")),)
    return fields


def _bounds(value: Any) -> Any:
    return {"min": value, "max": value} if isinstance(value, int) else value


def _delta_data(delta: DeltaEntry) -> dict[str, Any]:
    overrides = [{"match": o.match.to_data(), "params": dict(o.params)} for o in delta.overrides]
    return {
        "name": delta.name,
        "method": delta.method,
        "params": delta.params.model_dump(mode="json"),
        "target": delta.target and delta.target.to_data(),
        "overrides": overrides,
        "expect": delta.expect and delta.expect.model_dump(),
        "attached": delta.attached,
    }


def _compact(value: Any) -> Any:
    """Leave out what is absent or empty."""
    if isinstance(value, dict):
        compacted = {key: _compact(item) for key, item in value.items()}
        return {key: item for key, item in compacted.items() if item is not None and item != {} and item != []}
    return [_compact(item) for item in value] if isinstance(value, list) else value
