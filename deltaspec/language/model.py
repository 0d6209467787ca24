"""The DeltaSpec: a validated document as immutable data."""

from __future__ import annotations

from hashlib import sha256
from json import dumps
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PrivateAttr, SerializeAsAny, WithJsonSchema

from deltaspec.diagnostics.findings import Diagnostic, Path
from deltaspec.documents.document import Document
from deltaspec.language.conditions import Memory
from deltaspec.language.derivation import Combine, Weight, written
from deltaspec.language.params import read_params
from deltaspec.language.passes import ALL, PASSES
from deltaspec.language.selectors import NAME, Part, Selector
from deltaspec.language.training import Train
from deltaspec.methods.declarations import MethodParams
from deltaspec.names.escaping import DELTA_NAME, MOST

Name = Annotated[str, Field(min_length=1, max_length=200)]


Passes = Annotated[
    bool | tuple[str, ...] | None,
    WithJsonSchema({"type": ["boolean", "array"], "items": {"enum": list(PASSES)}, "uniqueItems": True}),
]


class ModelContract(Part):
    """What the backbone must be; another one is an error."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1})
    type: Name | None = None
    """`model_type` of the transformers configuration, such as `bert`."""
    architecture: Name | None = None
    """Class name of the model, such as `BertForSequenceClassification`."""


class Count(Part):
    """Bounds of a count, both included. A plain number means exactly that many."""

    model_config = ConfigDict(json_schema_extra={"type": ["integer", "object"], "minimum": 0, "minProperties": 1})
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
    untouched: tuple[Selector, ...] = Field((), json_schema_extra={"minItems": 1})
    """Selectors of modules that no delta may change."""
    memory: Memory | None = None
    """Memory that a step of training may take: a bound (`<= 12GiB`), or a mapping that says for which batch."""


class Override(Part):
    """Other parameters for some of a delta's sites."""

    match: Selector
    """The sites; the first override that matches a site wins."""
    params: Annotated[dict[str, Any], WithJsonSchema({"type": "object", "minProperties": 1})]
    """Parameters of the method that differ here; the others stay as the delta has them."""


_MATRIX: dict[str, Any] = {
    "type": ["object", "string"],
    "minProperties": 1,
    "minLength": 1,
    "additionalProperties": {"type": "array", "minItems": 1},
}
"""A matrix, as a document writes it. An entry that was read has the values of its own combination instead."""


class DeltaEntry(Part):
    """One delta of a spec."""

    name: str = Field(pattern=DELTA_NAME, max_length=MOST)
    """Name of the delta: letters, digits, `-`, `_`, and `.` and `/` between them (`french`, `user/lora`, `1_task`);
    one of a matrix has its values behind that (`french[rank=4,lr=1e-3]`)."""
    method: str
    """Delta-tuning method."""
    sources: dict[str, Weight] = Field(default_factory=dict, alias="from", json_schema_extra={"minProperties": 1})
    """Derived delta, in place of a method: the deltas of this spec that it is built from, each with its weight."""
    combine: Combine | None = None
    """How it is built: `svd` works on the change of the weight, the others on the factors of lora."""
    params: Annotated[SerializeAsAny[MethodParams], WithJsonSchema({"type": "object"})] = Field(
        default_factory=MethodParams
    )
    """Parameters of the method."""
    target: Selector | None = None
    """Where it goes; left out, the method's own default roles."""
    overrides: tuple[Override, ...] = ()
    """Other parameters for some of the sites; the first match wins."""
    expect: DeltaExpect | None = None
    """What its plan must come to."""
    attached: bool = True
    """Whether it starts attached; those of a matrix do not, unless this says so."""
    dtype: Literal["float16", "bfloat16", "float32", "float64"] | None = None
    """dtype of its tensors; left out, the backbone's, but float32 where that is of half precision or quantised."""
    provenance: dict[str, Any] = Field(default_factory=dict, json_schema_extra={"minProperties": 1})
    """Where it comes from, in keys of your own (data, licence). Locks and saved sets keep it; no plan changes."""
    train: Train | None = None
    """Hints for training it (learning rate, schedule …): `c.parameter_groups()` makes an optimizer's groups of them."""
    matrix: Annotated[dict[str, Any], WithJsonSchema(_MATRIX)] = Field(default_factory=dict)
    """A delta for each combination of values: lists by parameter (`rank`) or hint for training (`train.lr`); or the
    name of an entry before this one: a delta for each of its deltas, with their hints."""

    def params_with(self, override: Override) -> MethodParams:
        """Return the method's parameters with an override's in place of the delta's."""
        given = self.params.model_dump(mode="json", exclude_unset=True)
        return read_params(type(self.params), given | override.params)


class DeltaSpec(Part):
    """A set of deltas for one backbone."""

    version: Literal[1] = Field(alias="deltaspec")
    """Version of the format."""
    model: ModelContract | None = None
    """What the backbone must be."""
    seed: int = Field(0, ge=0, lt=1 << 63)
    """Seed of the initial delta weights."""
    selectors: dict[str, Selector] = Field(default_factory=dict, json_schema_extra={"propertyNames": {"pattern": NAME}})
    """Named selectors, used with `ref`."""
    deltas: tuple[DeltaEntry, ...] = Field(min_length=1)
    """The deltas, in the order in which they apply."""
    expect: Expect | None = None
    """What the plan must come to."""
    passes: Passes = None
    """Passes over training steps that may be taken: the names of some, or `false` for none; left out, all."""
    schema_uri: str | None = Field(None, alias="$schema")
    """Where an editor finds the JSON Schema of this file. It means nothing else."""
    _document: Document = PrivateAttr()

    def model_post_init(self, context: Any) -> None:
        """Keep the document that the fields were read from, which is the context of their validation."""
        if isinstance(context, Document):
            self._document = context

    @property
    def name(self) -> str:
        """File name, or `<spec>`."""
        return self._document.name

    @property
    def allowed_passes(self) -> frozenset[str]:
        """Names of the passes over training steps that may be taken."""
        if self.passes is None or isinstance(self.passes, bool):
            return frozenset() if self.passes is False else ALL
        return frozenset(self.passes)

    def locate(self, path: Path, key: bool = False) -> tuple[int, int]:
        """Return line and column of the value at a document path, or of its key; 0, 0 where there is no file."""
        return self._document.position(path, key)

    def diagnostic(
        self, code: str, message: str, path: Path = (), suggestion: str | None = None, key: bool = False
    ) -> Diagnostic:
        """Make a finding about the value at a document path, or about its key."""
        return self._document.diagnostic(code, message, path, suggestion, key)

    def to_data(self) -> dict[str, Any]:
        """Return the resolved spec as a document: every method parameter written out, places and comments gone."""
        expect = self.expect and _present(
            trainable=self.expect.trainable and self.expect.trainable.model_dump(exclude_none=True),
            untouched=[selector.to_data() for selector in self.expect.untouched],
            memory=self.expect.memory and self.expect.memory.model_dump(mode="json", exclude_unset=True),
        )
        return _present(
            deltaspec=self.version,
            model=self.model and self.model.model_dump(exclude_none=True),
            seed=self.seed,
            selectors={name: selector.to_data() for name, selector in self.selectors.items()},
            deltas=[_delta_data(delta) for delta in self.deltas],
            expect=expect,
            passes=None if self.allowed_passes == ALL else sorted(self.allowed_passes) or False,
        )

    def with_params(self, index: int, params: MethodParams) -> DeltaSpec:
        """Return the spec with other parameters for one delta."""
        deltas = list(self.deltas)
        deltas[index] = deltas[index].model_copy(update={"params": params})
        return self.model_copy(update={"deltas": tuple(deltas)})

    @property
    def digest(self) -> str:
        """SHA-256 of the resolved spec, provenance apart, as canonical JSON, in hexadecimal."""
        data = self.to_data()
        for delta in data["deltas"]:
            delta.pop("provenance", None)
        return sha256(dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, DeltaSpec) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)


def _delta_data(delta: DeltaEntry) -> dict[str, Any]:
    return _present(
        name=delta.name,
        method=None if delta.sources else delta.method,
        **{"from": dict(delta.sources)},
        combine=delta.combine,
        params=written(delta.combine, delta.params),
        target=delta.target and delta.target.to_data(),
        overrides=[{"match": o.match.to_data(), "params": dict(o.params)} for o in delta.overrides],
        expect=delta.expect and delta.expect.model_dump(exclude_none=True),
        attached=delta.attached,
        dtype=delta.dtype,
        provenance=dict(delta.provenance),
        train=delta.train and delta.train.to_data(),
    )


def _present(**fields: Any) -> dict[str, Any]:
    """Leave out what is absent or empty."""
    return {key: value for key, value in fields.items() if value is not None and value != {} and value != []}
