"""A formula for one delta, turned into one where each row of the batch has a delta of its own.

The formula is traced once into a graph apart. What does not depend on the delta's tensors is emitted as it stands and
runs on the whole batch; what does becomes batched matrix products where it is made of linear maps and elementwise
steps, and `torch.vmap` over the rows elsewhere. In between stands the host, which runs once on the whole batch.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.proxy import GraphAppendingTracer
from torch.nn import functional as F

from deltaspec.backbone.stand_in import Swapped, no_gradient_of_padding
from deltaspec.graphs.formula import formula
from deltaspec.graphs.lifted import to_function
from deltaspec.graphs.links import Inputs, Link, like, widened
from deltaspec.graphs.passes import keep_scales
from deltaspec.graphs.row_ops import (
    add_linear_rows,
    add_number_times,
    align,
    linear_rows,
    number_like,
    number_rows,
    rows_in,
    rows_out,
    take,
    toward_rows,
)  # fmt: skip

_ELEMENTWISE = frozenset({F.gelu, F.relu, F.silu, F.leaky_relu, torch.tanh, torch.sigmoid, operator.neg})
_BINARY = frozenset({operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.mul})


class RowEmitter:
    """Emits one link, its tensors `RowSource`s and its strength a `RowSlot`; `base` emits what stands before it."""

    def __init__(
        self,
        tracer: GraphAppendingTracer,
        link: Link,
        inputs: Inputs,
        value: fx.Proxy,
        base: Callable[[fx.Proxy], fx.Proxy],
    ) -> None:
        self.tracer, self.link, self.inputs, self.value, self.base = tracer, link, inputs, value, base
        self.graph, self.slot = tracer.graph, inputs.strength
        self.formula = formula(link, inputs.argument is not None)
        self.ids = link.form.kind == "embedding"
        self.compute = None if link.compute is None else getattr(torch, link.compute)
        self.env: dict[fx.Node, fx.Node] = {}
        self.host: fx.Node | None = None
        """The host's call in the formula."""
        self.leaving: fx.Node | None = None
        """Output of the host, in its own dtype and shape."""
        self._taken: dict[tuple[fx.Node, bool], fx.Node] = {}
        self._numbers = dict(zip(self.formula.numbers, inputs.numbers, strict=True))

    def _call(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        return self.graph.call_function(function, args)

    def run(self) -> fx.Node:
        """Emit, in the formula's own order: a cache that the host fills is asked after its call."""
        x = self.value.node
        if self.compute is not None and not self.ids:
            x = self._call(_cast, x, self.compute)
        self.env[self.formula.x] = self._call(rows_in, self.slot, x)
        for node in self.formula.result.graph.nodes:
            if node in self.formula.own or node in self.env:
                continue
            if self.formula.stream is not None and node is self.formula.stream:
                assert self.inputs.stream is not None
                entered = self.inputs.stream()
                entered = entered if self.compute is None else self._call(_cast, entered, self.compute)
                self.env[node] = self._call(rows_in, self.slot, entered)
            elif node.op == "placeholder":
                name = next((n for n, known in self.formula.arguments.items() if known is node), None)
                if name is not None:
                    assert self.inputs.argument is not None
                    self.env[node] = self.inputs.argument(name)
            elif node.op == "call_module" and node.target == "base":
                self._call_host(node)
            elif node.op == "call_module" and node.target == "dropout":
                assert self.inputs.dropout is not None
                self.env[node] = self.graph.call_module(self.inputs.dropout, (self.env[node.args[0]],))
            elif node.op != "call_module":  # the host on other parameters is part of what is the delta's own
                self.env[node] = self.graph.node_copy(node, self.env.__getitem__)
        if self.host is None:  # a replaced host: its own output is what a row without the delta has
            self._call_host(None)
        assert self.host is not None or self.formula.x in self.env
        result = self._finish(self.formula.result)
        assert self.leaving is not None
        keeps = self.compute is None and (result is self.plain or result.target is add_linear_rows)
        result = self._call(rows_out, self.leaving, result)
        return result if keeps else self._call(like, result, self.leaving)

    def _call_host(self, node: fx.Node | None) -> None:
        entering = self.formula.x if node is None else node.args[0]
        assert isinstance(entering, fx.Node)
        inner = self.value
        if entering is not self.formula.x:
            changed = self._own(entering) if entering in self.formula.own else self.env[entering]
            if not self.ids:
                changed = self._call(toward_rows, self.env[self.formula.x], changed, self.slot)
            changed = self._call(rows_out, self.value.node, changed)
            if not self.ids:
                changed = self._call(like, changed, self.value.node)
            inner = fx.Proxy(changed, self.tracer)
        self.leaving = self.base(inner).node
        output = self.leaving if self.compute is None else self._call(_cast, self.leaving, self.compute)
        self.plain = self._call(rows_in, self.slot, output)
        if node is not None:
            self.host, self.env[node] = node, self.plain

    def _finish(self, result: fx.Node) -> fx.Node:
        """Emit the result, by each row's strength."""
        if result not in self.formula.own:
            return self.env[result]
        if self._is_direct(result) and result.target in (torch.add, operator.add) and len(result.args) == 2:
            y, update = result.args
            linear = isinstance(update, fx.Node) and update.target is F.linear and len(update.args) == 2
            if y is self.host and linear and (not result.kwargs or (result, "alpha") in self.formula.numbers):
                assert isinstance(update, fx.Node)
                inner, weight = (self._value(arg, {}) for arg in update.args)
                number = self._numbers.get((result, "alpha"), 1.0)
                return self._call(add_linear_rows, self.plain, inner, weight, self.slot, number)
        return self._call(toward_rows, self.plain, self._own(result), self.slot)

    def _own(self, target: fx.Node) -> fx.Node:
        return self._value(target, {}) if self._is_direct(target) else self._vmapped(target)

    # Linear maps and elementwise steps

    def _is_direct(self, target: fx.Node) -> bool:
        return all(self._rule(node) is not None for node in self._steps(target))

    def _steps(self, target: fx.Node) -> list[fx.Node]:
        """Return the delta's own steps that lead to a node, its tensors apart, in order."""
        wanted, tensors = {target}, set(self.formula.tensors.values())
        for node in reversed(target.graph.nodes):
            if node in wanted:
                wanted.update(n for n in node.all_input_nodes if n in self.formula.own)
        return [node for node in target.graph.nodes if node in wanted and node not in tensors]

    def _is_vector(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and node in self.formula.tensors.values()

    def _rule(self, node: fx.Node) -> str | None:
        """Name the way a step is emitted for all rows at once; None: there is none."""
        if node.target is F.linear:
            x, *parameters = node.args
            whole = all(p is None or self._is_vector(p) for p in parameters) and not node.kwargs
            return "linear" if whole and not self._is_vector(x) else None
        if node.op == "call_module" and node.target == "dropout":
            return None if self._is_vector(node.args[0]) else "dropout"
        if node.target in _ELEMENTWISE:
            return None if self._is_vector(node.args[0]) else "same"
        if node.target in _BINARY and len(node.args) == 2:
            vectors = [self._is_vector(arg) for arg in node.args]
            others = [arg for arg in node.args if isinstance(arg, fx.Node) and not self._is_vector(arg)]
            return "binary" if sum(vectors) < 2 and others else None
        return None

    def _value(self, node: Any, done: dict[fx.Node, fx.Node]) -> Any:
        if not isinstance(node, fx.Node) or node in self.env:
            return self.env[node] if isinstance(node, fx.Node) else node
        if node in done:
            return done[node]
        if self._is_vector(node):
            new = self._tensor(node, zeros=True)
        else:
            rule, args = self._rule(node), [self._value(arg, done) for arg in node.args]
            places = {at: self._numbers[node, at] for at in (0, 1, "alpha") if (node, at) in self._numbers}
            if rule == "linear":
                new = self._call(linear_rows, *args)
            elif rule == "dropout":
                assert self.inputs.dropout is not None
                new = self.graph.call_module(self.inputs.dropout, tuple(args))
            else:
                if rule == "binary" and any(map(self._is_vector, node.args)):
                    vector = 0 if self._is_vector(node.args[0]) else 1
                    args[vector] = self._call(align, args[vector], args[1 - vector])
                for at, number in places.items():
                    factor = self._call(number_like, number, self.slot, args[1 if at == "alpha" else 1 - int(at)])
                    args[slice(2, 2) if at == "alpha" else slice(int(at), int(at) + 1)] = [factor]
                function: Any = add_number_times if "alpha" in places else node.target
                kwargs = {} if "alpha" in places else dict(node.kwargs)
                new = self.graph.call_function(function, tuple(args), kwargs)
        done[node] = new
        return new

    def _tensor(self, node: fx.Node, zeros: bool) -> fx.Node:
        if (node, zeros) not in self._taken:
            name = next(name for name, known in self.formula.tensors.items() if known is node)
            source, x = self.inputs.tensors[name], self.env[self.formula.x]
            taken = self._call(take, self.slot, source, x, zeros)
            self._taken[node, zeros] = self._call(widened, taken, self.compute) if self.link.narrow else taken
        return self._taken[node, zeros]

    # Everything else

    def _vmapped(self, target: fx.Node) -> fx.Node:
        """Emit the delta's own steps as a function of one row, mapped over the rows."""
        steps = self._steps(target)
        if not steps:
            return self._tensor(target, zeros=False)
        used = dict.fromkeys(n for step in steps for n in step.all_input_nodes if n not in steps)
        sub = fx.Graph()
        modules = [name for name in ("dropout", "swapped") if any(step.target == name for step in steps)]
        env: dict[fx.Node, fx.Node] = {}
        places = {name: sub.placeholder(name) for name in modules}
        for node in used:
            env[node] = sub.placeholder(node.name)
        factors = {(node, at): number for (node, at), number in self._numbers.items() if node in steps}
        of_row = {key: sub.placeholder(f"number_{place}") for place, key in enumerate(factors)}
        for step in steps:
            if step.target == "swapped":
                arguments = fx.node.map_arg(step.args, env.__getitem__)
                env[step] = sub.call_function(_one_row, (places["swapped"], *arguments))
                continue
            if (factor := of_row.get((step, "alpha"))) is not None:
                env[step] = sub.call_function(add_number_times, (*(env[arg] for arg in step.args), factor))  # type: ignore[index]
                continue
            env[step] = new = sub.node_copy(step, env.__getitem__)
            new.args = tuple(of_row.get((step, at), arg) for at, arg in enumerate(new.args))
        sub.output(env[target])
        keep_scales.run(sub)
        function, _ = to_function(sub, f"{self.link.method} of one row")
        given: list[Any] = []
        if "dropout" in modules:
            given.append(next(n for n in self.graph.find_nodes(op="placeholder") if n.target == self.inputs.dropout))
        if "swapped" in modules:
            assert self.inputs.swapped is not None
            given.append(self.inputs.swapped())
        values = [self._tensor(n, False) if self._is_vector(n) else self.env[n] for n in used]
        x = self.env[self.formula.x]
        values += [self._call(number_rows, number, self.slot, x) for number in factors.values()]
        mapped = _over_rows(function, len(modules), f"{self.link.method}_per_row")
        return self._call(mapped, *given, *values)


def _over_rows(function: Callable[..., Any], modules: int, name: str) -> Callable[..., Any]:
    """Map a function over the first dimension of its tensors; the first `modules` arguments are called in it."""

    def run(*inputs: Any) -> Any:
        values = inputs[modules:]
        dims = tuple(0 if isinstance(value, Tensor) and value.dim() else None for value in values)
        bound = functools.partial(function, *inputs[:modules])
        return torch.vmap(bound, in_dims=dims, randomness="different")(*values)

    run.__name__ = run.__qualname__ = name
    return run


def _one_row(swapped: Swapped, parameters: dict[str, Any], x: Tensor) -> Tensor:
    """Run a host on other parameters, on one row."""
    like = next((p.dtype for p in swapped.module.parameters() if p.is_floating_point()), x.dtype)
    own = {n: p.to(like) if isinstance(p, Tensor) and p.is_floating_point() else p for n, p in parameters.items()}
    entering = x.to(like) if x.is_floating_point() else x
    leaving: Tensor = swapped(own, entering.unsqueeze(0)).squeeze(0)
    leaving = no_gradient_of_padding(swapped.module, entering, leaving)
    return leaving.to(x.dtype) if x.is_floating_point() else leaving


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype)
