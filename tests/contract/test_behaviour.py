"""Every method in what a model does all day: training mode, checkpointing, torch.compile, half precision, generation.

Each alone and with a lora behind it, on its default sites, on four architectures.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, PARAMS, TOKENS, base
from torch import Tensor
from whole import cases, in_turn

from deltaspec.compiler.compile import compile_plan
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.contract.trial import disturb
from deltaspec.methods.registry import builtin_methods
from deltaspec.planning.plan import Plan
from deltaspec.planning.resolve import plan

WRITERS = ("gpt2", "llama", "t5")
METHODS = tuple(builtin_methods())


def on(architectures: tuple[str, ...]) -> Any:
    """Take every method alone on one architecture, with a lora behind it on the next one, and so on in turn."""
    turns = [(m, a, n % 2 == 1) for i, m in enumerate(METHODS) for n, a in enumerate(in_turn(architectures, i))]
    every = product(METHODS, architectures, (False, True))
    return pytest.mark.parametrize(("method", "architecture", "stacked"), cases(every, turns))


@cache
def planned(method: str, architecture: str, stacked: bool) -> Plan:
    deltas: list[dict[str, Any]] = [{"name": "one", "method": method, "params": PARAMS[method]}]
    if stacked:
        target = {"role": ["attn.qkv"] if architecture == "gpt2" else ["attn.q", "attn.v"]}
        deltas.append({"name": "two", "method": "lora", "params": {"rank": 2, "dropout": 0.2}, "target": target})
    return plan(base(architecture), {"deltaspec": 1, "deltas": deltas})


def compiled(method: str, architecture: str, stacked: bool, dtype: torch.dtype = torch.float32) -> CompiledModel:
    """Compile on the architecture, moved away from the start; only the deltas of the spec's plan are new each time."""
    model = base(architecture, dtype)
    made = planned(method, architecture, stacked)
    if dtype is not torch.float32:
        made = plan(model, *made.specs)
    c = compile_plan(model, made)
    disturb(c)
    return c


@cache
def inputs(architecture: str) -> dict[str, Tensor]:
    ids = torch.randint(3, 48, (2, 5), generator=torch.Generator().manual_seed(1))
    ids[0, :4] = torch.tensor(TOKENS)
    return {"input_ids": ids, "labels": ids[:, :4].clone() if architecture == "t5" else ids}


def gradients(c: CompiledModel, architecture: str, seed: int) -> dict[str, Tensor]:
    """Return one training step's gradients by tensor, and the loss."""
    c.train()
    torch.manual_seed(seed)
    options = {} if architecture == "bert" else {"use_cache": False}
    loss = c(**inputs(architecture), **options).loss
    c.zero_grad()
    loss.backward()
    found = {f"{d}.{n}": p.grad.clone() for d, delta in c.deltas.items() for n, p in delta.named_parameters()}
    return found | {"loss": loss.detach()}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@on(tuple(ARCHITECTURES))
def test_training_follows_the_seed_and_checkpointing_changes_no_gradient(method, architecture, stacked):
    c = compiled(method, architecture, stacked)
    first = gradients(c, architecture, 1)
    assert equal(gradients(c, architecture, 1), first)
    assert not equal(gradients(c, architecture, 2), first)
    for reentrant in (False, True):
        backbone: Any = c.backbone
        if reentrant:
            backbone.enable_input_require_grads()
        backbone.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert backbone.is_gradient_checkpointing
        found = gradients(c, architecture, 1)
        for name, gradient in first.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    c.eval()
    with torch.no_grad():
        assert torch.equal(c(**inputs(architecture)).logits, c(**inputs(architecture)).logits)


@on(tuple(ARCHITECTURES))
def test_a_backbone_in_bfloat16_gives_bfloat16_and_trains_in_float32(method, architecture, stacked):
    c = compiled(method, architecture, stacked, torch.bfloat16)
    if method != "full" and method != "norm":
        assert {p.dtype for p in c.trainable_parameters()} == {torch.float32}
    out = c(**inputs(architecture))
    assert out.logits.dtype == torch.bfloat16
    with c.detached(), torch.no_grad():
        assert not torch.equal(c(**inputs(architecture)).logits, out.logits)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in c.trainable_parameters())
    full = compiled(method, architecture, stacked)(**inputs(architecture))
    assert (out.logits.float() - full.logits).abs().mean() < 0.03 * full.logits.abs().max()


@on(WRITERS)
def test_generation_is_the_same_with_and_without_the_cache(method, architecture, stacked):
    c = compiled(method, architecture, stacked)
    ids = inputs(architecture)["input_ids"]
    settings: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "attention_mask": torch.ones_like(ids)}
    for way in ({"do_sample": False}, {"do_sample": True, "top_k": 0}, {"do_sample": False, "num_beams": 2}):
        found = []
        for cached in (True, False):
            torch.manual_seed(3)
            found.append(c.generate(ids, **settings, **way, use_cache=cached))
        assert torch.equal(*found), way
        assert found[0].shape[1] == (4 if architecture == "t5" else 8)


@pytest.mark.parametrize("method", METHODS)
def test_torch_compile_takes_it_whole(method):
    """With a lora behind it, in one graph, forwards and backwards."""
    torch._dynamo.reset()
    c = compiled(method, "short llama", True)
    fast = torch.compile(c, backend="aot_eager", fullgraph=True)
    batch = inputs("llama") | {"use_cache": False}
    slow_loss = c(**batch).loss
    slow_loss.backward()
    wanted = {name: p.grad.clone() for name, p in c.named_parameters() if p.grad is not None}
    c.zero_grad()
    loss = fast(**batch).loss
    torch.testing.assert_close(loss, slow_loss, atol=1e-5, rtol=1e-5)
    loss.backward()
    found = {name: p.grad for name, p in c.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)
