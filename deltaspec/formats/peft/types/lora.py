"""LoRA of PEFT: with its scales, ranks a module, DoRA, biases, embeddings, convolutions and packed attention."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from deltaspec.backbone.table import Row
from deltaspec.diagnostics.wording import counted
from deltaspec.formats.incoming import IncomingSite
from deltaspec.formats.outgoing import Outgoing, Part
from deltaspec.formats.peft.adapter import CONFIG
from deltaspec.formats.peft.convolutions import refuse_ignored_dilation
from deltaspec.formats.peft.factors import Update, of_groups
from deltaspec.formats.peft.low_rank import write_updates
from deltaspec.formats.peft.parameters import factors, matrices_of, places_of
from deltaspec.formats.peft.targets import alphas_of, by_pattern, check_targets, ranks_of
from deltaspec.formats.peft.tying import check_tied, tied_targets
from deltaspec.formats.peft.variants import BlockDiagonal, trained_otherwise
from deltaspec.formats.peft.words import STARTS
from deltaspec.methods.shared.parts import spread
from deltaspec.names.folding import shown

if TYPE_CHECKING:
    from torch import Tensor

    from deltaspec.formats.peft.adapter import Adapter

METHODS = frozenset({"lora"})
"""Methods that are written so."""

KEYS = (
    "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector",
)  # fmt: skip
_TRAINING = (
    "megatron_config", "megatron_core", "loftq_config", "eva_config", "runtime_config", "qalora_group_size",
    "fan_in_fan_out", "lora_ga_config",
)  # fmt: skip
_FACTORS = {"down": "lora_A", "up": "lora_B"}
_OURS = {"lora_A.weight": "down", "lora_B.weight": "up", "lora_B.bias": "bias", "lora_embedding_A": "down",
         "lora_embedding_B": "up", "lora_magnitude_vector": "magnitude"}  # fmt: skip


def read(adapter: Adapter) -> None:
    """Add the delta of a LoRA adapter."""
    adapter.ignore(*_TRAINING)
    for name in ("use_qalora", "alora_invocation_tokens", "layer_replication", "arrow_config", "kasa_config"):
        adapter.refuse(name, "there is no method for this variant", "merge it with PEFT: model.merge_and_unload()")
    trained_otherwise(adapter)
    blocks = BlockDiagonal(adapter)
    params = _params(adapter)
    rank, alpha, ranks, alphas = params["rank"], params["alpha"], ranks_of(adapter), alphas_of(adapter)
    modules = adapter.modules(*KEYS)
    places = adapter.places(modules)
    stand_for = places_of(adapter, places)
    tied = tied_targets(adapter, places)
    meant = {name: fqn for name, fqn in places.items() if stand_for[name].name == name and fqn not in tied}
    check_targets(adapter, meant)
    sites = []
    for module, fqn in places.items():
        place = stand_for[module]
        own: dict[str, Any] = {"rank": by_pattern(place.name, ranks, rank)}
        own["alpha"] = by_pattern(place.name, alphas, alpha) * (2 if place.doubled else 1)
        tensors = {
            _OURS[suffix]: value
            for suffix in KEYS
            if (value := adapter.tensor_of(module, suffix, f"{_OURS[suffix]} of {fqn}")) is not None
        }
        if place.idle:
            continue
        tensors = blocks.whole(module, tensors)
        row = adapter.base.rows[fqn]
        if not _fits(adapter, module, row, tensors):
            continue
        if (rows := own["rank"] * matrices_of(row, place)) != tensors["down"].shape[0]:
            shape = list(tensors["down"].shape)
            message = f"{module}: its rank is {own['rank']}, and lora_A is {shape}, where {rows} rows are due"
            adapter.find("DS543", message, _other_rank(place.name, ranks), adapter.file)
            continue
        if place.bypassed:
            own |= {"dropout": 0.0} if "dropout" in params else {}
            if "bias" in tensors:
                message = f"lora_bias on {place.fqn}: PEFT trains it, and adds it nowhere or once"
                adapter.find("DS544", message, "train it again with lora_bias=False", CONFIG)
        if place.parameter or place.name != module:
            tensors = factors(adapter, place, tensors)
        if "magnitude" in tensors:
            tensors["magnitude"] = tensors["magnitude"].flatten()
        if row.conv_groups > 1 and not _of_groups(adapter, row, tensors, own):
            continue
        refuse_ignored_dilation(adapter, fqn)
        differs = {key: value for key, value in own.items() if key not in params or value != params[key]}
        sites.append(IncomingSite(fqn, tensors, differs, place.parameter))
    if doubled := [place.fqn for place in stand_for.values() if place.doubled]:
        adapter.remark(
            f"PEFT adds the update of {shown(doubled)} twice, and computes the gradient of one: here it acts twice "
            "(alpha is doubled), and learns by the gradient of both"
        )
    if idle := [place.fqn for place in stand_for.values() if place.idle]:
        message = f"{shown(idle)} {'was' if len(idle) == 1 else 'were'} left out: torch's attention reads "
        adapter.remark(f"{message}the weight there and calls no module, so PEFT's factors change nothing")
    check_tied(adapter, sites, tied)
    adapter.add("lora", params, sites)


def _other_rank(name: str, ranks: Mapping[str, int]) -> str:
    """Say what may have gone wrong with the rank of a module: its file has another one.

    Of the keys that mean a module PEFT takes the first, and it sorts them when it saves.
    """
    both = [key for key in ranks if by_pattern(name, {key: True}, False)]
    if len(both) < 2:
        return "the configuration and the file are of two adapters"
    keys = " and ".join(map(repr, both))
    return f"{keys} of rank_pattern mean it, and PEFT sorts them when it saves: write first what was first in training"


def _of_groups(adapter: Adapter, row: Row, tensors: dict[str, Tensor], own: dict[str, Any]) -> bool:
    """Read factors of a grouped convolution: PEFT's A sees the channels of all groups, which a weight may not say.

    Return False, with a finding, where nothing here computes the same.
    """
    if (grouped := of_groups(tensors["down"], row.conv_groups)) is not None:
        tensors["down"] = grouped
        return True
    if "magnitude" in tensors:
        message = f"use_dora on {row.fqn}, a grouped convolution: PEFT divides by the norm of a weight that its "
        message += "factors do not make there"
        adapter.find("DS544", message, "train it again without use_dora, or without this module", CONFIG)
        return False
    own["channels"] = "all"
    return True


def _params(adapter: Adapter) -> dict[str, Any]:
    params: dict[str, Any] = {
        "rank": adapter.options.whole("r", 8, 1),
        "alpha": adapter.options.number("lora_alpha", 8),
    }
    if dropout := adapter.options.number("lora_dropout", 0.0):
        params["dropout"] = dropout
    if adapter.options.flag("use_rslora", False):
        params["scaling"] = "rslora"
    if adapter.options.flag("use_dora", False):
        params["use_dora"] = True
    if adapter.options.flag("lora_bias", False):
        params["bias"] = True
    return params | _start(adapter)


def _start(adapter: Adapter) -> dict[str, Any]:
    """Return what the start means for the outputs: PEFT takes some of them out of the base's weights when it loads."""
    given = adapter.option("init_lora_weights", True)
    if isinstance(given, str) and (found := re.fullmatch(r"pissa_niter_(\d{1,9})", given)):
        adapter.remark(
            f"init_lora_weights {given}: PEFT takes a random decomposition out of the base's weights, another one at "
            "each load; here it is drawn by the spec's seed, and outputs are about as near as those of two loads"
        )
        return {"init": "pissa", "svd_iterations": int(found[1])}
    start = adapter.options.start("init_lora_weights", True, STARTS, any_case=True)
    if start in ("corda", "loftq"):
        reason = {"corda": "it was taken out of the base's weights by data that the adapter does not hold",
                  "loftq": "PEFT quantises the base's weights when it loads the adapter"}[start]  # fmt: skip
        hint = "convert it where it was trained: save_pretrained(dir, path_initial_model_for_weight_conversion=…)"
        adapter.find("DS544", f"init_lora_weights: {start!r}: {reason}", hint, CONFIG)
    if start in ("pissa", "olora"):
        return {"init": start}
    if start == "mica":
        adapter.remark("init_lora_weights mica: PEFT trains lora_A alone; further training here moves both factors")
    return {"init": "normal"} if start == "gaussian" else {}


def _fits(adapter: Adapter, module: str, row: Row, tensors: dict[str, Any]) -> bool:
    lacking = [name for name in ("down", "up") if name not in tensors]
    if lacking:
        message = f"{module}: {' and '.join(_FACTORS[name] for name in lacking)} is missing"
        adapter.find("DS543", message, "the file was cut: save the adapter again", adapter.file)
    dims = len(row.shape_of("weight")) if row.kind == "conv" else 2
    wrong = [name for name in ("down", "up") if name in tensors and tensors[name].dim() != dims]
    for name in wrong:
        message = (
            f"{module}: its {name} is of shape {list(tensors[name].shape)}, and must have {counted(dims, 'dimension')}"
        )
        adapter.find("DS543", message, "the file was changed, or is for another model", adapter.file)
    return not lacking and not wrong and _magnitude_fits(adapter, module, tensors.get("magnitude"), dims)


def _magnitude_fits(adapter: Adapter, module: str, magnitude: Tensor | None, dims: int) -> bool:
    """Return whether norms of DoRA lie as PEFT has them: a vector; of a convolution, along its second dimension."""
    if magnitude is None:
        return True
    shape = list(magnitude.shape)
    if len(shape) == dims and shape == [1, shape[1], *(1,) * (dims - 2)] if dims > 2 else len(shape) == 1:
        return True
    wanted = "×".join(("1", "?", *("1",) * (dims - 2))) if dims > 2 else "one dimension"
    message = f"{module}: its magnitude is of shape {shape}, where {wanted} is due"
    adapter.find("DS526", message, "the file was changed, or is for another model", adapter.file)
    return False


def write(out: Outgoing) -> None:
    """Write all low-rank updates as one LoRA."""
    write_updates(out, {"lora": updates})


def updates(part: Part) -> Iterator[Update]:
    """Yield what a delta adds at one place."""
    params, own = part.params, part.own
    scale = params.scale * part.strength
    row = part.at.site.row
    if params.parts is not None:
        assert row.parts is not None
        for name in params.parts:
            up = spread(row.parts, {name: getattr(own, f"{name}_up")}, 0.0, (params.rank,))
            yield Update(getattr(own, f"{name}_down"), up, scale)
        return
    names = {spec.name for spec in part.at.tensors}
    yield Update(
        own.down, own.up, scale,
        bias=own.bias if "bias" in names else None,
        alpha=params.alpha * part.strength,
        rooted=params.scaling == "rslora",
        magnitude=own.magnitude if "magnitude" in names else None,
    )  # fmt: skip
    if params.keeps_start:
        yield Update(own.down_start, own.up_start, -scale)
