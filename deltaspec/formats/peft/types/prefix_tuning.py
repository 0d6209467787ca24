"""Prefix tuning of PEFT: keys and values that are in the cache before the first token, and take its first positions."""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any

import torch

from deltaspec.diagnostics.wording import counted
from deltaspec.formats.incoming import IncomingSite
from deltaspec.formats.outgoing import Outgoing, Part
from deltaspec.formats.peft.adapter import CONFIG, Adapter
from deltaspec.formats.peft.prompts import KEY, check_task, submodules, table
from deltaspec.formats.peft.prompts_out import LONE, lone, simplified, write_table
from deltaspec.names.folding import shown
from deltaspec.names.paths import is_inside

if TYPE_CHECKING:
    from torch import Tensor

    from deltaspec.backbone.table import Row
    from deltaspec.formats.base import Base

METHODS = frozenset({"prefix"})
"""Methods that are written so."""
_TRAINING = ("encoder_hidden_size", "prefix_projection")
"""Options of what computed the keys and values; the file has what it gave."""
_OUT = "go on with PEFT for this model, or train a prefix with deltaspec"


def read(adapter: Adapter) -> None:
    """Add the delta of a prefix tuning adapter."""
    adapter.ignore(*_TRAINING)
    adapter.options.word("init_weights", "", ("zero",))
    names = ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads")
    tokens, width, layers, _ = (adapter.options.whole(name, 0, 1) for name in names)
    check_task(adapter)
    stacks = submodules(adapter)
    adapter.options.settle()
    whole = table(adapter, tokens, layers * 2 * width, f"keys and values of {counted(tokens, 'token')}")
    rows = _layers(adapter, layers)
    if whole is None or not rows:
        return
    parts = whole.reshape(tokens, layers * 2, width).unbind(1)
    sites = []
    for index, row in rows.items():
        # PEFT cuts a table of 2 entries a layer as if it had 4, of which the others are for cross-attention.
        first = 2 * stacks * index
        key, value = (parts[(first + more) % len(parts)].clone() for more in (0, 1))
        sites.append(IncomingSite(row.fqn, {"key": key, "value": value}))
    if stacks == 2 and layers > 1:
        adapter.remark(f"PEFT gives several layers of the decoder the same keys and values, from every other pair of "
                       f"{KEY}; here each has its own, equal ones, and they part when they are trained on")  # fmt: skip
    adapter.add("prefix", {"tokens": tokens, "positions": "counted"}, sites)


def write(out: Outgoing) -> None:
    """Write a prefix whose tokens take positions, as PEFT's do; an MLP that it was trained by is folded away."""
    given = [part for own in out.take(lambda part: part.method in METHODS).values() for part in own]
    if reason := lone(out, given) or _unlike(out, given):
        out.refuse(given, reason, LONE if out.parts else None)
        return
    parts = {part.fqn: part for part in given}  # of one delta, so one a module
    rows = _attending(out.base, _stack(out.base))
    stacks = 1 + bool(getattr(out.base.config, "is_encoder_decoder", False))
    pieces: dict[int, Tensor] = {}
    for index, row in rows.items():
        own = simplified(parts[row.fqn])
        for more, name in enumerate(("key", "value")):  # where `read` finds them
            place = (2 * stacks * index + more) % (2 * len(rows))
            if not torch.equal(pieces.setdefault(place, own[name]), own[name]):
                reason = "PEFT gives several layers of a decoder behind an encoder the same keys and values"
                out.refuse(given, reason)
                return
    some = next(iter(pieces.values()))
    whole = [pieces.get(place, torch.zeros_like(some)) for place in range(2 * len(rows))]
    attention = given[0].at.site.attention
    assert attention is not None
    write_table(out, "PREFIX_TUNING", torch.cat(whole, 1), tokens=some.shape[0], width=some.shape[1], stacks=stacks,
                num_attention_heads=attention.heads, num_layers=len(rows), prefix_projection=False)  # fmt: skip


def _unlike(out: Outgoing, parts: list[Part]) -> str | None:
    """Return why PEFT's prefix computes something else; None where it may compute the same."""
    if any(part.params.positions != "counted" for part in parts):
        return "PEFT's prefix takes the first positions, and this one none (positions: none)"
    own, stack = {part.fqn for part in parts}, _stack(out.base)
    if stack is not None and (problem := _unreached(out.base, stack, 2)) is not None:
        return f"PEFT's keys do not get into {out.base.table.model_class}: {problem}"
    layers = {row.fqn for row in _attending(out.base, stack).values()}
    if own != layers:
        return f"PEFT's prefix is in all layers of the decoder and there alone: not so {shown(sorted(own ^ layers))}"
    sizes = {(part.params.tokens, part.at.site.attention) for part in parts}
    return "PEFT's prefix has as many tokens, as wide, in all layers" if len(sizes) > 1 else None


def _layers(adapter: Adapter, layers: int) -> dict[int, Row]:
    """Return the modules that attend to the tokens, by the number of their layer, as a cache counts them."""
    stack = _stack(adapter.base)
    if stack is not None and (problem := _unreached(adapter.base, stack, submodules(adapter))) is not None:
        adapter.find("DS548", f"PEFT's keys do not get into {adapter.base.table.model_class}: {problem}", _OUT, CONFIG)
        return {}
    found = _attending(adapter.base, stack)
    for row in adapter.base.table.rows:
        told = row.positions
        if told is None or told.fqn != stack or not row.attends or "cross_attn" in row.roles or row in found.values():
            continue
        if told.problem is not None and "encoder gives" not in told.problem:
            message = f"no keys can be put before the tokens of {row.fqn} here: {told.problem}"
            adapter.find("DS548", message, _OUT, CONFIG)
            return {}
    kind = adapter.base.table.model_class
    if lacking := [str(index) for index in range(layers) if index not in found]:
        if found and min(found) == 0 and len(found) == max(found) + 1:
            message = f"is for {counted(layers, 'layer')}, and this {kind} has {len(found)}"
            adapter.find("DS523", message, "load the model that it was trained on", adapter.file)
        else:
            message = f"no keys can be put into {counted(len(lacking), 'layer')} of this {kind} here ({shown(lacking)})"
            adapter.find("DS548", f"{message}: they do not call transformers' attention function", _OUT, CONFIG)
        return {}
    if surplus := [row.fqn for index, row in found.items() if index >= layers]:
        message = f"is for {counted(layers, 'layer')}, and this {kind} has more: {shown(surplus)}"
        adapter.find("DS523", message, "load the model that it was trained on", adapter.file)
        return {}
    return dict(sorted(found.items()))


def _attending(base: Base, stack: str | None) -> dict[int, Row]:
    """Return the modules of a stack that attend to its own tokens, by the number of their layer."""
    found: dict[int, Row] = {}
    for row in base.table.rows:
        told = row.positions
        if told is None or told.fqn != stack or told.problem is not None or not row.attends:
            continue
        index: Any = getattr(base.model.get_submodule(row.fqn), "layer_idx", None)
        if "cross_attn" not in row.roles and isinstance(index, int):
            found.setdefault(index, row)
    return dict(sorted(found.items()))


def _unreached(base: Base, stack: str, stacks: int) -> str | None:
    """Return why a model makes nothing, or not what is meant, of the cache that PEFT gives it; None where it does."""
    model = base.model.get_submodule(stack)
    if getattr(base.config, "is_encoder_decoder", False):
        if stacks == 1:
            return "with num_transformer_submodules: 1 its decoder puts the encoder's keys behind them, into one cache"
    elif "past_key_values" not in signature(type(model).forward).parameters:
        return f"{type(model).__name__} takes no past_key_values"
    elif any(row.positions.together for row in base.table.rows if row.positions is not None):
        return f"{type(model).__name__} uses no past_key_values in an encoder"
    return None


def _stack(base: Base) -> str | None:
    """Return the FQN of the model whose cache PEFT fills: the decoder, or the only one with attention modules."""
    stacks = list(dict.fromkeys(row.positions.fqn for row in base.table.rows if row.positions is not None))
    if getattr(base.config, "is_encoder_decoder", False):
        decoder = base.model.get_decoder()  # type: ignore[operator]
        name = next((name for name, module in base.model.named_modules() if module is decoder), "")
        return next((stack for stack in stacks if is_inside(stack, name)), None)
    return stacks[0] if stacks else None
