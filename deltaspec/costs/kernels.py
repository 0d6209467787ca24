"""A CPU's attention for tensors on the meta device, where torch picks the one that keeps all probabilities."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

_FLASH = SDPBackend.FLASH_ATTENTION
_kernel = attrgetter("_scaled_dot_product_flash_attention_for_cpu")(torch.ops.aten)


class AttentionOfCPU(TorchFunctionMode):
    """Lets attention on the meta device take the kernel that torch picks for the same shapes on a CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is F.scaled_dot_product_attention and _is_meta(*args, **given) and _picked(*args, **given) == _FLASH:
            return _flash(*args, **given)
        return func(*args, **given)


def _is_meta(query: Any, *_: Any, **__: Any) -> bool:
    return type(query) is Tensor and query.is_meta


def _picked(*args: Any, **kwargs: Any) -> SDPBackend:
    """Return the kernel that torch picks for such tensors on a CPU."""
    with FakeTensorMode():

        def fake(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
            return made.requires_grad_(value.requires_grad)

        given = {name: fake(value) for name, value in kwargs.items()}
        return SDPBackend(torch._fused_sdp_choice(*map(fake, args), **given))  # noqa: SLF001 (it has no other name)


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
