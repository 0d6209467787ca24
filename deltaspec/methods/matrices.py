"""Parameters as weights: a matrix, or a stack of them (the experts of a mixture), seen as linear layers without a bias.

A method that says `matrices` writes its formula for one linear layer. Here is what makes such a layer of a
parameter, and what stacks the method's tensors and initial values over the matrices of a stack. (The formula itself is
stacked by `substitution.fold_matrices`.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from deltaspec.methods.base import Method
    from deltaspec.methods.declarations import MethodParams, Site, TensorSpec


def as_matrices(site: Site) -> Site:
    """See a parameter as the weight of linear layers; the same site where it is no matrix and no stack of them.

    Its host runs with the changed parameter in every forward, so the site counts as bypassed.
    """
    [parameter] = [p for p in site.row.parameters if p.name == site.parameter]
    if site.kind in ("conv", "norm") or len(parameter.shape) not in ((2, 3) if site.kind == "other" else (2,)):
        return site
    *stack, rows, columns = parameter.shape
    turned = site.kind == "conv1d" or (bool(stack) and site.row.transposed)
    row = replace(
        site.row,
        kind="conv1d" if turned else "linear",
        in_features=rows if turned else columns,
        out_features=columns if turned else rows,
        parameters=(replace(parameter, name="weight", shape=(rows, columns)),),
        buffers=(),
    )
    host = site.row.fqn if site.host is None else site.host
    reads = None if site.is_read(parameter.name) else ()
    return replace(site, row=row, host=host, reads=reads, stack=tuple(stack))


def site_tensors(method: Method, site: Site, params: MethodParams) -> tuple[TensorSpec, ...]:
    """Declare a method's tensors at a site, one a matrix where the site is a stacked parameter."""
    specs = method.tensors(site, params)
    if site.stack is None:
        return specs
    stack, length = site.stack, sum(site.stack)
    each = {s.name: replace(s, shape=(*stack, *s.shape), key=f"{site.fqn}.{s.name}", stack=length) for s in specs}
    return tuple(each[spec.name] if spec.key is None else spec for spec in specs)


def initial_values(
    method: Method, site: Site, params: Any, weights: Mapping[str, Tensor], generator: Generator
) -> Mapping[str, Tensor]:
    """Ask a method for the initial values that depend on the site's weights, one a matrix of a stacked parameter."""
    import torch

    if not site.stack:
        return method.initialise(site, params, weights, generator)
    each = [method.initialise(site, params, {"weight": matrix}, generator) for matrix in weights["weight"]]
    shared = {spec.name for spec in method.tensors(site, params) if spec.key is not None}
    return {n: each[0][n] if n in shared else torch.stack([values[n] for values in each]) for n in each[0]}
