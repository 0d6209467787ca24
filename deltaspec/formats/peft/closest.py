"""The low-rank update that is closest to what deltas make of a weight, and how far it is from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltaspec.formats.outgoing import Outgoing, Part
from deltaspec.formats.peft.factors import Update
from deltaspec.methods.shared.weights import canonical


@dataclass(frozen=True, slots=True)
class Close:
    """An update in the place of a change that has no exact form."""

    update: Update
    error: float
    """Norm of what it lacks, relative to that of the change (Frobenius)."""
    bias: Tensor | None
    """New bias of the module, where deltas change that, too."""


def closest_update(out: Outgoing, fqn: str, parts: list[Part], rank: int) -> Close | None:
    """Return the best update of a rank (Eckart-Young); None, with a finding, where it cannot be computed."""
    row = parts[0].at.site.row
    if out.base.is_meta:
        out.lacks_weights(parts, "the change of a weight follows from the weight")
        return None
    if row.conv_groups > 1:
        out.refuse(parts, "a grouped convolution has no single update that could be decomposed")
        return None
    values = out.folded(fqn, parts)
    if other := sorted(values.keys() - {"weight", "bias"}):
        out.refuse(parts, f"it changes {', '.join(other)}, which no LoRA does")
        return None
    bias = values.get("bias")
    own = out.base_values(fqn)["weight"].double()
    change = (
        canonical(row.kind, values["weight"].double() - own) if "weight" in values else canonical(row.kind, own * 0)
    )
    left, sizes, right = torch.linalg.svd(change.flatten(1), full_matrices=False)
    most = min(rank, sizes.shape[0])
    up, down = left[:, :most] * sizes[:most], right[:most]
    whole = float(sizes.norm())
    error = float(sizes[most:].norm()) / whole if whole else 0.0
    kernel = change.shape[2:]
    down, up = down.reshape(most, *change.shape[1:]), up.reshape(*up.shape, *(1 for _ in kernel))
    return Close(Update(down.float(), up.float(), 1.0), error, bias)
