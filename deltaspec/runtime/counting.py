"""Positions that deltas take: the forwards that number the tokens of an input behind them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from deltaspec.backbone.positions import NUMBERS, PAST
from deltaspec.runtime.prompts import Around
from deltaspec.runtime.sockets import Forward


class Counted(Around):
    """The forward of a module that is given positions: those of all tokens are higher by a number.

    A model that is given none counts columns behind its cache, so that is done here.
    """

    def __init__(self, module: nn.Module, forward: Forward, tokens: int) -> None:
        super().__init__(module, forward)
        self.tokens = tokens

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module."""
        given = self.arguments(args, kwargs)
        if given.get(NUMBERS) is not None:
            given[NUMBERS] = given[NUMBERS] + self.tokens
        elif PAST in self.names:
            given[PAST] = given.get(PAST, 0) + self.tokens
        else:
            self._number(given)
        return self.forward(**given)

    def _number(self, given: dict[str, Any]) -> None:
        ids, cache = given.get("input_ids"), given.get("past_key_values")
        entering = given.get("inputs_embeds") if ids is None else ids
        if entering is not None:  # else the model has an error of its own to raise
            length = (ids.shape if ids is not None else entering.shape[:-1])[-1]
            before = 0 if cache is None else cache.get_seq_length()
            numbers = torch.arange(length, device=entering.device) + before + self.tokens
            given[NUMBERS] = numbers.unsqueeze(0)
