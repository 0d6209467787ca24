"""AdapterHub's bottlenecks: sequential and parallel adapters, AdapterPlus, Compacter; `forms` says what is where."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltaspec.formats.adapterhub.adapter import CONFIG, Adapter
from deltaspec.formats.adapterhub.forms import Form, Wiring
from deltaspec.formats.adapterhub.hypercomplex import hypercomplex_of
from deltaspec.formats.adapterhub.invertible import read_invertible
from deltaspec.formats.adapterhub.places import Place
from deltaspec.formats.incoming import IncomingSite
from deltaspec.formats.options import Options, is_number
from deltaspec.names.folding import shown

if TYPE_CHECKING:
    from torch import Tensor

_EPS = 1e-5
"""Number added to the variance in the norms that AdapterHub adds itself."""


def read(adapter: Adapter, options: Options, part: str) -> None:
    """Add the deltas: one for each of the domains."""
    shape = _Shape(adapter, options)
    places = _places(adapter, options)
    read_invertible(adapter, options, shape.activation, part)
    forms = _forms(adapter, shape.wiring, places)
    if adapter.findings:
        return
    groups: dict[tuple[str, bool, str], list[IncomingSite]] = {}
    projections: dict[tuple[str, bool, str], list[str]] = {}
    for module, form in forms.items():
        made = shape.made(module, form, places[module])
        if made is not None:
            method, site = made
            groups.setdefault((form.domain, form.before, method), []).append(site)
            projections.setdefault((form.domain, form.before, method), []).append(places[module].projection)
    for (domain, before, method), sites in groups.items():
        extra = f"{part}-{domain}" if len(groups) > 1 else part
        count = len(adapter.incoming.deltas)
        adapter.add(method, shape.params(method, before, sites), shape.settled(method, sites), extra.lstrip("-"))
        if len(adapter.incoming.deltas) > count:
            added = adapter.incoming.deltas[-1].name
            adapter.domains[added] = domain
            adapter.occupied[added] = projections[domain, before, method]


def _forms(adapter: Adapter, wiring: Wiring, places: dict[str, Place]) -> dict[str, Form]:
    """Return what it computes at each place; what has no counterpart is a finding."""
    found: dict[str, Form] = {}
    refused: dict[str, list[str]] = {}
    for module, place in places.items():
        form = wiring.at(place)
        if isinstance(form, Form):
            found[module] = form
        else:
            refused.setdefault(form, []).append(place.projection)
    for why, projections in refused.items():
        hint = "train a double_seq_bn, whose adapters stand behind projections"
        adapter.unsupported(f"bottlenecks behind {shown(projections)}", why, hint)
    return found


def _places(adapter: Adapter, options: Options) -> dict[str, Place]:
    """Return the places by the modules that have keys, and compare them with those that are meant."""
    known = adapter.arrangement.bottlenecks
    switches = {"mh": options.flag("mh_adapter", False), "output": options.flag("output_adapter", True),
                "cross": options.flag("cross_adapter", False)}  # fmt: skip
    out = adapter.left_out(options)
    options.settle()
    meant = [key for key, place in known.items() if switches[place.location] and place.layer not in out]
    modules = list(adapter.modules("adapters"))
    found = adapter.places(modules, known)
    if len(found) == len(modules):
        adapter.compare(set(found.values()), meant, "bottlenecks")
    return {module: known[key] for module, key in found.items() if key in meant}


class _Shape:
    """What one configuration makes of a place and its tensors."""

    def __init__(self, adapter: Adapter, options: Options) -> None:
        self.adapter, self.keys = adapter, adapter.modules("adapters")
        self.norm_before, self.norm_after = options.flag("ln_before", False), options.flag("ln_after", False)
        inside = options.flag("adapter_residual_before_ln", False)
        self.gated = options.flag("use_gating", False)
        if self.gated and (self.norm_before or self.norm_after):
            adapter.unsupported("use_gating", "a gate beside norms of its own has no counterpart", "train it without")
        self.wiring = Wiring(
            options.flag("original_ln_before", False),
            options.flag("original_ln_after", True),
            options.get("residual_before_ln", True),
            options.flag("is_parallel", False),
            self.norm_before,
        )
        scaling = options.get("scaling", 1.0)
        self.scaling = scaling if scaling in ("learned", "channel") else options.number("scaling", 1.0)
        self.dropout = options.number("dropout", 0.0)
        self.reduction = options.get("reduction_factor", 16)
        self.activation = adapter.activation(options, "relu")
        self.phm = hypercomplex_of(adapter, options)
        if depth := options.number("stochastic_depth", 0.0):
            adapter.remark(f"its stochastic depth of {depth:g} in training is left out")
        if self.norm_after and inside:
            adapter.unsupported("adapter_residual_before_ln", "a norm of the sum with the residual has no counterpart",
                                "train it without ln_after")  # fmt: skip
        if self.wiring.parallel and (self.norm_before or self.norm_after):
            adapter.unsupported("ln_before, ln_after", "parallel_adapter has no norms", "train it without")

    def made(self, module: str, form: Form, place: Place) -> tuple[str, IncomingSite] | None:
        """Take a place's tensors; return the method and the site."""
        keys = self.keys[module]
        scale = self._scale(keys, form.site)
        phm = self.phm
        tensors = self._dense(keys, form.site) if phm is None else phm.taken(self.adapter, keys, form.site)
        if tensors is None:
            return None
        method = "parallel_adapter" if form.parallel else "adapter"
        if self.phm is not None:
            plain = method == "adapter" and not (
                self.norm_before or self.norm_after or form.before or form.stream or self.gated
            )
            if plain and (scale is None or scale.numel() == 1):
                method = "compacter"
            else:
                self.adapter.remark("its hypercomplex projections are multiplied out: compacter has no such form")
                tensors = self.phm.dense(tensors)
        if not self._width_fits(tensors["down_bias"].shape[0], tensors["up_bias"].shape[0], place, form.site):
            return None
        if scale is not None:
            tensors = _scaled(tensors, scale, method)
        if self.gated:
            gate = self._need(keys, "gate.weight", f"gate of {form.site}", (1, len(tensors["up_bias"])))
            gate_bias = self._need(keys, "gate.bias", f"gate_bias of {form.site}", (1,))
            if gate is None or gate_bias is None:
                return None
            tensors |= {"gate": gate, "gate_bias": gate_bias}
        if method == "adapter":
            norms = self._norms(keys, form)
            if norms is None:
                return None
            tensors |= norms
        reads = "input_of" if form.parallel else "residual_of"
        return method, IncomingSite(form.site, tensors, {} if form.stream is None else {reads: form.stream})

    def _dense(self, keys: dict[str, str], site: str) -> dict[str, Tensor] | None:
        lead = "adapter_down.1" if self.norm_before else "adapter_down.0"
        down = self._need(keys, f"{lead}.weight", f"down of {site}", (None, None))
        down_bias = self._need(keys, f"{lead}.bias", f"down_bias of {site}", (None if down is None else len(down),))
        shape = (None, None) if down is None else (down.shape[1], down.shape[0])
        up = self._need(keys, "adapter_up.weight", f"up of {site}", shape)
        up_bias = self._need(keys, "adapter_up.bias", f"up_bias of {site}", shape[:1])
        if down is None or down_bias is None or up is None or up_bias is None:
            return None
        return {"down": down, "down_bias": down_bias, "up": up, "up_bias": up_bias}

    def _scale(self, keys: dict[str, str], site: str) -> Tensor | None:
        """Return a scale that is to be multiplied into the tensors; None where it is a parameter."""
        import torch

        if isinstance(self.scaling, str):
            shape = (1,) if self.scaling == "learned" else (None,)
            return self._need(keys, "scaling", f"multiplied into up of {site}", shape)
        number = float(self.scaling)
        if number <= 0 or (self.norm_after and number != 1):
            self.adapter.remark(f"its scaling of {number:g} is multiplied into its tensors")
            return torch.tensor([number])
        return None

    def _norms(self, keys: dict[str, str], form: Form) -> dict[str, Tensor] | None:
        """Take the norms of its own, and copy the model's in front of a bottleneck that stands before it."""
        found: dict[str, Tensor | None] = {}
        if self.norm_before:
            for name in ("weight", "bias"):
                own = self._need(keys, f"adapter_norm_before.{name}", f"norm_before_{name} of {form.site}", (None,))
                again = self._need(keys, f"adapter_down.0.{name}", "the same norm once more", (None,))
                if own is not None and again is not None and not own.equal(again):
                    message = f"{form.site}: adapter_norm_before and adapter_down.0 are one norm with two values"
                    self.adapter.find("DS539", message, "save the adapter again", self.adapter.file)
                found[f"norm_before_{name}"] = own
        if self.norm_after:
            for name in ("weight", "bias"):
                own = self._need(keys, f"adapter_norm_after.{name}", f"norm_after_{name} of {form.site}", (None,))
                found[f"norm_after_{name}"] = own
        if form.before:
            if self.adapter.base.is_meta:
                message = "its bottlenecks see what the model's norms give, and those have no values here"
                self.adapter.find("DS542", message, "load the base model with its weights")
                return None
            for name in ("weight", "bias"):
                found[f"norm_before_{name}"] = self.adapter.base.tensor(f"{form.site}.{name}").clone()
            self.adapter.remark("the norms in front of its bottlenecks are copies of the model's own, which further "
                                "training would train")  # fmt: skip
        return (
            None
            if any(value is None for value in found.values())
            else {n: v for n, v in found.items() if v is not None}
        )

    def params(self, method: str, before: bool, sites: list[IncomingSite]) -> dict[str, Any]:
        """Return the parameters of a delta; the width, and what it reads, are the first site's."""
        params: dict[str, Any] = {"width": len(sites[0].tensors["down_bias"]), "activation": self.activation}
        params |= sites[0].params
        number = 1.0 if isinstance(self.scaling, str) else float(self.scaling)
        number = number if number > 0 and not self.norm_after else 1.0
        if number != 1.0 or method == "parallel_adapter":
            params["scale"] = number
        if self.dropout:
            params["dropout"] = self.dropout
        if self.gated:
            params["gate"] = True
        if before:
            params["position"] = "before"
        if method == "compacter" and self.phm is not None:
            params |= self.phm.params(sites)
        if method == "adapter":
            params |= {name: True for name, on in (("norm_before", self.norm_before or before),
                                                   ("norm_after", self.norm_after)) if on}  # fmt: skip
            if before:
                params |= self._eps(sites)
        return params

    def _eps(self, sites: list[IncomingSite]) -> dict[str, Any]:
        eps = {float(getattr(self.adapter.base.model.get_submodule(site.fqn), "eps", _EPS)) for site in sites}
        if len(eps) > 1 or (self.norm_after and eps != {_EPS}):
            self.adapter.unsupported(
                "bottleneck", "its norms add several numbers to the variance", "train it without ln_after"
            )
        return {} if eps == {_EPS} else {"norm_eps": eps.pop()}

    def settled(self, method: str, sites: list[IncomingSite]) -> list[IncomingSite]:
        """Return the sites with what differs from the first one: widths, and what they read."""
        if method == "compacter" and self.phm is not None:
            sites = self.phm.alike(sites)
        own = [{"width": len(site.tensors["down_bias"]), **site.params} for site in sites]
        return [
            IncomingSite(s.fqn, s.tensors, {name: value for name, value in params.items() if value != own[0][name]})
            for s, params in zip(sites, own, strict=True)
        ]

    def _width_fits(self, width: int, hidden: int, place: Place, site: str) -> bool:
        """Compare a bottleneck's width with the configuration's."""
        factor = self.reduction
        if isinstance(factor, dict):
            factor = factor.get(str(place.layer), factor.get("default"))
        if not is_number(factor) or factor <= 0:
            message = f"reduction_factor: {self.reduction!r:.80} gives layer {place.layer} no number above 0"
            self.adapter.find("DS544", message, "save the adapter again", CONFIG)
            return False
        if (due := max(1, int(hidden // factor))) == width:
            return True
        message = f"{site}: a reduction_factor of {factor:g} makes bottlenecks {due} wide, and this one is {width}"
        self.adapter.find("DS543", message, "the configuration and the file are of two adapters", self.adapter.file)
        return False

    def _need(self, keys: dict[str, str], name: str, became: str, shape: tuple[int | None, ...]) -> Tensor | None:
        if name in keys:
            return self.adapter.take(keys[name], became, shape)
        message = f"has no {name} for {became}"
        self.adapter.find("DS543", message, "the file was cut: save the adapter again", self.adapter.file)
        return None


def _scaled(tensors: dict[str, Tensor], scale: Tensor, method: str) -> dict[str, Tensor]:
    """Multiply a scale into what a bottleneck gives, bias included."""
    name = "up_left" if method == "compacter" else "up"
    rows = scale if method == "compacter" else scale.reshape(-1, 1)
    return {**tensors, name: tensors[name] * rows, "up_bias": tensors["up_bias"] * scale}
