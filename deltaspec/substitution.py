"""Running a module's own code on other parameters than its own, without writing to the module.

Each call makes a shallow stand-in for the module (and for the children on the way to the parameter): same class, same
attributes, same children, other parameters. Nothing is shared between calls, so threads do not see each other, and
training flags are always current. Dynamo and torch.export trace through it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deltaspec.attention import Attention, Hook, Router, register
from deltaspec.diagnostics import DeltaSpecError, Diagnostic
from deltaspec.matrices import site_tensors
from deltaspec.methods._base import Form, Method, MethodParams, Site
from deltaspec.slots import Slot, Source, rows_in, rows_out, take, toward


def stand_in(module: nn.Module, tensors: dict[str, Any]) -> nn.Module:
    """Make a shallow copy of a module, without its instance-level forward, that holds `tensors` by own name."""
    shadow = module.__class__.__new__(module.__class__)
    attributes = shadow.__dict__
    attributes.update(module.__dict__)
    attributes.pop("forward", None)
    attributes["_parameters"] = {**module._parameters}
    attributes["_buffers"] = {**module._buffers}
    attributes["_modules"] = {**module._modules}
    for name, tensor in tensors.items():
        home = attributes["_buffers"] if name in module._buffers else attributes["_parameters"]
        home[name] = tensor
    if attributes.get("sparse") is True and not tensors["weight"].is_leaf:
        # An embedding's sparse gradients are for an optimizer; what computed this weight takes dense ones.
        attributes["sparse"] = False
    if "_flat_weights_names" in attributes:
        # nn.LSTM and its kin compute from this list, not from their attributes.
        attributes["_flat_weights"] = [getattr(shadow, name) for name in attributes["_flat_weights_names"]]
    return shadow


def run_row(shadow: nn.Module, code: Callable[..., Any], x: Tensor) -> Any:
    """Run a stand-in on one row, under torch.vmap.

    There, torch keeps gradients from an embedding's padding in the first row alone, so it is done here.
    """
    padding = shadow.__dict__.get("padding_idx")
    if padding is None or x.is_floating_point():
        return code(shadow, x)
    shadow.__dict__["padding_idx"] = None
    leaving = code(shadow, x)
    if not isinstance(leaving, Tensor) or leaving.shape[:-1] != x.shape:  # what it looks up is not what it is given
        return leaving
    return torch.where((x == padding).unsqueeze(-1), leaving.detach(), leaving)


class Swapped:
    """The module's own forward, with parameters given at each call."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, parameters: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Run the module."""
        return stand_in(self.module, parameters).forward(*args, **kwargs)


@dataclass(frozen=True, slots=True)
class Fold:
    """One delta that works through the parameters of a module at or below a host."""

    path: tuple[str, ...]
    """From the host to the module that owns the parameters; empty for the host itself."""
    method: Method
    params: MethodParams
    site: Site
    names: tuple[str, ...]
    """The delta's tensors, in the order they come in the call."""
    scaled: bool = False
    """Its strength comes after its tensors."""
    stacked: frozenset[str] = field(init=False)
    """Those that hold one tensor a matrix, where the site is a stacked parameter."""

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
    """Its strength comes after its tensors."""

    def bind(self, own: Any, strength: Tensor | None) -> Hook:
        """Give the hook that computes attention with these tensors."""

        def hook(query: Tensor, key: Tensor, value: Tensor, base: Attention) -> Any:
            return self.method.attend(self.form, self.params, own, query, key, value, base)

        if strength is None:
            return hook

        def by_strength(query: Tensor, key: Tensor, value: Tensor, base: Attention) -> Any:
            without, seen = base(query, key, value)
            output, weights = hook(query, key, value, base)
            if weights is not None:  # of the model's own positions
                weights = toward(seen, weights[..., -seen.shape[-1] :], strength)
            return toward(without, output, strength), weights

        return by_strength


class Own:
    """A delta's tensors at one site, as attributes (what `Method.fold` sees as `t`)."""

    def __init__(self, names: tuple[str, ...], tensors: Sequence[Tensor]) -> None:
        for index, name in enumerate(names):
            setattr(self, name, tensors[index])

    def __getattr__(self, name: str) -> Tensor:
        raise AttributeError(f"the delta has no tensor {name!r} here")


class Lowered:
    """The host's own forward, its parameters computed from the backbone's and the deltas' tensors at each call.

    This is how weight-expressible deltas reach modules whose weight is read without a call (`nn.MultiheadAttention`'s
    projections, a tied head, `F.linear` on a weight).
    """

    def __init__(
        self, host: nn.Module, folds: tuple[Fold, ...], frozen: bool = False, attends: tuple[Attend, ...] = ()
    ) -> None:
        self.host, self.folds, self.attends = host, folds, attends
        # Held here, since Dynamo knows no source for what it finds through a stand-in (closures of decorators).
        self.code = type(host).forward
        self.frozen = frozen
        """Run the host in evaluation mode: its statistics are the backbone's."""
        if attends:
            register()
            self.router = Router(type(host))

    def __call__(self, tensors: tuple[Tensor, ...], *args: Any, **kwargs: Any) -> Any:
        """Run the host; `tensors` are those of all folds, in order, then those of all hooks into its attention."""
        folded: dict[tuple[str, ...], dict[str, Tensor]] = {}
        start = 0
        for fold in self.folds:
            own = Own(fold.names, tensors[start:])
            start += len(fold.names)
            strength = tensors[start] if fold.scaled else None
            start += fold.scaled
            changed = folded.setdefault(fold.path, {})
            changed |= fold_into(_at(self.host, fold.path), fold, own, dict(changed), strength)
        shadow = _graft(self.host, (), folded)
        if self.frozen:
            shadow.training = False
        hooks: list[Hook] = []
        for attend in self.attends:
            own, start = Own(attend.form.tensors, tensors[start:]), start + len(attend.form.tensors)
            hooks.append(attend.bind(own, tensors[start] if attend.scaled else None))
            start += attend.scaled
        if hooks:
            self.router.route(shadow, hooks)
        return self.code(shadow, *args, **kwargs)


class FoldedRows:
    """The own forward of a module of one argument, each row with parameters of its own, computed at each call."""

    def __init__(
        self, module: nn.Module, folds: tuple[tuple[Fold, tuple[Source, ...], Slot], ...], frozen: bool
    ) -> None:
        self.module, self.folds, self.frozen = module, folds, frozen
        self.code = type(module).forward

    def __call__(self, x: Tensor) -> Tensor:
        """Run the module."""
        entering = rows_in(self.folds[0][2], x)
        tensors = [tuple(take(slot, source, entering, False) for source in sources) for _, sources, slot in self.folds]
        strengths = [slot.grown("strength", entering.shape[0]) for _, _, slot in self.folds]
        # Where tokens were given their rows, a row by itself is what the module expects; else it is one of a batch.
        one = functools.partial(self._one, alone=entering.dim() == x.dim())
        leaving: Tensor = torch.vmap(one, randomness="different")(entering, tensors, strengths)
        return rows_out(x, leaving) if x.is_floating_point() else leaving

    def _one(self, x: Tensor, tensors: list[tuple[Tensor, ...]], strengths: list[Tensor], *, alone: bool) -> Tensor:
        folded: dict[str, Tensor] = {}
        for (fold, _, _), own, strength in zip(self.folds, tensors, strengths, strict=True):
            folded |= fold_into(self.module, fold, Own(fold.names, own), folded, strength)
        shadow = stand_in(self.module, folded)
        if self.frozen:
            shadow.training = False
        leaving = run_row(shadow, self.code, x.unsqueeze(0) if alone else x)
        if not isinstance(leaving, Tensor):
            kind = type(self.module).__name__
            message = f"a {kind} whose weight changes row by row gives a {type(leaving).__name__}, and no hidden state"
            hint = "run its rows one delta at a time: with c.only(name)"
            raise DeltaSpecError([Diagnostic("DS442", message, suggestion=hint)])
        return leaving.squeeze(0) if alone else leaving


def fold_into(
    module: nn.Module, fold: Fold, own: Any, folded: dict[str, Tensor], strength: Tensor | None = None
) -> dict[str, Tensor]:
    """Compute the new own parameters of a module under one delta, by its strength, rounded once to the module's dtype.

    `folded` are those that deltas before it changed.
    """
    weights = {name: value for name, value in module._parameters.items() if value is not None} | folded
    if fold.site.stack is None:
        new = fold.method.fold(fold.site, fold.params, own, weights)
    else:
        parameter = fold.site.parameter
        assert parameter is not None
        new = {parameter: fold_matrices(fold, own, weights[parameter])}
    if strength is not None:
        before = {name: value for name, value in module._buffers.items() if value is not None} | weights
        new = {name: _scaled(before.get(name), value, strength) for name, value in new.items()}
    dtype = next((w.dtype for w in weights.values()), None)
    return {
        name: value if dtype is None or not value.is_floating_point() or value.dtype == dtype else value.to(dtype)
        for name, value in new.items()
    }


def _scaled(without: Tensor | None, with_it: Tensor, strength: Tensor) -> Tensor:
    """Go from a module's tensor (a missing one counts as zero) to what a delta makes of it; integers are not scaled."""
    if not with_it.is_floating_point():
        return with_it
    start = torch.zeros_like(with_it) if without is None else without.to(with_it.dtype)
    return toward(start, with_it, strength)


def fold_matrices(fold: Fold, own: Any, weight: Tensor) -> Tensor:
    """Fold a delta into a parameter that is a matrix or a stack of them."""

    def one(tensors: dict[str, Tensor], matrix: Tensor) -> Tensor:
        values = Own(tuple(tensors), tuple(tensors.values()))
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
