"""Full tuning of chosen modules or parameters (heads, norms), as a delta: trained copies stand in for the originals."""

from __future__ import annotations

from typing import Any, Literal

from deltaspec.methods.base import Method, Tensors, Weights
from deltaspec.methods.declarations import Init, MethodParams, Promises, Refusal, Site, TensorSpec

STATISTICS = ("_BatchNorm", "_InstanceNorm")


class FullParams(MethodParams):
    """Parameters of full."""

    tied: Literal["together", "alone"] | None = None
    """For a parameter that is tied to another place: `together` trains one copy for all its places, `alone` unties
    this place. It must be said where it matters."""


class Full(Method):
    """Full fine-tuning of a part."""

    name = "full"
    summary = "trained copies of whole modules or parameters"
    paper = "plain fine-tuning, of the selected part"
    Params = FullParams
    promises = Promises(identity_at_start=True, weight="replace", per_row=True)
    default_roles = ("head",)
    descends = True
    small = {"tied": "together"}

    def refuse(self, site: Site, params: FullParams) -> Refusal | None:
        """Take whatever owns parameters; ask about tied ones."""
        chosen = self._chosen(site)
        if not chosen:
            return Refusal(f"this {site.row.type} owns no parameters", "select modules with parameters")
        for parameter in chosen:
            if not site.is_read(parameter.name):
                return Refusal(
                    f"no forward reads {parameter.fqn}, so a trained copy would do nothing",
                    "select the parameters that are read (parameter: …)",
                )
            if parameter.tied and params.tied is None:
                return Refusal(
                    f"{parameter.fqn} is tied to {', '.join(parameter.tied)}",
                    "set params.tied: together (one trained copy for all places) or alone (untie this place)",
                )
        return None

    @staticmethod
    def _chosen(site: Site) -> list[Any]:
        return [p for p in site.row.parameters if site.parameter in (None, p.name)]

    def tensors(self, site: Site, params: FullParams) -> tuple[TensorSpec, ...]:
        """Declare a copy of each parameter (and of running statistics), from the backbone's values."""
        specs = []
        for p in self._chosen(site):
            shared = min((p.fqn, *p.tied)) if p.tied and params.tied == "together" else None
            specs.append(TensorSpec(p.name, p.shape, Init("copy", source=p.fqn), key=shared))
        if site.parameter is None and not set(site.row.bases).isdisjoint(STATISTICS):
            starts = ((b, Init("copy", source=b.fqn)) for b in site.row.buffers)
            specs += [TensorSpec(b.name, b.shape, start, buffer=True, dtype=b.dtype) for b, start in starts]
        return tuple(specs)

    def lowers(self, site: Site, params: FullParams) -> bool:
        """Return True: the host's own code runs on the copies."""
        return True

    def fold(self, site: Site, params: FullParams, t: Any, weights: Weights) -> Tensors:
        """Put the copies in place."""
        return {spec.name: getattr(t, spec.name) for spec in self.tensors(site, params)}
