"""Running a module's own code on other parameters than its own, without writing to the module.

Each call makes a shallow stand-in for the module (and for the children on the way to the parameter): same class, same
attributes, same children, other parameters. Nothing is shared between calls, so threads do not see each other, and
training flags are always current. Dynamo and torch.export trace through it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deltaspec.backbone.attention import Attention, Hook, Router, register
from deltaspec.backbone.stand_in import keep_state, stand_in, states
from deltaspec.backbone.weight_forms import dtype_of_values, own_values
from deltaspec.graphs.links import widened
from deltaspec.graphs.row_ops import toward
from deltaspec.methods.base import Method
from deltaspec.methods.declarations import DeltaTensors, Form, MethodParams, Site
from deltaspec.methods.matrices import site_tensors


@dataclass(frozen=True, slots=True)
class Fold:
    """One delta that works through the parameters of a module at or below a host."""

    path: tuple[str, ...]
    """Names from the host down to the module that owns the parameters; empty for the host itself."""
    method: Method
    params: MethodParams
    site: Site
    names: tuple[str, ...]
    """The delta's tensors, in the order they come in the call."""
    scaled: bool = False
    """Whether its strength comes after its tensors in the call."""
    stacked: frozenset[str] = field(init=False)
    """Names of tensors that hold one a matrix, where the site is a stacked parameter."""

    def __post_init__(self) -> None:
        specs = site_tensors(self.method, self.site, self.params) if self.site.stack else ()
        object.__setattr__(self, "stacked", frozenset(spec.name for spec in specs if spec.stack))


@dataclass(frozen=True, slots=True)
class Attend:
    """One delta that works inside the attention function of a host."""

    method: Method
    params: MethodParams
    form: Form
    scaled: bool = False
    """Whether its strength comes after its tensors in the call."""

    @property
    def counted(self) -> int:
        """Number of positions that what it puts in front of keys takes."""
        return self.method.counted_tokens(self.params)

    def bind(self, own: Any, toward: Callable[[Tensor, Tensor], Tensor] | None) -> Hook:
        """Return the hook that computes attention with these tensors; `toward` goes from what is without to with it."""

        def hook(query: Tensor, key: Tensor, value: Tensor, base: Attention) -> Any:
            return self.method.attend(self.form, self.params, own, query, key, value, base)

        if toward is None:
            return hook

        def by_strength(query: Tensor, key: Tensor, value: Tensor, base: Attention) -> Any:
            without, seen = base(query, key, value)
            output, weights = hook(query, key, value, base)
            if weights is not None:  # of the model's own positions
                weights = toward(seen, weights[..., -seen.shape[-1] :])
            return toward(without, output), weights

        return by_strength


class Lowered:
    """The host's own forward, its parameters computed from the backbone's and the deltas' tensors at each call.

    This is how weight-expressible deltas reach modules whose weight is read without a call (`nn.MultiheadAttention`'s
    projections, a tied head, `F.linear` on a weight).
    """

    def __init__(
        self,
        host: nn.Module,
        folds: tuple[Fold, ...],
        frozen: bool = False,
        attends: tuple[Attend, ...] = (),
        hooks: tuple[Hook, ...] = (),
    ) -> None:
        self.host, self.folds, self.attends, self.hooks = host, folds, attends, hooks
        self.counted = [0] * len(hooks) + [attend.counted for attend in attends]
        """Positions that what is in front takes, by the hooks of a forward."""
        # Held here, since Dynamo knows no source for what it finds through a stand-in (closures of decorators).
        self.code = type(host).forward
        self.frozen = frozen
        """Run the host in evaluation mode: its statistics are the backbone's."""
        if attends or hooks:
            register()
            self.router = Router(type(host))

    def __call__(self, tensors: tuple[Tensor, ...], *args: Any, **kwargs: Any) -> Any:
        """Run the host; `tensors` are those of all folds, in order, then those of all hooks into its attention."""
        folded: dict[tuple[str, ...], dict[str, Tensor]] = {}
        start = 0
        for fold in self.folds:
            own = DeltaTensors(fold.names, tensors[start:])
            start += len(fold.names)
            strength = tensors[start] if fold.scaled else None
            start += fold.scaled
            changed = folded.setdefault(fold.path, {})
            module = _at(self.host, fold.path)
            changed |= rounded(module, fold_widely(module, fold, own, dict(changed), strength))
        shadow = _graft(self.host, (), folded)
        if self.frozen:
            shadow.training = False
        hooks = list(self.hooks)
        for attend in self.attends:
            own, start = DeltaTensors(attend.form.tensors, tensors[start:]), start + len(attend.form.tensors)
            by_strength = functools.partial(toward, strength=tensors[start]) if attend.scaled else None
            hooks.append(attend.bind(own, by_strength))
            start += attend.scaled
        if hooks:
            self.router.route(shadow, hooks, self.counted)
        before = states(self.host, shadow)
        output = self.code(shadow, *args, **kwargs)
        keep_state(before)
        return output


def fold_widely(
    module: nn.Module, fold: Fold, own: Any, folded: dict[str, Tensor], strength: Tensor | None = None
) -> dict[str, Tensor]:
    """Compute the new own parameters of a module under one delta, by its strength; `folded`: those changed before it.

    They have the wider dtype of the module and the delta; see `rounded`.
    """
    weights = own_values(module) | folded
    own = _widened(fold.names, own, weights)
    if fold.site.stack is None:
        new = fold.method.fold(fold.site, fold.params, own, weights)
    else:
        parameter = fold.site.parameter
        assert parameter is not None
        new = {parameter: fold_matrices(fold, own, weights[parameter])}
    if strength is None:
        return new
    before = {name: value for name, value in module._buffers.items() if value is not None} | weights
    return {name: _scaled(before.get(name), value, strength) for name, value in new.items()}


def _widened(names: tuple[str, ...], own: Any, weights: dict[str, Tensor]) -> Any:
    """Return a delta's tensors in a dtype that is no narrower than the module's, as around a module's call."""
    like = next((value.dtype for value in weights.values() if value.dtype in _REAL), None)
    tensors = [getattr(own, name) for name in names]
    if like is None or all(tensor.dtype == like or tensor.dtype == torch.float64 for tensor in tensors):
        return own
    wide = [widened(t, torch.promote_types(t.dtype, like)) for t in tensors]
    return DeltaTensors(names, wide)


_REAL = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def rounded(module: nn.Module, new: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return new parameters of a module in its dtype."""
    dtype = dtype_of_values(module)
    return {
        name: value if dtype is None or not value.is_floating_point() or value.dtype == dtype else value.to(dtype)
        for name, value in new.items()
    }


def _scaled(without: Tensor | None, with_it: Tensor, strength: Tensor) -> Tensor:
    """Go from a module's tensor (a missing one counts as zero) to what a delta makes of it; integers are not scaled."""
    if not with_it.is_floating_point():
        return with_it
    if without is None:
        return toward(torch.zeros_like(with_it), with_it, strength)
    return toward(without, with_it.to(torch.promote_types(without.dtype, with_it.dtype)), strength)


def fold_matrices(fold: Fold, own: Any, weight: Tensor) -> Tensor:
    """Fold a delta into a parameter that is a matrix or a stack of them."""

    def one(tensors: dict[str, Tensor], matrix: Tensor) -> Tensor:
        values = DeltaTensors(tuple(tensors), tuple(tensors.values()))
        return fold.method.fold(fold.site, fold.params, values, {"weight": matrix})["weight"]

    tensors = {name: getattr(own, name) for name in fold.names}
    if not fold.site.stack:
        return one(tensors, weight)
    places = {name: 0 if name in fold.stacked else None for name in fold.names}
    folded: Tensor = torch.vmap(one, in_dims=(places, 0))(tensors, weight)
    return folded


def _at(module: nn.Module, path: tuple[str, ...]) -> nn.Module:
    for name in path:
        child = module._modules[name]
        assert child is not None
        module = child
    return module


def _graft(module: nn.Module, path: tuple[str, ...], folded: dict[tuple[str, ...], dict[str, Tensor]]) -> nn.Module:
    """Make the stand-in of a module, with stand-ins for the children that hold changed parameters."""
    shadow = stand_in(module, folded.get(path, {}))
    below = {other[len(path)] for other in folded if len(other) > len(path) and other[: len(path)] == path}
    for name in below:
        child = module._modules[name]
        assert child is not None
        shadow._modules[name] = _graft(child, (*path, name), folded)
    return shadow
