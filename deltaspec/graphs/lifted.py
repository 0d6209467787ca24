"""Graphs as plain functions: what a graph calls as modules, and all it reads, are arguments of the function."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

from torch import fx

SPLAT_ARGS, SPLAT_KWARGS = "_splat_args", "_splat_kwargs"
"""Keywords of a module's call that are spread in it: a graph has no way to say `*args` and `**kwargs` there."""
_STARS = {SPLAT_ARGS: b"*", SPLAT_KWARGS: b"**"}


def to_function(graph: fx.Graph, title: str) -> tuple[Callable[..., Any], str]:
    """Generate the function of a finished graph: (function, its source). What nobody uses is taken out.

    The modules that the graph calls are named like placeholders of it: `base`, `swapped`, `dropout`.
    """
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)
    graph.lint()
    generated = graph.python_code("self")
    return executed(without_self(generated.src), generated.globals, title)


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
