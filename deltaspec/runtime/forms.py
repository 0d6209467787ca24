"""What a region depends on at one site: the form of its tensors, its host's arguments, the dtype it computes in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deltaspec.backbone.forwards import arguments_of
from deltaspec.backbone.weight_forms import is_packed
from deltaspec.methods.declarations import Form, Site


def form_of(site: Site, tensors: tuple[str, ...]) -> Form:
    """Reduce a site to what a formula may depend on."""
    dims = len(site.row.shape_of("weight")) if site.row.has_parameter("weight") else 0
    return Form(site.kind, dims, dims - 2 if site.kind == "conv" else 0, site.row.conv_groups, tensors, site.row.parts)


def call_form(kind: type[nn.Module], site: Site) -> tuple[str | None, str]:
    """Return how a host is called: (its only argument's name, or None where anything is passed through; the first's
    name).
    """
    names, first = argument_names(kind.forward), first_argument(kind)
    known = site.kind != "other" and site.row.faithful
    single = known and len(names) == 1 and not names[0].startswith("*")
    return (first if single else None), first


def first_argument(kind: type[nn.Module]) -> str:
    """Return the name of the argument that carries the hidden state into a module."""
    names = argument_names(kind.forward)
    return names[0] if names and not names[0].startswith("*") else "hidden_states"


@functools.cache
def argument_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of what a forward takes after `self`, those with stars with them."""
    parameters = arguments_of(forward)
    stars = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}
    return tuple(stars.get(p.kind.name, "") + p.name for p in parameters)


def computed_in(tensors: list[Tensor], module: nn.Module) -> tuple[str | None, bool]:
    """Return the wider of the delta's dtype and the host's where they differ, and whether the delta's is another.

    The formula computes in it: what the host gives goes through it, and must come back as it was without the delta.
    """
    own = next((p.dtype for p in module.parameters() if p.is_floating_point() and p.element_size() > 1), None)
    delta = next((t.dtype for t in tensors if t.is_floating_point()), None)
    if own is None and delta is not None and is_packed(module):  # what enters and leaves may have any dtype
        return str(delta).removeprefix("torch."), False
    if own is None or delta is None or own == delta:
        return None, False
    wide = torch.promote_types(own, delta)
    return str(wide).removeprefix("torch."), wide != delta
