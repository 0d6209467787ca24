"""A trial of what mixed batches stand on: that modules are given the rows of the batch, in order, along dimension 0.

Nothing in a module's shape says so: a model may put time first, sort its rows, or share one input among them. So the
model is run on a few rows, and on the same rows in other orders: what enters each host must change place with them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from deltaspec.backbone.inputs import dummy_inputs
from deltaspec.backbone.random_state import random_state_kept
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.runtime.buffers import BufferGuard

_ROWS = 3
_CLOSE = 1e-3

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Seen = tuple[Tensor, list[Tensor], list[Tensor]]
"""An order of the rows, what entered a host in the first order, and what entered it in this one."""


def rows_lead(
    backbone: nn.Module,
    hosts: Mapping[str, nn.Module],
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> bool:
    """Return whether a trial could be made that shows it: False for one row, and for a call that goes on from a cache.

    And for rows that hold nothing. A transformers model is run on inputs of our own; any other one, and one that
    refuses those, on the call's. A host that these do not reach is judged by the shapes it is given once it is reached.
    Raises DeltaSpecError (DS442), with all findings, for hosts that are not given the rows along dimension 0.
    """
    seen = None
    small = _small_inputs(backbone)
    if small is not None:
        used: Arguments = ((), small)
        with suppress(Exception):  # whatever a model does not like about made-up inputs; it is tried on its own then
            seen = _in_orders(backbone, hosts, forward, used)
    if seen is None:
        if any(hasattr(value, "get_seq_length") for value in kwargs.values()):
            return False
        own: Arguments = (args, {**kwargs, **({"use_cache": False} if "use_cache" in kwargs else {})})
        if _is_empty(own):
            return False
        used = _told_apart(own)
        try:
            seen = _in_orders(backbone, hosts, forward, used)
        except Exception as error:
            with evaluating(backbone):
                forward(*own[0], **own[1])  # what this raises is about the call, and not about the trial
            raised = f"{type(error).__name__}: {error}"
            message = "nothing shows where the rows of the batch are inside the model: in another order, or of other "
            message += f"values, they raise {raised}"
            hint = "run these rows one delta at a time, with c.only(name)"
            raise DeltaSpecError([Diagnostic("DS442", message, suggestion=hint)]) from error
    findings = []
    for fqn, orders in seen.items():
        shared = all(x.shape[:1] == (1,) for _, before, _ in orders for x in before)
        moved = all(_moved(*one) for one in orders)
        if not moved or (shared and not _spreads(backbone, hosts[fqn], forward, used, len(orders[0][0]))):
            message = f"{fqn} is not given the rows of the batch along its input's first dimension"
            hint = "its rows cannot be told apart: run them one delta at a time, with c.only(name)"
            findings.append(Diagnostic("DS442", message, suggestion=hint))
    if findings:
        raise DeltaSpecError(findings)
    return bool(seen)


def _small_inputs(backbone: nn.Module) -> dict[str, Tensor] | None:
    inputs = dummy_inputs(backbone)
    if inputs is None:
        return None
    generator = torch.Generator().manual_seed(0)
    like = next((p for p in backbone.parameters() if p.is_floating_point()), torch.empty(0, device="cpu"))
    vocabulary = int(getattr(getattr(backbone, "config", None), "vocab_size", None) or 100)
    made = {}
    for name, value in inputs.items():
        shape = (_ROWS, *value.shape[1:])
        if value.is_floating_point():
            made[name] = torch.randn(shape, generator=generator, device="cpu").to(like)
        else:
            drawn = torch.randint(min(3, vocabulary - 1), vocabulary, shape, generator=generator, device="cpu")
            made[name] = drawn.to(like.device)
    return made


def _in_orders(
    backbone: nn.Module, hosts: Mapping[str, nn.Module], forward: Callable[..., Any], given: Arguments
) -> dict[str, list[Seen]]:
    """Run the rows as they are and in other orders, and note what enters each host that is reached."""
    rows = _size(given)
    if rows == 1:
        return {}
    runs = []
    orders = _orders(rows)
    for order in (torch.arange(rows, device="cpu"), *orders):
        args, kwargs = _each(given, functools.partial(_ordered, order))
        with evaluating(backbone), _noting(hosts) as entered:
            forward(*args, **kwargs)
        runs.append(entered)
    first, *others = runs
    return {
        fqn: [(order, first[fqn], other[fqn]) for order, other in zip(orders, others, strict=True)]
        for fqn in hosts
        if any(run[fqn] for run in runs)
    }


def _ordered(order: Tensor, x: Tensor) -> Tensor:
    return x[order.to(x.device)] if len(x) == len(order) else x


def _orders(rows: int) -> list[Tensor]:
    """Return orders such that only a model that keeps rows in place, and apart, commutes with all of them."""
    kept = torch.arange(rows, device="cpu")
    moved_on, twice = kept.roll(1), kept.clone()
    twice[0] = 1  # no row may change because another one is not there: no statistics of a batch, say
    return [moved_on, twice]


def _size(given: Arguments) -> int:
    sizes: list[int] = []
    _each(given, lambda x: sizes.append(len(x)))
    return sizes[0] if sizes else 1


def _is_empty(given: Arguments) -> bool:
    counts: list[int] = []
    _each(given, lambda x: counts.append(x.numel()))
    return bool(counts) and not any(counts)


def _each(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Put a function's results in the place of the tensors of at least one dimension, in a structure like this one."""
    if isinstance(value, Tensor):
        return function(value) if value.dim() else value
    if isinstance(value, Mapping):
        made: Any = copy.copy(value)
        for name, inner in value.items():
            made[name] = _each(inner, function)
        return made
    if type(value) in (tuple, list):
        return type(value)(_each(inner, function) for inner in value)
    return value


def _told_apart(given: Arguments) -> Arguments:
    """Return rows that are alike, or are no numbers, other values, since they look the same in any order.

    Raises DeltaSpecError (DS442) where all rows stay alike.
    """
    rows, differs = _size(given), []

    def vary(x: Tensor) -> Tensor:
        if len(x) != rows:
            return x
        if x.is_floating_point() and not x.isfinite().all():
            x = torch.where(x.isfinite(), x, torch.zeros_like(x))
        if not _distinct(x):
            x = torch.stack([row.flatten().roll(number).view_as(row) for number, row in enumerate(x)])
            if x.is_floating_point():  # in other sums, too, by which a model may sort
                x = x * torch.linspace(1, 0.5, rows, device="cpu").to(x).view(-1, *[1] * (x.dim() - 1))
        if x.is_floating_point() and not _distinct(x):
            x = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(x)
        differs.append(_distinct(x))
        return x

    varied: Arguments = _each(given, vary)
    if rows > 1 and not any(differs):
        message = "nothing shows where the rows of the batch are inside the model, since they are all alike"
        hint = "let the first batch under different deltas have different rows"
        raise DeltaSpecError([Diagnostic("DS442", message, suggestion=hint)])
    return varied


def _distinct(x: Tensor) -> bool:
    numbers = torch.view_as_real(x) if x.is_complex() else x
    if len(x) > 1 and not x.numel():
        return False
    return len(x) < 2 or len(torch.unique(numbers.reshape(len(x), -1), dim=0)) == len(x)


@contextmanager
def evaluating(backbone: nn.Module) -> Iterator[None]:
    """Run without dropout and gradients, and put all as it was."""
    modules = [(module, module.training) for module in backbone.modules()]
    buffers = BufferGuard(module for module, _ in modules)
    buffers.watch()
    try:
        for module, _ in modules:
            module.training = False
        with torch.no_grad(), random_state_kept(backbone.parameters()):
            yield
    finally:
        buffers.restore()
        for module, training in modules:
            module.training = training


@contextmanager
def _noting(hosts: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    entered: dict[str, list[Tensor]] = {fqn: [] for fqn in hosts}

    def note(fqn: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
            if found is not None:
                entered[fqn].append(found.detach().clone())

        return hook

    handles = [module.register_forward_pre_hook(note(fqn), with_kwargs=True) for fqn, module in hosts.items()]
    try:
        yield entered
    finally:
        for handle in handles:
            handle.remove()


def _moved(order: Tensor, before: list[Tensor], after: list[Tensor]) -> bool:
    """Return whether all that entered changed place with the rows; what is the same for all rows may stay."""
    if len(before) != len(after) or len({x.shape[0] == 1 for x in before if x.dim()}) > 1:
        return False  # an input that rows share cannot become one a row beside inputs that are one a row already
    return all(_moved_along(order, x, y) for x, y in zip(before, after, strict=True))


def _spreads(backbone: nn.Module, host: nn.Module, forward: Callable[..., Any], given: Arguments, rows: int) -> bool:
    """Return whether a model goes on where one output for all rows becomes one a row."""

    def spread(module: nn.Module, args: Any, output: Any) -> Any:
        return output.expand(rows, *output.shape[1:]) if isinstance(output, Tensor) else output

    handle = host.register_forward_hook(spread)
    try:
        with evaluating(backbone):
            forward(*given[0], **given[1])
    except (RuntimeError, ValueError, IndexError):  # what torch says of shapes that do not go together
        return False
    finally:
        handle.remove()
    return True


def _moved_along(order: Tensor, before: Tensor, after: Tensor) -> bool:
    if before.shape != after.shape or not before.dim():
        return False
    rows = len(order)
    if before.shape[0] == 1:
        expected = before
    elif before.shape[0] % rows == 0:
        expected = before.reshape(rows, -1, *before.shape[1:])[order.to(before.device)].reshape(before.shape)
    else:
        return False
    if not before.is_floating_point():
        return torch.equal(expected, after)
    finite = expected[expected.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    close = _CLOSE * (scale + 1e-6)
    return torch.allclose(expected.float(), after.float(), rtol=_CLOSE, atol=close, equal_nan=True)
