"""AdaLoRA of PEFT: ranks that were allocated, in their places among those that each module started with."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import torch

from deltaspec.formats.incoming import IncomingSite
from deltaspec.formats.outgoing import Outgoing, Part
from deltaspec.formats.peft.factors import Update
from deltaspec.formats.peft.single import Single
from deltaspec.formats.peft.sites import Found, differs, found_modules, lacks, misfits
from deltaspec.formats.peft.words import STARTS

if TYPE_CHECKING:
    from torch import Tensor

    from deltaspec.formats.peft.adapter import Adapter

METHODS = frozenset({"adalora"})
"""Methods that are written so."""
KEEPS_ROWS = True
"""Whether PEFT keeps rows of single tokens beside it."""
_NAMES = {"lora_A": "down", "lora_E": "singular", "lora_B": "up"}
_TRAINING = (
    "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
    "fan_in_fan_out", "r", "use_rslora", "use_dora", "alpha_pattern", "lora_bias", "megatron_config", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "runtime_config", "qalora_group_size", "lora_ga_config",
    "use_qalora",
)  # fmt: skip
"""What its configuration has from LoRA's, PEFT does not look at; the rest is told to the training."""


def read(adapter: Adapter) -> None:
    """Add the delta of an AdaLoRA adapter. Ranks that were dropped are zeros, as RankAllocator leaves them here."""
    adapter.ignore(*_TRAINING)
    adapter.options.start("init_lora_weights", True, STARTS, any_case=True)
    initial, target = adapter.options.whole("init_r", 12, 1), adapter.options.whole("target_r", 8, 1)
    alpha = adapter.options.number("lora_alpha", 8)
    params: dict[str, Any] = {"rank": min(target, initial), "initial_rank": initial}
    params["alpha"] = alpha if alpha > 0 else float(initial)
    if dropout := adapter.options.number("lora_dropout", 0.0):
        params["dropout"] = dropout
    kept = _kept(adapter)
    sites = []
    for found in found_modules(adapter, _NAMES):
        if lacks(adapter, found, _NAMES.values()):
            continue
        mask = kept.get(found.module)
        if mask is None:
            mask = [True] * found.tensors["down"].shape[0]
        (out, *inner), held = found.row.shape_of("weight"), sum(mask)
        if found.row.kind == "conv1d":
            out, inner = inner[0], [out]
        shapes = {"down": (held, prod(inner)), "singular": (held, 1), "up": (out, held)}
        if differs(adapter, found, "rank_pattern", len(mask), initial) or misfits(adapter, found, shapes):
            continue
        sites.append(IncomingSite(found.fqn, _spread(found, mask)))
    adapter.add("adalora", params, sites)


def _kept(adapter: Adapter) -> dict[str, list[bool]]:
    """Return which ranks each module has kept, by its name: keys end in `lora_E`, or in an adapter's name behind it."""
    if adapter.options.get("rank_pattern") is None:
        return {}
    found = {}
    for key, mask in adapter.options.mapping("rank_pattern").items():
        if not isinstance(mask, list) or not all(isinstance(rank, bool) for rank in mask):
            adapter.options.wrong("rank_pattern", {key: mask}, "a mapping of names to lists of true and false")
            continue
        name, _, _ = key.rpartition(".lora_E")
        found[name] = mask
    return found


def _spread(found: Found, mask: list[bool]) -> dict[str, Tensor]:
    """Return the tensors with zeros where ranks were dropped; a convolution's with their kernel."""
    places = torch.tensor(mask).nonzero().flatten()
    own = (found.tensors[name] for name in ("down", "singular", "up"))
    down, singular, up = (value.float() if value.element_size() == 1 else value for value in own)  # no copy of float8
    down = down.new_zeros(len(mask), *down.shape[1:]).index_copy(0, places, down)
    up = up.new_zeros(up.shape[0], len(mask)).index_copy(1, places, up)
    singular = singular.new_zeros(len(mask)).index_copy(0, places, singular.flatten())
    kernel = found.row.shape_of("weight")[2:] if found.row.kind == "conv" else ()
    return {"down": down.reshape(len(mask), -1, *kernel), "singular": singular, "up": up}


def write(out: Outgoing) -> None:
    """Write an AdaLoRA adapter. Ranks that were dropped stay in their places, as zeros."""
    single = Single(out, "ADALORA", "adalora", ("Linear", "Conv1D", "Conv2d"), rows=KEEPS_ROWS)
    initial = single.agreed("init_r", lambda part: part.params.initial_rank, 12)
    alpha = single.agreed("lora_alpha", lambda part: part.params.alpha, 8)
    target = single.agreed("target_r", lambda part: part.params.rank, 8)
    single.put("lora_A", lambda part: part.own.down.flatten(1))
    single.put("lora_E", lambda part: part.own.singular[:, None])
    single.put("lora_B", lambda part: part.own.up)
    dropout = single.largest(lambda part: part.params.dropout)
    # PEFT does not load one without steps to train for.
    single.finish(init_r=initial, target_r=target, lora_alpha=alpha, lora_dropout=dropout, total_step=1)


def updates(part: Part) -> list[Update]:
    """Return the update as LoRA has it."""
    singular = part.own.singular.reshape(-1, *(1,) * (part.own.down.dim() - 1))
    kernel = (1,) * (part.own.down.dim() - 2)
    up = part.own.up.reshape(*part.own.up.shape, *kernel)
    return [Update(singular * part.own.down, up, part.params.scale * part.strength)]
