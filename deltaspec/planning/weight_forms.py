"""What may be done to a weight that is no plain parameter: one that is computed, or kept as codes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from deltaspec.backbone.table import ParameterInfo
from deltaspec.methods.base import Method
from deltaspec.methods.declarations import MethodParams, Site
from deltaspec.methods.matrices import site_tensors

if TYPE_CHECKING:
    from torch import Tensor


def refuse_computed(method: Method, site: Site, params: MethodParams) -> tuple[str, str, str] | None:
    """Return why a method cannot work through the weight of a module where that is computed from other parameters.

    Code, reason and way out; None where it can.
    """
    row = site.row
    changes = site.host is not None or site.parameter is not None or method.lowers(site, params)
    if row.kind == "conv" and not row.has_parameter("weight"):
        reason = f"the weight of this {row.type} is computed by a parametrisation"
    elif row.computed and changes:
        names = ", ".join(row.computed)
        reason = f"a hook computes {names} of this {row.type} before each forward, so a change would be overwritten"
    elif "weight" in row.parametrised and changes and method.promises.weight == "add":
        reason = f"a parametrisation computes the weight of this {row.type}, so a change would be overwritten"
    else:
        return None
    return "DS402", reason, _TAKE_OFF


_TAKE_OFF = "take it off before compiling (remove_weight_norm, prune.remove, remove_parametrizations in torch.nn.utils)"


def refuse_packed(method: Method, site: Site, params: MethodParams) -> tuple[str, str, str] | None:
    """Return why a method cannot take a site whose weight is kept as codes; None where it can. See `refuse_computed`.

    A change of values that can be read is added beside the module; what would write into codes, or read some that only
    their module can read, has no place.
    """
    info = _chosen(site)
    if info is None or info.packed is None:
        return None
    form, kind = info.packed, site.row.type
    kept = f"the weight of this {kind} is kept as {form.name} codes"
    if site.parameter is not None and info.name != "weight":
        kept = f"{info.fqn} is kept as {form.name} codes"
    if any(tensor.init.source == info.fqn for tensor in site_tensors(method, site, params)):
        reason = f"{kept}, of which {method.name} cannot train a copy"
        return "DS402", reason, "choose what is kept as values (parameter: bias), or use method lora on it"
    changes = method.promises.weight == "add" and method.folds(site, params)
    own = site.host in (None, site.row.fqn) and not site.stack and info.name == "weight"
    if changes and not own:
        reason = f"{kept}, which {site.host or 'the model'} reads by itself"
        return "DS402", reason, "leave it out, or load the model without quantisation"
    if not form.readable and (changes or _starts(method, site, params)):
        reason = f"{method.name} computes from the values of the weight, and {kept} that only its class can read"
        return (
            "DS402",
            reason,
            "use method lora without use_dora and pissa there, or load the model without quantisation",
        )
    return None


def _chosen(site: Site) -> ParameterInfo | None:
    """Return the packed parameter that a site is about: the one that was chosen, or its module's."""
    packed = (p for p in site.row.parameters if p.packed is not None)
    if site.parameter is not None and site.stack is None:
        packed = (p for p in packed if p.name == site.parameter)
    return next(packed, None)


class _Asked(Exception):
    """A method asks for values of a weight."""


class _Unread(Mapping[str, "Tensor"]):
    """Weights that nobody can read."""

    def __getitem__(self, name: str) -> Tensor:
        raise _Asked(name)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def _starts(method: Method, site: Site, params: MethodParams) -> bool:
    """Return whether a method's initial values depend on the weight."""
    if type(method).initialise is Method.initialise:
        return False
    import torch

    generator: Any = torch.Generator()
    try:
        method.initialise(site, params, _Unread(), generator)
    except _Asked:
        return True
    return False
