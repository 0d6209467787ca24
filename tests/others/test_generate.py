"""Beside transformers: `generate` in all its ways, and what a forward can be asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import ARCHITECTURES, ids
from two_deltas import build, disturb, spec

import deltaspec
from deltaspec.contract.trial import seed

GENERATING = ("gpt2", "llama", "t5", "bart")


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "use_cache": False},
        {"num_beams": 3},
        {"do_sample": True, "top_k": 20, "temperature": 0.7},
        {"num_beams": 2, "do_sample": True, "no_repeat_ngram_size": 2},
    ],
    ids=["greedy", "uncached", "beam", "sampling", "beam-sampling"],
)
@pytest.mark.parametrize("architecture", GENERATING)
def test_generate(architecture, options):
    model = ARCHITECTURES[architecture].model()
    compiled = build(architecture, model)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, **options}

    def run(which: Any) -> list[list[int]]:
        with seed(5):
            return which.generate(input_ids=ids(2, 5), **options).tolist()

    attached = run(compiled)
    assert run(compiled.backbone) == attached
    merged = deltaspec.compile(model, spec(architecture) | {"deltas": spec(architecture)["deltas"][:1]})
    disturb(merged, 0.3)
    assert run(merged) == run(merged.merge())
    with compiled.detached():
        assert run(compiled) == run(model)
    assert run(compiled) == attached


def test_cached_and_uncached_generation_agree_with_deltas():
    for architecture in GENERATING:
        compiled = build(architecture)
        options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
        cached, uncached = (compiled.generate(input_ids=ids(2, 5), use_cache=use, **options) for use in (True, False))
        assert torch.equal(cached, uncached), architecture


def test_generation_changes_with_the_active_delta():
    compiled = build("llama")
    disturb(compiled, 1.0)
    seen = []
    for names in ((), ("low",), ("wide",), ("low", "wide")):
        compiled.only(*names)
        seen.append(compiled.generate(input_ids=ids(1, 5), max_new_tokens=12, do_sample=False).tolist())
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])
