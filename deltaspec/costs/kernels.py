"""What a CPU runs, for tensors on the meta device: its attention, and the products of experts in float32."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

_FLASH = SDPBackend.FLASH_ATTENTION
_GROUPED: Any = {getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)} - {None}
_kernel = attrgetter("_scaled_dot_product_flash_attention_for_cpu")(torch.ops.aten)


class KernelsOfCPU(TorchFunctionMode):
    """Lets attention on the meta device take the kernel that torch picks for the same shapes on a CPU; experts, too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is F.scaled_dot_product_attention and _is_meta(*args, **given) and _picked(*args, **given) == _FLASH:
            return _flash(*args, **given)
        if func in _GROUPED and [t.dim() for t in args[:2]] == [2, 3] and _is_meta(*args):
            return _Grouped.apply(*args[:2])  # type: ignore[no-untyped-call]
        return func(*args, **given)


def _is_meta(query: Any, *_: Any, **__: Any) -> bool:
    return type(query) is Tensor and query.is_meta


def _picked(*args: Any, **kwargs: Any) -> SDPBackend:
    """Return the kernel that torch picks for such tensors on a CPU; for fake ones it picks another."""
    given = {name: _on_cpu(value) for name, value in kwargs.items()}
    return SDPBackend(torch._fused_sdp_choice(*map(_on_cpu, args), **given))  # noqa: SLF001 (it has no other name)


def _on_cpu(value: Any) -> Any:
    """Return a tensor of this form on a CPU, which holds one row of values; it is what lies within one that matters."""
    if not isinstance(value, Tensor) or not value.dim():
        return value
    step, size = value.stride(-1), value.shape[-1]
    row = torch.empty(max(0, (size - 1) * step + 1), dtype=value.dtype, device="cpu")
    return row.as_strided(value.shape, (*[0] * (value.dim() - 1), step)).requires_grad_(value.requires_grad)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **_: Any,
) -> Tensor:
    """Do what torch does with that kernel: a mask of truth values becomes one of numbers."""
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), -torch.inf)
    found: Tensor = _kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return found


class _Grouped(torch.autograd.Function):
    """Rows of which each is multiplied by one of several matrices, which torch does on meta in bfloat16 alone."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrices: Tensor) -> Tensor:
        """Multiply all by one of them: that takes as much."""
        ctx.shape = matrices.shape
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, matrices if ctx.needs_input_grad[0] else None)
        return rows @ matrices[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Multiply the gradient."""
        rows, matrices = ctx.saved_tensors
        to_matrices = None if rows is None else (rows.t() @ gradient).new_empty(ctx.shape)
        return None if matrices is None else gradient @ matrices[0].t(), to_matrices
