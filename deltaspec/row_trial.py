"""A trial of what mixed batches stand on: that modules are given the rows of the batch, in order, along dimension 0.

Nothing in a module's shape says so: a model may put time first, sort its rows, or share one input among them. So the
model is run on a few rows, and on the same rows in another order: what enters each host must change place with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from deltaspec.diagnostics import DeltaSpecError, Diagnostic
from deltaspec.inputs import dummy_inputs

_ROWS = 3
_CLOSE = 1e-3

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def rows_lead(
    backbone: nn.Module,
    hosts: Mapping[str, nn.Module],
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> bool:
    """Tell whether a trial could be made that shows it: False for one row, and for a call that goes on from a cache.

    A transformers model is run on inputs of our own; any other one, and one that refuses those, on the call's. A host
    that these do not reach is judged by the shapes it is given once it is reached. Raises DeltaSpecError (DS442), with
    all findings, for hosts that are not given the rows along dimension 0.
    """
    seen = None
    small = _small_inputs(backbone)
    if small is not None:
        used: Arguments = ((), small)
        with suppress(Exception):  # whatever a model does not like about made-up inputs; it is tried on its own then
            seen = _both(backbone, hosts, forward, used)
    if seen is None:
        if any(hasattr(value, "get_seq_length") for value in kwargs.values()):
            return False
        used = (args, {**kwargs, **({"use_cache": False} if "use_cache" in kwargs else {})})
        seen = _both(backbone, hosts, forward, used)
    findings = []
    for fqn, (rows, before, after) in seen.items():
        shared = all(x.shape[:1] == (1,) for x in before)
        if not _moved(rows, before, after) or (shared and not _spreads(backbone, hosts[fqn], forward, used, rows)):
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
    like = next((p for p in backbone.parameters() if p.is_floating_point()), torch.empty(0))
    vocabulary = int(getattr(getattr(backbone, "config", None), "vocab_size", None) or 100)
    made = {}
    for name, value in inputs.items():
        shape = (_ROWS, *value.shape[1:])
        if value.is_floating_point():
            made[name] = torch.randn(shape, generator=generator).to(like)
        else:
            made[name] = torch.randint(min(3, vocabulary - 1), vocabulary, shape, generator=generator).to(like.device)
    return made


def _both(
    backbone: nn.Module, hosts: Mapping[str, nn.Module], forward: Callable[..., Any], given: Arguments
) -> dict[str, tuple[int, list[Tensor], list[Tensor]]]:
    """Run the rows as they are, and moved on by one: by host (rows, what entered at first, what entered then)."""
    args, kwargs = given
    rows = next((v.shape[0] for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim()), 1)
    if rows == 1:
        return {}

    def roll(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.roll(1, 0) if value.dim() and value.shape[0] == rows else value
        if isinstance(value, Mapping):
            return type(value)(**{name: roll(inner) for name, inner in value.items()})
        return value

    runs = []
    for arguments in (given, (tuple(map(roll, args)), {name: roll(value) for name, value in kwargs.items()})):
        with _evaluating(backbone), _noting(hosts) as entered:
            forward(*arguments[0], **arguments[1])
        runs.append(entered)
    return {fqn: (rows, runs[0][fqn], runs[1][fqn]) for fqn in hosts if runs[0][fqn] or runs[1][fqn]}


@contextmanager
def _evaluating(backbone: nn.Module) -> Iterator[None]:
    """Run without dropout and gradients, and put all as it was."""
    modules = [(module, module.training) for module in backbone.modules()]
    try:
        for module, _ in modules:
            module.training = False
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
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


def _moved(rows: int, before: list[Tensor], after: list[Tensor]) -> bool:
    """Tell whether all that entered moved on with the rows; what is the same for all rows may stay."""
    if len(before) != len(after) or len({x.shape[0] == 1 for x in before if x.dim()}) > 1:
        return False  # an input that rows share cannot become one a row beside inputs that are one a row already
    return all(_moved_on(x, y, rows) for x, y in zip(before, after, strict=True))


def _spreads(backbone: nn.Module, host: nn.Module, forward: Callable[..., Any], given: Arguments, rows: int) -> bool:
    """Tell whether a model goes on where one output for all rows becomes one a row."""

    def spread(module: nn.Module, args: Any, output: Any) -> Any:
        return output.expand(rows, *output.shape[1:]) if isinstance(output, Tensor) else output

    handle = host.register_forward_hook(spread)
    try:
        with _evaluating(backbone):
            forward(*given[0], **given[1])
    except (RuntimeError, ValueError, IndexError):  # what torch says of shapes that do not go together
        return False
    finally:
        handle.remove()
    return True


def _moved_on(before: Tensor, after: Tensor, rows: int) -> bool:
    if before.shape != after.shape or not before.dim():
        return False
    if before.shape[0] == 1:
        expected = before
    elif before.shape[0] % rows == 0:
        expected = before.reshape(rows, -1, *before.shape[1:]).roll(1, 0).reshape(before.shape)
    else:
        return False
    if not before.is_floating_point():
        return torch.equal(expected, after)
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    return torch.allclose(expected.float(), after.float(), rtol=_CLOSE, atol=_CLOSE * (scale + 1e-6))
