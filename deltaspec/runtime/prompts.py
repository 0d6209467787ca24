"""Virtual tokens in front of a model's input: the forwards that lengthen what goes in and shorten what comes out.

The tokens are ids below zero, put among `input_ids` where those enter the model; its embedding, which a delta changes,
looks them up. So masks, positions, caches and generation are the model's own, and what follows the entrance (heads,
losses) sees the real tokens only. They stand right before the first real token of each row, behind any padding on the
left, so that padding changes nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic

if TYPE_CHECKING:
    from torch import nn


Forward = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Gap:
    """Where `tokens` places open in each row."""

    tokens: int
    padding: Tensor | None
    """Number of places before them, `[rows, 1]`; None: none in any row."""

    @classmethod
    def before_first(cls, mask: Tensor | None, tokens: int) -> Gap:
        """Open right before the first place of each row that a `[rows, places]` mask shows."""
        return cls(tokens, None if mask is None else padding_of(mask))

    def fill(self, values: Tensor, rest: Tensor, other: int = 0) -> Tensor:
        """Put `values` [rows or 1, tokens, …] into the gap in `rest` [rows, places, …]; nothing else opens here."""
        both = torch.cat([values.expand(rest.shape[0], *values.shape[1:]), rest], dim=1)
        if self.padding is None:
            return both
        place = torch.arange(both.shape[1], device=both.device)
        inside = (place >= self.padding) & (place < self.padding + self.tokens)
        source = torch.where(
            inside, place - self.padding, torch.where(place < self.padding, place + self.tokens, place)
        )
        return take_places(both, source, 1)

    def close(self, value: Tensor, dim: int) -> Tensor:
        """Take the gap out of `value`, whose rows are its first dimension."""
        if self.padding is None:
            return value.narrow(dim, self.tokens, value.shape[dim] - self.tokens)
        place = torch.arange(value.shape[dim] - self.tokens, device=value.device)
        return take_places(value, torch.where(place < self.padding, place, place + self.tokens), dim)

    def number(self, positions: Tensor, times: int) -> Tensor:
        """Put numbers on the prompt from the first real token's on, and higher ones on what follows it.

        `positions` are `[times * rows, places]`: some models have several numbers a token.
        """
        gap, first, moved = self, positions[:, :1], positions + self.tokens
        if self.padding is not None:
            padding = self.padding.repeat(times, 1)
            place = torch.arange(positions.shape[1], device=positions.device)
            first = positions.gather(1, padding.clamp(max=positions.shape[1] - 1))
            gap, moved = Gap(self.tokens, padding), torch.where(place < padding, positions, moved)
        return gap.fill(first + torch.arange(self.tokens, device=positions.device, dtype=positions.dtype), moved)


class Opened(Protocol):
    """Places that opened in each row."""

    @property
    def tokens(self) -> int:
        """Number of places."""

    def fill(self, values: Tensor, rest: Tensor, other: int = 0) -> Tensor:
        """As `Gap.fill`; `other` goes into places that are for nothing."""

    def close(self, value: Tensor, dim: int) -> Tensor:
        """As `Gap.close`."""

    def number(self, positions: Tensor, times: int) -> Tensor:
        """As `Gap.number`."""


def padding_of(mask: Tensor) -> Tensor:
    """Return the number of places before the first one of each row that a `[rows, places]` mask shows, `[rows, 1]`."""
    return ((mask != 0).cumsum(1) == 0).sum(1, keepdim=True)


def take_places(value: Tensor, source: Tensor, dim: int) -> Tensor:
    """Take places of a dimension, those of each row given by `source`, `[rows or 1, places]`."""
    shape = [1] * value.dim()
    shape[0], shape[dim] = source.shape
    return torch.take_along_dim(value, source.reshape(shape), dim)


class Around:
    """A forward around that of a module, with the module's own signature."""

    def __init__(self, module: nn.Module, forward: Forward) -> None:
        self.module, self.forward = module, forward
        signature = inspect.signature(type(module).forward)
        self.names = tuple(signature.parameters)[1:]
        self.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Name all arguments of a call."""
        return {**dict(zip(self.names, args, strict=False)), **kwargs}


class Prompted(Around):
    """The forward of an entrance, with virtual tokens before the first token of each row."""

    def __init__(
        self, module: nn.Module, forward: Forward, embedding: nn.Module, lengths: tuple[int, ...], shorten: bool
    ) -> None:
        super().__init__(module, forward)
        self.embedding, self.shorten, self.tokens = embedding, shorten, sum(lengths)
        self.filler = max(0, getattr(getattr(module, "config", None), "pad_token_id", None) or 0)
        """What stands for no token."""
        self.ids: list[int] = []
        """In the deltas' order; the last delta is the outermost at the embedding, so its ids start at -1."""
        for number, length in enumerate(lengths):
            start = -1 - sum(lengths[number + 1 :])
            self.ids += range(start, start - length, -1)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the entrance."""
        given = self.arguments(args, kwargs)
        entering = self._entering(given)
        if entering is None:
            return self.forward(**given)
        seen = self._seen(given.get("past_key_values"))
        gap = self._mask(given, seen, entering.shape[1])
        if seen:  # the prompt is in the cache
            self._check_positions(given, seen + entering.shape[1], self.tokens)
            for name in ("position_ids", "cache_position"):
                if given.get(name) is not None:
                    given[name] = given[name] + self.tokens
        else:
            self._fill(given, gap, entering, torch.tensor([self.ids], device=entering.device))
        return self._run(given, gap, fresh=not seen)

    def _entering(self, given: dict[str, Any]) -> Tensor | None:
        """Return the ids or embeddings that enter."""
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        entering = embeds if ids is None else ids
        if entering is not None and entering.dim() != (3 if ids is None else 2):
            raise prompt_error("a prompt needs input_ids of shape [batch, tokens]", "flatten the other dimensions")
        return entering

    def _run(self, given: dict[str, Any], gap: Opened, fresh: bool) -> Any:
        """Run the model on what has the prompt in it, and take that out of the output."""
        if not self.shorten:
            return self.forward(**given)
        as_tuple = _wants_tuple(self.module, given)
        if as_tuple:
            given["return_dict"] = True
        output = self._without(self.forward(**given), gap, fresh)
        if as_tuple and isinstance(output, Mapping):
            return tuple(value for value in output.values() if value is not None)
        return output

    def _seen(self, cache: Any) -> int:
        """Return the number of places in a cache, the prompt's included."""
        if getattr(cache, "is_compileable", False):
            message = "a static cache has its size and masks made for the model's own tokens, without a prompt"
            raise prompt_error(message, "use a dynamic cache")
        return cache.get_seq_length() if cache is not None else 0

    def _mask(self, given: dict[str, Any], seen: int, length: int) -> Gap:
        """Lengthen the mask of the padding, and say where the prompt stands."""
        mask = checked_mask(given)
        gap = Gap.before_first(mask, self.tokens)
        if mask is None:
            return gap
        # With a cache the mask covers the past; some callers count the prompt in it.
        whole = seen + length if seen else self.tokens + length
        if mask.shape[1] == whole - self.tokens:
            given["attention_mask"] = gap.fill(mask.new_ones(1, self.tokens), mask)
        elif mask.shape[1] != whole:
            raise mask_error(mask, whole - self.tokens)
        return gap

    def _check_positions(self, given: dict[str, Any], whole: int, tokens: int) -> None:
        """Refuse inputs that generate cut by the cache's length, which counts the prompt."""
        positions = given.get("position_ids")
        if positions is None or given.get("attention_mask") is not None or torch.compiler.is_compiling():
            return
        if int(positions.max()) + 1 + tokens != whole:
            raise prompt_error(
                "the position_ids are not those of the tokens that follow this cache, which holds a prompt, too",
                "to go on from a cache made with this prompt, pass the new tokens only, and the mask of all tokens",
            )

    def _fill(self, given: dict[str, Any], gap: Opened, entering: Tensor, virtual: Tensor) -> None:
        """Put the virtual tokens, ids `[rows or 1, tokens]`, into the inputs."""
        tokens = gap.tokens
        if entering.dim() == 2:
            given["input_ids"] = gap.fill(virtual.to(entering.dtype), entering, self.filler)
        else:
            given["inputs_embeds"] = gap.fill(self.embedding(virtual).to(entering.dtype), entering)
        types = given.get("token_type_ids")
        if types is not None:
            given["token_type_ids"] = gap.fill(types.new_zeros(1, tokens), types)
        positions = given.get("position_ids")
        if positions is not None:
            kinds = positions.shape[:-2]  # some models have several numbers a token
            flat = positions.expand(*kinds, entering.shape[0], positions.shape[-1]).flatten(0, -2)
            numbered = gap.number(flat, flat.shape[0] // entering.shape[0])
            given["position_ids"] = numbered.reshape(*kinds, entering.shape[0], -1)
        places = given.get("cache_position")
        if places is not None:
            more = torch.arange(tokens, device=places.device, dtype=places.dtype)
            given["cache_position"] = torch.cat([more, places + tokens])

    def _without(self, output: Any, gap: Opened, fresh: bool) -> Any:
        """Take the prompt out of an output: its hidden states, if they are there, and its columns of attention."""
        if isinstance(output, Mapping):
            return type(output)(**{name: self._shorter(name, value, gap, fresh) for name, value in output.items()})
        if isinstance(output, tuple):
            return (self._shorter("last_hidden_state", output[0], gap, fresh), *output[1:])
        return self._shorter("last_hidden_state", output, gap, fresh)

    def _shorter(self, name: str, value: Any, gap: Opened, fresh: bool) -> Any:
        if isinstance(value, tuple | list) and name in ("hidden_states", "attentions", "cross_attentions"):
            return tuple(self._shorter(name, item, gap, fresh) for item in value)
        if not isinstance(value, Tensor):
            return value
        if name in ("last_hidden_state", "hidden_states"):
            return gap.close(value, 1) if fresh else value
        if name in ("attentions", "cross_attentions"):
            value = gap.close(value, 2) if fresh else value
            return gap.close(value, 3) if name == "attentions" else value
        return value


class Following(Around):
    """The forward of a decoder whose encoder has virtual tokens: the mask of what it attends to covers them, too."""

    def __init__(self, module: nn.Module, forward: Forward, tokens: int) -> None:
        super().__init__(module, forward)
        self.tokens = tokens

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the decoder."""
        given = self.arguments(args, kwargs)
        states, mask = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
        if states is not None and mask is not None and mask.shape[-1] + self.tokens == states.shape[1]:
            if mask.dim() != 2:
                raise prompt_error(
                    "a prompt needs an attention_mask of shape [batch, tokens]", "pass the 2-D padding mask"
                )
            gap = Gap.before_first(mask, self.tokens)
            given["encoder_attention_mask"] = gap.fill(mask.new_ones(1, self.tokens), mask)
        return self.forward(**given)


def checked_mask(given: dict[str, Any], name: str = "attention_mask") -> Tensor | None:
    """Return the mask of the padding. Raises DeltaSpecError for another one."""
    mask = given.get(name)
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        message = "a prompt needs an attention_mask of shape [batch, tokens]; this one was made for the model alone"
        raise prompt_error(message, "pass the 2-D mask of the padding")
    return mask


def mask_error(mask: Tensor, tokens: int) -> DeltaSpecError:
    """Make the error about a mask of another length than the input with its past."""
    return prompt_error(
        f"the attention_mask covers {mask.shape[1]} positions, and there are {tokens} tokens",
        "to go on from a cache made with this prompt, pass the new tokens only, and the mask of all tokens",
    )


def _wants_tuple(module: nn.Module, given: dict[str, Any]) -> bool:
    asked = given.get("return_dict")
    if asked is None:
        asked = getattr(getattr(module, "config", None), "return_dict", True)
    return not asked


def prompt_error(message: str, suggestion: str) -> DeltaSpecError:
    """Make the error about a call that leaves no place for a prompt."""
    return DeltaSpecError([Diagnostic("DS439", message, suggestion=suggestion)])
