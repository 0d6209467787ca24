"""A PEFT LoRA made of one low-rank update a module: its configuration, and each tensor under PEFT's name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from deltaspec.backbone.table import Row
from deltaspec.formats.outgoing import Outgoing
from deltaspec.formats.peft.aside import PREFIX
from deltaspec.formats.peft.factors import Update, padded
from deltaspec.formats.peft.naming import by_name
from deltaspec.formats.peft.parameters_out import (
    ONE_BY_ONE,
    older_names,
    refuse_beside,
    wrappers,
    write_parameters,
)
from deltaspec.formats.peft.single import most, name_modules
from deltaspec.methods.shared.dora import squared_norms
from deltaspec.methods.shared.weights import canonical


def with_bias(update: Update | None, bias: Tensor, row: Row) -> Update:
    """Return an update that adds a bias, too; one of zeros where there is none yet."""
    if update is None:
        assert row.in_features is not None and row.out_features is not None
        if row.kind == "conv":
            out_channels, in_per_group, *kernel = row.shape_of("weight")
            groups, ones = row.conv_groups, (1,) * len(kernel)
            down, up = bias.new_zeros(groups, groups * in_per_group, *kernel), bias.new_zeros(out_channels, 1, *ones)
        else:
            down, up = bias.new_zeros(1, row.in_features), bias.new_zeros(row.out_features, 1)
        return Update(down, up, 1.0 / down.shape[0], bias=bias * down.shape[0], alpha=1.0)
    shift = bias / update.scale
    return replace(update, bias=shift if update.bias is None else update.bias + shift)


def write_lora(
    out: Outgoing, updates: Mapping[str, Update], parameters: Mapping[str, Update], dropout: float = 0.0
) -> None:
    """Add the configuration and the tensors of a LoRA to what goes out: of modules, and of parameters, by FQN."""
    if any(update.magnitude is not None for update in updates.values()):
        updates = _decomposed(out, updates)
    if parameters:
        refuse_beside(out, updates, parameters)
    if out.wishes.uniform and (updates or parameters):
        every = _uniform(out, {**updates, **parameters})
        updates = {fqn: every[fqn] for fqn in updates if fqn in every}
        parameters = {name: every[name] for name in parameters}
    every = {**updates, **parameters}
    rooted = out.wishes.rslora and bool(every) and all(u.rooted and u.alpha is not None for u in every.values())
    ranks = {name: update.rank for name, update in every.items()}
    alphas = {name: _plain(update.alpha_as(rooted)) for name, update in every.items()}
    rank, alpha = most(ranks, 8), most(alphas, 8)
    biased = any(update.bias is not None for update in updates.values())
    rows = out.base.rows
    out.config |= {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "rank_pattern": by_name(ranks, rank),
        "alpha_pattern": by_name(alphas, alpha),
        "use_rslora": rooted,
        "use_dora": any(update.magnitude is not None for update in updates.values()),
        "fan_in_fan_out": bool(updates) and all(rows[fqn].kind == "conv1d" for fqn in updates),
        "init_lora_weights": True,
        **({"lora_bias": True} if biased else {}),
    }
    out.config.setdefault("bias", "none")
    if tables := [fqn for fqn in updates if biased and rows[fqn].kind == "embedding"]:
        parts = [part for fqn in tables for part in out.at(fqn)]
        out.refuse(parts, "PEFT's lora_bias is for all modules of an adapter, and takes no embeddings", ONE_BY_ONE)
    name_modules(out, list(updates), wrappers(parameters))
    for fqn, update in updates.items():
        _put(out, fqn, update, rows[fqn], biased)
    if isinstance(out.config["target_modules"], str) and updates and older_names(out):
        parts = [part for fqn in updates for part in out.at(fqn)]
        out.refuse(parts, "PEFT takes an expression for all modules of the same last names in a mixture of this type")
    if parameters:
        write_parameters(out, parameters)


def _put(out: Outgoing, fqn: str, update: Update, row: Row, biased: bool) -> None:
    at = f"{PREFIX}{fqn}."
    if row.kind == "embedding":
        out.tensors |= {f"{at}lora_embedding_A": update.down, f"{at}lora_embedding_B": update.up}
    else:
        out.tensors |= {f"{at}lora_A.weight": update.down, f"{at}lora_B.weight": update.up}
        if biased:
            bias = update.up.new_zeros(update.up.shape[0]) if update.bias is None else update.bias
            out.tensors[f"{at}lora_B.bias"] = bias
    if update.magnitude is not None:
        # PEFT keeps those of convolutions with all the dimensions of their output.
        shape = (1, -1, *(1 for _ in row.shape_of("weight")[2:])) if row.kind == "conv" else (-1,)
        out.tensors[f"{at}lora_magnitude_vector"] = update.magnitude.reshape(shape)


def _plain(number: float) -> int | float:
    return int(number) if number == int(number) else number


def _uniform(out: Outgoing, updates: Mapping[str, Update]) -> dict[str, Update]:
    """Give all updates one rank, the largest, and one scale."""
    rank = max(update.rank for update in updates.values())
    scale = most({fqn: update.scale for fqn, update in updates.items()}, 1.0)
    found = {}
    for fqn, update in updates.items():
        groups = 1 if fqn not in out.base.rows else out.base.rows[fqn].conv_groups
        if update.rank == rank and update.scale == scale and not update.rooted:
            found[fqn] = update
        elif rank % groups:
            out.refuse(out.at(fqn), f"rank {rank}, that of other modules, is no multiple of the {groups} groups here")
        else:
            found[fqn] = padded(update, rank, scale, groups)
    return found


def _decomposed(out: Outgoing, updates: Mapping[str, Update]) -> dict[str, Update]:
    """Give all updates a magnitude, since PEFT's DoRA is for all modules or none: where they have none, the norms that
    the changed weight has anyway.
    """
    found = {}
    for fqn, update in updates.items():
        own = out.at(fqn)
        kind = out.base.rows[fqn].kind
        if update.bias is not None:
            out.refuse(own, "PEFT has no bias in a DoRA")
        elif update.magnitude is not None:
            found[fqn] = update
        elif kind == "conv":
            out.refuse(own, "PEFT's DoRA is for all modules of an adapter or none, and this convolution has none")
        elif out.base.is_meta:
            out.lacks_weights(own, "PEFT's DoRA needs the norms of this weight")
        else:
            weight = out.base_values(fqn)["weight"].double()
            changed = weight + canonical(kind, update.scale * update.up.double() @ update.down.double())
            found[fqn] = replace(update, magnitude=squared_norms(kind, changed).sqrt().to(torch.float32))
    return found
