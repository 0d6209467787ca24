"""The forward with a delta attached, and merged, over the number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

import deltaspec
from benchmarks.harness import LIMITS, Item, Row, Series, interleave, ratio
from benchmarks.models import LLAMA_LINEAR, llama, peft, spec

TOKENS = (1, 4, 16, 64, 128, 256, 512)


def over_tokens() -> Iterator[Item]:
    """One row of 1 … 512 tokens: bare, LoRA attached, and merged; the peer's merged is unloaded, its best form."""
    base = llama()
    ours = deltaspec.compile(base, spec(["d0"], LLAMA_LINEAR))
    models: dict[str, nn.Module] = {
        "bare": base,
        "deltaspec": ours,
        "PEFT": peft(base, ["d0"], LLAMA_LINEAR),
        "deltaspec, merged": ours.merge(),
        "PEFT, merged": peft(base, ["d0"], LLAMA_LINEAR).merge_and_unload(),
    }
    curves: dict[str, dict[float, list[float]]] = {name: {} for name in models if name != "bare"}
    for tokens in TOKENS if LIMITS.pairs is None else TOKENS[::2]:
        ids = torch.randint(0, 1000, (1, tokens))
        with torch.inference_mode():
            times = interleave({name: _run(model, ids) for name, model in models.items()}, 40 if tokens < 100 else 20)
        for name, found in curves.items():
            found[tokens] = [a / b for a, b in zip(times[name], times["bare"], strict=True)]
        if tokens in (1, 16, 128, 512):
            _, first = ratio(times["deltaspec, merged"], times["bare"])
            _, second = ratio(times["PEFT, merged"], times["bare"])
            yield Row(
                f"merged, over bare, 1 × {tokens} tokens (8 × 512 Llama)",
                f"{first} ×",
                f"{second} ×",
                "-",
                "1",
                "-",
                "ours is a plain model of the original class; PEFT's is merged and unloaded" if tokens == 1 else "",
            )
    for name, found in curves.items():
        yield Series.of("tokens", name, found)


def _run(model: nn.Module, ids: torch.Tensor) -> Callable[[], object]:
    return lambda: model(input_ids=ids, use_cache=False)
