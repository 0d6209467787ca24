"""The rewriter: from a graph and one site's node to the same graph with the deltas' formulas in it.

It sees only a graph and a `call_module` node, so the same code serves both captures: one region per module,
where the node is the module's own forward, and one region for a whole traced model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.proxy import GraphAppendingTracer

from deltaspec.methods import methods
from deltaspec.methods._base import Form, MethodParams

Call = Callable[..., fx.Node]
"""Emits one call of the host: (input node, replaced parameters by own name) -> node of what leaves."""


@dataclass(frozen=True, slots=True)
class Link:
    """One delta in a site's chain: all that its formula depends on, and nothing of its values."""

    method: str
    params: MethodParams
    form: Form
    compute: str | None = None
    """dtype to compute in where it is not the host's own (`float32`), without the torch prefix."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """Nodes that hold one link's tensors, and the name to call its dropout by."""

    tensors: dict[str, fx.Node]
    dropout: str | None
    argument: Callable[[str], fx.Node] | None = None
    """Emits the lookup of one of the host's arguments by name; None where the host takes the hidden state alone."""


class _Tensors:
    """What a formula sees as `t`: the delta's tensors as proxies, dropout, the host's other arguments."""

    def __init__(self, tracer: GraphAppendingTracer, inputs: Inputs) -> None:
        self._tracer, self._inputs = tracer, inputs

    def __getattr__(self, name: str) -> fx.Proxy:
        return fx.Proxy(self._inputs.tensors[name], self._tracer)

    def dropout(self, value: fx.Proxy) -> fx.Proxy:
        if self._inputs.dropout is None:
            return value
        return fx.Proxy(self._tracer.graph.call_module(self._inputs.dropout, (value.node,)), self._tracer)

    def argument(self, name: str) -> fx.Proxy | None:
        if self._inputs.argument is None:
            return None
        return fx.Proxy(self._inputs.argument(name), self._tracer)

    def call(self, function: Callable[..., Any], *args: Any) -> fx.Proxy:
        return self._tracer.create_proxy("call_function", function, args, {})


def emit_chain(graph: fx.Graph, x: fx.Node, links: tuple[Link, ...], inputs: tuple[Inputs, ...], call: Call) -> fx.Node:
    """Emit, at the graph's insertion point, a site's chain of deltas around its host; give the node of the result.

    The first link stands next to the host. Each method calls its base itself, so it decides what comes before and
    after.
    """
    tracer = GraphAppendingTracer(graph)

    def run(depth: int, value: fx.Proxy, replaced: dict[str, Any]) -> fx.Proxy:
        if depth < 0 or replaced:
            nodes = {name: getattr(tensor, "node", tensor) for name, tensor in replaced.items()}
            return fx.Proxy(call(value.node, nodes), tracer)
        link = links[depth]

        def base(inner: fx.Proxy, **parameters: Any) -> fx.Proxy:
            if link.compute is None or link.form.kind == "embedding":
                given = inner
            else:
                given = value if inner is cast else inner.to(value.dtype)
                parameters = {n: p if p is None else p.to(value.dtype) for n, p in parameters.items()}
            out = run(depth - 1, given, parameters)
            leaving.append(out)
            return out if link.compute is None else out.to(getattr(torch, link.compute))

        leaving: list[fx.Proxy] = []
        cast = (
            value if link.compute is None or link.form.kind == "embedding" else value.to(getattr(torch, link.compute))
        )
        result: fx.Proxy = methods()[link.method].apply(
            link.form, link.params, _Tensors(tracer, inputs[depth]), cast, base
        )
        return result if link.compute is None else result.to(leaving[0].dtype)

    return run(len(links) - 1, fx.Proxy(x, tracer), {}).node
