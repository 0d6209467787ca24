"""The low-rank update that is closest to what deltas make of a weight, and how far it is from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltaspec.formats.outgoing import Outgoing, Part
from deltaspec.formats.peft.factors import Update, stack
from deltaspec.formats.peft.parameters_out import matrices


@dataclass(frozen=True, slots=True)
class Close:
    """An update in the place of a change that has no exact form."""

    update: Update
    error: float
    """Norm of what it lacks, relative to that of the change (Frobenius)."""
    bias: Tensor | None
    """New bias of the module, where deltas change that, too."""


def closest_update(out: Outgoing, parts: list[Part], rank: int) -> Close | None:
    """Return the best update of a rank (Eckart-Young) at one place; None, with a finding, where there is none."""
    place = parts[0]
    row = place.at.site.row
    name = place.parameter or "weight"
    if out.base.is_meta:
        out.lacks_weights(parts, "the change of a weight follows from the weight")
        return None
    if row.conv_groups > 1:
        out.refuse(parts, "a grouped convolution has no single update that could be decomposed")
        return None
    values = out.folded(place.fqn, parts)
    if other := sorted(values.keys() - {name, *({"bias"} if place.parameter is None else ())}):
        out.refuse(parts, f"it changes {', '.join(other)}, which no LoRA does")
        return None
    own = out.base_values(place.fqn)[name].double()
    change = values[name].double() - own if name in values else own * 0
    each = [_closest(matrix, rank) for matrix in matrices(place, change)]
    update = stack(at for at, _ in each) if place.at.site.stack else each[0][0]
    whole, lost = float(change.norm()), sum(square for _, square in each) ** 0.5
    return Close(update, lost / whole if whole else 0.0, values.get("bias"))


def _closest(change: Tensor, rank: int) -> tuple[Update, float]:
    """Return the best update of a rank of one matrix, `[out, in, *kernel]`, and the square of what it lacks."""
    left, sizes, right = torch.linalg.svd(change.flatten(1), full_matrices=False)
    most = min(rank, sizes.shape[0])
    up, down = left[:, :most] * sizes[:most], right[:most]
    kernel = change.shape[2:]
    down, up = down.reshape(most, *change.shape[1:]), up.reshape(*up.shape, *(1 for _ in kernel))
    return Update(down.float(), up.float(), 1.0), float(sizes[most:].square().sum())
