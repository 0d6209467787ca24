"""Working inside the attention function of a transformers model: between its projections and its softmax.

An attention module looks its function up by the name in its config. It is run as a stand-in whose config has our name
in it, so that the backbone's own config, modules and caches are never written.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaspec.backbone.forwards import names_in
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic

NAME = "deltaspec"
"""The name of our function in transformers' AttentionInterface."""
SUPPORTED = ("sdpa", "eager")
"""Attention functions whose masks we can lengthen."""
_ROUTE = "_deltaspec_route"

Attention = Callable[..., Any]
"""From query, key and value, each `[batch, heads, positions, width]`, to (output, weights or None). Where keys are put
in front for some rows alone, those rows come as a fourth argument, boolean `[batch]`."""
Hook = Callable[[Tensor, Tensor, Tensor, Attention], Any]
"""Computes attention anew, given what it is without the hook."""
Front = tuple[bool, ...]
"""Which of the keys in front take positions before those of the model's own tokens."""


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What the attention function of one module was given in a forward."""

    heads: int
    """Number of heads of keys and values (fewer than of queries where those are grouped)."""
    key_width: int
    value_width: int


class Router:
    """Sends the attention function of modules of one class through hooks."""

    def __init__(self, kind: type[nn.Module]) -> None:
        forward = inspect.unwrap(kind.forward)
        plain = next((name for name in names_in(kind.forward) if name.endswith("eager_attention_forward")), "")
        self._interface = forward.__globals__["ALL_ATTENTION_FUNCTIONS"]
        self._plain = forward.__globals__.get(plain)

    def route(self, module: nn.Module, hooks: Sequence[Hook], counted: Sequence[int] = ()) -> None:
        """Route one module, which is a stand-in or a copy; the first hook is the innermost.

        `counted` says of each hook how many positions it takes in front; left out: none.
        """
        attributes = module.__dict__
        config = attributes["config"]
        routed = config.__class__.__new__(config.__class__)
        routed.__dict__.update(config.__dict__)
        routed.__dict__["_attn_implementation_internal"] = NAME
        attributes["config"] = routed
        taken = counted or (0,) * len(hooks)
        attributes[_ROUTE] = (self, config._attn_implementation, tuple(zip(hooks, taken, strict=True)))
        if (tokens := sum(taken)) and makes_bias(module):
            attributes["compute_bias"] = functools.partial(_longer_bias, module, tokens)

    def takes(self, implementation: str) -> bool:
        """Return whether a model's choice of attention function can be routed."""
        return implementation in SUPPORTED and (implementation != "eager" or self._plain is not None)

    def function(self, implementation: str) -> Callable[..., Any]:
        """Return the function that the module would have called."""
        if not self.takes(implementation):
            raise DeltaSpecError([unsupported(implementation)])
        found: Callable[..., Any] = self._interface.get_interface(implementation, self._plain)
        return found


def is_routable(module: nn.Module) -> bool:
    """Return whether a module looks its attention function up in transformers' AttentionInterface, by its config."""
    chooses = hasattr(module.__dict__.get("config"), "_attn_implementation")
    return chooses and "ALL_ATTENTION_FUNCTIONS" in names_in(type(module).forward)


def makes_bias(module: nn.Module) -> bool:
    """Return whether a module computes a bias by the distance of tokens, as T5's first ones do for all of them."""
    return getattr(module, "has_relative_attention_bias", False) is True and hasattr(type(module), "compute_bias")


def register() -> None:
    """Make our function known to transformers, under our name."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention through a routed module's hooks; weights, if any, are those of the model's own positions."""
    router, implementation, hooks = module.__dict__[_ROUTE]
    function = router.function(implementation)
    length = key.shape[2]
    causal = kwargs.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    implied = implementation == "sdpa" and causal and query.shape[2] > 1

    def own(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None, front: Front = ()) -> Any:
        more, mask, rest = k.shape[2] - length, attention_mask, kwargs
        if more:
            if mask is None and implied:
                mask = torch.ones(q.shape[2], length, dtype=torch.bool, device=q.device).tril()[None, None]
            if seen is not None:
                mask = _lengthened_by_row(mask, seen, q, length, boolean=implementation == "sdpa")
            elif any(front) and (window := kwargs.get("sliding_window")) is not None:
                mask = _lengthened_in_window(mask, front, window, q, length, boolean=implementation == "sdpa")
            elif mask is not None:
                mask = _lengthened(mask, more)
            if rest.get("position_bias") is not None:
                rest = {**rest, "position_bias": _lengthened_bias(rest["position_bias"], front, length)}
        return function(module, q, k, v, mask, *args, **rest)

    run: Attention = own
    for hook, counted in hooks:
        run = _around(hook, run, counted > 0)
    output, weights = run(query, key, value)
    return output, None if weights is None else weights[..., -length:]


def _around(hook: Hook, inner: Attention, counted: bool) -> Attention:
    """Let a hook compute attention; `seen`, `[batch, keys in front]`, says which rows see which."""

    def run(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None = None, front: Front = ()) -> Any:
        def base(q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None) -> Any:
            more = k.shape[2] - key.shape[2]
            flags = (counted,) * more + front
            if not more or (rows is None and seen is None):
                return inner(q, k, v, seen, flags)
            own = torch.ones(q.shape[0], dtype=torch.bool, device=q.device) if rows is None else rows
            own = own[:, None].expand(-1, more)
            return inner(q, k, v, own if seen is None else torch.cat([own, seen], dim=1), flags)

        return hook(query, key, value, base)

    return run


def _lengthened_in_window(
    mask: Tensor | None, front: Front, window: int, query: Tensor, length: int, boolean: bool
) -> Tensor:
    """Put columns in front of a mask; those that take positions are seen from inside the window alone.

    The position of a query is the last that its row of the mask shows, behind those in front.
    """
    places, device = query.shape[2], query.device
    if mask is None:
        last = torch.arange(length - places, length, device=device)
        mask = torch.ones(1, 1, places, length, dtype=torch.bool, device=device)
        if not boolean:
            mask = torch.zeros_like(mask, dtype=query.dtype)
    else:
        shown = mask if mask.dtype == torch.bool else mask >= 0
        column = torch.arange(length, device=device)
        last = torch.where(shown, column, -1).amax(dim=(0, 1, 3))
    counted = torch.tensor(front, device=device)
    number = counted.long().cumsum(0) - 1
    visible = ~counted | (number > last[:, None] + sum(front) - window)
    if mask.dtype != torch.bool:
        nothing = torch.zeros((), dtype=mask.dtype, device=device)
        visible = torch.where(visible, nothing, torch.finfo(mask.dtype).min)
    return torch.cat([visible.expand(*mask.shape[:2], *visible.shape), mask], dim=-1)


def _lengthened_by_row(mask: Tensor | None, seen: Tensor, query: Tensor, length: int, boolean: bool) -> Tensor:
    """Put columns in front of a mask `[batch or 1, heads or 1, queries or 1, length]` that only some rows see."""
    front = seen[:, None, None, :]
    if mask is None:
        mask = torch.ones(1, 1, 1, length, dtype=torch.bool, device=query.device)
        if not boolean:  # what is added to scores
            mask = torch.zeros_like(mask, dtype=query.dtype)
    if mask.dtype != torch.bool:
        nothing = torch.zeros((), dtype=mask.dtype, device=mask.device)
        front = torch.where(front, nothing, torch.finfo(mask.dtype).min)
    rest = mask.expand(seen.shape[0], -1, -1, -1)
    return torch.cat([front.expand(*rest.shape[:-1], -1), rest], dim=-1)


def _lengthened(mask: Tensor, more: int) -> Tensor:
    """Put columns in front of a mask: what is added to scores is zero, what is asked is whether to look."""
    shape = (*mask.shape[:-1], more)
    front = mask.new_ones(shape) if mask.dtype == torch.bool else mask.new_zeros(shape)
    return torch.cat([front, mask], dim=-1)


def _lengthened_bias(bias: Tensor, front: Front, length: int) -> Tensor:
    """Put columns in front of a bias: zero, or those that it has there already for what takes positions."""
    if all(front) and bias.shape[-1] == length + len(front):
        return bias
    columns = iter(range(bias.shape[-1] - length))
    nothing = bias.new_zeros(*bias.shape[:-1], 1)
    own = [bias[..., next(columns)].unsqueeze(-1) if counted else nothing for counted in front]
    return torch.cat([*own, bias[..., -length:]], dim=-1)


def _longer_bias(module: Any, tokens: int, query_length: int, key_length: int, **how: Any) -> Tensor:
    """Compute a bias by distance for keys with `tokens` more in front."""
    how["past_seen_tokens"] = how.get("past_seen_tokens", 0) + tokens
    bias: Tensor = type(module).compute_bias(module, query_length, key_length + tokens, **how)
    return bias


def unsupported(implementation: str) -> Diagnostic:
    """Say that the model's attention function is one whose masks cannot be lengthened."""
    able = " and ".join(SUPPORTED)
    message = f"attention function {implementation!r} takes no keys beyond the model's own; {able} do"
    return Diagnostic("DS438", message, suggestion='call model.set_attn_implementation("sdpa")')


def record_shapes(twin: nn.Module) -> dict[str, AttentionShape]:
    """Have a copy of a model note, by FQN, what its attention functions are given (those that we can take)."""
    shapes: dict[str, AttentionShape] = {}
    for fqn, module in twin.named_modules():
        if is_routable(module):
            router = Router(type(module))
            if router.takes(module.config._attn_implementation):
                register()
                router.route(module, [_noting(shapes, fqn)])
    return shapes


def _noting(shapes: dict[str, AttentionShape], fqn: str) -> Hook:
    def note(query: Tensor, key: Tensor, value: Tensor, base: Attention) -> Any:
        shapes[fqn] = AttentionShape(key.shape[1], key.shape[-1], value.shape[-1])
        return base(query, key, value)

    return note
