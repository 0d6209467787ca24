"""Virtual tokens in front of a model's input: the forwards that lengthen what goes in and shorten what comes out.

The tokens are ids below zero, put in front of `input_ids` where those enter the model; its embedding, which a delta
changes, looks them up. So positions, masks, caches and generation are the model's own, and what follows the entrance
(heads, losses) sees the real tokens only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deltaspec.diagnostics import DeltaSpecError, Diagnostic

Forward = Callable[..., Any]


class Prompted:
    """The forward of an entrance, with virtual tokens in front of the first tokens of each sequence."""

    def __init__(
        self, module: nn.Module, forward: Forward, embedding: nn.Module, lengths: tuple[int, ...], shorten: bool
    ) -> None:
        self.module, self.forward, self.embedding, self.shorten = module, forward, embedding, shorten
        self.tokens = sum(lengths)
        self.ids: list[int] = []
        """In the deltas' order; the last delta is the outermost at the embedding, so its ids start at -1."""
        for number, length in enumerate(lengths):
            start = -1 - sum(lengths[number + 1 :])
            self.ids += range(start, start - length, -1)
        signature = inspect.signature(type(module).forward)
        self.names = tuple(signature.parameters)[1:]
        self.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the entrance."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        entering = embeds if ids is None else ids
        if entering is None:
            return self.forward(**given)
        if (ids is not None and ids.dim() != 2) or (embeds is not None and embeds.dim() != 3):
            raise _error("a prompt needs input_ids of shape [batch, tokens]", "flatten the other dimensions")
        batch, length = entering.shape[:2]
        cache = given.get("past_key_values")
        seen = cache.get_seq_length() if cache is not None else 0
        self._lengthen_mask(given, seen, length)
        more = self.tokens
        if seen:  # the prompt is in the cache
            self._check_positions(given, seen + length)
            self._move_positions(given, more)
            output = self.forward(**given)
            return self._without(output, 0) if self.shorten else output
        virtual = torch.tensor([self.ids], device=entering.device)
        if ids is not None:
            given["input_ids"] = torch.cat([virtual.to(ids.dtype).expand(batch, -1), ids], dim=1)
        else:
            rows = self.embedding(virtual).to(entering.dtype)
            given["inputs_embeds"] = torch.cat([rows.expand(batch, -1, -1), entering], dim=1)
        types = given.get("token_type_ids")
        if types is not None:
            given["token_type_ids"] = torch.cat([types.new_zeros(types.shape[0], more), types], dim=1)
        for name in ("position_ids", "cache_position"):
            positions = given.get(name)
            if positions is not None:
                front = torch.arange(more, device=positions.device, dtype=positions.dtype)
                front = front.expand(*positions.shape[:-1], more)
                given[name] = torch.cat([front, positions + more], dim=-1)
        if not self.shorten:
            return self.forward(**given)
        as_tuple = _wants_tuple(self.module, given)
        if as_tuple:
            given["return_dict"] = True
        output = self._without(self.forward(**given), more)
        if as_tuple and isinstance(output, Mapping):
            return tuple(value for value in output.values() if value is not None)
        return output

    def _lengthen_mask(self, given: dict[str, Any], seen: int, length: int) -> None:
        mask = given.get("attention_mask")
        if mask is None:
            return
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise _error(
                "a prompt needs an attention_mask of shape [batch, tokens]; this one was made for the model alone",
                "pass the 2-D mask of the padding; with generate, do not use a static cache",
            )
        # With a cache the mask covers the past; some callers count the prompt in it.
        whole = seen + length if seen else self.tokens + length
        if mask.shape[1] == whole - self.tokens:
            given["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], self.tokens), mask], dim=1)
        elif mask.shape[1] != whole:
            raise _error(
                f"the attention_mask covers {mask.shape[1]} positions, and there are {whole - self.tokens} tokens",
                "to go on from a cache made with this prompt, pass the new tokens only, and the mask of all tokens",
            )

    def _check_positions(self, given: dict[str, Any], whole: int) -> None:
        """Refuse inputs that generate cut by the cache's length, which counts the prompt."""
        positions = given.get("position_ids")
        if positions is None or given.get("attention_mask") is not None or torch.compiler.is_compiling():
            return
        if int(positions.max()) + 1 + self.tokens != whole:
            raise _error(
                "the position_ids are not those of the tokens that follow this cache, which holds a prompt, too",
                "to go on from a cache made with this prompt, pass the new tokens only, and the mask of all tokens",
            )

    @staticmethod
    def _move_positions(given: dict[str, Any], more: int) -> None:
        for name in ("position_ids", "cache_position"):
            if given.get(name) is not None:
                given[name] = given[name] + more

    def _without(self, output: Any, rows: int) -> Any:
        """Take the first `rows` positions, and the prompt's columns of attention weights, out of an output."""
        if isinstance(output, Mapping):
            return type(output)(**{name: self._shorter(name, value, rows) for name, value in output.items()})
        if isinstance(output, tuple):
            return (self._shorter("last_hidden_state", output[0], rows), *output[1:])
        return self._shorter("last_hidden_state", output, rows)

    def _shorter(self, name: str, value: Any, rows: int) -> Any:
        if isinstance(value, tuple | list):
            if name in ("hidden_states", "attentions", "cross_attentions"):
                return tuple(self._shorter(name, item, rows) for item in value)
            return value
        if not isinstance(value, Tensor):
            return value
        if name in ("last_hidden_state", "hidden_states"):
            return value[:, rows:]
        if name == "attentions":
            return value[:, :, rows:, self.tokens :]
        if name == "cross_attentions":
            return value[:, :, rows:]
        return value


class Following:
    """The forward of a decoder whose encoder has virtual tokens: the mask of what it attends to covers them, too."""

    def __init__(self, module: nn.Module, forward: Forward, tokens: int) -> None:
        self.forward, self.tokens = forward, tokens
        signature = inspect.signature(type(module).forward)
        self.names = tuple(signature.parameters)[1:]
        self.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the decoder."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        states, mask = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
        if states is not None and mask is not None and mask.shape[-1] + self.tokens == states.shape[1]:
            if mask.dim() != 2:
                raise _error("a prompt needs an attention_mask of shape [batch, tokens]", "pass the 2-D padding mask")
            given["encoder_attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], self.tokens), mask], dim=1)
        return self.forward(**given)


def _wants_tuple(module: nn.Module, given: dict[str, Any]) -> bool:
    asked = given.get("return_dict")
    if asked is None:
        asked = getattr(getattr(module, "config", None), "return_dict", True)
    return not asked


def _error(message: str, suggestion: str) -> DeltaSpecError:
    return DeltaSpecError([Diagnostic("DS439", message, suggestion=suggestion)])
