"""The `symbolic` capture: one region for a whole model that torch.fx can trace."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from deltaspec.backbone.clone import clone
from deltaspec.backbone.forwards import arguments_of, foreign_forward
from deltaspec.graphs.fixed import copied, fixed_in, keep, noting, refusing_changes
from deltaspec.graphs.lifted import executed
from deltaspec.graphs.links import Inputs, Link
from deltaspec.graphs.regions import hidden_out, with_hidden_out
from deltaspec.graphs.rewrite import emit_chain
from deltaspec.names.paths import below, is_inside


class _Tracer(fx.Tracer):
    """Keeps every site whole, as one `call_module` node."""

    def __init__(self, sites: Collection[str]) -> None:
        super().__init__()
        self._sites = sites

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self._sites or super().is_leaf_module(m, module_qualified_name)


def trace(
    backbone: nn.Module, sites: Collection[str], hosts: Collection[str], *, fixes: bool = True
) -> tuple[fx.Graph | None, str]:
    """Trace a detached backbone with its sites as leaves: (graph, why it is good) or (None, why not).

    `fixes`: the graph may fix attributes that are no tensors (see `fixed_in`). Tracing burns in `self.training`,
    whether optional arguments were given, and hooks; so the graph is only taken where training and evaluation mode
    trace to the same code, forward has no optional arguments and writes nothing into its modules, and no traced-through
    module has hooks. The trace is made on a structural copy: torch.fx stores the constants it meets on the module it
    traces.
    """
    if foreign_forward(backbone) is not None:
        return None, "a forward was put onto it, which a trace would leave out"
    parameters = arguments_of(type(backbone).forward)
    stars = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    if optional := [p.name for p in parameters if p.default is not p.empty or p.kind in stars]:
        return None, f"its forward has optional arguments ({', '.join(optional)}), which a trace would fix"
    twin = clone(backbone)
    before = _state(twin)
    graphs: list[fx.Graph] = []
    for mode in (True, False):
        for module in twin.modules():
            module.training = mode
        try:
            with noting(twin) as fixed:
                graphs.append(_Tracer(sites).trace(twin))
        except Exception as error:  # whatever a stranger's forward raises on proxies; the reason is kept for the user
            reason = str(error).splitlines()[0] if str(error) else ""
            return None, f"it does not trace: {type(error).__name__}: {reason}"
    if written := _written(before, _state(twin)):
        return None, f"its forward writes {', '.join(written)}, which a trace would leave out"
    training, evaluation = map(_steps, graphs)
    if training != evaluation:
        return None, "its traces in training and in evaluation mode differ"
    graph = graphs[1]
    keep(graph, fixed)
    if fixed and not fixes:
        return None, f"its forward reads {', '.join(fixed_in(graph))}, which a trace would fix"
    held = backbone.named_parameters(remove_duplicate=False), backbone.named_buffers(remove_duplicate=False)
    own = {name for named in held for name, _ in named}
    if constants := [str(node.target) for node in graph.nodes if node.op == "get_attr" and node.target not in own]:
        return None, f"its trace holds tensors that are no parameters or buffers ({', '.join(constants)})"
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    for fqn, module in backbone.named_modules():
        if (fqn not in called or fqn in sites) and (module._forward_hooks or module._forward_pre_hooks) and fqn:
            return None, f"{fqn} has hooks, which a trace would fix or put in another order"
    for host in sorted(hosts):
        if not any(is_inside(host, name) for name in called):
            return None, f"{host or 'the model'} is not called in its trace, and a delta needs its forward"
    return graph, "it traces, the same in training and evaluation mode"


def _steps(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """Return what a trace does, step by step, in a form that is equal for equal traces."""
    return [(n.name, n.op, n.target, fx.node.map_arg((n.args, n.kwargs), lambda a: a.name)) for n in graph.nodes]


def _state(model: nn.Module) -> dict[str, tuple[Any, int]]:
    """Return what a forward may leave in its modules: buffers with their counts of writes, and other attributes."""
    found: dict[str, tuple[Any, int]] = {}
    for fqn, module in model.named_modules():
        for name, buffer in module._buffers.items():
            counts = isinstance(buffer, Tensor) and not buffer.is_inference()  # a trace may leave a proxy here
            found[below(fqn, name)] = (buffer, buffer._version if counts else -1)
        for name, value in module.__dict__.items():
            if name != "training" and not name.startswith("_tensor_constant"):  # fx's own
                found[below(fqn, name)] = (value, 0)
    return found


def _written(before: dict[str, tuple[Any, int]], after: dict[str, tuple[Any, int]]) -> list[str]:
    """Name what is another object, or was written, since."""
    known = {name for name, (value, count) in after.items() if name in before and before[name][0] is value
             and before[name][1] == count}  # fmt: skip
    return sorted((before.keys() | after.keys()) - known)


def reads_around_calls(graph: fx.Graph, backbone: nn.Module, sites: Collection[str]) -> bool:
    """Return whether a trace reads parameters of a site besides calling it (a tied head, `F.linear` on a weight)."""
    named = dict(backbone.named_parameters(remove_duplicate=False))
    read = {id(named.get(str(node.target))) for node in graph.nodes if node.op == "get_attr"}
    owned = (p for fqn in sites if fqn for p in backbone.get_submodule(fqn)._parameters.values() if p is not None)
    return any(id(parameter) in read for parameter in owned)


def compile_graph(graph: fx.Graph) -> tuple[Callable[..., Any], str]:
    """Turn a graph over the backbone into a function of (backbone, inputs) and its source."""
    graph.lint()
    generated = graph.python_code("self")
    function, code = executed(generated.src, generated.globals, "region of the whole model")
    return refusing_changes(graph, function), code


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """Copy a graph, so that it can be rewritten."""
    new = fx.Graph()
    new.output(new.graph_copy(graph, {}))
    return copied(graph, new)


def rewrite_site(
    graph: fx.Graph,
    node: fx.Node,
    links: tuple[Link, ...],
    names: tuple[SiteNames, ...],
    opaque: bool,
    hidden: str = "hidden_states",
) -> None:
    """Put a chain of deltas around one `call_module` node.

    `names` say, per link, where its tensors are registered. `opaque` hosts may return more than the hidden state.
    `hidden` is the name of the argument that carries it, where it comes by keyword.
    """
    with graph.inserting_before(node):
        inputs = tuple(
            Inputs({own: graph.get_attr(target) for own, target in site.tensors.items()}, site.dropout)
            for site in names
        )
        by_keyword = None if node.args else hidden if hidden in node.kwargs else next(iter(node.kwargs))
        x = node.args[0] if by_keyword is None else node.kwargs[by_keyword]
        assert isinstance(x, fx.Node)
        outputs: list[fx.Node] = []

        def call(value: fx.Node, replaced: dict[str, Any]) -> fx.Node:
            assert not replaced, "a method that runs the host on other parameters has a region of its own"
            args = node.args if by_keyword is not None else (value, *node.args[1:])
            kwargs = node.kwargs if by_keyword is None else {**node.kwargs, by_keyword: value}
            outputs.append(graph.call_module(str(node.target), args, kwargs))
            return graph.call_function(hidden_out, (outputs[0],)) if opaque else outputs[0]

        result = emit_chain(graph, x, links, inputs, call)
        if opaque:
            result = graph.call_function(with_hidden_out, (outputs[0], result))
    node.replace_all_uses_with(result)
    graph.erase_node(node)


@dataclass(frozen=True, slots=True)
class SiteNames:
    """The paths under which the backbone holds the tensors of one link, by own name."""

    tensors: dict[str, str]
    dropout: str | None
