"""Virtual tokens in front of a model's input: the forwards that lengthen what goes in and shorten what comes out.

The tokens are ids below zero, put among `input_ids` where those enter the model; its embedding, which a delta changes,
looks them up. So masks, positions, caches and generation are the model's own, and what follows the entrance (heads,
losses) sees the real tokens only. They stand right before the first real token of each row, behind any padding on the
left, so that padding changes nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.runtime.sockets import Forward

ENCODED = "encoder_attention_mask"
"""Name under which a decoder is given the mask of its encoder's tokens."""
_GO_ON = "to go on from a cache made with this prompt, pass the new tokens only, and the mask of all tokens"


@dataclass(frozen=True, slots=True)
class Gap:
    """Where places open in each row: as many as it needs before its first token, the others at one end."""

    tokens: int
    """Number of places in all."""
    lengths: Tensor | int
    """How many each row needs, `[rows, 1]`; a number: so many in any row, which is all of them."""
    padding: Tensor | None
    """Number of places before them, `[rows, 1]`; None: none in any row, and all rows need the same."""
    behind: bool = True
    """The others open behind the row, else in front of everything."""

    def fill(self, values: Tensor, rest: Tensor, other: int = 0) -> Tensor:
        """Put the first of `values` [rows or 1, tokens, …] into `rest` [rows, places, …], and `other` elsewhere."""
        rows, places = rest.shape[:2]
        parts = [values.expand(rows, *values.shape[1:]), rest]
        if self.padding is None:
            return torch.cat(parts, dim=1)
        place = torch.arange(places + self.tokens, device=rest.device)
        if not self.behind:
            place = place - (self.tokens - self.lengths)
        virtual, real = place - self.padding, place + self.tokens
        source = torch.where(virtual < 0, real, torch.where(virtual < self.lengths, virtual, real - self.lengths))
        if isinstance(self.lengths, Tensor):
            parts.append(rest.new_full((rows, 1, *rest.shape[2:]), other))
            source = torch.where((place < 0) | (place >= places + self.lengths), places + self.tokens, source)
        return take_places(torch.cat(parts, dim=1), source, 1)

    def lengthen(self, mask: Tensor) -> Tensor:
        """Open the places in a `[rows, places]` mask, so that a row's own ones are seen."""
        return self.fill(mask.new_ones(1, self.tokens), mask)

    def close(self, value: Tensor, dim: int) -> Tensor:
        """Take the places out of `value`, whose rows are its first dimension."""
        left = value.shape[dim] - self.tokens
        if self.padding is None:
            return value.narrow(dim, self.tokens, left)
        place = torch.arange(left, device=value.device)
        source = torch.where(place < self.padding, place, place + self.lengths)
        if not self.behind:
            source = source + (self.tokens - self.lengths)
        return take_places(value, source, dim)

    def number(self, positions: Tensor) -> Tensor:
        """Put numbers on the prompt from the first real token's on, and higher ones on what follows it."""
        first, moved = positions[:, :1], positions + self.lengths
        if self.padding is not None:
            place = torch.arange(positions.shape[1], device=positions.device)
            first = positions.gather(1, self.padding.clamp(max=positions.shape[1] - 1))
            moved = torch.where(place < self.padding, positions, moved)
        return self.fill(first + torch.arange(self.tokens, device=positions.device, dtype=positions.dtype), moved)


class Front:
    """The virtual tokens of one embedding, the same in each row. Their ids go down from -1, as the places do."""

    def __init__(self, lengths: Sequence[int], leads: bool = False) -> None:
        self.total = sum(lengths)
        """Number of tokens of all deltas."""
        self.leads = leads  # in front of padding; then all is numbered by columns
        after = [sum(lengths[number:]) for number in range(1, len(lengths) + 1)]
        self._ids = [-1 - more - place for length, more in zip(lengths, after, strict=True) for place in range(length)]
        """In the deltas' order; the last delta is the outermost at the embedding, so its ids start at -1."""

    def most(self) -> int:
        """Return the largest number of tokens that a row has."""
        return self.total

    def ids(self, size: int, device: torch.device) -> Tensor:
        """Return the ids of each row's tokens, `[size or 1, tokens]`."""
        return torch.tensor([self._ids], device=device)

    def gap(self, mask: Tensor | None, most: int, behind: bool = True) -> Gap:
        """Say where the tokens of each row stand: right before the first place that a `[rows, places]` mask shows.

        Those that lead stand before all places.
        """
        return Gap(most, most, None if mask is None or self.leads else padding_of(mask))

    def positions(self, given: Tensor, entering: Tensor, past: int) -> Tensor | None:
        """Return the positions that tokens have without the prompt; None: those that the model gives them."""
        return None if self.leads else given


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

    def __init__(self, module: nn.Module, forward: Forward, embedding: nn.Module, front: Front, shorten: bool) -> None:
        super().__init__(module, forward)
        self.embedding, self.front, self.shorten = embedding, front, shorten
        self.filler = max(0, getattr(getattr(module, "config", None), "pad_token_id", None) or 0)
        """What stands for no token."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the entrance."""
        given, most = self.arguments(args, kwargs), self.front.most()
        entering = self._entering(given)
        if entering is None or not most:
            return self.forward(**given)
        seen = self._seen(given.get("past_key_values"))
        past = seen - most if seen else 0
        if (numbers := given.get("position_ids")) is not None:
            given["position_ids"] = self.front.positions(numbers, entering, past)
        gap = self._open(given, entering, most, past)
        if not seen:
            return self._start(given, gap, entering)
        self._check_positions(given, seen + entering.shape[1], most)  # the prompt is in the cache
        for name, more in (("position_ids", gap.lengths), ("cache_position", most)):
            if given.get(name) is not None:
                given[name] = given[name] + more
        return self._run(given, gap, fresh=False)

    def _entering(self, given: dict[str, Any]) -> Tensor | None:
        """Return the ids or embeddings that enter."""
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        entering = embeds if ids is None else ids
        if entering is not None and entering.dim() != (3 if ids is None else 2):
            raise prompt_error("a prompt needs input_ids of shape [batch, tokens]", "flatten the other dimensions")
        return entering

    def _start(self, given: dict[str, Any], gap: Gap, entering: Tensor) -> Any:
        """Run the model on the first tokens, the virtual ones among them."""
        self._fill(given, gap, entering, self.front.ids(entering.shape[0], entering.device)[:, : gap.tokens])
        return self._run(given, gap, fresh=True)

    def _run(self, given: dict[str, Any], gap: Gap, fresh: bool) -> Any:
        """Run the model on what has the prompt in it, and take that out of the output."""
        if not self.shorten:
            return self.forward(**given)
        asked = given.get("return_dict")
        as_tuple = not (getattr(getattr(self.module, "config", None), "return_dict", True) if asked is None else asked)
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

    def _open(self, given: dict[str, Any], entering: Tensor, most: int, past: int) -> Gap:
        """Lengthen the mask of the padding, and say where the prompt stands."""
        mask, places = checked_mask(given), past + entering.shape[1]
        gap = self.front.gap(mask, most)
        if mask is not None and mask.shape[1] == places:
            given["attention_mask"] = gap.lengthen(mask)
        elif mask is not None and mask.shape[1] != places + most:  # some callers count the prompt in it
            raise mask_error(mask, places)
        return gap

    def _check_positions(self, given: dict[str, Any], whole: int, tokens: int) -> None:
        """Refuse inputs that generate cut by the cache's length, which counts the prompt."""
        positions = given.get("position_ids")
        if positions is None or given.get("attention_mask") is not None or torch.compiler.is_compiling():
            return
        if int(positions.max()) + 1 + tokens != whole:
            message = "the position_ids are not those of the tokens that follow this cache, which holds a prompt, too"
            raise prompt_error(message, _GO_ON)

    def _fill(self, given: dict[str, Any], gap: Gap, entering: Tensor, virtual: Tensor) -> None:
        """Put the virtual tokens, ids `[rows or 1, tokens]`, into the inputs."""
        tokens, rows = gap.tokens, entering.shape[0]
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
            each = positions.expand(*kinds, rows, positions.shape[-1]).reshape(-1, rows, positions.shape[-1])
            given["position_ids"] = torch.stack([gap.number(one) for one in each]).reshape(*kinds, rows, -1)
        places = given.get("cache_position")
        if places is not None:
            more = torch.arange(tokens, device=places.device, dtype=places.dtype)
            given["cache_position"] = torch.cat([more, places + tokens])

    def _without(self, output: Any, gap: Gap, fresh: bool) -> Any:
        """Take the prompt out of an output: its hidden states, if they are there, and its columns of attention."""
        if isinstance(output, Mapping):
            return type(output)(**{name: self._shorter(name, value, gap, fresh) for name, value in output.items()})
        if isinstance(output, tuple):
            return (self._shorter("last_hidden_state", output[0], gap, fresh), *output[1:])
        return self._shorter("last_hidden_state", output, gap, fresh)

    def _shorter(self, name: str, value: Any, gap: Gap, fresh: bool) -> Any:
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

    def __init__(self, module: nn.Module, forward: Forward, front: Front) -> None:
        super().__init__(module, forward)
        self.front = front

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the decoder."""
        given, most = self.arguments(args, kwargs), self.front.most()
        states: Any = given.get("encoder_hidden_states")
        mask: Tensor | None = None if states is None or not most else self._mask(given, states, most)
        if mask is not None and mask.shape[-1] + most == states.shape[1]:
            if mask.dim() != 2:
                message = "a prompt needs an attention_mask of shape [batch, tokens]"
                raise prompt_error(message, "pass the 2-D padding mask")
            given[ENCODED] = self.front.gap(mask, most).lengthen(mask)
        return self.forward(**given)

    def _mask(self, given: dict[str, Any], states: Tensor, most: int) -> Tensor | None:
        """Return the mask of the encoder's tokens."""
        return given.get(ENCODED)


def checked_mask(given: dict[str, Any], name: str = "attention_mask") -> Tensor | None:
    """Return the mask of the padding. Raises DeltaSpecError for another one."""
    mask = given.get(name)
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        message = "a prompt needs an attention_mask of shape [batch, tokens]; this one was made for the model alone"
        raise prompt_error(message, "pass the 2-D mask of the padding")
    return mask


def mask_error(mask: Tensor, tokens: int) -> DeltaSpecError:
    """Make the error about a mask of another length than the input with its past."""
    message = f"the attention_mask covers {mask.shape[1]} positions, and there are {tokens} tokens"
    return prompt_error(message, _GO_ON)


def prompt_error(message: str, suggestion: str) -> DeltaSpecError:
    """Make the error about a call that leaves no place for a prompt."""
    return DeltaSpecError([Diagnostic("DS439", message, suggestion=suggestion)])
