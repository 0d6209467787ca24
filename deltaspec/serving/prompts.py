"""Virtual tokens in front of the rows of a mixed batch: each row has its own ones, and as many as its deltas have.

The batch stays rectangular by columns that nothing attends to. Where no cache is in use they stand behind a row's last
token, so that to any model the row looks as it does alone. With a cache they stand in front of everything: columns then
keep their distances from one step to the next, and the model is told its numbers of positions (see `numbering`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.runtime.prompts import (
    ENCODED,
    Following,
    Front,
    Gap,
    Prompted,
    checked_mask,
    mask_error,
    padding_of,
)
from deltaspec.runtime.sockets import Forward
from deltaspec.serving.numbering import Numbering
from deltaspec.serving.slots import Slot
from deltaspec.serving.sources import Table


class RowFront(Front):
    """The virtual tokens of one embedding's rows. Their ids go down from -1, slot by slot."""

    def __init__(self, parts: Sequence[tuple[Slot, int]], leading: Sequence[Slot] = ()) -> None:
        self.parts = tuple(parts)
        """Slots in order of application, and the number of tokens that a delta in them has."""
        super().__init__([tokens for _, tokens in parts], leads=bool(leading))
        self.leading = tuple(leading)
        """Slots whose deltas have their tokens stand in front of padding."""
        self.entering = False
        """The forward that runs starts a sequence, so there are virtual tokens among its ids."""
        self.entered = False
        """The encoder has run in front of the decoder that comes next."""

    def most(self) -> int:
        """Return the largest number of tokens that a row has; in a compiled graph, where that is data, a bound."""
        if torch.compiler.is_compiling():
            return self.total
        counts = {name: tokens for slot, tokens in self.parts for name in slot.names}
        rows = self.parts[0][0].deltas
        return max((sum(counts.get(name, 0) for name in row) for row in rows), default=0)

    def lengths(self, size: int, device: torch.device) -> Tensor:
        """Return the number of tokens of each row, `[size, 1]`."""
        present = [(slot.grown("index", size) > 0).long() * tokens for slot, tokens in self.parts]
        return torch.stack(present, dim=1).sum(1, keepdim=True).to(device)

    def gap(self, mask: Tensor | None, most: int, behind: bool = True) -> Gap:
        """Say where the tokens of each row stand; those that a row lacks of `most` stand at one end."""
        assert mask is not None
        size, padding = mask.shape[0], padding_of(mask)
        if self.leads:
            padding = torch.where(self._led(size).to(mask.device), 0, padding)
        return Gap(most, self.lengths(size, mask.device), padding, behind)

    def positions(self, given: Tensor, entering: Tensor, past: int) -> Tensor | None:
        """Return the positions that tokens have without prompts: those of columns for rows whose prompts lead."""
        if not self.leads:
            return given
        columns = torch.arange(entering.shape[1], device=given.device, dtype=given.dtype) + past
        return torch.where(self._led(entering.shape[0]).to(given.device), columns, given)

    def _led(self, size: int) -> Tensor:
        """Return which rows have their tokens in front of padding, `[size, 1]`."""
        return torch.stack([slot.grown("index", size) > 0 for slot in self.leading]).any(0)[:, None]

    def ids(self, size: int, device: torch.device) -> Tensor:
        """Return the ids of each row's tokens, `[size, total]`: first those it has, in order, then the others."""
        absent = [(slot.grown("index", size) == 0).long()[:, None].expand(-1, tokens) for slot, tokens in self.parts]
        return -1 - torch.sort(torch.cat(absent, dim=1).to(device), dim=1, stable=True).indices


class EmbeddedRows:
    """The forward of an embedding that looks ids below zero up in the tables of each row's own deltas."""

    def __init__(self, forward: Forward, front: RowFront, tables: Sequence[Table]) -> None:
        self.forward, self.front, self.tables = forward, front, tuple(tables)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the embedding."""
        ids: Tensor = args[0] if args else next(iter(kwargs.values()))
        if not self.front.entering:
            found: Tensor = self.forward(ids)
            return found
        out: Tensor = self.forward(ids.clamp(min=0))
        rows = torch.cat([table.take(ids.shape[0])[0] for table in self.tables], dim=1).to(out)
        place = (-1 - ids).clamp(min=0).unsqueeze(-1)
        return torch.where((ids < 0).unsqueeze(-1), torch.take_along_dim(rows, place, 1), out)


class PromptedRows(Prompted):
    """The forward of an entrance, with its own virtual tokens before the first token of each row."""

    front: RowFront

    def __init__(
        self, module: nn.Module, forward: Forward, embedding: nn.Module, front: RowFront, numbering: Numbering | None
    ) -> None:
        super().__init__(module, forward, embedding, front, shorten=numbering is not None)
        self.numbering = numbering
        """None is the numbering of an encoder: it never has a cache."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the entrance. Raises DeltaSpecError (DS447) where rows could not have the positions they have alone."""
        self.front.entered = True
        return super().__call__(*args, **kwargs)

    def _start(self, given: dict[str, Any], gap: Gap, entering: Tensor) -> Any:
        size, length = entering.shape[:2]
        self.front.parts[0][0].batch.totals += (size * (length + gap.tokens),)
        self.front.entering = True
        try:
            return super()._start(given, gap, entering)
        finally:
            self.front.entering = False

    def _open(self, given: dict[str, Any], entering: Tensor, most: int, past: int) -> Gap:
        """Lengthen the mask of the padding, made where there is none, and say where the places opened."""
        size, length = entering.shape[:2]
        mask = checked_mask(given)
        if mask is None:
            mask = torch.ones(size, past + length, dtype=torch.long, device=entering.device)
        if mask.shape[1] != past + length:
            raise mask_error(mask, past + length)
        mask = mask.expand(size, -1)
        gap = self.front.gap(mask, most, behind=not self._keeps_cache(given))
        given["attention_mask"] = gap.lengthen(mask)
        if not gap.behind:
            self._number(given, entering, past)
        return gap

    def _keeps_cache(self, given: dict[str, Any]) -> bool:
        able = self.numbering not in (None, Numbering.NO_CACHE)
        return given.get("past_key_values") is not None or (able and given.get("use_cache") is not False)

    def _number(self, given: dict[str, Any], entering: Tensor, past: int) -> None:
        """Give the tokens the positions that they have alone, where the model would number columns."""
        if given.get("position_ids") is not None:
            return
        if self.numbering is Numbering.COLUMNS:
            given["position_ids"] = torch.arange(past, past + entering.shape[1], device=entering.device)[None]
        elif self.numbering is not Numbering.OWN or entering.dim() != 2:
            message = "rows with prompts of different lengths need their own positions, and "
            message += f"{type(self.module).__name__} numbers them in a way of its own while it keeps a cache"
            hint = "pass position_ids if it takes them, or use_cache=False"
            raise DeltaSpecError([Diagnostic("DS447", message, suggestion=hint)])


class FollowingRows(Following):
    """The forward of a decoder whose encoder has virtual tokens of each row."""

    front: RowFront

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the decoder. Raises DeltaSpecError (DS447) where nothing says where the tokens are."""
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self.front.entered = False

    def _mask(self, given: dict[str, Any], states: Tensor, most: int) -> Tensor:
        mask = checked_mask(given, ENCODED)
        if mask is None:
            if not self.front.entered:
                message = "encoder_outputs without an attention_mask do not say where the virtual tokens of their rows"
                message += " are"
                hint = "pass the 2-D attention_mask of the encoder's tokens, too"
                raise DeltaSpecError([Diagnostic("DS447", message, suggestion=hint)])
            mask = torch.ones(states.shape[0], states.shape[1] - most, dtype=torch.long, device=states.device)
        return mask.expand(states.shape[0], -1)
