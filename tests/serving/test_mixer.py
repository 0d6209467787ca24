"""Mixed batches: every row under its own deltas is what it is alone, in outputs, gradients and generation."""

from __future__ import annotations

import random
from itertools import product
from typing import Any

import pytest
import torch
from counted import graphs_of
from mixed_rows import METHODS, ROWS, alone, batch, build, close, entry, family, ids
from tiny_models import ARCHITECTURES, BUILDERS, base
from whole import cases, some_of_each

import deltaspec
from deltaspec.contract.trial import disturb
from deltaspec.runtime.pickled_alone import MARK


@pytest.mark.parametrize(
    ("method", "architecture"), cases(product(METHODS, ARCHITECTURES), some_of_each(METHODS, tuple(ARCHITECTURES)))
)
def test_each_row_is_what_it_is_alone(method, architecture):
    compiled = build(base(architecture), entry("a", method), entry("b", method))
    given = batch(architecture)
    with torch.no_grad():
        bare = compiled(**given).logits
        mixed = compiled(**given, deltas=ROWS).logits
        for row, deltas in enumerate(ROWS):
            assert close(mixed[row], alone(compiled, given, row, deltas)), deltas
        assert not close(mixed[0], bare[0])
        assert torch.equal(compiled(**given).logits, bare)
    assert not any("forward" in module.__dict__ for module in compiled.backbone.modules())


@pytest.mark.parametrize("method", METHODS)
def test_one_backward_gives_each_delta_the_gradient_of_its_own_rows(method):
    compiled = build(base("llama"), *(entry(name, method) for name in "abc"))
    given, rows = batch("llama"), ["a", None, "b", "a", "b"]
    weight = torch.randn(5, 6, 48, generator=torch.Generator().manual_seed(3))
    (compiled(**given, deltas=rows).logits * weight).sum().backward()
    found = {name: [p.grad for p in delta.parameters()] for name, delta in compiled.deltas.items()}
    assert all(gradient is None for gradient in found["c"])
    assert all(p.grad is None for n, p in compiled.backbone.named_parameters() if not n.startswith("deltaspec."))
    compiled.zero_grad()
    for name in "ab":
        own = [row for row, deltas in enumerate(rows) if deltas == name]
        with compiled.only(name):
            (compiled(**{key: value[own] for key, value in given.items()}).logits * weight[own]).sum().backward()
        expected = [p.grad for p in compiled.deltas[name].parameters()]
        largest = max(float(gradient.abs().max()) for gradient in expected)
        assert largest > 0
        for gradient, wanted in zip(found[name], expected, strict=True):
            assert gradient is not None
            torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5 * max(1.0, largest))


@pytest.mark.parametrize("method", METHODS)
def test_what_is_no_number_under_one_row_reaches_no_other(method):
    compiled = build(base("llama"), entry("broken", method), entry("alike", method), entry("other", "lora"))
    given, rows = batch("llama"), ["broken", "alike", "other", None, "broken"]
    kept = compiled(**given, deltas=rows).logits[1:4]
    kept.sum().backward()
    own = [p for name in ("alike", "other") for p in compiled.deltas[name].parameters()]
    expected = [p.grad.clone() for p in own]
    compiled.zero_grad()
    weight = torch.ones(5, 6, 48)
    weight[[0, 4]] = torch.nan
    (compiled(**given, deltas=rows).logits * weight).sum().backward()
    for parameter, wanted in zip(own, expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted)
    with torch.no_grad():
        for parameter in compiled.deltas["broken"].parameters():
            parameter.fill_(torch.nan)
        found = compiled(**given, deltas=rows).logits
    torch.testing.assert_close(found[1:4], kept.detach())
    assert not found[[0, 4]].isfinite().any()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
def test_methods_ranks_stacks_and_strengths_mix(architecture):
    compiled = family(base(architecture))
    given = batch(architecture)
    choices: list[Any] = [None, *compiled.deltas, ("lora2", "adapter"), ("adapter", "again"), ("lora2", "again"),
                          ("reft", "bitfit", "ia3"), {"adapter": 0.3, "lora4": 2.0}, ("hira", "lora4")]  # fmt: skip
    pick = random.Random(0)
    with torch.no_grad():
        for _ in range(4):
            rows = [pick.choice(choices) for _ in range(5)]
            mixed = compiled(**given, deltas=rows).logits
            for row, deltas in enumerate(rows):
                assert close(mixed[row], alone(compiled, given, row, deltas)), (rows, deltas)


@pytest.mark.parametrize("architecture", ["llama", "t5"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}],
    ids=["greedy", "beams", "several", "uncached"],
)
def test_generation_expands_rows(architecture, options):
    compiled = family(base(architecture))
    given = {key: value for key, value in batch(architecture).items() if key != "decoder_input_ids"}
    rows = ["lora4", None, ("lora2", "adapter"), "ia3", {"reft": 0.7}]
    told = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **options}
    several = options.get("num_return_sequences", 1)
    mixed = compiled.generate(**given, **told, deltas=rows)
    for row, deltas in enumerate(rows):
        names = deltas if isinstance(deltas, dict) else (deltas,) if isinstance(deltas, str) else deltas or ()
        with compiled.only(names) if isinstance(names, dict) else compiled.only(*names):
            single = compiled.generate(**{key: value[row : row + 1] for key, value in given.items()}, **told)
        own = mixed[row * several : (row + 1) * several, : single.shape[1]]
        assert torch.equal(own, single), deltas


def test_sampling_with_the_same_seed_follows_the_rows():
    compiled = family(base("llama"))
    told = {"max_new_tokens": 4, "do_sample": True, "pad_token_id": 0}
    torch.manual_seed(0)
    left = compiled.generate(ids(), **told, deltas=["lora2"] * 5)
    torch.manual_seed(0)
    with compiled.only("lora2"):
        right = compiled.generate(ids(), **told)
    assert torch.equal(left, right)


def test_one_compiled_graph_serves_a_hundred_assignments():
    deltas = [entry(f"d{number}", "lora") for number in range(12)]
    compiled = build(BUILDERS["short llama"]().eval(), *deltas)
    fast, graphs = graphs_of(compiled)
    pick = random.Random(1)
    tokens = ids()
    with torch.no_grad():
        for _ in range(100):
            names = [pick.choice([None, *compiled.deltas]) for _ in range(4)] + ["d3"]
            rows = [{name: pick.random()} if name and pick.random() < 0.3 else name for name in names]
            output = fast(tokens, deltas=compiled.rows(rows)).logits
        assert len(graphs) == 1
        assert close(output, compiled(tokens, deltas=rows).logits)
        # Other values of the same shapes: trained further, or loaded.
        disturb(compiled)
        assert close(fast(tokens, deltas=compiled.rows(rows)).logits, compiled(tokens, deltas=rows).logits)
        assert not close(fast(tokens, deltas=compiled.rows(rows)).logits, output)
        assert len(graphs) == 1
        compiled.rows([None] * 5, among=["d0"])
        fast(tokens, deltas=compiled.rows([None] * 5, among=["d0"]))
        assert len(graphs) == 1


def test_switches_and_other_kinds_in_between_compile_nothing_anew():
    low = [entry(name, "lora", "**.q_proj", rank=rank) for name, rank in (("a", 2), ("b", 2), ("c", 3))]
    compiled = build(BUILDERS["short llama"]().eval(), *low, entry("d", "ssf", "**.q_proj"))
    (fast, graphs), rows = graphs_of(compiled), ["a", None, "b", {"a": 0.5}, None]
    with torch.no_grad():
        expected = compiled(ids(), deltas=rows).logits
        for between in ((), ("a",), ({"b": 0.5},), ("c",)):
            assert close(fast(ids(), deltas=compiled.rows(rows, among=["c"])).logits, expected)
            compiled.only(*between)
        for other in ("c", "d"):
            compiled(ids(), deltas=[other, None, "a", None, None])
            assert close(fast(ids(), deltas=compiled.rows(rows, among=["c"])).logits, expected)
            compiled.detach()
    assert len(graphs) == 1


def test_one_compiled_graph_serves_batches_of_any_size():
    compiled = build(BUILDERS["short llama"]().eval(), entry("a", "lora"), entry("b", "lora"))
    fast, graphs = graphs_of(compiled, dynamic=True)
    with torch.no_grad():
        for size in (2, 3, 5, 7):
            rows = [(None, "a", "b")[number % 3] for number in range(size)]
            mixed = fast(ids(size, 4 + size), deltas=compiled.rows(rows)).logits
            assert close(mixed, compiled(ids(size, 4 + size), deltas=rows).logits)
    assert len(graphs) == 1


def test_flags_and_state_are_those_of_a_fresh_clone_afterwards():
    model = base("llama")
    compiled = build(model, entry("a", "lora"), entry("b", "adapter"))
    keys = list(compiled.state_dict())
    compiled(ids(), deltas=["a", "b", None, "a", "a"])
    assert list(compiled.state_dict()) == keys
    fresh = deltaspec.compile(model, {"deltaspec": 1, "deltas": [entry("a", "lora"), entry("b", "adapter")]})
    for (name, ours), (_, theirs) in zip(compiled.named_parameters(), fresh.named_parameters(), strict=True):
        assert ours.requires_grad == theirs.requires_grad, name
    for ours, theirs in zip(compiled.backbone.modules(), fresh.backbone.modules(), strict=True):
        assert ours.__dict__.keys() - {MARK} == theirs.__dict__.keys() - {MARK}
