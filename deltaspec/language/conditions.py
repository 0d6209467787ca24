"""What a step of training is estimated for, in a spec, in Python and on the command line; and amounts of memory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Field, ValidationError

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.diagnostics.wording import closest, show_value
from deltaspec.language.selectors import Part

Optimizer = Literal[
    "none", "adadelta", "adafactor", "adagrad", "adam", "adam_8bit", "adamax", "adamw", "adamw_8bit", "lion",
    "lion_8bit", "muon", "nadam", "radam", "rmsprop", "sgd", "sgd_momentum",
]  # fmt: skip
_OTHER_NAMES: Mapping[str, Optimizer] = {
    **dict.fromkeys(("adamwtorch", "adamwtorchfused", "adamwhf", "pagedadamw", "pagedadamw32bit"), "adamw"),
    **dict.fromkeys(("adamwbnb8bit", "pagedadamw8bit", "8bitadamw"), "adamw_8bit"),
    **dict.fromkeys(("adam8bit", "8bitadam", "pagedadam8bit"), "adam_8bit"),
    **dict.fromkeys(("lion32bit", "pagedlion", "pagedlion32bit"), "lion"),
    **dict.fromkeys(("8bitlion", "pagedlion8bit"), "lion_8bit"),
    **dict.fromkeys(("sgd+momentum", "momentum", "sgdnesterov", "nesterov"), "sgd_momentum"),
}
"""Names that transformers and people have for them, in small letters without what stands between the words."""
Half = Literal["bfloat16", "float16"]

AMOUNT = r"^(≤|<=)? ?[0-9]{1,12}(\.[0-9]{1,6})? ?([KMGT]i?)?B$"
"""At most this much memory: `12GiB`, `<= 800 MB`, `≤ 1.5GiB`."""
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


class Conditions(Part):
    """What a step of training is estimated for."""

    batch: int = Field(8, ge=1, le=1 << 24)
    """Rows of a batch."""
    length: int | None = Field(None, ge=1, le=1 << 24)
    """Tokens of a row; left out, 512, or as many as the model has positions for."""
    target_length: int | None = Field(None, ge=1, le=1 << 24)
    """Tokens of a row of the decoder, in an encoder-decoder; left out, `length`."""
    image_size: int | None = Field(None, ge=1, le=1 << 16)
    """Height and width of an image; left out, what the model's configuration says."""
    optimizer: Optimizer = "adamw"
    """The optimizer of the deltas' parameters."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """dtype of the backbone's weights; left out, their own, or the one that the configuration names."""
    autocast: Half | None = None
    """dtype of torch.autocast around the forward; left out, there is none."""
    base: Literal["4bit", "4bit_double", "8bit"] | None = None
    """Form that the backbone's linear layers are packed in, as bitsandbytes packs them; left out, as they are."""
    checkpointing: bool = False
    """Whether the backbone's layers are computed again in the backward (gradient checkpointing)."""
    labels: bool = True
    """Whether the forward is given labels, where it takes them, and computes the loss."""
    deltas: tuple[str, ...] | None = Field(None, min_length=1)
    """The deltas that are attached and trained; left out, those that start attached."""


class Memory(Conditions):
    """Bound of the memory that one step of training takes."""

    model_config = ConfigDict(json_schema_extra={"type": ["string", "object"], "pattern": AMOUNT})
    max: Annotated[str, Field(pattern=AMOUNT)]
    """At most this much: `12GiB`, `<= 800MB`. A text in the place of the mapping means the same."""

    @property
    def bytes(self) -> int:
        """The bound in bytes."""
        return amount(self.max)


def amount(text: str) -> int:
    """Read an amount of memory that keeps to `AMOUNT`, in bytes."""
    number, letter, binary = re.sub(r"[≤<=\s]", "", text), "", False
    if found := re.fullmatch(r"([0-9.]+)([KMGT]?)(i?)B", number):
        number, letter, binary = found[1], found[2], bool(found[3])
    return int(float(number) * (1024 if binary else 1000) ** _POWERS[letter])


def shown_amount(count: float) -> str:
    """Write bytes for people: `11.8 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def conditions(given: Mapping[str, Any], place: str = "estimate") -> Conditions:
    """Read conditions that a call gives. Raises DeltaSpecError (DS506) with all that is wrong; `place` names the call.

    A text stands for what it says, so that a command line can give them: `"8"`, `"true"`, `"french+legal"`.
    """
    fields, findings, values = Conditions.model_fields, [], {}
    for key, value in given.items():
        if key not in fields:
            near = closest(key, fields)
            hint = f"did you mean {near}? " if near else ""
            message = f"an estimate has no option {show_value(key)}"
            findings.append(Diagnostic("DS506", message, place, suggestion=f"{hint}options: {', '.join(fields)}"))
        elif value is not None:
            values[key] = _read(key, value)
    try:
        made = Conditions.model_validate(values)
    except ValidationError as error:
        findings += [_finding(str(found["loc"][0]), values, found, place) for found in error.errors()]
    if findings:
        raise DeltaSpecError(findings)
    return made


def from_text(text: str, place: str = "--estimate") -> Conditions:
    """Read `batch=8,length=512,optimizer=adamw`. Raises DeltaSpecError (DS506) with all that is wrong."""
    given: dict[str, str] = {}
    findings = []
    for part in filter(None, (part.strip() for part in _apart(",", text))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value:
            message = f"{show_value(part)} is no option and its value"
            findings.append(Diagnostic("DS506", message, place, suggestion="write batch=8,length=512,optimizer=adamw"))
        elif key in given:
            message = f"{key} is there twice"
            findings.append(Diagnostic("DS506", message, place, suggestion="leave one of the two out"))
        else:
            given[key] = value
    try:
        made = conditions(given, place)
    except DeltaSpecError as error:
        findings += error.diagnostics
    if findings:
        raise DeltaSpecError(findings)
    return made


def _apart(mark: str, text: str) -> list[str]:
    """Split a text at a mark, but not within the name of a delta of a matrix: `french[rank=4,lr=1e-3]`."""
    return re.split(rf"{re.escape(mark)}(?![^\[\]]*\])", text)


def _read(key: str, value: Any) -> Any:
    """Return what a value stands for; one that stands for nothing stays, and is refused."""
    if key == "optimizer":
        name = value.__name__ if isinstance(value, type) else str(value)
        plain = re.sub(r"[-_ ]", "", name.lower())
        same = (known for known in get_args(Optimizer) if known.replace("_", "") == plain)
        return _OTHER_NAMES.get(plain) or next(same, name)
    if key == "deltas":
        return tuple(_apart("+", value)) if isinstance(value, str) else tuple(value)
    if key in ("dtype", "autocast", "base"):
        return _SHORT.get(str(value).lower(), str(value).removeprefix("torch."))
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return int(value)
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


_SHORT = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "nf4": "4bit", "fp4": "4bit",
          "int8": "8bit", "4": "4bit", "8": "8bit"}  # fmt: skip


def _finding(key: str, values: Mapping[str, Any], error: Any, place: str) -> Diagnostic:
    value, hint, why = values[key], None, f": {error['msg'].lower().removeprefix('input ')}"
    if error["type"] == "literal_error":
        why = ""
        kind = Conditions.model_fields[key].annotation
        known = [word for word in _words(kind) if word is not None]
        near = closest(str(value), known)
        hint = f"{f'did you mean {near}? ' if near else ''}known: {', '.join(known)}"
    shown = show_value(value if isinstance(value, str | int | float | bool) else str(value))
    return Diagnostic("DS506", f"{key} cannot be {shown}{why}", place, suggestion=hint)


def _words(kind: Any) -> list[Any]:
    """Return the words that a field may be."""
    found: list[Any] = []
    for one in get_args(kind):
        found += _words(one) if get_args(one) else [one] if isinstance(one, str) else []
    return found
