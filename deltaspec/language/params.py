"""A delta's parameters read by its method's model, with findings in the author's words."""

from __future__ import annotations

from collections.abc import Mapping
from json import dumps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltaspec.methods.declarations import MethodParams


def read_params(kind: type[MethodParams], data: Mapping[str, Any]) -> MethodParams:
    """Read a method's parameters from a document's data, where a tuple is a list. Raises pydantic's ValidationError."""
    return kind.model_validate_json(dumps(data))
