"""Parameters that suit the models of `models.py`; methods that are not here are checked with their defaults."""

from __future__ import annotations

from typing import Any

# Sizes that suit models this small; methods that are not here are checked with their defaults.
PARAMS: dict[str, tuple[dict[str, Any], ...]] = {
    "lora": ({"rank": 4}, {"rank": 2, "scaling": "rslora", "bias": True, "dropout": 0.1, "init": "normal"}),
    "adapter": ({"width": 4}, {"width": 3, "position": "before", "scale": 0.5, "activation": "silu", "dropout": 0.1}),
    "full": ({"tied": "together"}, {"tied": "alone"}),
    "soft_prompt": ({"tokens": 3},),
    "p_tuning": ({"tokens": 3, "width": 8}, {"tokens": 3, "width": 8, "encoder": "lstm", "dropout": 0.1}),
    "trainable_tokens": ({"token_ids": [4, 26, 52, 80]},),
    "prefix": ({"tokens": 3}, {"tokens": 2, "reparametrisation": "mlp", "width": 8}),
    "road": ({"group_size": 8},),
    "c3a": ({"block_size": 8},),
    "oft": ({"block_size": 8},),
    "miss": ({"rank": 4},),
    "hira": ({"rank": 4},),
    "vera": ({"rank": 8},),
    "compacter": ({"width": 8, "divisions": 2},),
    "low_rank_adapter": ({"width": 8},),
    "parallel_adapter": ({"width": 4},),
}
