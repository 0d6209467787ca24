"""The root graph: placeholders that mirror the backbone's forward, and one call of the backbone."""

from __future__ import annotations

import inspect
import math
from typing import Any

from torch import fx, nn

_PLAIN = (int, float, bool, str, type(None))


class Entry(nn.Module):
    """Calls the backbone with named arguments and the rest of the keywords; a leaf of the root graph.

    A graph cannot spread `**kwargs` into a call, so this does. It holds the backbone without registering it, for the
    root registers it already.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.__dict__["backbone"] = backbone

    def forward(self, args: tuple[Any, ...], named: dict[str, Any], kwargs: dict[str, Any]) -> Any:
        """Call the backbone."""
        return self.__dict__["backbone"](*args, **named, **kwargs)


def root_graph(backbone: nn.Module) -> tuple[fx.Graph, bool]:
    """Build the root's graph; the flag tells whether it goes through an `Entry` named `entry`.

    The placeholders have the names, order and defaults of the backbone's forward. Where a default is no plain value,
    everything is passed through as `*args, **kwargs`.
    """
    parameters = list(inspect.signature(type(backbone).forward).parameters.values())[1:]
    kinds = inspect.Parameter
    mirrored = all(p.default is kinds.empty or _writable(p.default) for p in parameters) and not any(
        p.kind in (kinds.POSITIONAL_ONLY, kinds.VAR_POSITIONAL) for p in parameters
    )
    graph = fx.Graph()
    if not mirrored:
        args, kwargs = graph.placeholder("*args"), graph.placeholder("**kwargs")
        graph.output(graph.call_module("entry", (args, {}, kwargs)))
        return graph, True
    # What every caller gives is passed by position, as callers do: hooks on the backbone may count on it.
    positional: list[fx.Node] = []
    named: dict[str, Any] = {}
    rest: Any = None
    for parameter in parameters:
        if parameter.kind is kinds.VAR_KEYWORD:
            rest = graph.placeholder(f"**{parameter.name}")
        elif parameter.default is kinds.empty and parameter.kind is kinds.POSITIONAL_OR_KEYWORD:
            positional.append(graph.placeholder(parameter.name))
        elif parameter.default is kinds.empty:
            named[parameter.name] = graph.placeholder(parameter.name)
        else:
            named[parameter.name] = graph.placeholder(parameter.name, default_value=parameter.default)
    if rest is None:
        graph.output(graph.call_module("backbone", tuple(positional), named))
        return graph, False
    graph.output(graph.call_module("entry", (tuple(positional), named, rest)))
    return graph, True


def _writable(value: Any) -> bool:
    """Tell whether generated code can spell the value."""
    if isinstance(value, float):
        return math.isfinite(value)
    return type(value) in _PLAIN
