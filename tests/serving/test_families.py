"""Rows of one method mix freely: at any rank, width, scale and dropout, on other sites, at the cost of one delta."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from counted import graphs_of, operators
from mixed_rows import alone, batch, build, close, entry, ids
from tiny_models import BUILDERS, base

ALL = ["**.q_proj", "**.v_proj", "**.up_proj", "**.down_proj"]
SOME = ["**.q_proj", "**.v_proj"]


def target(*paths: str) -> dict[str, Any]:
    return {"path": list(paths or ALL)}


def kinds(compiled: Any, *names: Any) -> int:
    return len(compiled.rows(list(names)).lines)


MIXES: dict[str, list[dict[str, Any]]] = {
    "ranks": [entry(f"d{n}", "lora", target(), rank=rank) for n, rank in enumerate((1, 2, 3, 8))],
    "scales": [
        entry("d0", "lora", target(), rank=4, alpha=1.0),
        entry("d1", "lora", target(), rank=4, alpha=64.0),
        entry("d2", "lora", target(), rank=2, alpha=3.0, scaling="rslora"),
        entry("d3", "lora", target(), rank=4, alpha=16.0, init="normal"),
    ],
    "widths": [entry(f"d{n}", "adapter", target(), width=width) for n, width in enumerate((2, 3, 5, 8))],
    "parallel": [entry(f"d{n}", "parallel_adapter", target(), width=width) for n, width in enumerate((2, 3, 5, 8))],
    "products": [entry(f"d{n}", "loha", target(), rank=rank, alpha=rank + n) for n, rank in enumerate((1, 2, 3, 4))],
    "shared": [entry(f"d{n}", "vera", target(), rank=rank) for n, rank in enumerate((2, 3, 5, 8))],
    "dora": [entry(f"d{n}", "lora", target(), rank=rank, use_dora=True) for n, rank in enumerate((1, 2, 3, 8))],
    "embedded": [entry(f"d{n}", "lora", target("**.embed_tokens", *ALL), rank=1 + n) for n in range(4)],
}  # fmt: skip


@pytest.mark.parametrize("mix", MIXES)
def test_rows_of_one_family_are_what_they_are_alone(mix):
    compiled = build(BUILDERS["short llama"]().eval(), *MIXES[mix])
    rows = ["d3", None, "d0", {"d2": 0.5}, "d1"]
    given = {"input_ids": ids()}
    assert kinds(compiled, *rows) == 1
    with torch.no_grad():
        mixed = compiled(**given, deltas=rows).logits
        for row, deltas in enumerate(rows):
            assert close(mixed[row], alone(compiled, given, row, deltas)), deltas
        few = compiled(**given, deltas=["d2", "d2", None, "d2", "d2"]).logits
        assert close(few[0], alone(compiled, given, 0, "d2"))


@pytest.mark.parametrize("mix", MIXES)
def test_each_delta_of_a_family_gets_its_own_gradient(mix):
    compiled = build(BUILDERS["short llama"]().eval(), *MIXES[mix])
    given, rows = ids(), ["d3", "d0", "d0", "d1", "d3"]
    weight = torch.randn(5, 6, 48, generator=torch.Generator().manual_seed(3))
    (compiled(given, deltas=rows).logits * weight).sum().backward()
    found = {name: [p.grad for p in compiled.deltas[name].parameters()] for name in ("d0", "d1", "d2", "d3")}
    assert all(gradient is None for gradient in found["d2"])
    for name in ("d0", "d1", "d3"):
        own = [row for row, deltas in enumerate(rows) if deltas == name]
        compiled.zero_grad()
        with compiled.only(name):
            (compiled(given[own]).logits * weight[own]).sum().backward()
        for parameter, gradient in zip(compiled.deltas[name].parameters(), found[name], strict=True):
            assert gradient is not None and gradient.shape == parameter.shape and gradient.is_contiguous()
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


def test_deltas_on_other_sites_share_a_place():
    narrow, wide = entry("q", "lora", target(*SOME), rank=2), entry("all", "lora", target(), rank=3)
    more = entry("up", "lora", target("**.v_proj", "**.up_proj"), rank=1)
    compiled = build(base("llama"), narrow, wide, more)
    given, rows = batch("llama"), ["q", "all", None, {"up": 0.7}, ("q", "all")]
    with torch.no_grad():
        mixed = compiled(**given, deltas=rows).logits
        for row, deltas in enumerate(rows):
            names = dict.fromkeys(deltas, 1.0) if isinstance(deltas, tuple) else deltas
            assert close(mixed[row], alone(compiled, given, row, names)), deltas
    assert kinds(compiled, "all", "all", None) == 1
    assert len(compiled.rows(["q", "all", None]).kinds) == 1


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("scale", ["alike", "other"])
def test_calls_are_those_of_one_delta_for_all(tokens, scale):
    ranks = (1, 2, 3, 4, 5, 6, 7, 8)
    alpha = (lambda rank: 2.0 * rank) if scale == "alike" else (lambda rank: 16.0)
    deltas = [entry(f"d{rank}", "lora", target(), rank=rank, alpha=alpha(rank)) for rank in ranks]
    compiled, one = build(base("llama"), *deltas), build(base("llama"), deltas[-1])
    one.only("d8")
    given, rows = ids(8, tokens), compiled.rows([f"d{rank}" for rank in ranks])
    with torch.inference_mode():
        compiled(given, deltas=rows)
        mixed = operators(lambda: compiled(given, deltas=rows))
        assert mixed <= 1.15 * operators(lambda: one(given))


def test_ranks_cost_no_calls_where_norms_are_taken():
    names, given, calls = [f"d{n}" for n in range(8)], ids(8, 8), []
    for ranks in (range(1, 9), [8] * 8):
        deltas = [
            entry(name, "lora", target(), rank=rank, use_dora=True) for name, rank in zip(names, ranks, strict=True)
        ]
        compiled = build(base("llama"), *deltas)
        rows = compiled.rows(names)
        with torch.inference_mode():
            compiled(given, deltas=rows)
            calls.append(operators(lambda compiled=compiled, rows=rows: compiled(given, deltas=rows)))
    assert calls[0] <= 1.25 * calls[1]  # views of what was padded; one at a time would be some times as many


def test_memory_is_that_of_the_payload():
    ranks = (1, 4, 16, 64)
    compiled = build(base("llama"), *(entry(f"d{rank}", "lora", target(), rank=rank) for rank in ranks))
    rows = compiled.rows([f"d{rank}" for rank in ranks])
    payload = sum(p.nbytes for delta in compiled.deltas.values() for p in delta.parameters())
    held = {id(flat): flat.nbytes for stack in rows.stacks.values() for flat in stack.flats}
    empty = {id(flat): flat[:1].nbytes for stack in rows.stacks.values() for flat in stack.flats}
    assert sum(held.values()) - sum(empty.values()) <= 1.1 * payload  # and a row of zeros for each rank


def test_one_compiled_graph_serves_all_ranks():
    deltas = [entry(f"d{rank}", "lora", target(), rank=rank, alpha=5.0) for rank in (1, 2, 4)]
    compiled = build(BUILDERS["short llama"]().eval(), *deltas)
    fast, graphs = graphs_of(compiled)
    with torch.no_grad():
        for rows in (["d1", "d2", None], ["d4", "d4", "d1"], [{"d2": 0.5}, "d4", "d2"], [None] * 3):
            found = fast(ids(3), deltas=compiled.rows(rows, among=["d1", "d2", "d4"])).logits
            assert close(found, compiled(ids(3), deltas=rows).logits)
    assert len(graphs) == 1


def test_each_row_drops_by_its_own_probability():
    deltas = [entry(f"d{n}", "lora", target(), rank=2 + n, dropout=p) for n, p in enumerate((0.0, 0.5, 0.5))]
    compiled = build(BUILDERS["short llama"]().eval(), *deltas)
    rows = ["d0", "d1", None, "d2"]
    with torch.no_grad():
        whole = compiled(ids(4), deltas=rows).logits
        for delta in compiled.deltas.values():
            delta.train()
        one, two = (compiled(ids(4), deltas=rows).logits for _ in range(2))
    assert torch.equal(one[[0, 2]], two[[0, 2]]) and close(one[[0, 2]], whole[[0, 2]])
    assert not close(one[1], two[1]) and not close(one[3], two[3])
    compiled(ids(4), deltas=rows).logits.sum().backward()
    assert all(p.grad is not None for name in ("d0", "d1", "d2") for p in compiled.deltas[name].parameters())
