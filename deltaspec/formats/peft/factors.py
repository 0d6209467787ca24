"""Low-rank updates as PEFT's LoRA has them: one pair of factors a module, made of all that deltas add there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce
from math import sqrt

import torch
from torch import Tensor
from torch.nn.functional import pad

from deltaspec.backbone.table import Row


@dataclass(frozen=True, slots=True)
class Update:
    """scale · (up · down), and scale · bias beside it."""

    down: Tensor
    """`[rank, in]`; of a convolution `[rank, in, *kernel]`, over the channels of all groups; of a stack of matrices
    `[matrices, rank, in]`."""
    up: Tensor
    """`[out, rank]`; of a convolution `[out, rank per group, *ones]`, of a stack `[matrices, out, rank]`."""
    scale: float
    bias: Tensor | None = None
    alpha: float | None = None
    """Numerator of the scale over the rank (or its root), where the update is as a delta has it."""
    rooted: bool = False
    """Whether that is over the root of the rank (rsLoRA)."""
    magnitude: Tensor | None = None
    """Norms of the decomposed weight (DoRA)."""
    stacked: bool = False
    """Whether it is one of a stack of matrices, each with a pair of factors of its own."""

    @property
    def rank(self) -> int:
        """Rank of the update."""
        return self.down.shape[1 if self.stacked else 0]

    def alpha_as(self, rooted: bool) -> float:
        """Return the numerator with which PEFT computes this scale."""
        if self.alpha is not None and self.rooted == rooted:
            return self.alpha
        return self.scale * (sqrt(self.rank) if rooted else self.rank)


def joined(updates: Iterable[Update], groups: int = 1) -> Update:
    """Return one update that is the sum of several; a single one of a positive scale stays as it is."""
    all_of_them = list(updates)
    if len(all_of_them) == 1 and all_of_them[0].scale > 0:
        return all_of_them[0]
    scale = max(abs(update.scale) for update in all_of_them) or 1.0
    ups = [_times(update.up, update.scale / scale) for update in all_of_them]
    if all_of_them[0].stacked:
        downs = [update.down for update in all_of_them]
        return Update(torch.cat(_alike(downs), 1), torch.cat(_alike(ups), 2), scale, stacked=True)
    downs = [_grouped(update.down, groups) for update in all_of_them]
    biases = [_times(update.bias, update.scale / scale) for update in all_of_them if update.bias is not None]
    shape = all_of_them[0].down.shape[1:]
    down = torch.cat(_alike(downs), 1).reshape(-1, *shape)
    bias = reduce(torch.add, _alike(biases)) if biases else None
    return Update(down, torch.cat(_alike(ups), 1), scale, bias=bias)


def padded(update: Update, rank: int, scale: float, groups: int = 1) -> Update:
    """Return an update of a higher rank, zeros behind its own, and of another scale."""
    factor = update.scale / scale
    if update.stacked:
        down = pad(update.down, (0, 0, 0, rank - update.rank))
        up = pad(_times(update.up, factor), (0, rank - update.rank))
        return Update(down, up, scale, stacked=True)
    up, bias = _times(update.up, factor), None if update.bias is None else _times(update.bias, factor)
    lacking = rank - update.rank
    down = _grouped(update.down, groups)
    down = torch.cat((down, down.new_zeros(groups, lacking // groups, *down.shape[2:])), 1)
    up = torch.cat((up, up.new_zeros(up.shape[0], lacking // groups, *up.shape[2:])), 1)
    return Update(down.reshape(rank, *update.down.shape[1:]), up, scale, bias=bias, magnitude=update.magnitude)


def stack(matrices: Iterable[Update]) -> Update:
    """Return the update of a stack of matrices, of those of each; all have one rank."""
    each = list(matrices)
    first = each[0]
    alike = all(update.scale == first.scale for update in each)
    ups = [update.up if alike else _times(update.up, update.scale) for update in each]
    down, up = torch.stack([update.down for update in each]), torch.stack(ups)
    if alike:
        return Update(down, up, first.scale, alpha=first.alpha, rooted=first.rooted, stacked=True)
    return Update(down, up, 1.0, stacked=True)


def ungrouped(update: Update, row: Row) -> Update:
    """Return an update of a grouped convolution as PEFT has it: A over all channels, zeros for other groups'."""
    groups, down = row.conv_groups, update.down
    if groups == 1 or down.shape[1] == row.in_features:
        return update
    rank, per_group, *kernel = down.shape
    wide = down.new_zeros(rank, groups, per_group, *kernel)
    for group, rows in enumerate(torch.arange(rank).chunk(groups)):
        wide[rows, group] = down[rows]
    return replace(update, down=wide.reshape(rank, groups * per_group, *kernel))


def of_groups(down: Tensor, groups: int) -> Tensor | None:
    """Return A with the channels of its own groups alone; None where it sees others, or is not made for groups."""
    rank, channels, *kernel = down.shape
    if rank % groups or channels % groups:
        return None
    parts = down.reshape(groups, rank // groups, groups, channels // groups, *kernel)
    own = torch.stack([parts[group, :, group] for group in range(groups)])
    return own.flatten(0, 1) if own.count_nonzero() == down.count_nonzero() else None


def _grouped(down: Tensor, groups: int) -> Tensor:
    return down.reshape(groups, -1, *down.shape[1:])


def _times(value: Tensor, factor: float) -> Tensor:
    """Scale a tensor; what is rounded by it is so in float32 at least."""
    if factor == 1:
        return value
    return value.to(torch.promote_types(value.dtype, torch.float32)) * factor


def _alike(values: list[Tensor]) -> list[Tensor]:
    wide = values[0].dtype
    for value in values:
        wide = torch.promote_types(wide, value.dtype)
    return [value.to(wide) for value in values]
