"""Entrances: where token ids enter a transformers model, so that virtual tokens can be put in front of them.

An entrance is the innermost model whose forward takes `input_ids` and `attention_mask`: it looks the ids up in one
embedding, and everything after it (heads, losses, pooling over ids) sees only what it returns.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from deltaspec.backbone.forwards import arguments_of
from deltaspec.backbone.table import Entrance
from deltaspec.names.paths import is_inside

_KNOWN = frozenset(
    "input_ids attention_mask token_type_ids position_ids cache_position inputs_embeds past_key_values head_mask "
    "cross_attn_head_mask encoder_hidden_states encoder_attention_mask output_attentions output_hidden_states "
    "return_dict use_cache".split()
)
"""Arguments of which it is known what they are for tokens put in front."""


def entrances(modules: list[tuple[str, nn.Module]]) -> dict[int, Entrance]:
    """Find the entrances among a model's named modules, by `id` of the embedding module.

    Empty for models that are not transformers'.
    """
    kind = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    if kind is None:
        return {}
    named = [(fqn, module) for fqn, module in modules if isinstance(module, kind)]
    taking = [(fqn, module) for fqn, module in named if {"input_ids", "attention_mask"} <= set(_optional(module))]
    found: dict[int, Entrance] = {}
    for fqn, module in taking:
        if any(other is not module and is_inside(other_fqn, fqn) for other_fqn, other in taking):
            continue
        embedding = part_of(module, "get_input_embeddings")
        if embedding is None:
            continue
        follower, problem = _follower(module, named)
        unknown = [n for n, empty in _optional(module).items() if empty and n not in _KNOWN]
        if unknown:
            problem = f"{type(module).__name__} also takes {', '.join(unknown)}, of which virtual tokens have nothing"
        place = None if follower is None else next((name for name, other in modules if other is follower), None)
        places = getattr(getattr(module, "config", None), "max_position_embeddings", None)
        places = places if isinstance(places, int) and places > 0 else None
        found[id(embedding)] = Entrance(fqn, place, _scale(embedding), places, problem)
    return found


def _follower(module: nn.Module, named: list[tuple[str, Any]]) -> tuple[nn.Module | None, str | None]:
    """Find the decoder behind an encoder: (decoder, None), (None, why there can be no prompt) or (None, None)."""
    for _, owner in named:
        if not getattr(owner.config, "is_encoder_decoder", False) or module not in set(owner.modules()):
            continue
        decoder = part_of(owner, "get_decoder")
        if decoder is None or module in set(decoder.modules()):
            return None, "it is the decoder's input, and a prompt belongs in front of the encoder's"
        if not {"encoder_hidden_states", "encoder_attention_mask"} <= set(_optional(decoder)):
            return None, f"the decoder {type(decoder).__name__} takes no encoder_attention_mask to lengthen"
        return decoder, None
    return None, None


def part_of(module: Any, getter: str) -> nn.Module | None:
    """Ask a transformers model for a part of it, such as `get_input_embeddings`; None where it has none."""
    try:
        part = getattr(module, getter)()
    except (AttributeError, NotImplementedError):  # what transformers raises for a model without
        return None
    return part if isinstance(part, nn.Module) and part is not module else None


def _scale(embedding: Any) -> float:
    scale = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", 1.0))
    return float(scale) if isinstance(scale, int | float) else 1.0


def _optional(module: nn.Module) -> dict[str, bool]:
    """Return the named arguments of a forward, and which of them are tensors that may be left out (default None)."""
    parameters = arguments_of(type(module).forward)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return {p.name: p.default is None or p.default is p.empty for p in named}
