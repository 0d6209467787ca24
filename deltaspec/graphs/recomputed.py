"""Parts of formulas as one step of autograd, which keeps what enters them and computes them again in the backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deltaspec.graphs.autocast import autocasts, without_autocast
from deltaspec.graphs.bits import packed, unpacked
from deltaspec.graphs.modes import PLAIN, is_rewritten
from deltaspec.graphs.recipe_steps import make
from deltaspec.graphs.recipes import Recipe, recipe_of

Part = Callable[..., tuple[Tensor, ...]]
"""Takes tensors and then dropouts; returns tensors."""


class _Masks:
    """Dropouts of a part as they ran once: their masks in bits, in order."""

    def __init__(self, dropouts: tuple[nn.Dropout, ...]) -> None:
        self.probabilities = [d.p if d.training else 0.0 for d in dropouts]
        self.kept: list[Tensor] = []
        self.shapes: list[torch.Size] = []

    def drop(self, place: int) -> Callable[[Tensor], Tensor]:
        """Return the dropout in a place: it draws, and keeps its mask."""

        def run(value: Tensor) -> Tensor:
            if not (p := self.probabilities[place]):
                return value
            dropped, mask = torch.native_dropout(value, p, True)
            self.kept.append(packed(mask.contiguous()))
            self.shapes.append(value.shape)
            return dropped

        return run

    def again(self, place: int, kept: list[Tensor], shapes: list[torch.Size]) -> Callable[[Tensor], Tensor]:
        """Return the dropout in a place: it takes the masks in order."""

        def run(value: Tensor) -> Tensor:
            if not (p := self.probabilities[place]):
                return value
            return value * unpacked(kept.pop(0), shapes.pop(0)).to(value.dtype).mul_(1 / (1 - p))

        return run


class PartStep(torch.autograd.Function):
    """The step. Its inputs: (the part, its dropouts, how its first tensor is made again or None, *tensors)."""

    @staticmethod
    def forward(
        ctx: Any, part: Part, dropouts: tuple[nn.Dropout, ...], recipe: Recipe | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """Run the part."""
        masks = _Masks(dropouts)
        given = part(*tensors, *map(masks.drop, range(len(dropouts))))
        device = tensors[0].device
        ctx.autocast = torch.get_autocast_dtype(device.type) if autocasts(device) else None
        ctx.part, ctx.masks, ctx.count, ctx.drawn = part, masks, len(tensors), len(masks.kept)
        ctx.steps = None if recipe is None else recipe.steps
        ctx.save_for_backward(*masks.kept, *(tensors if recipe is None else (*tensors[1:], *recipe.kept)))
        masks.kept = []
        ctx.set_materialize_grads(False)
        return given

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        """Run the part again, and differentiate that."""
        again, saved = torch.is_grad_enabled(), list(ctx.saved_tensors)
        kept, tensors = saved[: ctx.drawn], saved[ctx.drawn :]
        if ctx.steps is not None:
            tensors, of_first = tensors[: ctx.count - 1], tuple(tensors[ctx.count - 1 :])
            tensors = [make(ctx.steps, of_first), *tensors]
        wanted = ctx.needs_input_grad[3:]
        if again:  # one may be made of another, whose own gradient is not to pass through it
            tensors = [t.view_as(t) for t in tensors]
        else:
            tensors = [t.detach().requires_grad_(to) for t, to in zip(tensors, wanted, strict=True)]
        shapes = list(ctx.masks.shapes)
        dropouts = [ctx.masks.again(place, kept, shapes) for place in range(len(ctx.masks.probabilities))]
        device, dtype = tensors[0].device, ctx.autocast
        with torch.enable_grad(), torch.autocast(device.type, dtype) if dtype else without_autocast(device):
            given = ctx.part(*tensors, *dropouts)
        pairs = [(y, g) for y, g in zip(given, gradients, strict=True) if g is not None and y.requires_grad]
        into = [t for t, to in zip(tensors, wanted, strict=True) if to]
        outputs, arriving = [y for y, _ in pairs], [g for _, g in pairs]
        found = iter(torch.autograd.grad(outputs, into, arriving, create_graph=again, allow_unused=True))
        return (None, None, None, *(next(found) if to else None for to in wanted))


def run_part(
    part: Part, remake: bool, few: int, tensors: tuple[Tensor, ...], dropouts: tuple[nn.Dropout, ...]
) -> tuple[Tensor, ...]:
    """Run a part of a formula on tensors, in one step of autograd where that pays; the first entered the site."""
    first = tensors[0]
    if (
        is_rewritten()
        or any(type(tensor) not in PLAIN for tensor in tensors)
        or first.numel() < few
        or not any(tensor.requires_grad for tensor in tensors)
    ):
        return part(*tensors, *dropouts)
    site = next((tensor for tensor in tensors[1:] if isinstance(tensor, nn.Parameter)), None)
    recipe = recipe_of(first, False, site) if remake and site is not None else None
    given: tuple[Tensor, ...] = PartStep.apply(part, dropouts, recipe, *tensors)  # type: ignore[no-untyped-call]
    return given
