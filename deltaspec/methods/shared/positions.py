"""Which positions of a hidden state are tokens, and which of those are the first and the last ones.

A transformers block is called with its attention mask (and the cache, while generating), so all that is needed stands
in the very call: nothing is kept between modules, and gradient checkpointing, threads and torch.compile need no care.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

MASK = "attention_mask"
CACHES = ("past_key_values", "layer_past")
"""Names under which blocks are given the cache."""
_HIDDEN = -5000.0
"""An additive mask below this hides; biases such as ALiBi's, which may be in it, are zero for a token on itself."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens a block sees."""

    real: Tensor | None
    """`[batch, columns]`: whether a column of the sequence so far is a token and no padding; None: all are."""
    before: int
    """Number of columns before those of this forward."""
    prompt: int | None = None
    """Number of columns of the prompt, where this forward repeats it and brings more; None: it brings no more."""


def real_tokens(hidden: Tensor, ends: bool, mask: Any, *caches: Any) -> Tokens:
    """Return which columns are tokens and which padding, by what a block was called with.

    `hidden` is `[batch, positions, width]`, what the block gives. `ends`: whether the prompt's end matters. `mask` is
    `[batch, columns]` or `[batch, …, queries, columns]`, boolean, 0/1 or additive; None hides nothing. Raises TypeError
    for a mask of another kind.
    """
    from torch import Tensor

    from deltaspec.backbone.prompt_end import prompt_length

    if hidden.dim() != 3:
        raise TypeError(f"chosen positions need hidden states [batch, positions, width], not {tuple(hidden.shape)}")
    cache = next((c for c in caches if hasattr(c, "get_seq_length")), None)
    length = hidden.shape[1]
    # At the end of a block the cache holds this forward's tokens, too. Without a cache this forward is all there is.
    before = max(0, int(cache.get_seq_length()) - length) if cache is not None else 0
    prompt = prompt_length(length) if ends and cache is None else None
    if mask is None:
        return Tokens(None, before, prompt)
    if not isinstance(mask, Tensor) or mask.dim() < 2:
        raise TypeError(f"padding cannot be told from an attention mask of type {type(mask).__name__}")
    if mask.is_floating_point() and mask.dim() > 2:
        mask = mask > _HIDDEN
    seen = mask != 0
    while seen.dim() > 2:  # a column is a token if any query sees it: a token sees itself
        seen = seen.any(1)
    columns = seen.shape[-1]
    if columns < length:
        raise TypeError(f"the attention mask has {columns} columns, and the hidden state {length} positions")
    # A sliding window's cache has dropped its first columns; a static one has columns that are not written yet.
    return Tokens(seen, min(before, columns - length), prompt)


def edges(tokens: Tokens, hidden: Tensor, first: int | None, last: int | None) -> tuple[Tensor, Tensor]:
    """Choose positions: two 0/1 tensors `[batch, positions, 1]`, for the first and for the last tokens.

    `last` counts from the end of the prompt: that of a forward that starts a sequence, or what is known of it. Nothing
    is chosen in a forward that continues a sequence by a token. A position that is both is a first one. Raises
    DeltaSpecError (DS450) where several tokens continue a sequence: whether they end the prompt is not known.
    """
    import torch

    from deltaspec.backbone.prompt_end import pieces

    batch, length, _ = hidden.shape
    if tokens.real is None:
        real = torch.ones(1, tokens.before + length, dtype=torch.bool, device=hidden.device)
    else:
        real = tokens.real
    count = real.long().cumsum(-1)
    here = slice(tokens.before, tokens.before + length)
    nothing = torch.zeros_like(real[:, here])
    at_first = nothing if first is None else (real & (count <= first))[:, here]
    at_last = nothing
    if last is not None and tokens.before == 0:
        end = length if tokens.prompt is None else min(tokens.prompt, length)
        total = count[:, end - 1 : end]
        at_last = real[:, here] & (count[:, here] > total - last) & ~at_first
        at_last[:, end:] = False
    elif last is not None and length > 1:
        raise pieces(tokens.before, length)
    shape = (batch, length, 1)
    first_ones, last_ones = (chosen[:, :, None].expand(shape).to(hidden.dtype) for chosen in (at_first, at_last))
    return first_ones, last_ones
