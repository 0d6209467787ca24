"""Tuning of the normalisation layers: trained copies of their scales and shifts stand in for the originals."""

from __future__ import annotations

from typing import Any, Literal

from deltaspec.methods.base import Method, Tensors, Weights
from deltaspec.methods.declarations import Init, MethodParams, Promises, Refusal, Site, TensorSpec


class NormParams(MethodParams):
    """Parameters of norm."""

    train: Literal["both", "weight", "bias"] = "both"
    """Which of the norm's parameters are trained; `both` means those that it has."""


class Norm(Method):
    """LayerNorm and RMSNorm tuning."""

    name = "norm"
    summary = "trained scales and shifts of LayerNorm, RMSNorm and other norms"
    paper = "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning (arXiv:2312.11420)"
    Params = NormParams
    promises = Promises(identity_at_start=True, weight="replace", per_row=True)
    default_roles = ("norm",)

    def refuse(self, site: Site, params: NormParams) -> Refusal | None:
        """Take norms that have what is to be trained."""
        if site.parameter is not None:
            return Refusal(f"norm takes modules, not the parameter {site.parameter!r}", "use method full")
        if site.kind != "norm":
            return Refusal(f"norm needs a normalisation layer, not {site.row.type}", "use method full, or role: norm")
        chosen = self._chosen(site, params)
        if not chosen:
            what = "weight or bias" if params.train == "both" else params.train
            return Refusal(f"this {site.row.type} has no {what} to train", "leave it out, or change `train`")
        for parameter in chosen:
            if not site.is_read(parameter.name):
                return Refusal(f"no forward reads {parameter.fqn}", "change `train` for this site in overrides")
        return None

    @staticmethod
    def _chosen(site: Site, params: NormParams) -> list[Any]:
        names = ("weight", "bias") if params.train == "both" else (params.train,)
        return [p for p in site.row.parameters if p.name in names]

    def tensors(self, site: Site, params: NormParams) -> tuple[TensorSpec, ...]:
        """Declare a copy of the weight and of the bias, from the backbone's values."""
        return tuple(
            TensorSpec(p.name, p.shape, Init("copy", source=p.fqn), key=min((p.fqn, *p.tied)) if p.tied else None)
            for p in self._chosen(site, params)
        )

    def lowers(self, site: Site, params: NormParams) -> bool:
        """Run the norm's own code on the copies, whatever it makes of its weight (Gemma adds one)."""
        return True

    def fold(self, site: Site, params: NormParams, t: Any, weights: Weights) -> Tensors:
        """Put the copies in place."""
        return {p.name: getattr(t, p.name) for p in self._chosen(site, params)}
