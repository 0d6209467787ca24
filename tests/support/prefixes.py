"""Models with prefixes, and a prefix as a cache that was there before the first token."""

from typing import Any

from prompt_models import BASIC
from torch import Tensor, nn
from transformers import (
    DistilBertConfig,
    DistilBertModel,
    DynamicCache,
    Qwen3Config,
    Qwen3ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import deltaspec


def distilbert() -> nn.Module:
    return DistilBertModel(DistilBertConfig(vocab_size=90, dim=32, hidden_dim=64, n_layers=2, n_heads=4))


def qwen3() -> nn.Module:
    return Qwen3ForCausalLM(Qwen3Config(**BASIC, num_key_value_heads=2, head_dim=8))


def vit() -> nn.Module:
    sizes = {key: value for key, value in BASIC.items() if not key.endswith("_id") and key != "vocab_size"}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8))


def compiled(model: nn.Module, *deltas: dict[str, Any], **params: Any) -> Any:
    """Compile one prefix, or one for each dict of a delta's keys."""
    listed = [{"name": f"p{n}", "method": "prefix", **delta} for n, delta in enumerate(deltas or ({"params": params},))]
    return deltaspec.compile(model, {"deltaspec": 1, "deltas": listed})


def own(c: Any, site: str, delta: str = "p0") -> dict[str, Tensor]:
    """The tensors of one site, by own name."""
    return {key.removeprefix(f"{site}."): t for key, t in c.deltas[delta].tensors() if key.startswith(f"{site}.")}


def cache_of(c: Any, model: Any, rows: int, heads: int) -> Any:
    """The prefix as a cache that was there before the first token."""
    cache = DynamicCache(config=model.config)
    for layer, planned in enumerate(c.plan.sites):
        tensors = own(c, planned.fqn)
        key, value = (
            tensors[n].unflatten(1, (heads, -1)).transpose(0, 1).expand(rows, -1, -1, -1) for n in ("key", "value")
        )
        cache.update(key, value, layer)
    return cache
