"""Selectors as data: what a target, an override or an expectation says about modules. `selection/` matches them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema
from pydantic.json_schema import SkipJsonSchema

from deltaspec.diagnostics.findings import Path
from deltaspec.roles.vocabulary import ROLES

NAME = "^[A-Za-z][A-Za-z0-9_-]{0,63}$"
"""Names of deltas and of selectors."""


def _some(item: dict[str, Any]) -> WithJsonSchema:
    """Describe how a document writes alternatives: one of them, or a list."""
    single = {key: value for key, value in item.items() if key != "type"}
    return WithJsonSchema({"type": ["string", "array"], **single, "items": item, "minItems": 1})


Texts = Annotated[tuple[str, ...], _some({"type": "string", "minLength": 1, "maxLength": 500})]
Roles = Annotated[
    tuple[str, ...],
    WithJsonSchema(
        {
            "type": ["string", "array"],
            "if": {"type": "string"},
            "then": {"enum": list(ROLES)},
            "items": {"enum": list(ROLES)},
            "minItems": 1,
        }
    ),
]
Width = Annotated[
    int | str | None,
    WithJsonSchema({"type": ["integer", "string"], "minimum": 1, "pattern": "^(>=|<=|==|!=|>|<) ?[0-9]{1,12}$"}),
]
Index = Annotated[int, Field(ge=0, le=100_000)]
Positive = Annotated[int, Field(ge=1, le=100_000)]


class Part(BaseModel):
    """Base of every part of a spec: closed, strict, immutable, finite."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, populate_by_name=True, defer_build=True
    )


class Layers(Part):
    """Repeated layers, by their index in their stack. All keys given must hold."""

    model_config = ConfigDict(
        json_schema_extra={
            "type": ["object", "array"],
            "minProperties": 1,
            "items": {"type": "integer", "minimum": 0, "maximum": 100_000},
            "minItems": 1,
        }
    )
    from_: Index | None = Field(None, alias="from")
    """First layer, counted from 0."""
    to: Index | None = None
    """Last layer, itself included."""
    first: Positive | None = None
    """The first n layers."""
    last: Positive | None = None
    """The last n layers."""
    only: tuple[Index, ...] = Field((), min_length=1)
    """Exactly these layers. A list in the place of the mapping means the same."""
    every: Positive | None = None
    """Every n-th layer, counted from `from` (or 0)."""


class Shape(Part):
    """Widths of a module: a number, or a comparison such as `>=4096`."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1})
    in_: Width = Field(None, alias="in")
    """Input width: in_features of a Linear, rows of an Embedding, input channels of a convolution."""
    out: Width = None
    """Output width: out_features of a Linear, row width of an Embedding, output channels of a convolution."""


class Selector(Part):
    """Modules (or parameters) of a model. Keys AND, lists OR. A plain string is a `path`, a list is an `any`."""

    model_config = ConfigDict(
        json_schema_extra={
            "type": ["string", "array", "object"],
            "minLength": 1,
            "maxLength": 500,
            "minItems": 1,
            "minProperties": 1,
        }
    )
    path: Texts = ()
    """Glob on the module's full name: `*` within one segment, `**` any number of segments. A list means any of them."""
    regex: Texts = ()
    """Regular expression that the module's whole full name must match. A list means any of them."""
    type: Texts = ()
    """Class name of the module, or of any of its base classes. A list means any of them."""
    role: Roles = ()
    """What the module does in its architecture, whatever its name. A list means any of them."""
    layers: Layers | None = None
    """Layers it lies in: a mapping, or a list of indices."""
    shape: Shape | None = None
    """Widths of the module."""
    parameter: Texts = ()
    """Own name of a parameter, such as `weight`: selects the parameter, not its module. A list means any of them."""
    ref: Annotated[str, Field(min_length=1)] | None = None
    """Name of a selector under the document's `selectors`."""
    any_of: tuple[Selector, ...] = Field((), alias="any", json_schema_extra={"minItems": 1})
    """At least one of these must hold."""
    all_of: tuple[Selector, ...] = Field((), alias="all", json_schema_extra={"minItems": 1})
    """All of these must hold."""
    none_of: Selector | None = Field(None, alias="not")
    """This must not hold."""
    optional: bool = False
    """It may match nothing."""
    location: SkipJsonSchema[tuple[str | int, ...]] = ()
    """Path of this selector in the document."""

    def walk(self) -> Iterator[Selector]:
        """Return this selector and all selectors nested in it, in document order."""
        yield self
        for nested in (*self.any_of, *self.all_of, *((self.none_of,) if self.none_of else ())):
            yield from nested.walk()

    def to_data(self) -> dict[str, Any]:
        """Return the selector as a document writes it, in full form."""
        data: dict[str, Any] = {}
        for key in ("path", "regex", "type", "role", "parameter"):
            if alternatives := getattr(self, key):
                data[key] = alternatives[0] if len(alternatives) == 1 else list(alternatives)
        for key in ("layers", "shape"):
            if (part := getattr(self, key)) is not None:
                data[key] = {k: list(v) if isinstance(v, tuple) else v for k, v in given(part).items()}
        if self.ref is not None:
            data["ref"] = self.ref
        for key, nested in (("any", self.any_of), ("all", self.all_of)):
            if nested:
                data[key] = [selector.to_data() for selector in nested]
        if self.none_of is not None:
            data["not"] = self.none_of.to_data()
        if self.optional:
            data["optional"] = True
        return data


def given(part: Part) -> dict[str, Any]:
    """Return what a part says, by the keys of a document."""
    return {k: v for k, v in part.model_dump(by_alias=True).items() if v not in (None, ())}


def canonical(data: Any, location: Path) -> dict[str, Any]:
    """Bring a document's selector (string, list or mapping) into the fields of `Selector`, nested ones too."""
    if isinstance(data, str):
        return {"path": (data,), "location": location}
    if isinstance(data, list):
        return {"any": tuple(canonical(d, (*location, i)) for i, d in enumerate(data)), "location": location}
    result: dict[str, Any] = {**data, "location": location}
    for key in ("path", "regex", "type", "role", "parameter"):
        if key in result:
            result[key] = tuple(result[key]) if isinstance(result[key], list) else (result[key],)
    for key in ("any", "all"):
        if key in result:
            result[key] = tuple(canonical(d, (*location, key, i)) for i, d in enumerate(result[key]))
    if "not" in result:
        result["not"] = canonical(result["not"], (*location, "not"))
    if (layers := result.get("layers")) is not None:
        layers = {"only": layers} if isinstance(layers, list) else dict(layers)
        if "only" in layers:
            layers["only"] = tuple(layers["only"])
        result["layers"] = layers
    return result
