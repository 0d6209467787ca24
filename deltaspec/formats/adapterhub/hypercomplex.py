"""Compacter's projections in AdapterHub's bottlenecks: rules and factors, shared between places or not.

Read in `modeling.py` of adapters 1.3 (`PHMLayer`): x·H + b with H = Σᵢ kron(rule[i], W[i]).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from deltaspec.formats.adapterhub.adapter import Adapter
from deltaspec.formats.formulas import factored, hypercomplex, kronecker_sum, padded
from deltaspec.formats.incoming import IncomingSite
from deltaspec.formats.options import Options

if TYPE_CHECKING:
    from torch import Tensor

_WAYS = {"down": "adapter_down.0", "up": "adapter_up"}
_START = ("phm_c_init", "phm_init_range", "learn_phm", "hypercomplex_nonlinearity", "phm_rank",
          "factorized_phm_rule", "factorized_phm_W")  # fmt: skip
"""Options that matter where training starts, or that the tensors themselves show."""


def hypercomplex_of(adapter: Adapter, options: Options) -> Hypercomplex | None:
    """Return what a configuration says of hypercomplex projections; None where it has plain ones."""
    options.ignore(*_START)
    n = options.whole("phm_dim", 4, least=1)
    rule, weights = options.flag("shared_phm_rule", True), options.flag("shared_W_phm", False)
    biased = options.flag("phm_bias", True)
    if not options.flag("phm_layer", False):
        return None
    shared = {name: key for keys in adapter.modules("shared_parameters").values() for name, key in keys.items()}
    needed = (["phm_rule" if "phm_rule" in shared else "phm_rule_left"] if rule else []) + (
        ["W_down" if "W_down" in shared else "W_down_left"] if weights else []
    )
    if lacking := [name for name in needed if name not in shared]:
        adapter.lost("Compacter", f"has no shared_parameters ({', '.join(lacking)}): AdapterHub saves them for some "
                     "models only")  # fmt: skip
    return Hypercomplex(n, rule, weights, shared, biased)


@dataclass
class Hypercomplex:
    """How the projections of one configuration are made."""

    n: int
    shared_rule: bool
    shared_weights: bool
    shared: dict[str, str]
    """Keys of what is shared, by name."""
    biased: bool = True
    """`phm_bias`."""

    def __post_init__(self) -> None:
        self._once: dict[str, Tensor | None] = {}

    def taken(self, adapter: Adapter, keys: dict[str, str], site: str) -> dict[str, Tensor] | None:
        """Take a place's tensors, as method compacter has them; with a common rule, that is `rule`."""
        found: dict[str, Tensor] = {}
        for way, lead in _WAYS.items():
            own = {rest[len(lead) + 1 :]: key for rest, key in keys.items() if rest.startswith(f"{lead}.")}
            rule = self._tensor(adapter, own, "phm_rule", self.shared_rule, f"rule of {site}", "")
            weight = self._weight(adapter, own, way, site)
            if rule is None or weight is None:
                return None
            if (
                tuple(rule.shape) != (self.n,) * 3
                or len(weight[0]) != self.n
                or weight[0].shape[2] != weight[1].shape[1]
            ):
                message = f"{site}: its hypercomplex factors do not fit a phm_dim of {self.n}"
                adapter.find("DS526", message, "the file and the configuration are of two adapters", adapter.file)
                return None
            rules, left, right = hypercomplex(rule, *weight)
            width = self.n * left.shape[1]
            if self.biased and "b" not in own:
                adapter.find("DS543", f"has no {lead}.b for {site}", "the file was cut: save it again", adapter.file)
            bias = adapter.take(own["b"], f"{way}_bias of {site}", (width,)) if "b" in own else torch.zeros(width)
            if bias is None:
                return None
            found |= {f"{way}_left": left, f"{way}_right": right, f"{way}_bias": bias, f"{way}_rule": rules}
        if self.shared_rule:
            found["rule"] = found.pop("down_rule")
            del found["up_rule"]
        return found

    def _tensor(
        self, adapter: Adapter, own: dict[str, str], name: str, shared: bool, became: str, way: str
    ) -> Tensor | None:
        """Take a tensor or the product of its two factors, of this place or of all."""
        called = f"{name}{way}"
        if shared and called in self._once:
            return self._once[called]
        keys = self.shared if shared else own
        if called in keys:
            found = adapter.take(keys[called], f"{became}, transposed", (None, None, None))
        else:
            halves = [self._half(adapter, keys, f"{called}_{side}", became) for side in ("left", "right")]
            left, right = halves
            fits = left is not None and right is not None and left.shape[2] == right.shape[1]
            found = torch.bmm(left, right) if fits and left is not None and right is not None else None
        if shared:
            self._once[called] = found
        return found

    def _half(self, adapter: Adapter, keys: dict[str, str], name: str, became: str) -> Tensor | None:
        if name not in keys:
            message = f"has no {name} for {became}"
            adapter.find("DS543", message, "the file was cut: save the adapter again", adapter.file)
            return None
        return adapter.take(keys[name], f"{became}, multiplied out and transposed", (self.n, None, None))

    def _weight(self, adapter: Adapter, own: dict[str, str], way: str, site: str) -> tuple[Tensor, Tensor] | None:
        """Take the two factors of a weight."""
        keys, lead = (self.shared, f"W_{way}") if self.shared_weights else (own, "W")
        if self.shared_weights and lead in self._once:
            left, right = self._once[f"{lead}_left"], self._once[f"{lead}_right"]
            return None if left is None or right is None else (left, right)
        found: tuple[Tensor, Tensor] | None = None
        if lead in keys:
            whole = adapter.take(
                keys[lead], f"{way} of {site}, with an identity as second factor", (self.n, None, None)
            )
            found = None if whole is None else factored(whole)
        elif {f"{lead}_left", f"{lead}_right"} <= keys.keys():
            halves = [adapter.take(keys[f"{lead}_{side}"], f"{way}_{other} of {site}, transposed", (self.n, None, None))
                      for side, other in (("left", "right"), ("right", "left"))]  # fmt: skip
            found = None if halves[0] is None or halves[1] is None else (halves[0], halves[1])
        else:
            adapter.find("DS543", f"has no {lead} for {way} of {site}", "the file was cut: save it again", adapter.file)
        if self.shared_weights:
            self._once |= {lead: None, f"{lead}_left": found and found[0], f"{lead}_right": found and found[1]}
            adapter.remark("its shared factors are given to each place, which further training would train apart")
        return found

    def dense(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the projections as plain matrices."""
        found: dict[str, Tensor] = {}
        for way in _WAYS:
            rule = tensors["rule" if self.shared_rule else f"{way}_rule"]
            product = torch.bmm(tensors[f"{way}_left"], tensors[f"{way}_right"])
            found |= {way: kronecker_sum(rule, product), f"{way}_bias": tensors[f"{way}_bias"]}
        return found

    def params(self, sites: list[IncomingSite]) -> dict[str, Any]:
        """Return the parameters of method compacter for these sites."""
        params: dict[str, Any] = {"divisions": self.n, "rank": self._rank(sites)}
        return params if self.shared_rule else {**params, "share_rule": False}

    def alike(self, sites: list[IncomingSite]) -> list[IncomingSite]:
        """Return the sites with factors of one rank."""
        rank = self._rank(sites)
        return [replace(site, tensors=padded(dict(site.tensors), rank)) for site in sites]

    @staticmethod
    def _rank(sites: list[IncomingSite]) -> int:
        return max(site.tensors[f"{way}_left"].shape[2] for site in sites for way in _WAYS)
