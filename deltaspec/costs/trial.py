"""Trials: a step of a compiled model on fake tensors, or on zeros where its forward looks at values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from deltaspec.backbone.random_state import random_state_kept
from deltaspec.costs.batches import Batch
from deltaspec.costs.kernels import KernelsOfCPU
from deltaspec.costs.step import Step, run_step
from deltaspec.costs.twins import put_fakes
from deltaspec.diagnostics.wording import brief
from deltaspec.language.conditions import Conditions

_MOST_WORK = 10**12
"""Parameters × positions up to which a forward that looks at values is run on zeros: seconds, or a minute."""


class Compiled(NamedTuple):
    """A plan, compiled onto a model, for training."""

    model: nn.Module
    """The backbone, in training mode."""
    trained: tuple[nn.Parameter, ...]
    """Parameters of the deltas that are attached."""
    deltas: tuple[Tensor, ...]
    """Parameters and buffers of all deltas."""


class Trial(NamedTuple):
    """A step that was run, or why none could be."""

    step: Step | None
    batch: Batch | None
    """The form of the batch that was run, or the likeliest one."""
    failure: str | None = None
    """Why the likeliest form could not be run."""
    passed: bool = True
    """Whether passes were taken where they would be."""


def on_meta(compiled: Compiled, forms: Sequence[Batch], conditions: Conditions) -> Trial:
    """Run a step of the first form of a batch that a model takes, on plain tensors without values, as a CPU does."""
    with KernelsOfCPU():
        return _first(compiled, forms, conditions, "meta")


def on_fakes(compiled: Compiled, forms: Sequence[Batch], conditions: Conditions, device: str) -> Trial:
    """Run a step as `on_meta`, on fake tensors of a device, which the model holds from then on.

    They are what autocast acts on, and what goes together with tensors of other devices. Passes leave them alone.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        put_fakes(compiled.model, device)
        return _first(compiled, forms, conditions, device)._replace(passed=False)


def on_zeros(compiled: Compiled, forms: Sequence[Batch], conditions: Conditions) -> Trial:
    """Run a step on a CPU, of a model whose parameters are zeros there."""
    size = sum(parameter.numel() for parameter in compiled.model.parameters())
    if size * forms[0].positions > _MOST_WORK:
        return Trial(None, forms[0], "its forward looks at values, and it is too large to be run on zeros")
    return _first(compiled, forms, conditions, "cpu")


def _first(compiled: Compiled, forms: Sequence[Batch], conditions: Conditions, device: str) -> Trial:
    failure = None
    for batch in forms:
        try:
            with _apart(), _autocast(conditions, device):
                step = _run(compiled, batch, device)
        except Exception as error:  # whatever a stranger's forward raises: the estimate says that it could not be run
            failure = failure or brief(error)
        else:
            return Trial(step, batch, failure)
    return Trial(None, forms[0], failure)


def _run(compiled: Compiled, batch: Batch, device: str) -> Step:
    inputs = tree_map_only(Tensor, lambda value: torch.zeros_like(value, device=device), tuple(batch))
    return run_step(compiled.model, lambda: compiled.model(*inputs[0], **inputs[1]))


def _autocast(conditions: Conditions, device: str) -> Any:
    if conditions.autocast is None:
        return nullcontext()
    return torch.autocast(device, getattr(torch, conditions.autocast))


@contextmanager
def _apart() -> Iterator[None]:
    """Keep the random state, and run a model as it is written where its methods carry `torch.compile`."""
    with random_state_kept(), torch.compiler.set_stance("force_eager"), torch.enable_grad():
        yield
