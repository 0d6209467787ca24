"""Fuse a narrow matrix product with the addition after it: y + scale · h Wᵀ in one pass over the wide output.

On its own the product writes an output as wide as the host's, and the addition reads both and writes a third. Where `y`
is a new tensor that nothing else holds, the product is accumulated into it. A single row takes matrix-vector products,
which cost half the dispatch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from deltaspec.graphs.low_rank import MANY
from deltaspec.graphs.passes.scope import Scope, result_is_new
from deltaspec.graphs.row_ops import toward

_is_transformed = torch._C._are_functorch_transforms_active


@result_is_new
def add_product(y: Tensor, h: Tensor, weight: Tensor, scale: float, strength: Tensor | None = None) -> Tensor:
    """Return y + strength · scale · h weightᵀ. `y` is `[…, out]`, `h` `[…, in]`, `weight` `[out, in]`."""
    if strength is not None:
        h = h * strength
    if _is_plain(y, h, weight):
        flat = y.dim() == 2
        rows, narrow = (y, h) if flat else (y.flatten(0, -2), h.flatten(0, -2))
        rows = torch.addmm(rows, narrow, weight.t(), alpha=scale)
        if rows.dtype is y.dtype:  # not so under autocast
            return rows if flat else rows.view(y.shape)
    if torch.compiler.is_compiling():  # they lose an `alpha`: see `keep_scales.py`
        return y + F.linear(h * scale, weight)
    return torch.add(y, F.linear(h, weight), alpha=scale)


@result_is_new
def add_product_(y: Tensor, h: Tensor, weight: Tensor, scale: float, strength: Tensor | None = None) -> Tensor:
    """Return y + strength · scale · h weightᵀ; `y` may be overwritten."""
    if torch.is_grad_enabled() or not _is_plain(y, h, weight) or not y.is_contiguous():
        # Autograd would copy its gradients for a write through a view.
        return add_product(y, h, weight, scale, strength)
    if strength is not None:
        h = h * strength
    if y.dim() == 2:
        return y.addmm_(h, weight.t(), alpha=scale)
    y.view(-1, weight.size(0)).addmm_(h.flatten(0, -2), weight.t(), alpha=scale)
    return y


@result_is_new
def add_low_rank(
    y: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: float, strength: Tensor | None = None
) -> Tensor:
    """Return y + strength · scale · (x downᵀ) upᵀ.

    `y` is `[…, out]`, `x` `[…, in]`, `down` `[rank, in]`, `up` `[out, rank]`.
    """
    return add_product(y, F.linear(x, down), up, scale, strength)


@result_is_new
def add_low_rank_(
    y: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: float, strength: Tensor | None = None
) -> Tensor:
    """Return y + strength · scale · (x downᵀ) upᵀ; `y` may be overwritten."""
    # Few and cheap tests: beside one row each counts. A linear host's output is contiguous.
    dtype = y.dtype
    if (
        type(y) is not Tensor
        or up.dtype is not dtype
        or x.dtype is not dtype
        or torch.is_grad_enabled()
        or _is_transformed()
    ):
        return add_product(y, F.linear(x, down), up, scale, strength)
    if 0 < y.numel() == up.size(0):
        h = down.mv(x.reshape(-1))
        if h.dtype is dtype:
            if strength is not None:
                h = h * strength
            y.view(-1).addmv_(up, h, alpha=scale)
            return y
    elif y.dim() > 1 and not torch.compiler.is_compiling():
        values, width, rows = y.numel(), up.size(0), x.flatten(0, -2)
        h = rows.mm(down.t()) if values < MANY * width else down.mm(rows.t()).t()
        if h.dtype is dtype and y.is_contiguous() and values:
            if strength is not None:
                h = h * strength
            y.view(-1, width).addmm_(h, up.t(), alpha=scale)
            return y
    return add_product(y, F.linear(x, down), up, scale, strength)  # under autocast narrow values have another dtype


def _is_plain(y: Tensor, x: Tensor, weight: Tensor) -> bool:
    """Return whether the fused forms serve: compilers fuse by themselves, subclasses have rules of their own."""
    return (
        type(y) is Tensor
        and x.dtype is y.dtype
        and weight.dtype is y.dtype
        and y.dim() > 1
        and not torch.compiler.is_compiling()
        and not _is_transformed()
    )


def run(scope: Scope) -> None:
    """Rewrite `add(y, linear(h, weight), alpha=scale)`, and with `h = linear(x, down)` both products.

    A strength between `y` and the sum is as well applied to the narrow values: 0 adds nothing, 1 leaves them.
    """
    for node in list(scope.graph.nodes):
        if node.target is not torch.add or len(node.args) != 2 or not set(node.kwargs) <= {"alpha"}:
            continue
        y, update = node.args
        if not (_is_product(scope, update) and set(update.users) == {node} and isinstance(y, fx.Node)):
            continue
        scaled = next((user for user in node.users if user.target is toward and user.args[:2] == (y, node)), None)
        last = node if scaled is None or len(node.users) > 1 else scaled
        h, up = update.args
        both = _is_product(scope, h) and set(h.users) == {update}
        function = _FORMS[both, scope.may_overwrite(y, node, last)]
        strength = () if last is node else (last.args[2],)
        with scope.graph.inserting_before(last):
            given = (y, *(h.args if both else (h,)), up, node.kwargs.get("alpha", 1.0), *strength)
            last.replace_all_uses_with(scope.graph.call_function(function, given))
        for gone in dict.fromkeys((last, node, update, h)):
            if not gone.users:
                scope.graph.erase_node(gone)


_FORMS: dict[tuple[bool, bool], Callable[..., Tensor]] = {
    (True, True): add_low_rank_, (True, False): add_low_rank,
    (False, True): add_product_, (False, False): add_product,
}  # fmt: skip


def _is_product(scope: Scope, node: Any) -> bool:
    """Return whether a node is a product with a tensor of a delta, without a bias."""
    is_linear = isinstance(node, fx.Node) and node.target is F.linear and len(node.args) == 2 and not node.kwargs
    return is_linear and scope.is_delta_tensor(node.args[1])
