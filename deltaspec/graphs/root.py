"""The root graph: placeholders that mirror the backbone's forward, and one call of the backbone."""

from __future__ import annotations

import inspect
import math
from typing import Any, Protocol

from torch import fx, nn

from deltaspec.backbone.forwards import arguments_of

_PLAIN = (int, float, bool, str, type(None))

DELTAS = "deltas"
"""Name of the argument of the root that takes a delta a row."""


class RowCalls(Protocol):
    """Runs a backbone with deltas row by row."""

    def call(self, deltas: Any, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """Run `forward` with these deltas."""


class Entry(nn.Module):
    """Calls the backbone with named arguments and the rest of the keywords; a leaf of the root graph.

    A graph cannot spread `**kwargs` into a call, so this does. It holds the backbone without registering it, for the
    root registers it already.
    """

    def __init__(self, backbone: nn.Module, rows: RowCalls) -> None:
        super().__init__()
        self.__dict__["backbone"], self.__dict__["rows"] = backbone, rows
        self.__dict__["takes_deltas"] = all(p.name != DELTAS for p in arguments_of(type(backbone).forward))

    def forward(self, args: tuple[Any, ...], named: dict[str, Any], kwargs: dict[str, Any], deltas: Any = None) -> Any:
        """Call the backbone, under a delta a row if `deltas` says so."""
        backbone, mine = self.__dict__["backbone"], self.__dict__["takes_deltas"]
        if mine and DELTAS in kwargs:
            kwargs = dict(kwargs)
            deltas = kwargs.pop(DELTAS)
        if deltas is None:
            return backbone(*args, **named, **kwargs)
        return self.__dict__["rows"].call(deltas, backbone, *args, **named, **kwargs)


def root_graph(backbone: nn.Module) -> fx.Graph:
    """Build the root's graph: one call of an `Entry` named `entry`.

    The placeholders have the names, order and defaults of the backbone's forward, and `deltas` after them. Where a
    default is no plain value, everything is passed through as `*args, **kwargs`.
    """
    parameters = arguments_of(type(backbone).forward)
    kinds = inspect.Parameter
    mirrored = all(p.default is kinds.empty or _writable(p.default) for p in parameters) and not any(
        p.kind in (kinds.POSITIONAL_ONLY, kinds.VAR_POSITIONAL) for p in parameters
    )
    graph = fx.Graph()
    if not mirrored:
        args, kwargs = graph.placeholder("*args"), graph.placeholder("**kwargs")
        graph.output(graph.call_module("entry", (args, {}, kwargs)))
        return graph
    # What every caller gives is passed by position, as callers do: hooks on the backbone may count on it.
    positional: list[fx.Node] = []
    named: dict[str, Any] = {}
    rest: Any = {}
    deltas: fx.Node | None = None
    own = any(parameter.name == DELTAS for parameter in parameters)
    keywords = next((p for p in parameters if p.kind is kinds.VAR_KEYWORD), None)
    for parameter in (p for p in parameters if p is not keywords):
        if parameter.default is kinds.empty and parameter.kind is kinds.POSITIONAL_OR_KEYWORD:
            positional.append(graph.placeholder(parameter.name))
        elif parameter.default is kinds.empty:
            named[parameter.name] = graph.placeholder(parameter.name)
        else:
            named[parameter.name] = graph.placeholder(parameter.name, default_value=parameter.default)
    if not own:
        deltas = graph.placeholder(DELTAS, default_value=None)
    if keywords is not None:
        rest = graph.placeholder(f"**{keywords.name}")
    graph.output(graph.call_module("entry", (tuple(positional), named, rest, deltas)))
    return graph


def _writable(value: Any) -> bool:
    """Return whether generated code can spell the value."""
    return math.isfinite(value) if isinstance(value, float) else type(value) in _PLAIN
