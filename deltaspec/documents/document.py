"""Read a YAML or JSON document into plain data, with the place of every value.

Strict on purpose: what a document says must not depend on the parser's habits. Every bound is checked before the work
it bounds, so a hostile document ends in one finding within about a second.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic, Path
from deltaspec.diagnostics.wording import show_path
from deltaspec.documents.builder import MAX_DEPTH, MAX_NODES, MAX_NUMBER, Builder, Mark, bad_character
from deltaspec.documents.nearby import near_path

MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """Plain data (dicts with string keys, lists, str, int, float, bool, None) and where each value stands."""

    data: dict[str, Any]
    name: str
    marks: Mark | None = None
    """Places of the values; None for data given in Python."""
    places: Mapping[Path, Path] = field(default_factory=dict)
    """Paths of the data that are written elsewhere in the document, and where: those inside of them, too."""

    def written(self, path: Path) -> Path:
        """Return the path in the document as it was written of what stands at a path of the data."""
        for end in range(len(path), 0, -1) if self.places else ():
            if path[:end] in self.places:
                return *self.places[path[:end]], *path[end:]
        return path

    def where(self, path: Path) -> str:
        """Name a path of the data as it was written: `deltas[0].target.path`."""
        return show_path(self.written(path))

    def position(self, path: Path, key: bool = False) -> tuple[int, int]:
        """Return line and column of the value at `path`, or of its key; of its nearest container where it has none."""
        mark = self.marks
        if mark is None:
            return 0, 0
        place = mark.line, mark.column
        for part in self.written(path):
            if part not in mark.children:
                return place
            mark = mark.children[part]
            place = mark.line, mark.column
        return mark.key if key and path and mark.key is not None else place

    def diagnostic(
        self, code: str, message: str, path: Path = (), suggestion: str | None = None, key: bool = False
    ) -> Diagnostic:
        """Make a finding about the value at `path`, or about its key."""
        line, column = self.position(path, key)
        return Diagnostic(code, message, self.name, line, column, suggestion, self.where(path))


def read(path: str | os.PathLike[str]) -> Document:
    """Read a file: strict JSON where it ends in `.json`, else YAML. Raises DeltaSpecError."""
    name = os.fsdecode(path)
    try:
        if not stat.S_ISREG(os.stat(name).st_mode):
            kind = "a directory" if os.path.isdir(name) else "not a regular file"
            finding = Diagnostic("DS101", f"cannot read a spec here: this is {kind}", _called(name))
            raise DeltaSpecError([replace(finding, suggestion=_in_place_of(name))])
        with open(name, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except DeltaSpecError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        long_text = "\n" in name or len(name) > 1000
        missing = None if os.path.lexists(name) or long_text else near_path(name)
        hint = "this looks like the text of a spec: pass a file name or a dict" if long_text else None
        hint = hint if missing is None else f"did you mean {missing}?"
        finding = Diagnostic("DS101", f"cannot read: {reason}", _called(name), suggestion=hint)
        raise DeltaSpecError([finding]) from None
    return from_bytes(content, _called(name))


def from_bytes(content: bytes, name: str) -> Document:
    """Read a document from the bytes of a file. Raises DeltaSpecError."""
    if len(content) > MAX_BYTES:
        raise DeltaSpecError([_too_large(name)])
    return from_text(_decode(content, name), name)


def from_text(text: str, name: str = "<text>") -> Document:
    """Read a document from text: strict JSON where `name` ends in `.json`, else YAML. Raises DeltaSpecError."""
    text = text.removeprefix("\ufeff")
    if len(text) > MAX_BYTES:
        raise DeltaSpecError([_too_large(name)])
    builder = Builder(name)
    if name.lower().endswith(".json"):
        from deltaspec.documents.json import feed
    else:
        from deltaspec.documents.yaml import feed
    if (found := bad_character(text)) is not None:
        offset, message = found
        before = text[:offset]
        line, column = before.count("\n") + 1, offset - before.rfind("\n")
        raise DeltaSpecError([Diagnostic("DS104", message, name, line, column)])
    feed(text, builder)
    data, marks = builder.finish()
    return Document(data, name, marks)


def from_data(data: Mapping[str, Any], name: str = "<spec>") -> Document:
    """Copy a document given as Python data. Raises DeltaSpecError where JSON could not hold it."""
    findings: list[Diagnostic] = []
    nodes = 0

    def refuse(code: str, message: str, path: Path) -> None:
        findings.append(Diagnostic(code, message, name, where=show_path(path)))

    def copy(value: Any, path: Path) -> Any:
        nonlocal nodes
        nodes += 1
        if len(path) > MAX_DEPTH or nodes > MAX_NODES:
            if not findings or findings[-1].code not in ("DS102", "DS110"):
                deep = len(path) > MAX_DEPTH
                refuse(*(("DS110", _DEEP, path) if deep else ("DS102", f"more than {MAX_NODES} values", ())))
            return None
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            if (found := bad_character(value)) is not None:
                refuse("DS104", found[1], path)
            return str(value)
        if isinstance(value, int):
            if abs(value) >= MAX_NUMBER:
                refuse("DS111", "this integer does not fit into 64 bits", path)
            return int(value)
        if isinstance(value, float):
            if not math.isfinite(value):
                refuse("DS111", f"{value} is not a finite number", path)
            return float(value)
        if isinstance(value, Mapping):
            copied = {}
            for key, item in value.items():
                if isinstance(key, str):
                    copied[str(key)] = copy(item, (*path, str(key)))
                else:
                    refuse("DS112", f"the key {key!r:.60} is not a string", path)
            return copied
        if isinstance(value, list | tuple):
            return [copy(item, (*path, index)) for index, item in enumerate(value)]
        refuse("DS115", f"a document cannot hold a {type(value).__name__}", path)
        return None

    if not isinstance(data, Mapping):
        raise DeltaSpecError([Diagnostic("DS114", f"a spec is a mapping, not a {type(data).__name__}", name)])
    copied = copy(data, ())
    if findings:
        raise DeltaSpecError(findings)
    return Document(copied, name)


_DEEP = f"nested more than {MAX_DEPTH} levels deep"


def _called(name: str) -> str:
    """Return what a file is called in findings; a text that was taken for a name is cut."""
    return name[:300] if "\n" in name or len(name) > 4096 else name


def _in_place_of(folder: str) -> str | None:
    """Return what may have been meant by a directory that stands where a spec is asked for."""
    try:
        held = sorted(os.listdir(folder))
    except OSError:  # no directory, or an unreadable one
        return None
    specs = [name for name in held if name.endswith((".deltaspec.yaml", ".deltaspec.yml", ".deltaspec.json"))]
    if "manifest.json" in held:
        own = [name for name in specs if not name.endswith(".json")]
        spec = f"name its spec, {os.path.join(folder, own[0])}; " if own else ""
        return f'{spec}deltaspec.restore(model, "{folder}") takes deltas that were saved'
    if "adapter_config.json" in held:
        return f"this is an adapter: deltaspec convert {folder} -o OUT makes a spec of it; restore takes it as it is"
    if "config.json" in held:
        return "this is a model's folder: the model comes first, then specs"
    return "name a file" + (f" in it, such as {os.path.join(folder, specs[0])}" if specs else ": task.deltaspec.yaml")


def _too_large(name: str) -> Diagnostic:
    return Diagnostic("DS102", f"larger than {MAX_BYTES // (1 << 20)} MiB", name, suggestion="is this really a spec?")


def _decode(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line = before.count(b"\n") + 1
        column = len(before[before.rfind(b"\n") + 1 :].decode("utf-8", "replace")) + 1
        utf16 = content[:2] in (b"\xff\xfe", b"\xfe\xff")
        hint = "this looks like UTF-16: save the file as UTF-8" if utf16 else "save the file as UTF-8"
        message = f"not UTF-8: byte 0x{content[error.start]:02x} cannot stand here"
        raise DeltaSpecError([Diagnostic("DS103", message, name, line, column, hint)]) from None
