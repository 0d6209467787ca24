"""Which row is under which deltas: wrong assignments are refused, and what went wrong leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
from mixed_rows import alone, batch, build, close, entry, family, ids
from tiny_models import BUILDERS, base

import deltaspec
from deltaspec.diagnostics.findings import DeltaSpecError


def test_order_of_a_stack_is_that_of_the_spec_as_everywhere():
    compiled = family(base("llama"))
    given = batch("llama")
    with torch.no_grad():
        left = compiled(**given, deltas=[("adapter", "again")] * 5).logits
        right = compiled(**given, deltas=[("again", "adapter")] * 5).logits
    assert torch.equal(left, right)


def test_what_is_attached_does_not_reach_rows_and_stays():
    compiled = family(base("llama"))
    compiled.only("adapter")
    given = batch("llama")
    with torch.no_grad():
        before = compiled(**given).logits
        mixed = compiled(**given, deltas=[None, "lora2", "ia3", None, "adapter"]).logits
        assert compiled.attached == ("adapter",) and torch.equal(compiled(**given).logits, before)
        assert close(mixed[4], before[4])
        assert close(mixed[0], alone(compiled, given, 0, None))


def test_under_compile_rows_must_be_made_outside():
    torch._dynamo.reset()
    compiled = build(BUILDERS["short llama"]().eval(), entry("a", "lora"))
    fast = torch.compile(compiled, fullgraph=True, backend="eager")
    with torch.no_grad(), pytest.raises(Exception, match="DS444"):
        fast(ids(), deltas=["a"] * 5)
    rows = compiled.rows(["a"] * 5)
    compiled.detach()
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(Exception, match="DS444"):
        fast(ids(), deltas=rows)


def test_rows_made_before_a_cast_are_made_anew():
    compiled = family(base("llama"))
    rows = compiled.rows(["lora2", "adapter", None, "ia3", "again"])
    compiled.double()
    given = batch("llama")
    with torch.no_grad():
        mixed = compiled(**given, deltas=rows).logits
        assert mixed.dtype is torch.float64
        assert close(mixed[4], alone(compiled, given, 4, "again"), 1e-10)


@pytest.mark.parametrize(
    ("deltas", "error", "text"),
    [
        (["a", "nobody", None, "somebody", "a"], deltaspec.DeltaSpecError, "(?s)DS434.*nobody.*DS434.*somebody"),
        (["a", "a"], DeltaSpecError, "DS443.*2 rows, and the batch has 5"),
        (["a"], DeltaSpecError, "DS443.*1 row, and the batch has 5"),
        ([], DeltaSpecError, "DS443.*0 rows, and the batch has 5"),
        ("a", TypeError, "one entry a row"),
        ([1, None, None, None, None], TypeError, r"deltas\[0\]"),
        ([("a", 2), None, None, None, None], TypeError, r"deltas\[0\]"),
        ([("a", "a"), None, None, None, None], ValueError, "twice"),
        ([{"a": float("inf")}, None, None, None, None], ValueError, "finite"),
        ([{"a": "much"}, None, None, None, None], TypeError, "strength of 'a'"),
        ([("full1", "full2"), None, None, None, None], DeltaSpecError, "DS436"),
    ],
)
def test_wrong_assignments_are_refused_before_anything_runs(deltas, error, text):
    compiled = build(
        base("llama"),
        entry("a", "lora"),
        entry("full1", "full", {"role": "mlp.down"}),
        entry("full2", "full", {"role": "mlp.down"}),
    )
    with pytest.raises(error, match=text):
        compiled(ids(), deltas=deltas)
    assert not any("forward" in module.__dict__ for module in compiled.backbone.modules())


def test_an_error_in_a_forward_with_rows_leaves_nothing_behind():
    compiled = build(base("llama"), entry("a", "lora"))
    with torch.no_grad():
        before = compiled(ids()).logits
        with pytest.raises(IndexError):
            compiled(torch.full((2, 3), 10**6), deltas=["a", None])
        assert torch.equal(compiled(ids()).logits, before)
        assert close(compiled(ids(), deltas=["a"] * 5).logits[1], alone(compiled, {"input_ids": ids()}, 1, "a"))
