"""Train linear hosts with a low-rank update in one step of autograd, which keeps their input and little else.

What is cheap is computed again in the backward. Where nothing is recorded, where few values enter, and where others
rewrite what runs (torch.compile does the same by itself), all stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from deltaspec.graphs.activations import Gate
from deltaspec.graphs.autocast import autocasts
from deltaspec.graphs.inference import without_gradients
from deltaspec.graphs.low_rank import LowRankStep, Step
from deltaspec.graphs.modes import PLAIN, is_rewritten
from deltaspec.graphs.passes.fuse_addition import add_low_rank_
from deltaspec.graphs.passes.scope import Scope, result_is_new
from deltaspec.graphs.recipes import recipe_of
from deltaspec.graphs.remade import remade

FEW = 1 << 17
"""Values that enter and leave below which autograd's own steps are faster than one in Python (measured)."""


class How(NamedTuple):
    """What is known of a site when its graph is made."""

    own: bool
    """Whether the host runs its class's own forward, and gives a new tensor."""
    transposed: bool
    """Whether the host's weight is `[in, out]`, as transformers' Conv1D has it."""
    remake: bool
    """Whether its input may be made again from what autograd keeps anyway."""
    absorb: bool
    """Whether that may go around activations."""


@result_is_new
def low_rank_site(
    base: Callable[[Tensor], Tensor],
    host: nn.Module,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    scale: float,
    dropout: nn.Dropout | None,
    how: tuple[bool, bool, bool, bool],
) -> Tensor:
    """Return base(x) + scale · (drop(x) downᵀ) upᵀ, where `base` is the own forward of a linear `host`.

    `how` are the values of a `How`: a plain tuple is a constant of the code that calls this.
    """
    if type(x) is Gate:
        x = x.alone()
    if not torch.is_grad_enabled():
        _, transposed, *_ = how
        if dropout is None or not dropout.training:
            y = without_gradients(host._parameters, x, down, up, scale, transposed)
            if y is not None:
                return y
    elif (step := _step(base, host, x, down, up, scale, dropout, how := How(*how))) is not None:
        recipe = recipe_of(x, how.absorb, host) if how.remake else None
        if recipe is None:
            return _run(step, x, down, up)
        return _run(step._replace(steps=recipe.steps, kept=recipe.kept, shared=remade(x.grad_fn)), x, down, up)
    return add_low_rank_(base(x), x if dropout is None else dropout(x), down, up, scale)


def _run(step: Step, *tensors: Tensor) -> Tensor:
    y: Tensor = LowRankStep.apply(step, *tensors)  # type: ignore[no-untyped-call]
    return y


def _step(
    base: Any, host: nn.Module, x: Tensor, down: Tensor, up: Tensor, scale: float, dropout: nn.Dropout | None, how: How
) -> Step | None:
    """Return what the step is given; None where it does not serve: subclasses of tensors have rules of their own."""
    if type(x) not in PLAIN or is_rewritten():
        return None
    wide = down.size(-1)
    if x.dim() < 2 or x.numel() // wide * (wide + up.size(0)) < FEW:
        return None
    own = host._parameters
    weight, bias = own.get("weight"), own.get("bias")
    if weight is None:
        return None
    tensors = (weight, down, up) if bias is None else (weight, down, up, bias)
    dtype, device = x.dtype, x.device
    if any(type(t) not in PLAIN or t.dtype is not dtype or t.device != device for t in tensors):
        return None
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    if not (x.requires_grad or down.requires_grad or up.requires_grad):
        return None
    if autocasts(device) and dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
    probability = dropout.p if dropout is not None and dropout.training else 0.0
    return Step(base, weight.t() if how.transposed else weight, bias, scale, probability, dtype)


def run(scope: Scope, how: How) -> None:
    """Rewrite `add_low_rank_(base(x), drop(x), down, up, scale)` of a host whose forward is its class's own."""
    inputs = {str(node.target): node for node in scope.graph.find_nodes(op="placeholder")}
    for node in list(scope.graph.nodes):
        if HOST not in inputs or node.target is not add_low_rank_ or len(node.args) != 5:
            continue
        y, entering, down, up, scale = node.args
        if y.target != "base" or set(y.users) != {node} or len(y.args) != 1:
            continue
        [x] = y.args
        drops = entering is not x
        if drops and (entering.op != "call_module" or set(entering.users) != {node} or entering.args != (x,)):
            continue
        dropout = inputs[str(entering.target)] if drops else None
        with scope.graph.inserting_before(node):
            given = (inputs["base"], inputs[HOST], x, down, up, scale, dropout, tuple(how))
            node.replace_all_uses_with(scope.graph.call_function(low_rank_site, given))
        for gone in (node, y, *([entering] if drops else [])):
            scope.graph.erase_node(gone)


HOST = "host"
"""Name of the input that is the host itself, where its forward is its class's own."""


def trains_in_one_step(graph: fx.Graph) -> bool:
    """Return whether the pass has found a site in a graph."""
    return any(node.target is low_rank_site for node in graph.nodes)
