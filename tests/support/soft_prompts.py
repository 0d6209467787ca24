"""Models with soft prompts."""

from typing import Any

import torch
from torch import Tensor, nn

import deltaspec


def compiled(model: nn.Module, *tokens: int, **params: Any) -> Any:
    """Compile one soft prompt for each number of tokens."""
    deltas = [
        {"name": f"p{number}", "method": "soft_prompt", "params": {"tokens": count, **params}}
        for number, count in enumerate(tokens)
    ]
    return deltaspec.compile(model, {"deltaspec": 1, "deltas": deltas})


def prompt(c: Any) -> Tensor:
    """All attached prompts, in order."""
    return torch.cat([p.detach() for name in c.attached for p in c.deltas[name].parameters()])


def by_hand(model: Any, rows: Tensor, ids: Tensor, **kwargs: Any) -> Any:
    """Run the original on embeddings with the rows in front."""
    embeds = torch.cat([rows.expand(len(ids), -1, -1), model.get_input_embeddings()(ids)], dim=1)
    return model(inputs_embeds=embeds, **kwargs)
