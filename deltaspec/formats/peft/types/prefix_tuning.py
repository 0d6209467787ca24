"""Prefix tuning of PEFT: keys and values that are in the cache before the first token, and take its first positions."""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any

from deltaspec.diagnostics.wording import counted
from deltaspec.formats.incoming import IncomingSite
from deltaspec.formats.peft.adapter import CONFIG, Adapter
from deltaspec.formats.peft.prompts import KEY, submodules, table
from deltaspec.names.folding import shown
from deltaspec.names.paths import is_inside

if TYPE_CHECKING:
    from deltaspec.backbone.table import Row

_TRAINING = ("encoder_hidden_size", "prefix_projection", "init_weights")
"""Options of what computed the keys and values; the file has what it gave."""
_OUT = "go on with PEFT for this model, or train a prefix with deltaspec"


def read(adapter: Adapter) -> None:
    """Add the delta of a prefix tuning adapter."""
    adapter.ignore(*_TRAINING)
    tokens, width = adapter.option("num_virtual_tokens"), adapter.option("token_dim")
    layers, heads = adapter.option("num_layers"), adapter.option("num_attention_heads")
    stacks = submodules(adapter)
    sizes = {"num_virtual_tokens": tokens, "token_dim": width, "num_layers": layers, "num_attention_heads": heads}
    wrong = [f"{name}: {value!r}" for name, value in sizes.items() if not isinstance(value, int) or value < 1]
    if wrong:
        adapter.find("DS544", f"{', '.join(wrong)} is no number", "save the adapter again", CONFIG)
        adapter.take(KEY, "not read")
        return
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


def _layers(adapter: Adapter, layers: int) -> dict[int, Row]:
    """Return the modules that attend to the tokens, by the number of their layer, as a cache counts them."""
    stack = _stack(adapter)
    found: dict[int, Row] = {}
    if stack is not None and (problem := _unreached(adapter, stack)) is not None:
        adapter.find("DS548", f"PEFT's keys do not get into {adapter.base.table.model_class}: {problem}", _OUT, CONFIG)
        return {}
    for row in adapter.base.table.rows:
        told = row.positions
        if told is None or told.fqn != stack or not row.attends or "cross_attn" in row.roles:
            continue
        index: Any = getattr(adapter.base.model.get_submodule(row.fqn), "layer_idx", None)
        if told.problem is None and isinstance(index, int):
            found.setdefault(index, row)
        elif told.problem is not None and "encoder gives" not in told.problem:
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


def _unreached(adapter: Adapter, stack: str) -> str | None:
    """Return why a model makes nothing, or not what is meant, of the cache that PEFT gives it; None where it does."""
    base = adapter.base
    model = base.model.get_submodule(stack)
    if getattr(base.config, "is_encoder_decoder", False):
        if submodules(adapter) == 1:
            return "with num_transformer_submodules: 1 its decoder puts the encoder's keys behind them, into one cache"
    elif "past_key_values" not in signature(type(model).forward).parameters:
        return f"{type(model).__name__} takes no past_key_values"
    elif any(row.positions.together for row in base.table.rows if row.positions is not None):
        return f"{type(model).__name__} uses no past_key_values in an encoder"
    return None


def _stack(adapter: Adapter) -> str | None:
    """Return the FQN of the model whose cache PEFT fills: the decoder, or the only one with attention modules."""
    base = adapter.base
    stacks = list(dict.fromkeys(row.positions.fqn for row in base.table.rows if row.positions is not None))
    if getattr(base.config, "is_encoder_decoder", False):
        decoder = base.model.get_decoder()  # type: ignore[operator]
        name = next((name for name, module in base.model.named_modules() if module is decoder), "")
        return next((stack for stack in stacks if is_inside(stack, name)), None)
    return stacks[0] if stacks else None
