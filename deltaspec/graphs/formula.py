"""A method's formula as a graph of its own, before it is emitted for the rows of a batch."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx.proxy import GraphAppendingTracer

from deltaspec.methods.registry import methods

if TYPE_CHECKING:
    from deltaspec.graphs.links import Link


@dataclass(frozen=True, slots=True)
class Formula:
    """A method's formula as a graph: nodes `base`, `swapped` and `dropout` are calls, the rest is arithmetic."""

    x: fx.Node
    tensors: dict[str, fx.Node]
    arguments: dict[str, fx.Node]
    stream: fx.Node | None
    result: fx.Node
    own: frozenset[fx.Node]
    """Nodes that depend on the delta's tensors or call the host on other parameters; the host's own output is none."""
    numbers: tuple[tuple[fx.Node, int | str], ...]
    """Factors that the delta's own steps are given as numbers, by node and argument. A parameter may set them, so they
    may differ from row to row."""
    drops: bool
    """Whether it drops values, if it is asked to."""
    drops_own: bool
    """Whether it drops values that depend on the delta's tensors."""

    @property
    def factors(self) -> tuple[float, ...]:
        """The values of `numbers`."""
        found: list[Any] = [node.kwargs[at] if isinstance(at, str) else node.args[at] for node, at in self.numbers]
        return tuple(map(float, found))


class _Formal:
    """Stands for `t`, the delta's tensors, while a formula is traced apart."""

    def __init__(self, tracer: GraphAppendingTracer, names: tuple[str, ...], open_call: bool) -> None:
        self._tracer, self._open = tracer, open_call
        self.nodes = {name: tracer.graph.placeholder(name) for name in names}
        self.arguments: dict[str, fx.Node] = {}
        self.entered: fx.Node | None = None

    def __getattr__(self, name: str) -> fx.Proxy:
        return fx.Proxy(self.nodes[name], self._tracer)

    @property
    def stream(self) -> fx.Proxy:
        """What entered the module that the formula reads besides."""
        if self.entered is None:
            self.entered = self._tracer.graph.placeholder("stream")
        return fx.Proxy(self.entered, self._tracer)

    def dropout(self, value: fx.Proxy) -> fx.Proxy:
        return fx.Proxy(self._tracer.graph.call_module("dropout", (value.node,)), self._tracer)

    def argument(self, name: str) -> fx.Proxy | None:
        if not self._open:
            return None
        if name not in self.arguments:
            self.arguments[name] = self._tracer.graph.placeholder(f"argument_{name}")
        return fx.Proxy(self.arguments[name], self._tracer)

    def call(self, function: Callable[..., Any], *args: Any) -> fx.Proxy:
        return self._tracer.create_proxy("call_function", function, args, {})


@functools.cache
def formula(link: Link, open_call: bool) -> Formula:
    """Trace a method's formula."""
    graph = fx.Graph()
    tracer = GraphAppendingTracer(graph)
    x = graph.placeholder("x")
    method = methods()[link.method]
    given = _Formal(tracer, link.form.tensors, open_call)

    def base(inner: fx.Proxy, **parameters: Any) -> fx.Proxy:
        if not parameters:
            return fx.Proxy(graph.call_module("base", (inner.node,)), tracer)
        nodes = {name: getattr(value, "node", value) for name, value in parameters.items()}
        return fx.Proxy(graph.call_module("swapped", (nodes, inner.node)), tracer)

    result = method.apply(link.form, link.params, given, fx.Proxy(x, tracer), base).node
    own = set(given.nodes.values())
    for node in graph.nodes:
        if node.target == "swapped" or (node.target != "base" and not own.isdisjoint(node.all_input_nodes)):
            own.add(node)
    dropped = [node for node in graph.nodes if node.op == "call_module" and node.target == "dropout"]
    numbers = tuple(_numbers(node) for node in graph.nodes if node in own)
    return Formula(
        x, given.nodes, given.arguments, given.entered, result, frozenset(own), tuple(chain(*numbers)),
        bool(dropped), not own.isdisjoint(dropped),
    )  # fmt: skip


def _numbers(node: fx.Node) -> list[tuple[fx.Node, int | str]]:
    if node.target is torch.add and type(node.kwargs.get("alpha")) in (int, float):
        return [(node, "alpha")]
    if node.target in (operator.mul, torch.mul, operator.truediv) and len(node.args) == 2:
        return [(node, place) for place, arg in enumerate(node.args) if type(arg) is float]
    return []
