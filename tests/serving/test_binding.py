"""Prefixes row by row: each row of a mixed batch sees its own keys and values alone."""

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from prompt_models import build, gemma3, llama, t5, tokens
from prompt_rows import MODELS, PREFIXES, assert_as_alone, compiled, inputs, row_of

from deltaspec.diagnostics.findings import DeltaSpecError


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("make", [*MODELS, gemma3])
def test_prefixes(make: Any, side: str | None, implementation: str) -> None:
    model = build(make)
    model.set_attn_implementation(implementation)
    c = compiled(model, "lora", "long", "short", "other")
    given = inputs(make, len(PREFIXES), side)
    out = assert_as_alone(c, given, PREFIXES)
    assert not torch.allclose(out.logits[0], c(**row_of(given, 0)).logits[0], atol=1e-3)
    if side is None:
        del given["attention_mask"]
        assert_as_alone(c, given, PREFIXES)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [llama, t5])
def test_prefixes_by_strength(make: Any, implementation: str) -> None:
    model = build(make)
    model.set_attn_implementation(implementation)
    c = compiled(model, "lora", "long", "short", "other")
    deltas: list[Any] = [{"long": 0.5}, {"long": 1.5, "short": 0.25}, {"other": 0.0}, None, "short", {"lora": 0.5}]
    out = assert_as_alone(c, inputs(make, len(deltas), "left"), deltas)
    bare = c.only()
    with bare:
        expected = c(**inputs(make, len(deltas), "left")).logits
    torch.testing.assert_close(out.logits[2:4], expected[2:4], atol=2e-5, rtol=1e-4)


def test_a_static_cache_is_refused() -> None:
    c = compiled(build(llama), "soft")
    with pytest.raises(DeltaSpecError, match="DS439"):
        c.generate(tokens(2), max_new_tokens=2, cache_implementation="static", deltas=["soft", None])
