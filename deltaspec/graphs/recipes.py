"""Recipes: how a tensor can be made again, by cheap steps, from what autograd keeps of the host's own forward anyway.

A site's input often is what a norm, an activation or an attention gave. The nodes that made it keep what went into
them, so that to keep the input, too, is to keep it twice. A recipe is read off the nodes of the autograd graph as they
are: no model code is traced or known. What an activation gave and a gate keeps, `act(g) * u`, is made again from `g`
for the gate, too, which then lets go of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from deltaspec.backbone.storages import identity
from deltaspec.graphs.dropouts import dropped
from deltaspec.graphs.recipe_steps import (
    Again,
    Steps,
    make,
    run_alone,
    run_cast,
    run_dropped,
    run_gated,
    run_gelu,
    run_layer_norm,
)

_DEEPEST = 12
"""Steps of one recipe at most."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a tensor is made again."""

    steps: Steps
    kept: tuple[Tensor, ...]
    """What it is made of; the graph keeps these."""


def recipe_of(x: Tensor, absorb: bool, site: Any) -> Recipe | None:
    """Return how `x` is made again; None where that is not known, or would save nothing.

    `absorb`: nodes on the way may let go of what they can make again. `site` is what reads it, by identity: there each
    way to make it is tried once, for models may overwrite a tensor where autograd does not see it.
    """
    if x.grad_fn is None or x._version:  # overwritten, it is not what its node gave
        return None
    reader = _Reader(absorb)
    try:
        steps = reader.output(x.grad_fn, 0, _DEEPEST)
    except RuntimeError:  # something was overwritten since: a backward through it will say so, if there is one
        return None
    if steps is None or len(steps) == 1 or not (reader.computes or reader.is_apart(x)):
        return None
    if not _gives(steps, tuple(reader.kept), x, site):
        return None
    for raw, again in reader.absorbed:
        raw.register_hooks(again, Again.unpacked)
    return Recipe(steps, tuple(reader.kept))


def _gives(steps: Steps, kept: tuple[Tensor, ...], x: Tensor, site: Any) -> bool:
    """Return whether what is made by these steps is what entered a site, when it was first looked at."""
    if x.is_meta:  # it has no values, and costs are what is asked for
        return True
    tried: dict[Any, bool] = _TRIED.setdefault(site, {})
    kind = _kind(steps)
    if kind not in tried:
        with torch.no_grad():
            made, given = make(steps, kept), x.detach()
            bound = given.abs().max() * max(_ROUNDING * torch.finfo(x.dtype).eps, _LEAST)
            if not bound.isfinite():
                return False
            tried[kind] = made.shape == x.shape and not bool(((made - given).abs() > bound).any())
    return tried[kind]


def _kind(steps: Steps) -> Any:
    """Return what two ways have in common that differ in sizes alone."""
    if len(steps) == 1:
        return steps
    function, inner, others = steps
    return function, *map(_kind, inner), *(len(fact) if isinstance(fact, tuple) else fact for fact in others)


_TRIED: Any = WeakIdKeyDictionary()
"""By site, what each way to make its input has given."""
_ROUNDING, _LEAST = 16, 1e-5
"""How far, beside the largest value, rounding may move another: in epsilons of the dtype, and at least."""


class _Reader:
    """Reads the steps of one recipe, and collects what is kept."""

    def __init__(self, absorb: bool) -> None:
        self.kept: list[Tensor] = []
        self.absorb = absorb
        self.absorbed: list[tuple[Any, Again]] = []
        """What nodes keep that they may let go of, and how it is made again."""
        self.computes = False
        """Whether it does more than to look at what is kept in another shape."""

    def output(self, node: Any, number: int, depth: int) -> Steps | None:
        """Return how one output of a node is made."""
        rule = _RULES.get(node.name())
        return None if rule is None or number or not depth else rule(self, node, depth)

    def before(self, node: Any, place: int, depth: int) -> Steps | None:
        """Return how the input of a node is made, which it does not keep."""
        following, number = node.next_functions[place]
        return None if following is None else self.output(following, number, depth - 1)

    def keep(self, tensor: Tensor | None) -> Steps | None:
        """Return the step that is a tensor which is kept."""
        if tensor is None or (tensor.numel() and not tensor.untyped_storage().nbytes()):  # FSDP took its weights back
            return None
        for place, known in enumerate(self.kept):
            if known is tensor:
                return (place,)
        self.kept.append(tensor)
        return (len(self.kept) - 1,)

    def step(self, function: Callable[..., Tensor], inner: tuple[Steps | None, ...], *others: Any) -> Steps | None:
        """Return a step that computes; None where one before is unknown."""
        self.computes = True
        return None if None in inner else (function, inner, others)

    def is_apart(self, x: Tensor) -> bool:
        """Return whether a tensor has memory of its own beside what is kept."""
        return all(_storage(tensor) != _storage(x) for tensor in self.kept)


def _storage(tensor: Tensor) -> int:
    return identity(tensor.untyped_storage())


def _saved(node: Any, name: str) -> Tensor | None:
    """Return a tensor that a node keeps; None where it keeps none, or where hooks keep it elsewhere.

    Checkpointing makes it again when it is unpacked, offloading moves it: neither is to happen before the backward.
    """
    try:
        is_here = _is_here(getattr(node, f"_raw_saved_{name}"))
    except RuntimeError:
        return None
    return getattr(node, f"_saved_{name}") if is_here else None


def _is_here(raw: Any) -> bool:
    """Return whether what a node keeps is a tensor that it has at hand. Raise RuntimeError where it keeps none."""
    unpack = raw.unpack_hook
    if unpack is None:
        return True
    return isinstance(raw.data, Tensor) and getattr(unpack, "__module__", None) != "torch.utils.checkpoint"


_raw_tensors = attrgetter("_raw_saved_tensors")
"""What a step of autograd in Python keeps."""


def _fact(node: Any, name: str) -> Any:
    return getattr(node, f"_saved_{name}")


def _product(reader: _Reader, node: Any, depth: int) -> Steps | None:
    factors = []
    for place, name in enumerate(("self", "other")):
        tensor = _saved(node, name)
        if tensor is None:
            factors.append(reader.before(node, place, depth))
            continue
        raw, own = getattr(node, f"_raw_saved_{name}"), _Reader(absorb=False)
        again = _activation(own, tensor, depth) if reader.absorb and raw.unpack_hook is None else None
        if again is None:
            factors.append(reader.keep(tensor))
            continue
        reader.absorbed.append((raw, Again(again, tuple(own.kept))))
        factors.append(_activation(reader, tensor, depth))
    return reader.step(torch.mul, tuple(factors))


def _activation(reader: _Reader, tensor: Tensor, depth: int) -> Steps | None:
    """Return how a tensor is made again that an activation gave; None for others, and what was overwritten."""
    if tensor.grad_fn is None or tensor.grad_fn.name() not in _ACTIVATIONS or tensor._version:
        return None
    return reader.output(tensor.grad_fn, 0, depth - 1)


def _silu(reader: _Reader, node: Any, depth: int) -> Steps | None:
    return reader.step(F.silu, (reader.keep(_saved(node, "self")),))


def _gelu(reader: _Reader, node: Any, depth: int) -> Steps | None:
    return reader.step(run_gelu, (reader.keep(_saved(node, "self")),), _fact(node, "approximate"))


def _recomputed(reader: _Reader, node: Any, depth: int) -> Steps | None:
    raws = _raw_tensors(node)
    if not all(map(_is_here, raws)):
        return None
    function = run_gated if len(raws) > 1 else run_alone
    return reader.step(function, tuple(reader.keep(tensor) for tensor in node.saved_tensors), node.run)


def _dropped_bits(reader: _Reader, node: Any, depth: int) -> Steps | None:
    if not all(map(_is_here, _raw_tensors(node))):
        return None
    inner = reader.before(node, 0, depth), reader.keep(node.saved_tensors[0])
    return reader.step(dropped, inner, node.shape, node.scale)


def _result(reader: _Reader, node: Any, depth: int) -> Steps | None:
    return reader.keep(_saved(node, "result"))


def _attended(reader: _Reader, node: Any, depth: int) -> Steps | None:
    return reader.keep(_saved(node, "output"))


def _dropped(reader: _Reader, node: Any, depth: int) -> Steps | None:
    inner = reader.before(node, 0, depth), reader.keep(_saved(node, "result1"))
    return reader.step(run_dropped, inner, 1 / (1 - _fact(node, "p")))


def _layer_norm(reader: _Reader, node: Any, depth: int) -> Steps | None:
    inner = [reader.keep(_saved(node, name)) for name in ("input", "result1", "result2")]
    affine = [reader.keep(tensor) for name in ("weight", "bias") if (tensor := _saved(node, name)) is not None]
    if len(affine) == 1:  # which of both, the node does not say apart
        return None
    return reader.step(run_layer_norm, (*inner, *affine))


def _cast(reader: _Reader, node: Any, depth: int) -> Steps | None:
    given = node._input_metadata[0]
    return reader.step(run_cast, (reader.before(node, 0, depth),), given.device, given.dtype)


def _viewed(reader: _Reader, node: Any, depth: int) -> Steps | None:
    inner = reader.before(node, 0, depth)
    return None if inner is None else (torch.reshape, (inner,), (tuple(node._input_metadata[0].shape),))


def _transposed(reader: _Reader, node: Any, depth: int) -> Steps | None:
    inner, dims = reader.before(node, 0, depth), (_fact(node, "dim0"), _fact(node, "dim1"))
    return None if inner is None else (torch.transpose, (inner,), tuple(d - (1 << 64) * (d >> 63) for d in dims))


def _copied(reader: _Reader, node: Any, depth: int) -> Steps | None:
    return reader.before(node, 0, depth)


_Rule = Callable[[_Reader, Any, int], Steps | None]
_ACTIVATIONS: dict[str, _Rule] = {"SiluBackward0": _silu, "GeluBackward0": _gelu, "RecomputedBackward": _recomputed}
_RULES: dict[str, _Rule] = {
    **_ACTIVATIONS,
    "GatedProductBackward": _recomputed,
    "MulBackward0": _product,
    **dict.fromkeys(("ReluBackward0", "TanhBackward0", "SigmoidBackward0"), _result),
    "NativeDropoutBackward0": _dropped,
    "DropStepBackward": _dropped_bits,
    "NativeLayerNormBackward0": _layer_norm,
    "ToCopyBackward0": _cast,
    **dict.fromkeys(("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"), _viewed),
    "TransposeBackward0": _transposed,
    "CloneBackward0": _copied,
    **dict.fromkeys(
        (
            "ScaledDotProductFlashAttentionForCpuBackward0", "ScaledDotProductFlashAttentionBackward0",
            "ScaledDotProductEfficientAttentionBackward0", "ScaledDotProductCudnnAttentionBackward0",
        ),
        _attended,
    ),
}  # fmt: skip
"""How the output of a node is made, by the node's name."""
