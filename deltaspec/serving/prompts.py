"""Virtual tokens in front of the rows of a mixed batch: each row has its own ones, and as many as its deltas have.

The batch stays rectangular by columns that nothing attends to. Where no cache is in use they stand behind a row's last
token, so that to any model the row looks as it does alone. With a cache they stand in front of everything: columns then
keep their distances from one step to the next, and the model is told its numbers of positions (see `numbering`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.runtime.prompts import Around, Prompted, checked_mask, mask_error, padding_of, take_places
from deltaspec.serving.numbering import Numbering

if TYPE_CHECKING:
    from torch import nn

    from deltaspec.runtime.prompts import Forward
    from deltaspec.serving.slots import Slot, Table


@dataclass(frozen=True, slots=True)
class RowGap:
    """Where places open in each row: as many as it needs before its first token, the others at one end."""

    tokens: int
    """Number of places in all."""
    lengths: Tensor
    """How many each row needs, `[rows, 1]`."""
    padding: Tensor
    """Number of places before them, `[rows, 1]`."""
    behind: bool
    """The others open behind the row, else in front of everything."""

    def fill(self, values: Tensor, rest: Tensor, other: int = 0) -> Tensor:
        """Put the first of `values` [rows or 1, tokens, …] into `rest` [rows, places, …], and `other` elsewhere."""
        rows, shape = rest.shape[0], rest.shape[2:]
        both = torch.cat([rest.new_full((rows, 1, *shape), other), values.expand(rows, *values.shape[1:]), rest], dim=1)
        place = torch.arange(rest.shape[1] + self.tokens, device=rest.device) - self._front()
        virtual, real = place - self.padding, place + self.tokens
        source = torch.where(virtual < 0, real, torch.where(virtual < self.lengths, virtual, real - self.lengths))
        outside = (place < 0) | (place >= rest.shape[1] + self.lengths)
        return take_places(both, torch.where(outside, 0, source + 1), 1)

    def close(self, value: Tensor, dim: int) -> Tensor:
        """Take the places out of `value`, whose rows are its first dimension."""
        place = torch.arange(value.shape[dim] - self.tokens, device=value.device)
        return take_places(value, self._front() + torch.where(place < self.padding, place, place + self.lengths), dim)

    def number(self, positions: Tensor, times: int) -> Tensor:
        """Put numbers on the prompt from the first real token's on, and higher ones on what follows it."""
        gap = replace(self, lengths=self.lengths.repeat(times, 1), padding=self.padding.repeat(times, 1))
        place = torch.arange(positions.shape[1], device=positions.device)
        first = positions.gather(1, gap.padding.clamp(max=positions.shape[1] - 1))
        own = first + torch.arange(self.tokens, device=positions.device, dtype=positions.dtype)
        return gap.fill(own, torch.where(place < gap.padding, positions, positions + gap.lengths))

    def _front(self) -> Tensor | int:
        return 0 if self.behind else self.tokens - self.lengths


class Front:
    """The virtual tokens of one embedding's rows. Their ids go down from -1, slot by slot."""

    def __init__(self, parts: Sequence[tuple[Slot, int]]) -> None:
        self.parts = tuple(parts)
        """Slots in order of application, and the number of tokens that a delta in them has."""
        self.total = sum(tokens for _, tokens in parts)
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

    def ids(self, size: int, device: torch.device) -> Tensor:
        """Return the ids of each row's tokens, `[size, total]`: first those it has, in order, then the others."""
        absent = [(slot.grown("index", size) == 0).long()[:, None].expand(-1, tokens) for slot, tokens in self.parts]
        return -1 - torch.sort(torch.cat(absent, dim=1).to(device), dim=1, stable=True).indices


class EmbeddedRows:
    """The forward of an embedding that looks ids below zero up in the tables of each row's own deltas."""

    def __init__(self, forward: Forward, front: Front, tables: Sequence[Table]) -> None:
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

    def __init__(
        self, module: nn.Module, forward: Forward, embedding: nn.Module, front: Front, numbering: Numbering | None
    ) -> None:
        super().__init__(module, forward, embedding, (), shorten=numbering is not None)
        self.front, self.numbering = front, numbering
        """None is the numbering of an encoder: it never has a cache."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the entrance. Raises DeltaSpecError (DS447) where rows could not have the positions they have alone."""
        given, most = self.arguments(args, kwargs), self.front.most()
        entering = self._entering(given)
        self.front.entered = True
        if entering is None or not most:
            return self.forward(**given)
        size, length = entering.shape[:2]
        seen = self._seen(given.get("past_key_values"))
        past = seen - most if seen else 0
        gap = self._open(given, entering, most, past, behind=not self._keeps_cache(given))
        if not gap.behind:
            self._number(given, entering, past)
        if seen:
            self._check_positions(given, seen + length, most)
            if given.get("position_ids") is not None:
                given["position_ids"] = given["position_ids"] + gap.lengths
            if given.get("cache_position") is not None:
                given["cache_position"] = given["cache_position"] + most
            return self._run(given, gap, fresh=False)
        self.front.parts[0][0].batch.totals += (size * (length + most),)
        self.front.entering = True
        try:
            self._fill(given, gap, entering, self.front.ids(size, entering.device)[:, :most])
            return self._run(given, gap, fresh=True)
        finally:
            self.front.entering = False

    def _open(self, given: dict[str, Any], entering: Tensor, most: int, past: int, behind: bool) -> RowGap:
        """Lengthen the mask of the padding, made where there is none, and say where the places opened."""
        size, length = entering.shape[:2]
        mask = checked_mask(given)
        if mask is None:
            mask = torch.ones(size, past + length, dtype=torch.long, device=entering.device)
        if mask.shape[1] != past + length:
            raise mask_error(mask, past + length)
        mask = mask.expand(size, -1)
        gap = RowGap(most, self.front.lengths(size, entering.device), padding_of(mask), behind)
        given["attention_mask"] = gap.fill(mask.new_ones(1, most), mask)
        return gap

    def _keeps_cache(self, given: dict[str, Any]) -> bool:
        able = self.numbering not in (None, Numbering.NO_CACHE)
        return given.get("past_key_values") is not None or (able and given.get("use_cache") is not False)

    def _number(self, given: dict[str, Any], entering: Tensor, past: int) -> None:
        """Return which positions the tokens have, where the model would number columns."""
        if given.get("position_ids") is not None:
            return
        if self.numbering is Numbering.COLUMNS:
            given["position_ids"] = torch.arange(past, past + entering.shape[1], device=entering.device)[None]
        elif self.numbering is not Numbering.OWN or entering.dim() != 2:
            raise DeltaSpecError([_unnumbered(self.module)])


class FollowingRows(Around):
    """The forward of a decoder whose encoder has virtual tokens: the mask of what it attends to covers them, too."""

    def __init__(self, module: nn.Module, forward: Forward, front: Front) -> None:
        super().__init__(module, forward)
        self.front = front

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the decoder."""
        given, most = self.arguments(args, kwargs), self.front.most()
        entered, self.front.entered = self.front.entered, False
        states = given.get("encoder_hidden_states")
        if states is None or not most:
            return self.forward(**given)
        mask = checked_mask(given, "encoder_attention_mask")
        if mask is None:
            if not entered:
                raise DeltaSpecError([_unmasked()])
            mask = torch.ones(states.shape[0], states.shape[1] - most, dtype=torch.long, device=states.device)
        if mask.shape[1] + most == states.shape[1]:
            gap = RowGap(most, self.front.lengths(states.shape[0], states.device), padding_of(mask), behind=True)
            given["encoder_attention_mask"] = gap.fill(mask.new_ones(1, most), mask)
        return self.forward(**given)


def _unnumbered(module: nn.Module) -> Diagnostic:
    message = (
        f"rows with prompts of different lengths need their own positions, and {type(module).__name__} numbers them "
        "in a way of its own while it keeps a cache"
    )
    return Diagnostic("DS447", message, suggestion="pass position_ids if it takes them, or use_cache=False")


def _unmasked() -> Diagnostic:
    message = "encoder_outputs without an attention_mask do not say where the virtual tokens of their rows are"
    return Diagnostic("DS447", message, suggestion="pass the 2-D attention_mask of the encoder's tokens, too")
