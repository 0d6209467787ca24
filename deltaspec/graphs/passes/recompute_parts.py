"""Keep what enters a formula, and compute the rest of it again in the backward: for every formula of maps and steps.

What a formula makes of the site's input and its own tensors alone is one part, what it makes of the host's output
another. What calls the host on other weights, or functions that nothing is known of, stays as it is. This works on a
copy of the graph, which runs while gradients are recorded; the graph itself is for all else.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from deltaspec.graphs.fixed import copied
from deltaspec.graphs.lifted import to_function
from deltaspec.graphs.passes.repeatable import is_unrepeatable
from deltaspec.graphs.recomputed import run_part

_KEEPING = frozenset({F.linear, torch.matmul, torch.bmm, operator.matmul})
"""Functions that keep their first tensor."""
FEW = 1 << 16
"""Values that enter below which autograd's own steps are faster than one in Python (measured)."""
_LEAST = {"before": 2, "after": 4}
"""Steps of a part from which it pays: what entered the site is kept by itself, what left the host by one step more."""
_NUMBERS = itertools.count()
_KNOWN = ("torch", "operator", "_operator", "deltaspec")
_FORM = frozenset("dtype shape device ndim".split())


def training_graph(
    graph: fx.Graph, argument: str | None, tensors: Collection[str], dropouts: Collection[str], remake: bool
) -> fx.Graph | None:
    """Return a copy of a region's graph whose parts are recomputed; None where it has none for which that pays.

    `argument` is the name of the input that entered the site; None where that is found among all arguments. `tensors`
    and `dropouts` are those of the deltas' inputs. `remake`: what entered may be made again from what is kept anyway.
    """
    new = fx.Graph()
    new.output(new.graph_copy(graph, {}))
    copied(graph, new)
    if any(map(is_unrepeatable, new.nodes)):
        return None
    inputs = {str(n.target): n for n in new.find_nodes(op="placeholder")}
    own = [inputs[name] for name in tensors]
    found = [n for n in new.nodes if n.op == "call_function" and n.target.__name__ in ("hidden_in", "hidden_out")]
    x = inputs[argument] if argument is not None else found[0]
    changed = _wrap(new, x, own, inputs, dropouts, _LEAST["before"], remake)
    leaving = (
        [n for n in new.nodes if n.op == "call_module" and n.target == "base"] if argument is not None else found[1:]
    )
    if leaving and _wrap(new, leaving[0], [x, *own], inputs, dropouts, _LEAST["after"], False):
        changed = True
    return new if changed else None


def _wrap(
    graph: fx.Graph, first: fx.Node, tensors: list[fx.Node], inputs: dict[str, fx.Node], dropouts: Collection[str],
    least: int, remake: bool,
) -> bool:  # fmt: skip
    """Put one part, which begins with `first`, into one call."""
    sources, part, reached = {first, *tensors}, list[fx.Node](), {first}
    for node in itertools.dropwhile(lambda node: node is not first, graph.nodes):  # what the host reads stays before it
        before = node.all_input_nodes
        if not before or not all(n in sources or n in part for n in before) or not _is_known(node, dropouts):
            continue
        part.append(node)
        if any(n in reached for n in before) and not _is_form(node):
            reached.add(node)
    part = [node for node in part if not _is_form(node) or any(user in part for user in node.users)]
    ends = [node for node in part if any(user not in part for user in node.users)]
    computing = [node for node in part if not _is_form(node)]
    keeps = any(node.args[0] in reached for node in computing if node.target in _KEEPING or node.op == "call_module")
    if len(computing) < least or not keeps or any(_is_form(node) for node in ends):
        return False
    before = _place(graph, part, ends, first)
    if before is None:
        return False
    used = dict.fromkeys(n for node in part for n in node.all_input_nodes if n in sources and n is not first)
    drops = list(dict.fromkeys(str(node.target) for node in part if node.op == "call_module"))
    function = _function(part, [first, *used], drops, ends)

    def step(given: tuple[Tensor, ...], dropped: tuple[Any, ...]) -> tuple[Tensor, ...]:
        return run_part(function, remake, FEW, given, dropped)

    step.__name__ = step.__qualname__ = f"part_{next(_NUMBERS)}"
    with graph.inserting_before(before):
        call = graph.call_function(step, ((first, *used), tuple(inputs[name] for name in drops)))
        for place, end in enumerate(ends):
            value = graph.call_function(_item, (call, place))
            end.replace_all_uses_with(value, delete_user_cb=lambda user: user not in part)
    for node in reversed(part):
        graph.erase_node(node)
    return True


def _place(graph: fx.Graph, part: list[fx.Node], ends: list[fx.Node], first: fx.Node) -> fx.Node | None:
    """Return the node before which a part can run as one, so that all dropouts draw in the order of the graph."""
    order: dict[fx.Node, int] = {node: number for number, node in enumerate(graph.nodes)}
    users = [order[user] for end in ends for user in end.users if user not in part]
    drops = [order[node] for node in part if node.op == "call_module"]
    if not drops:
        return list(order)[min(users)]
    place = min(drops)
    between = {node for node in order if node.op == "call_module" and place < order[node] < max(drops)}
    if order[first] > place or min(users) < place or not between <= set(part):  # the host draws, too
        return None
    return list(order)[place]


def _item(values: tuple[Tensor, ...], place: int) -> Tensor:
    return values[place]


def _function(
    part: list[fx.Node], given: list[fx.Node], drops: list[str], ends: list[fx.Node]
) -> Callable[..., tuple[Tensor, ...]]:
    graph, known = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in given:
        known[node] = graph.placeholder(node.name)
    for name in drops:
        graph.placeholder(name)
    for node in part:
        known[node] = graph.node_copy(node, known.__getitem__)
    graph.output(tuple(known[node] for node in ends))
    return to_function(graph, "part of a formula")[0]


def _is_form(node: fx.Node) -> bool:
    """Return whether a node looks at a tensor's form, not at its values."""
    return node.target is getattr and node.args[1] in _FORM


def _is_known(node: fx.Node, dropouts: Collection[str]) -> bool:
    """Return whether a node computes the same from the same tensors, and writes into none."""
    if node.op == "call_module":
        return node.target in dropouts
    if node.op == "call_method":
        return callable(getattr(Tensor, str(node.target), None)) and not str(node.target).endswith("_")
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return _is_form(node)
    module, name = getattr(node.target, "__module__", None) or "", getattr(node.target, "__name__", "")
    return module.partition(".")[0] in _KNOWN or getattr(torch, name, None) is node.target
