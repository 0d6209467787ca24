"""Graphs as plain functions: what a graph calls as modules, and all it reads, are arguments of the function.

Tensors that others may replace are no arguments: the function is given who holds them and their names there, and looks
them up when it runs.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any, NamedTuple

from torch import fx

SPLAT_ARGS, SPLAT_KWARGS = "_splat_args", "_splat_kwargs"
"""Keywords of a module's call that are spread in it: a graph has no way to say `*args` and `**kwargs` there."""
_STARS = {SPLAT_ARGS: b"*", SPLAT_KWARGS: b"**"}


class Held(NamedTuple):
    """Where a function finds one of its tensors when it runs."""

    holder: str
    """Name of the argument that is the module which holds it."""
    buffer: bool = False
    """Whether the module holds it as a buffer."""


def to_function(graph: fx.Graph, title: str, held: Mapping[str, Held] | None = None) -> tuple[Callable[..., Any], str]:
    """Generate the function of a finished graph: (function, its source). What nobody uses is taken out.

    The modules that the graph calls are named like placeholders of it: `base`, `swapped`, `dropout`. In the place of
    a placeholder in `held` the function takes its name in the module that holds it, and before the first of them that
    module.
    """
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)
    graph.lint()
    generated = graph.python_code("self")
    return executed(looking_up(without_self(generated.src), held or {}), generated.globals, title)


def executed(source: str, names: Mapping[str, Any], title: str) -> tuple[Callable[..., Any], str]:
    """Return the function that generated source defines, and the source; `names` are those it finds."""
    namespace = dict(names)
    exec(compile(source, f"<deltaspec {title}>", "exec"), namespace)
    return namespace["forward"], source.strip() + "\n"


def without_self(source: str) -> str:
    """Remove `self` from generated source: `self.base(x)` becomes `base(x)`, and what is to be spread gets its stars.

    The syntax tree says where; the text stays as it was generated elsewhere.
    """
    text = source.encode()
    starts = [0, *accumulate(len(line) + 1 for line in text.split(b"\n"))]

    def start(node: Any) -> int:
        return starts[int(node.lineno) - 1] + int(node.col_offset)

    edits: list[tuple[int, int, bytes]] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            me, following = node.args.args[:2]
            edits.append((start(me), start(following), b""))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            edits.append((start(node), start(node) + len(b"self."), b""))
        elif isinstance(node, ast.keyword) and node.arg in _STARS:
            edits.append((start(node), start(node.value), _STARS[node.arg]))
    for first, end, new in sorted(edits, reverse=True):
        text = text[:first] + new + text[end:]
    return text.decode()


def looking_up(source: str, held: Mapping[str, Held]) -> str:
    """Let generated source look these of its arguments up when it runs.

    First in the registry that nn.Module keeps them in, which costs next to nothing. What is not there (parametrized,
    pruned, FSDP1's plain attributes) is an attribute.
    """
    if not held:
        return source
    function = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    lines, arguments, known = source.split("\n"), list[str](), set[str]()
    for argument in function.args.args:
        place = held.get(argument.arg)
        if place is None:
            arguments.append(argument.arg)
            continue
        arguments += [] if place.holder in known else [place.holder]
        arguments.append(f"{argument.arg}_key")
        known.add(place.holder)
    stars = [f"{star}{one.arg}" for star, one in (("*", function.args.vararg), ("**", function.args.kwarg)) if one]
    first = function.body[0].lineno - 1
    return "\n".join([
        *lines[: function.lineno - 1], f"def {function.name}({', '.join([*arguments, *stars])}):", *_lookups(held),
        *lines[first:],
    ])  # fmt: skip


def _lookups(held: Mapping[str, Held]) -> list[str]:
    lines = []
    for holder in dict.fromkeys(place.holder for place in held.values()):
        mine = {name: place for name, place in held.items() if place.holder == holder}
        lines.append("    try:")
        for registry, buffer in (("_parameters", False), ("_buffers", True)):
            found = [f"{name} = _own[{name}_key]" for name, place in mine.items() if place.buffer is buffer]
            if found:
                lines.append(f"        _own = {holder}.{registry}; {'; '.join(found)}")
        asked = "; ".join(f"{name} = getattr({holder}, {name}_key)" for name in mine)
        lines += ["    except KeyError:", f"        {asked}"]
    return lines
