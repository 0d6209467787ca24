"""Methods that each break one promise."""

from __future__ import annotations

from dataclasses import replace

import torch

from deltaspec.methods.builtin.adapter import Adapter
from deltaspec.methods.builtin.lora import Lora
from deltaspec.methods.declarations import Init, Refusal


class Loud(Lora):
    name = "loud"

    def apply(self, form, params, t, x, base):
        return super().apply(form, params, t, x, base) + 1e-3


class Deaf(Lora):
    name = "deaf"

    def apply(self, form, params, t, x, base):
        return base(x) + t.up.detach().sum() + t.down.sum() * 0


class Dead(Adapter):
    name = "dead"

    def apply(self, form, params, t, x, base):
        return base(x)


class Misfolded(Lora):
    name = "misfolded"

    def fold(self, site, params, t, weights):
        return {"weight": weights["weight"] - params.scale * t.up @ t.down}


class Random(Lora):
    name = "random"

    def initialise(self, site, params, weights, generator):
        return {"down": torch.randn(params.rank, site.row.in_features)}


class Writing(Lora):
    name = "writing"

    def initialise(self, site, params, weights, generator):
        weights["weight"].add_(1e-3)
        return {}


class Stuck(Lora):
    name = "stuck"

    def tensors(self, site, params):
        return tuple(replace(spec, init=Init("zeros")) for spec in super().tensors(site, params))


class Mistaken(Lora):
    name = "mistaken"

    def fold(self, site, params, t, weights):
        return {"wieght": super().fold(site, params, t, weights)["weight"]}


class Refusing(Lora):
    name = "refusing"

    def refuse(self, site, params):
        return Refusal("no", "yes")
