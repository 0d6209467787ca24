"""Regions of the `modules` capture: one small fx graph per form of site, turned into one function that all such sites
share.

A region's graph takes the host's own forward (`base`) and the deltas' tensors as inputs, like the lifted graphs of
torch.export: graphs belong to shapes, tensors to deltas. Its function is given the deltas' modules and the tensors'
names, and looks the tensors up when it runs. A site binds the function with `functools.partial`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from deltaspec.graphs.formula import formula
from deltaspec.graphs.lifted import SPLAT_ARGS, SPLAT_KWARGS, Held, to_function
from deltaspec.graphs.links import Inputs, Link
from deltaspec.graphs.passes.recompute import HOST, How, trains_in_one_step
from deltaspec.graphs.passes.recompute_parts import training_graph
from deltaspec.graphs.passes.run import run_passes
from deltaspec.graphs.rewrite import emit_chain
from deltaspec.graphs.streams import entered
from deltaspec.methods.registry import methods


@dataclass(frozen=True, slots=True)
class RegionKey:
    """Everything that a region's graph depends on."""

    links: tuple[Link, ...]
    argument: str | None
    """Name of the host's only argument; None for a host called with any arguments, which are passed through."""
    hidden: str = "hidden_states"
    """Name of the argument that carries the hidden state, where it comes by keyword."""
    lowered: tuple[tuple[bool | None, ...], ...] = ()
    """Tensors that go into the host's parameters, through a `Lowered` base, by delta: whether each is a buffer of it;
    None for a strength."""
    arguments: tuple[str, ...] = ()
    """Names of the host's arguments in order, where a formula asks for one."""
    owned: bool = False
    """Whether `base` gives a new tensor that nothing else holds, so that passes may let it be overwritten."""
    how: How | None = None
    """In which way the site trains, where passes change that."""


@dataclass(frozen=True, slots=True)
class Region:
    """One fx graph and the function generated from it."""

    key: RegionKey | None
    """Key that it was built for; None for the region of a whole model."""
    graph: fx.Graph
    code: str
    function: Callable[..., Any]
    bound: tuple[str, ...]
    """Names of the graph's inputs that a site binds, in order: `base`, each link's tensors, dropout, stream and
    strength, `host`, `swapped`."""


def hidden_in(args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> Tensor:
    """Find the hidden state among a call's arguments: the first positional one, else the keyword `name`."""
    hidden: Tensor = args[0] if args else kwargs[name]
    return hidden


def argument_in(args: tuple[Any, ...], kwargs: Mapping[str, Any], names: tuple[str, ...], name: str) -> Any:
    """Find one of a call's arguments by name; None where it is not given."""
    place = names.index(name) if name in names else len(args)
    return args[place] if place < len(args) else kwargs.get(name)


def with_hidden_in(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str, hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the same arguments with another hidden state."""
    return ((hidden, *args[1:]), dict(kwargs)) if args else (args, {**kwargs, name: hidden})


def hidden_out(output: Any) -> Tensor:
    """Find the hidden state in what a module returns: the tensor, or the first of a tuple or ModelOutput."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        output = tuple(output.values())
    hidden: Tensor = output[0]
    return hidden


def with_hidden_out(output: Any, hidden: Tensor) -> Any:
    """Return the same output with another hidden state."""
    if isinstance(output, Tensor):
        return hidden
    if isinstance(output, Mapping):
        first = next(iter(output))
        return type(output)(**{**output, first: hidden})
    if hasattr(output, "_replace"):
        return output._replace(**{output._fields[0]: hidden})
    return type(output)((hidden, *output[1:]))


@functools.cache
def region(key: RegionKey) -> Region:
    """Build the region of a form of site; made once per process."""
    graph = fx.Graph()
    bound = ["base"]
    graph.placeholder("base")

    def bind(name: str) -> fx.Node:
        node = graph.placeholder(name)
        bound.append(name)
        return node

    def swapped() -> fx.Node:
        if "swapped" not in bound:
            with graph.inserting_before(entering):
                bind("swapped")
        found: fx.Node = next(node for node in graph.find_nodes(op="placeholder") if node.target == "swapped")
        return found

    held: dict[str, Held] = {}
    lowered: list[fx.Node] = []
    for number, tensors_of in enumerate(key.lowered):
        for buffer in tensors_of:
            node = bind(f"lowered_{len(lowered)}")
            lowered.append(node)
            if buffer is not None:
                held[str(node.target)] = Held(f"_within_{number}", buffer)
    inputs = []
    for depth, link in enumerate(key.links):
        suffix = f"_{depth + 1}" if len(key.links) > 1 else ""
        tensors = {name: bind(name + suffix) for name in link.form.tensors}
        if not link.per_row:
            held |= {name + suffix: Held(f"_held{suffix}", name in link.buffers) for name in tensors}
        dropout, numbers = None, tuple[fx.Node, ...]()
        drops = methods()[link.method].dropout(link.params) > 0
        if link.per_row:
            per_row = formula(link, key.argument is None)
            numbers = tuple(bind(f"number_{place}{suffix}") for place in range(len(per_row.numbers)))
            drops = per_row.drops
        if drops:
            dropout = f"dropout{suffix}"
            bind(dropout)
        stream = functools.partial(_entered, graph, bind(f"stream{suffix}")) if link.reads_stream else None
        strength = bind(f"strength{suffix}") if link.scaled or link.per_row else None
        inputs.append(Inputs(tensors, dropout, strength=strength, stream=stream, numbers=numbers, swapped=swapped))
    if key.how is not None and key.how.own:
        bind(HOST)

    leading = (tuple(lowered),) if lowered else ()
    if key.argument is not None:
        entering = graph.placeholder(key.argument)

        def call(value: fx.Node, replaced: dict[str, Any]) -> fx.Node:
            if replaced:
                swapped()
                return graph.call_module("swapped", (replaced, value))
            return graph.call_module("base", (*leading, value))

        result = emit_chain(graph, entering, key.links, tuple(inputs), call)
    else:
        entering = args = graph.placeholder("*args")
        kwargs = graph.placeholder("**kwargs")
        result = _open_call(graph, key, args, kwargs, leading, tuple(inputs), swapped)
    graph.output(result)
    title = f"region {' + '.join(link.method for link in key.links) or 'lowered'}"
    training = None
    if key.how is not None and not any(link.per_row for link in key.links):
        names = [name for given in inputs for name in (node.target for node in given.tensors.values())]
        dropouts = [given.dropout for given in inputs if given.dropout is not None]
        training = training_graph(graph, key.argument, list(map(str, names)), dropouts, key.how.remake)
    run_passes(graph, key.owned, how=key.how)
    function, code = to_function(graph, title, held)
    if training is not None and not trains_in_one_step(graph):
        run_passes(training, key.owned)
        function = _either(function, to_function(training, f"{title} in training", held)[0])
    return Region(key, graph, code, function, tuple(bound))


def _either(function: Callable[..., Any], training: Callable[..., Any]) -> Callable[..., Any]:
    """Return what runs one function while gradients are recorded, and another one else."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return (training if torch.is_grad_enabled() else function)(*args, **kwargs)

    return run


def _open_call(
    graph: fx.Graph,
    key: RegionKey,
    args: fx.Node,
    kwargs: fx.Node,
    leading: tuple[Any, ...],
    inputs: tuple[Inputs, ...],
    swapped: Callable[[], fx.Node],
) -> fx.Node:
    """Emit a host that takes any arguments and may return more than the hidden state."""
    outputs: list[fx.Node] = []

    def argument(name: str) -> fx.Node:
        return graph.call_function(argument_in, (args, kwargs, key.arguments, name))

    inputs = tuple(replace(given, argument=argument) for given in inputs)
    x = graph.call_function(hidden_in, (args, kwargs, key.hidden))

    def call(value: fx.Node, replaced: dict[str, Any]) -> fx.Node:
        given_args, given_kwargs = args, kwargs
        if value is not x:
            both = graph.call_function(with_hidden_in, (args, kwargs, key.hidden, value))
            given_args = graph.call_function(_getitem, (both, 0))
            given_kwargs = graph.call_function(_getitem, (both, 1))
        splat: dict[str, Any] = {SPLAT_ARGS: given_args, SPLAT_KWARGS: given_kwargs}
        if replaced:
            swapped()
            output = graph.call_module("swapped", (replaced,), splat)
        else:
            output = graph.call_module("base", leading, splat)
        outputs.append(output)
        return graph.call_function(hidden_out, (output,)) if key.links else output

    result = emit_chain(graph, x, key.links, inputs, call)
    return graph.call_function(with_hidden_out, (outputs[0], result)) if key.links else result


def _entered(graph: fx.Graph, stream: fx.Node) -> fx.Node:
    return graph.call_function(entered, (stream,))


def _getitem(pair: tuple[Any, Any], index: int) -> Any:
    return pair[index]
