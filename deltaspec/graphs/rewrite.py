"""The rewriter: from a graph and one site's node to the same graph with the deltas' formulas in it.

It sees only a graph and a `call_module` node, so the same code serves both captures: one region per module,
where the node is the module's own forward, and one region for a whole traced model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.proxy import GraphAppendingTracer

from deltaspec.graphs.links import Call, Inputs, Link, keeps_dtype, like, widened
from deltaspec.graphs.per_row import RowEmitter
from deltaspec.graphs.row_ops import toward
from deltaspec.methods.registry import methods


class _Tensors:
    """Stands for `t` in a formula: the delta's tensors as proxies, dropout, the host's other arguments."""

    def __init__(self, tracer: GraphAppendingTracer, inputs: Inputs, compute: torch.dtype | None, narrow: bool) -> None:
        self._tracer, self._inputs, self._compute = tracer, inputs, compute
        self._widen = compute if narrow else None

    def __getattr__(self, name: str) -> fx.Proxy:
        tensor = fx.Proxy(self._inputs.tensors[name], self._tracer)
        return tensor if self._widen is None else self.call(widened, tensor, self._widen)

    @property
    def stream(self) -> fx.Proxy:
        """What entered the module that the formula reads besides."""
        assert self._inputs.stream is not None
        entered = fx.Proxy(self._inputs.stream(), self._tracer)
        return entered if self._compute is None else entered.to(self._compute)

    def dropout(self, value: fx.Proxy) -> fx.Proxy:
        if self._inputs.dropout is None:
            return value
        return fx.Proxy(self._tracer.graph.call_module(self._inputs.dropout, (value.node,)), self._tracer)

    def argument(self, name: str) -> fx.Proxy | None:
        return None if self._inputs.argument is None else fx.Proxy(self._inputs.argument(name), self._tracer)

    def call(self, function: Callable[..., Any], *args: Any) -> fx.Proxy:
        return self._tracer.create_proxy("call_function", function, args, {})


def emit_chain(graph: fx.Graph, x: fx.Node, links: tuple[Link, ...], inputs: tuple[Inputs, ...], call: Call) -> fx.Node:
    """Emit, at the graph's insertion point, a site's chain of deltas around its host; return the node of the result.

    The first link stands next to the host. Each method calls its base itself, so it decides what comes before and
    after.
    """
    tracer = GraphAppendingTracer(graph)

    def run(depth: int, value: fx.Proxy, replaced: dict[str, Any]) -> fx.Proxy:
        if depth < 0 or replaced:
            nodes = {name: getattr(tensor, "node", tensor) for name, tensor in replaced.items()}
            return fx.Proxy(call(value.node, nodes), tracer)
        link, given = links[depth], inputs[depth]
        if link.per_row:
            emitter = RowEmitter(tracer, link, given, value, lambda inner: run(depth - 1, inner, {}))
            return fx.Proxy(emitter.run(), tracer)
        compute = None if link.compute is None else getattr(torch, link.compute)
        # Ids have no dtype to compute in, and nothing between two of them.
        cast = value if compute is None or link.form.kind == "embedding" else value.to(compute)
        strength = fx.Proxy(given.strength, tracer) if given.strength is not None else None
        leaving: list[fx.Proxy] = []
        without: list[fx.Proxy] = []

        def base(inner: fx.Proxy, **parameters: Any) -> fx.Proxy:
            if link.scaled and inner is not cast and not parameters and link.form.kind != "embedding":
                inner = tracer.create_proxy("call_function", toward, (cast, inner, strength), {})
            if compute is not None and link.form.kind != "embedding":
                inner = value if inner is cast else inner.to(value.dtype)
                parameters = {n: p if p is None else p.to(value.dtype) for n, p in parameters.items()}
            elif inner is not cast and not parameters and link.form.kind != "embedding":
                inner = tracer.create_proxy("call_function", like, (inner, value), {})
            out = run(depth - 1, inner, parameters)
            leaving.append(out)
            out = out if compute is None else out.to(compute)
            if not parameters:
                without.append(out)
            return out

        tensors = _Tensors(tracer, given, compute, link.narrow)
        result: fx.Proxy = methods()[link.method].apply(link.form, link.params, tensors, cast, base)
        if compute is None and not keeps_dtype(result.node, leaving[0].node):
            result = tracer.create_proxy("call_function", like, (result, leaving[0]), {})
        if link.scaled:
            plain = without[0] if without else base(cast)
            result = tracer.create_proxy("call_function", toward, (plain, result, strength), {})
        return result if compute is None else result.to(leaving[0].dtype)

    return run(len(links) - 1, fx.Proxy(x, tracer), {}).node
