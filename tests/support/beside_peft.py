"""An adapter that PEFT itself made, trained a little and saved; and the same read by deltaspec, beside it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import deltaspec


def moved(model: nn.Module, config: Any, seed: int = 0) -> Any:
    """Return PEFT's model of a copy, with all that it trains moved away from its start."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return made


def saved(made: Any, folder: Path) -> Path:
    """Save PEFT's adapter and return where."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.save_pretrained(folder)
    return folder


def reloaded(model: nn.Module, folder: Path) -> Any:
    """Return what PEFT reads from a folder, which may be other than what was saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder, is_trainable=True).eval()


def as_theirs(
    model: nn.Module,
    made: Any,
    folder: Path,
    run: Callable[[Any], Tensor],
    tolerance: float = 1e-5,
    gradients: bool = True,
) -> deltaspec.CompiledModel:
    """Read PEFT's saved adapter, and assert that outputs and the norm of what is trained's gradients agree with PEFT's.

    `run` gives a model's output. What is read acts: the base's output differs. `gradients`: False where PEFT's own are
    not those of what it computes.
    """
    theirs = reloaded(model, saved(made, folder))
    compiled = deltaspec.restore(model, folder)
    expected, found, plain = run(theirs), run(compiled), run(model)
    scale = max(1.0, float(expected.detach().abs().max()))
    assert not torch.allclose(plain, expected, atol=1e-4 * scale), "the adapter does nothing"
    torch.testing.assert_close(found, expected, atol=tolerance * scale, rtol=tolerance)
    if not gradients:
        return compiled
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected * direction).sum().backward()
    (found * direction).sum().backward()
    norms = [sum(float(p.grad.pow(2).sum()) for p in of if p.grad is not None) ** 0.5
             for of in (_trained(theirs), compiled.trainable_parameters())]  # fmt: skip
    assert norms[0] > 0
    assert abs(norms[0] - norms[1]) <= 1e-4 * max(norms), "the gradients of what is trained differ"
    return compiled


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
