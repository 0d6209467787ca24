"""How a model numbers the positions of tokens that it is given without numbers, shown by a trial.

Padding in front of a row must not change what the row gives. Some models need nothing for that (they count by the mask,
or know distances only), others count columns, and must be told each row's numbers. What a model does shows in no
signature, so a few tokens are run, once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from deltaspec.serving.trial import evaluating

_TOKENS, _PADDING = 4, 2


class Numbering(Enum):
    """What a model needs where padding is put in front of its rows."""

    NO_CACHE = "nothing: it keeps no cache, though it is asked to"
    COLUMNS = "it numbers columns from 0 on, and takes other numbers"
    OWN = "its numbering leaves padding out by itself, where it is given ids"
    UNKNOWN = "its numbering is another one"


_KNOWN: WeakKeyDictionary[nn.Module, Numbering] = WeakKeyDictionary()


def numbering_of(module: nn.Module, forward: Callable[..., Any]) -> Numbering:
    """Find out how a model that takes ids and a mask numbers positions; `forward` runs it. Remembered by module."""
    found = _KNOWN.get(module)
    if found is None:
        found = _KNOWN[module] = _try(module, forward)
    return found


def _try(module: nn.Module, forward: Callable[..., Any]) -> Numbering:
    names = signature(type(module).forward).parameters
    asked: dict[str, Any] = {"return_dict": True} | ({"use_cache": True} if "use_cache" in names else {})
    config = getattr(module, "config", None)
    pad, words = max(0, getattr(config, "pad_token_id", None) or 0), getattr(config, "vocab_size", 0)
    ids = [word for word in range(words) if word != pad][-_TOKENS:]
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    if len(ids) < _TOKENS or device.type == "meta":
        return Numbering.UNKNOWN

    def run(padding: int, **more: Tensor) -> Tensor:
        row = torch.tensor([[pad] * padding + ids], device=device)
        mask = torch.tensor([[0] * padding + [1] * _TOKENS], device=device)
        output = forward(input_ids=row, attention_mask=mask, **asked, **more)
        hidden: Tensor = output["last_hidden_state"][:, padding:]
        caches.append(isinstance(output, Mapping) and output.get("past_key_values") is not None)
        return hidden.float()

    caches: list[bool] = []
    with evaluating(module):
        alone, padded = run(0), run(_PADDING)
        if not any(caches):
            return Numbering.NO_CACHE
        if "position_ids" in names:
            columns = torch.arange(_PADDING + _TOKENS, device=device)[None]
            by_columns = torch.equal(run(_PADDING, position_ids=columns), padded)
            if by_columns and _same(run(_PADDING, position_ids=(columns - _PADDING).clamp(min=0)), alone):
                return Numbering.COLUMNS
        return Numbering.OWN if _same(padded, alone) else Numbering.UNKNOWN


def _same(one: Tensor, other: Tensor) -> bool:
    """Compare up to the rounding of half precision, far below what another position makes of a token."""
    return bool((one - other).abs().max() <= 0.02 * other.abs().max())
