"""Which parameters of a method are checked by code, beyond what their JSON Schema says.

Where a document leaves those out, the schema alone tells that it is valid, without the method or pydantic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from inspect import getattr_static
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltaspec.methods.declarations import MethodParams


def coded(params: type[MethodParams], example: Mapping[str, Any]) -> list[str]:
    """Return the names of the fields on which the class's own validators depend, in the order of the fields.

    A rule about several fields is run on the default values, or on an example where some have none, and the fields
    that it reads are recorded. A document that leaves them at these values sends it the very same way.
    """
    fields = params.model_fields
    required = [name for name, field in fields.items() if field.is_required()]
    params.model_rebuild()
    seen: set[str] = set()
    for field, function in _functions(params.__pydantic_core_schema__):
        if field is not None:
            seen.add(field)
        elif function is None or not example.keys() >= {*required}:
            seen.update(fields)
        else:
            start = params.model_validate({name: example[name] for name in required})
            function(_Recorder(start, seen))
    return [name for name in fields if name in seen]


def _functions(node: Any, field: str | None = None) -> Iterator[tuple[str | None, Callable[[Any], Any] | None]]:
    """Return the validating functions of a pydantic core schema: their field, or themselves for the whole model.

    (None, None) stands for one of the whole model that takes something else than an instance.
    """
    if isinstance(node, list | tuple):
        for item in node:
            yield from _functions(item, field)
    if not isinstance(node, dict):
        return
    kind = node.get("type")
    if isinstance(kind, str) and kind.startswith("function-"):
        after = kind == "function-after" and node["function"]["type"] == "no-info"
        yield field, node["function"]["function"] if after and field is None else None
    for key, inner in node.items():
        if kind == "model-fields" and key == "fields" and field is None:
            for name, schema in inner.items():
                yield from _functions(schema, name)
        elif key == "fields":
            yield from _functions(list(inner.values()), field)
        elif key not in ("metadata", "serialization", "config", "function"):
            yield from _functions(inner, field)


class _Recorder:
    """Stands for an instance of a params class, and notes which fields are read, in properties and methods too."""

    def __init__(self, instance: MethodParams, seen: set[str]) -> None:
        self._instance, self._seen = instance, seen

    def __getattr__(self, name: str) -> Any:
        kind = type(self._instance)
        if name in kind.model_fields:
            self._seen.add(name)
            return getattr(self._instance, name)
        found = getattr_static(kind, name)
        if isinstance(found, property) and found.fget is not None:
            return found.fget(self)
        if isinstance(found, FunctionType):
            return MethodType(found, self)
        raise AttributeError(f"a rule of {kind.__name__} reads {name}, which is neither field, property nor method")
