"""Gates on what a delta adds, opened by what enters it (UniPELT, arXiv:2110.07577)."""

from __future__ import annotations

from typing import Any

from deltaspec.methods.declarations import Init, Refusal, Site, TensorSpec


def refuse_gate(site: Site) -> Refusal | None:
    """Take hidden states `[batch, positions, width]`."""
    if site.dims in (None, 3):
        return None
    return Refusal(
        f"after this {site.row.type} the hidden state has {site.dims} dimensions, and a gate takes the mean over "
        "positions in [batch, positions, width]",
        "set gate: false for this site in overrides",
    )


def gate_of(width: int) -> tuple[TensorSpec, ...]:
    """Declare the gate's linear map, `[1, width]`, and its bias."""
    return (TensorSpec("gate", (1, width), Init("normal", 0.02)), TensorSpec("gate_bias", (1,)))


def opened(t: Any, entering: Any) -> Any:
    """Compute the gate, `[…, 1, 1]`, from what enters, `[…, positions, width]`."""
    import torch
    from torch.nn import functional as F

    return torch.mean(torch.sigmoid(F.linear(entering, t.gate, t.gate_bias)), -2, keepdim=True)
