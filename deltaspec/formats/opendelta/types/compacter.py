"""OpenDelta's Compacter: an adapter of hypercomplex products, each with a rule of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from deltaspec.formats.formulas import factored, hypercomplex, padded
from deltaspec.formats.incoming import IncomingSite
from deltaspec.formats.opendelta.saved import Saved
from deltaspec.formats.options import Options

if TYPE_CHECKING:
    from torch import Tensor

INFIXES = ("compactor",)
NEEDS = "its non_linearity"
_START = ("phm_c_init", "phm_init_range", "hypercomplex_nonlinearity", "kronecker_prod", "sequential")


def read(saved: Saved, options: Options, part: str) -> None:
    """Add the delta."""
    options.ignore(*_START, "reduction_factor", "bottleneck_dim", "phm_rank", "factorized_phm", "factorized_phm_rule",
                   "learn_phm")  # fmt: skip
    biased = {way: options.flag(f"use_bias_{way}_sampler", True) for way in ("down", "up")}
    for name in ("shared_phm_rule", "shared_W_phm"):
        options.refuse(name, "OpenDelta 0.3 has none", "save the delta again")
    n = options.whole("hypercomplex_division", 4, least=1)
    sites, rank, width = [], 1, 1
    for module, fqn in saved.sites("compactor", options).items():
        lead = f"{module}.compactor"
        if lacking := [way for way, due in biased.items() if due and f"{lead}.{way}_sampler.b" not in saved.weights]:
            message = f"has no {lead}.{lacking[0]}_sampler.b"
            saved.find("DS543", message, "the file was cut: save the delta again", saved.file)
        down, up = (_sampler(saved, f"{lead}.{way}_sampler", f"{way} of {fqn}", n) for way in ("down", "up"))
        if not down or not up:
            continue
        rank = max(rank, down["left"].shape[2], up["left"].shape[2])
        width = n * down["left"].shape[1]
        tensors = {f"{way}_{name}": value for way, own in (("down", down), ("up", up)) for name, value in own.items()}
        sites.append(IncomingSite(fqn, tensors))
    sites = [IncomingSite(site.fqn, padded(dict(site.tensors), rank)) for site in sites]
    params = {"width": width, "divisions": n, "rank": rank, "share_rule": False,
              "activation": saved.activation(options)}  # fmt: skip
    saved.add("compacter", params, sites, part)


def _sampler(saved: Saved, lead: str, became: str, n: int) -> dict[str, Tensor]:
    """Take one projection: its rule, factors and bias."""
    there = {key[len(lead) + 1 :] for key in saved.weights if key.startswith(f"{lead}.")}
    if not there & {"phm_rule", "phm_rule_left"}:
        message = f"has no {lead}.phm_rule: OpenDelta leaves out rules that were not trained (learn_phm: false)"
        saved.find("DS538", message, "save the whole model, or train with learn_phm: true", saved.file)
        return {}
    if "phm_rule" in there:
        rule = saved.take(f"{lead}.phm_rule", f"rule of {became}, transposed", (n, n, n))
    else:
        rule = _product(saved, f"{lead}.phm_rule", f"rule of {became}, multiplied out and transposed", (n, n, None))
    if "W" in there:
        whole = saved.take(f"{lead}.W", f"{became}, with an identity as second factor", (n, None, None))
        factors = None if whole is None else factored(whole)
    else:
        left = saved.need(f"{lead}.W_left", f"right factor of {became}, transposed", (n, None, None))
        right = saved.need(f"{lead}.W_right", f"left factor of {became}, transposed", (n, None, None))
        factors = None if left is None or right is None else (left, right)
    bias = saved.take(f"{lead}.b", f"bias of {became}", (None,))
    if rule is None or factors is None or not _fit(saved, lead, *factors):
        return {}
    rules, lefts, rights = hypercomplex(rule, *factors)
    zeros = torch.zeros(n * lefts.shape[1], dtype=lefts.dtype)
    return {"rule": rules, "left": lefts, "right": rights, "bias": zeros if bias is None else bias}


def _product(saved: Saved, key: str, became: str, shape: tuple[int | None, ...]) -> Tensor | None:
    left = saved.need(f"{key}_left", became, shape)
    right = saved.need(f"{key}_right", became, (shape[0], None, shape[1]))
    if left is None or right is None or not _fit(saved, key, left, right):
        return None
    return torch.bmm(left, right)


def _fit(saved: Saved, lead: str, left: Tensor, right: Tensor) -> bool:
    """Return whether two stacks of factors can be multiplied; that they cannot is a finding."""
    if left.shape[2] == right.shape[1]:
        return True
    message = f"the factors of {lead} are {list(left.shape)} and {list(right.shape)}, which do not fit one another"
    saved.find("DS526", message, "save the delta again", saved.file)
    return False
