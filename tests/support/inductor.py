"""Inductor's rewritings of graphs without its code generation, which takes a C++ compiler minutes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor.compile_fx import compile_fx
from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
from torch._inductor.virtualized import V


def inductor_passes(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Rewrite forwards and backwards as `torch.compile` does by default, and run what comes out step by step."""
    return compile_fx(graph, inputs, inner_compile=_rewritten)


def _rewritten(graph: fx.GraphModule, inputs: Sequence[Any], *, is_inference: bool = False, **_: Any) -> Any:
    view_to_reshape(graph)
    with V.set_fake_mode(torch._guards.detect_fake_mode(inputs)):
        post_grad_passes(graph, is_inference)
    graph.recompile()

    def run(values: list[Any]) -> Any:
        given = list(values)
        values.clear()
        return graph(*given)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run
