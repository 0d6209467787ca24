"""Weight decomposition (DoRA, arXiv:2402.09353): W' = m · V / ‖V‖ with V = W + ΔW, one magnitude m per output.

The norm counts as a constant for gradients, as in the paper's section 4.3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deltaspec.methods.declarations import Form
from deltaspec.methods.shared.weights import canonical, host_bias, without_bias


def squared_norms(kind: str, weight: Any) -> Any:
    """Return the squared norm of each output's weights, `[out]`, from a weight in the host's own layout."""
    rows = canonical(kind, weight)
    return (rows * rows).flatten(1).sum(1)


def decompose(kind: str, weight: Any, magnitude: Any) -> Any:
    """Scale each output's weights to the norm that `magnitude` says, in the host's own layout."""
    rows = canonical(kind, weight)
    factor = magnitude / _norms(squared_norms(kind, weight).detach())
    return canonical(kind, rows * factor.reshape(-1, *(1,) * (rows.dim() - 1)))


def decomposed_output(
    form: Form, t: Any, x: Any, dropped: Any, y: Any, update: Any, scale: float, base: Callable[..., Any]
) -> Any:
    """Return a linear host's output under the decomposed weight, without making that weight.

    `y` is the host's output on `x`, `update` is `up(down(dropped))`, `dropped` is `x` or a dropout of it.
    ‖W + scale·BA‖² = ‖W‖² + 2·scale·⟨W, BA⟩ + scale²·‖BA‖², where ⟨W, BA⟩ needs only W Aᵀ:
    the host's output on A's rows.
    """
    down, up = t.down.detach(), t.up.detach()
    cross = (up * without_bias(form, base, down, t.magnitude).t()).sum(1)
    own = ((up @ (down @ down.t())) * up).sum(1)
    factor = t.magnitude / _norms(t.norm_squared + 2 * scale * cross + scale * scale * own)
    plain = y - host_bias(form, base, t.magnitude) if dropped is x else without_bias(form, base, dropped, t.magnitude)
    return y + (factor - 1) * plain + factor * scale * update


def _norms(squared: Any) -> Any:
    """Return the norms; 1 for an output without any weight, which stays without one. Rounding may leave less than 0."""
    return squared.where(squared > 0, 1).sqrt()
