"""Which deltas of one method can be computed together, row by row: those whose formulas are the same but for sizes.

A tensor is *free* in a dimension where zeros may be appended and what the formula gives stays the same: the rank of
low-rank updates, the width of bottlenecks. Whether that is so is read off the formula, whatever method it is of: a
dimension is free unless it meets the host's own widths, or a step that is not known to keep zeros apart from values.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from deltaspec.graphs.formula import Formula, formula
from deltaspec.graphs.links import Link

_FIXED = 0
_KEEPS_ZEROS = frozenset({F.gelu, F.relu, F.silu, F.leaky_relu, torch.tanh, operator.neg})
_PRODUCTS = frozenset({operator.mul, torch.mul})
_QUOTIENTS = frozenset({operator.truediv, torch.div})
_SUMS = frozenset({operator.add, operator.sub, torch.add, torch.sub})
_ONCE = ({"dims": 1}, {"dims": 1, "out": None})
_CONVOLUTIONS = frozenset({F.conv1d, F.conv2d, F.conv3d})

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pattern:
    """A delta's formula at a site, without what may differ from row to row. Equal ones are computed together."""

    method: str
    form: Any
    compute: str | None
    narrow: bool
    buffers: frozenset[str]
    steps: tuple[Any, ...]
    """The graph, with a mark in the place of each number in `Formula.numbers`."""
    shapes: tuple[tuple[str, tuple[int | None, ...]], ...]
    """Shapes of the tensors; None in free dimensions."""


@functools.cache
def pattern(link: Link, open_call: bool, shapes: tuple[tuple[str, Shape], ...]) -> Pattern:
    """Return the pattern of a link that is per row; `shapes` are those of its tensors, by own name."""
    found = formula(link, open_call)
    given = dict(shapes)
    free = _Dimensions(found, given, link.form).free()
    masked = tuple((name, _masked(shape, free[name])) for name, shape in given.items())
    return Pattern(link.method, link.form, link.compute, link.narrow, link.buffers, _steps(found), masked)


def _masked(shape: Shape, free: tuple[bool, ...]) -> tuple[int | None, ...]:
    return tuple(None if is_free else size for size, is_free in zip(shape, free, strict=True))


def _steps(found: Formula) -> tuple[Any, ...]:
    nodes = {node: number for number, node in enumerate(found.result.graph.nodes)}
    numbers = set(found.numbers)

    def plain(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return "node", nodes[value]
        if isinstance(value, Mapping):
            return tuple((key, plain(inner)) for key, inner in value.items())
        if isinstance(value, tuple | list):
            return tuple(map(plain, value))
        return type(value).__name__, repr(value)

    def step(node: fx.Node) -> tuple[Any, ...]:
        args = tuple("#" if (node, place) in numbers else plain(arg) for place, arg in enumerate(node.args))
        kwargs = tuple((k, "#" if (node, k) in numbers else plain(v)) for k, v in node.kwargs.items())
        return node.op, node.target, args, kwargs

    return (*map(step, nodes), nodes[found.result])


@dataclass(frozen=True, slots=True)
class _Value:
    """The last dimensions of a step's result, as far as known, and whether it is zero where they are padded."""

    dims: tuple[int, ...]
    zero: bool = False
    whole: bool = False
    """Whether these are all dimensions."""


class _Dimensions:
    """Dimensions of a formula's tensors, those that must agree joined; whatever is joined to `_FIXED` is not free."""

    def __init__(self, found: Formula, shapes: Mapping[str, Shape], form: Any) -> None:
        self._parent = [_FIXED]
        self._form, self._own = form, found.own
        self._values: dict[fx.Node, _Value] = {}
        self._leaves: dict[str, tuple[int, ...]] = {}
        for name, node in found.tensors.items():
            dims = self._leaves[name] = tuple(self._new() for _ in shapes[name])
            self._values[node] = _Value(dims, zero=True, whole=True)
        for node in found.result.graph.nodes:
            if node not in self._values:
                self._values[node] = self._step(node)
        self._fix(found.result)

    @property
    def _rules(self) -> tuple[Callable[[fx.Node], _Value | None], ...]:
        return self._linear, self._elementwise, self._product, self._method, self._hosted, self._convolved

    def free(self) -> dict[str, tuple[bool, ...]]:
        """Return, by tensor, which of its dimensions are free."""
        return {name: tuple(self._root(dim) != _FIXED for dim in dims) for name, dims in self._leaves.items()}

    def _new(self) -> int:
        self._parent.append(len(self._parent))
        return len(self._parent) - 1

    def _root(self, dim: int) -> int:
        while self._parent[dim] != dim:
            dim = self._parent[dim]
        return dim

    def _join(self, one: int, other: int) -> None:
        low, high = sorted((self._root(one), self._root(other)))
        self._parent[high] = low

    def _fix(self, node: Any) -> None:
        if isinstance(node, fx.Node):
            for dim in self._values[node].dims:
                self._join(dim, _FIXED)

    def _unknown(self, node: fx.Node) -> _Value:
        """Take a step that nothing is known of: none of its inputs may be padded."""
        for given in node.all_input_nodes:
            self._fix(given)
        return _Value((_FIXED,))

    def _step(self, node: fx.Node) -> _Value:
        if node not in self._own:
            return self._unknown(node)  # of the whole batch
        for rule in self._rules:
            if (found := rule(node)) is not None:
                return found
        return self._unknown(node)

    def _value(self, node: Any) -> _Value | None:
        return self._values[node] if isinstance(node, fx.Node) else None

    def _contract(self, one: tuple[_Value, int], other: tuple[_Value, int]) -> None:
        """Sum over a dimension: what is appended adds nothing where one of the two is zero there."""
        self._join(one[1], other[1])
        if not (one[0].zero or other[0].zero):
            self._join(one[1], _FIXED)

    def _linear(self, node: fx.Node) -> _Value | None:
        if node.target is not F.linear or node.kwargs:
            return None
        x, weight, bias = map(self._value, (*node.args, None)[:3])
        if x is None or weight is None or len(weight.dims) != 2 or not x.dims:
            return None
        self._contract((x, x.dims[-1]), (weight, weight.dims[1]))
        if bias is not None:
            self._join(bias.dims[-1], weight.dims[0])
        return _Value((weight.dims[0],), weight.zero and (bias is None or bias.zero))

    def _elementwise(self, node: fx.Node) -> _Value | None:
        if node.target in _KEEPS_ZEROS or node.target is torch.sigmoid or _is_dropout(node):
            value = self._value(node.args[0])
            if value is None or any(isinstance(arg, fx.Node) for arg in node.args[1:]):
                return None
            return _Value(value.dims, value.zero and node.target is not torch.sigmoid, value.whole)
        if node.target not in _PRODUCTS | _QUOTIENTS | _SUMS or len(node.args) != 2:
            return None
        one, other = map(self._value, node.args)
        if one is None or other is None:
            value = one or other
            if value is None or (node.target in _QUOTIENTS and one is None):
                return None
            return _Value(value.dims, value.zero and node.target not in _SUMS, value.whole)
        for left, right in zip(reversed(one.dims), reversed(other.dims), strict=False):
            self._join(left, right)
        if node.target in _QUOTIENTS:
            self._fix(node.args[1])
        zero = one.zero and other.zero if node.target in _SUMS else one.zero or other.zero
        return _Value(max(one.dims, other.dims, key=len), zero, one.whole and other.whole)

    def _product(self, node: fx.Node) -> _Value | None:
        if node.target in (torch.matmul, operator.matmul, torch.mm) and len(node.args) == 2:
            one, other = map(self._value, node.args)
            if one is None or other is None or not one.dims or len(other.dims) != 2:
                return None
            self._contract((one, one.dims[-1]), (other, other.dims[0]))
            return _Value((*one.dims[:-1], other.dims[1]), one.zero and other.zero, one.whole and other.whole)
        if node.target is torch.tensordot and node.kwargs in _ONCE and len(node.args) == 2:
            one, other = map(self._value, node.args)
            if one is None or other is None or not (one.whole and other.whole):
                return None
            self._contract((one, one.dims[-1]), (other, other.dims[0]))
            return _Value((*one.dims[:-1], *other.dims[1:]), one.zero and other.zero, whole=True)
        return None

    def _method(self, node: fx.Node) -> _Value | None:
        if node.op != "call_method" or node.kwargs or (value := self._value(node.args[0])) is None:
            return None
        if node.target == "detach":
            return value
        if node.target == "t":
            return _Value(tuple(reversed(value.dims)), value.zero, value.whole)
        if node.target != "sum" or len(node.args) != 2 or not value.whole or not isinstance(node.args[1], int):
            return None
        left = list(value.dims)
        gone = left.pop(node.args[1])
        self._contract((value, gone), (value, gone))
        return _Value(tuple(left), value.zero, whole=True)

    def _hosted(self, node: fx.Node) -> _Value | None:
        """Take the host's own code on a weight of the delta: what is appended gives more outputs, which are zero."""
        if node.op != "call_module" or node.target != "swapped":
            return None
        replaced, x = node.args
        assert isinstance(replaced, Mapping)
        if not any(isinstance(value, fx.Node) for value in replaced.values()):
            return self._hosted_rows(replaced, self._value(x))
        weight = self._value(replaced.get("weight"))
        others = [value for name, value in replaced.items() if name != "weight" and value is not None]
        if weight is None or others or not weight.whole:
            return None
        self._fix(x)
        wide = {"embedding": 1, "conv": 0, "linear": 0}.get(self._form.kind)
        if wide is None or (self._form.kind == "linear" and len(weight.dims) != 2) or self._form.groups > 1:
            return None
        if self._form.kind != "embedding" and "bias" not in replaced:
            return None  # the host's own would be added
        for number, dim in enumerate(weight.dims):
            if number != wide:
                self._join(dim, _FIXED)
        spatial = len(weight.dims) - 2
        return _Value((weight.dims[wide], *(_FIXED,) * spatial), weight.zero)

    def _hosted_rows(self, replaced: Mapping[str, Any], x: _Value | None) -> _Value | None:
        """Take a linear host's own weight on rows of the delta: appended ones give rows of zeros, without a bias."""
        if self._form.kind not in ("linear", "conv1d") or "bias" not in replaced or x is None or not x.whole:
            return None
        self._join(x.dims[-1], _FIXED)
        return _Value((*x.dims[:-1], _FIXED), x.zero, whole=True)

    def _convolved(self, node: fx.Node) -> _Value | None:
        if node.target not in _CONVOLUTIONS or len(node.args) != 2 or node.kwargs.keys() - {"groups"}:
            return None
        x, weight = map(self._value, node.args)
        if x is None or weight is None or not weight.whole or node.kwargs.get("groups", 1) != 1:
            return None
        spatial = len(weight.dims) - 2
        if len(x.dims) < spatial + 1:
            return None
        self._contract((x, x.dims[-spatial - 1]), (weight, weight.dims[1]))
        for dim in weight.dims[2:]:
            self._join(dim, _FIXED)
        return _Value((weight.dims[0], *(_FIXED,) * spatial), weight.zero)


def _is_dropout(node: fx.Node) -> bool:
    return node.op == "call_module" and node.target == "dropout"
