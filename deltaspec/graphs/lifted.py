"""Graphs as plain functions: what a graph calls as modules, and all it reads, are arguments of the function."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import fx
from torch.fx.graph import CodeGen

_LIFTED = re.compile(r"self\.(base|swapped|dropout)(_\w+)?\(")
_SPLAT = re.compile(r"_splat_args = (\w+), _splat_kwargs = (\w+)")


class _LiftedCodeGen(CodeGen):
    """Generates a plain function: the host and dropout are arguments, not attributes of a `self`."""

    def gen_fn_def(self, free_vars: list[str], *args: Any, **kwargs: Any) -> str:
        return super().gen_fn_def(free_vars, *args, **kwargs).replace("(self, ", "(", 1)


def new_graph() -> fx.Graph:
    """Make an empty graph whose modules are named like placeholders: `base`, `swapped`, `dropout`."""
    graph = fx.Graph()
    graph.set_codegen(_LiftedCodeGen())
    return graph


def to_function(graph: fx.Graph, title: str) -> tuple[Callable[..., Any], str]:
    """Generate the function of a finished graph: (function, its source). What nobody uses is taken out."""
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)
    graph.on_generate_code(lambda _: _lift)
    graph.lint()
    source = graph.python_code("self")
    namespace = dict(source.globals)
    exec(compile(source.src, f"<deltaspec {title}>", "exec"), namespace)
    function: Callable[..., Any] = namespace["forward"]
    return function, source.src.strip() + "\n"


def _lift(lines: list[str]) -> list[str]:
    return [_SPLAT.sub(r"*\1, **\2", _LIFTED.sub(r"\1\2(", line)) for line in lines]
