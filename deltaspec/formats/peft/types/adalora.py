"""AdaLoRA of PEFT: ranks that were allocated, in their places among those that each module started with."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from deltaspec.formats.incoming import IncomingSite
from deltaspec.formats.peft.sites import Found, differs, found_modules, lacks, misfits

if TYPE_CHECKING:
    from torch import Tensor

    from deltaspec.formats.peft.adapter import Adapter

_NAMES = {"lora_A": "down", "lora_E": "singular", "lora_B": "up"}
_TRAINING = (
    "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step", "init_lora_weights",
    "fan_in_fan_out", "r", "use_rslora", "use_dora", "alpha_pattern", "lora_bias", "megatron_config", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "runtime_config", "qalora_group_size", "lora_ga_config",
    "use_qalora",
)  # fmt: skip
"""What its configuration has from LoRA's, PEFT does not look at; the rest is told to the training."""


def read(adapter: Adapter) -> None:
    """Add the delta of an AdaLoRA adapter. Ranks that were dropped are zeros, as RankAllocator leaves them here."""
    adapter.ignore(*_TRAINING)
    initial, target = adapter.option("init_r", 12), adapter.option("target_r", 8)
    alpha = adapter.option("lora_alpha", 8)
    params: dict[str, Any] = {"rank": min(target, initial), "initial_rank": initial}
    params["alpha"] = float(alpha if alpha > 0 else initial)
    if dropout := adapter.option("lora_dropout", 0.0):
        params["dropout"] = float(dropout)
    kept = _kept(adapter.option("rank_pattern") or {})
    sites = []
    for found in found_modules(adapter, _NAMES):
        if lacks(adapter, found, _NAMES.values()):
            continue
        mask = kept.get(found.module, [True] * initial)
        (out, *inner), held = found.row.shape_of("weight"), sum(mask)
        if found.row.kind == "conv1d":
            out, inner = inner[0], [out]
        shapes = {"down": (held, prod(inner)), "singular": (held, 1), "up": (out, held)}
        if differs(adapter, found, "rank_pattern", len(mask), initial) or misfits(adapter, found, shapes):
            continue
        sites.append(IncomingSite(found.fqn, _spread(found, mask)))
    adapter.add("adalora", params, sites)


def _kept(pattern: Mapping[str, Any]) -> dict[str, list[bool]]:
    """Return which ranks each module has kept, by its name: keys end in `lora_E`, or in an adapter's name behind it."""
    found = {}
    for key, mask in pattern.items():
        name, _, _ = key.rpartition(".lora_E")
        found[name] = [bool(rank) for rank in mask]
    return found


def _spread(found: Found, mask: list[bool]) -> dict[str, Tensor]:
    """Return the tensors with zeros where ranks were dropped; a convolution's with their kernel."""
    places = torch.tensor(mask).nonzero().flatten()
    down, singular, up = (found.tensors[name] for name in ("down", "singular", "up"))
    down = down.new_zeros(len(mask), *down.shape[1:]).index_copy(0, places, down)
    up = up.new_zeros(up.shape[0], len(mask)).index_copy(1, places, up)
    singular = singular.new_zeros(len(mask)).index_copy(0, places, singular.flatten())
    kernel = found.row.shape_of("weight")[2:] if found.row.kind == "conv" else ()
    return {"down": down.reshape(len(mask), -1, *kernel), "singular": singular, "up": up}
