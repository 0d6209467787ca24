"""Deltas written as a PEFT adapter, beside PEFT's own reading of it and ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from beside_peft import reloaded
from torch import Tensor, nn

import deltaspec


def stirred(model: nn.Module, *deltas: dict[str, Any], size: float = 0.1) -> deltaspec.CompiledModel:
    """Return a compiled model whose deltas' tensors are away from their starts."""
    compiled = deltaspec.compile(model, {"deltaspec": 1, "deltas": list(deltas)})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for delta in compiled.deltas.values():
            for parameter in delta.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
    return compiled.eval()


@torch.no_grad()
def same_in_peft(
    compiled: deltaspec.CompiledModel,
    model: nn.Module,
    folder: Path,
    run: Callable[[Any], Tensor],
    tolerance: float = 1e-5,
    **wishes: Any,
) -> Any:
    """Write what is attached, and assert that PEFT computes the same with it, and that it reads back here to the same.

    Return PEFT's model. What is written acts: the base's output differs.
    """
    compiled.save_as("peft", folder, **wishes)
    theirs = reloaded(model, folder)
    expected, found = run(compiled), run(theirs)
    scale = max(1.0, float(expected.abs().max()))
    assert not torch.allclose(run(model), expected, atol=1e-4 * scale), "the deltas do nothing"
    torch.testing.assert_close(found, expected, atol=tolerance * scale, rtol=tolerance)
    back = deltaspec.restore(model, folder)
    torch.testing.assert_close(run(back), expected, atol=tolerance * scale, rtol=tolerance)
    return theirs
