"""The pass over regions of mixed batches: equal within round-off, in place only where nothing else holds the output."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from mixed_rows import alone, batch, build, close, entry
from tiny_models import base

import deltaspec
from deltaspec.contract.trial import disturb
from deltaspec.graphs.passes.fuse_rows import add_low_rank_rows, add_low_rank_rows_

ROWS = ["a", None, "b", {"a": 0.5}, "a"]
PASS = {add_low_rank_rows.__code__, add_low_rank_rows_.__code__}


def calls(compiled: Any, host: str, rows: list[Any], **inputs: Any) -> list[str]:
    """Return the functions of the pass that the region of a host calls, while these rows run."""
    found: list[str] = []

    def record(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code in PASS:
            found.append(frame.f_code.co_name)

    def begin(*_: Any) -> None:
        found.clear()  # of an earlier forward, such as the trial of the rows
        sys.setprofile(record)

    module = compiled.backbone.get_submodule(host)
    hooks = module.register_forward_pre_hook(begin), module.register_forward_hook(lambda *_: sys.setprofile(None))
    with torch.no_grad():
        compiled(**inputs, deltas=rows)
    for hook in hooks:
        hook.remove()
    compiled.detach()
    return found


def site(compiled: Any) -> str:
    return next(s.site.row.fqn for s in compiled.plan.deltas[0].sites)


def test_a_linear_host_is_accumulated_into():
    compiled = build(base("llama"), entry("a", "lora"), entry("b", "lora"))
    assert calls(compiled, site(compiled), ROWS, **batch("llama")) == ["add_low_rank_rows_"]


def test_chained_links_are_accumulated_into():
    other = entry("c", "lora", rank=3)
    compiled = build(base("llama"), entry("a", "lora"), entry("b", "lora"), other)
    found = calls(compiled, site(compiled), [("a", "c"), "b", None, "c", "a"], **batch("llama"))
    assert found == ["add_low_rank_rows_"] * 2


def test_a_host_that_may_keep_its_output_is_not_written_into():
    class Keeping(torch.nn.Linear):
        def forward(self, input):
            self.kept = super().forward(input)
            return self.kept

    torch.manual_seed(0)
    model = torch.nn.Sequential(Keeping(8, 8), torch.nn.Linear(8, 4)).eval()
    target = {"type": "Linear"}
    deltas = [entry("a", "lora", target), entry("b", "lora", target)]
    x = torch.randn(2, 3, 8)
    compiled = deltaspec.compile(model, {"deltaspec": 1, "deltas": deltas}, example_inputs=x)
    disturb(compiled)
    assert calls(compiled, "0", ["a", "b"], input=x) == ["add_low_rank_rows"]
    assert calls(compiled, "1", ["a", "b"], input=x) == ["add_low_rank_rows_"]
    with torch.no_grad():
        compiled(x, deltas=["a", "b"])
        assert torch.equal(compiled.backbone[0].kept, model[0](x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 6, 40])
def test_rows_are_what_they_are_alone_at_any_number_of_tokens(tokens, mode):
    compiled = build(base("llama"), entry("a", "lora"), entry("b", "lora"))
    given = {"input_ids": torch.randint(3, 48, (len(ROWS), tokens), generator=torch.Generator().manual_seed(0))}
    with mode():
        mixed = compiled(**given, deltas=ROWS).logits
        for row, deltas in enumerate(ROWS):
            assert close(mixed[row], alone(compiled, given, row, deltas)), deltas
        assert torch.equal(mixed[1], compiled(**given, deltas=[None] * 5).logits[1])


def test_with_and_without_gradients_agree():
    compiled = build(base("llama"), entry("a", "lora"), entry("b", "lora"))
    given = batch("llama")
    trained = compiled(**given, deltas=ROWS).logits
    with torch.no_grad():
        assert close(trained, compiled(**given, deltas=ROWS).logits)
    trained.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in compiled.deltas["a"].parameters())


def test_modes_follow_each_other():
    compiled = build(base("llama"), entry("a", "lora"), entry("b", "lora"))
    given, rows = batch("llama"), compiled.rows(ROWS)
    with torch.inference_mode():
        first = compiled(**given, deltas=rows).logits.clone()
    with torch.no_grad():
        second = compiled(**given, deltas=rows).logits
    assert torch.equal(first, second)
    compiled(**given, deltas=rows).logits.sum().backward()


def test_autocast_runs_the_formula():
    compiled = build(base("llama"), entry("a", "lora"), entry("b", "lora"))
    given = batch("llama")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixed = compiled(**given, deltas=ROWS).logits
        for row, deltas in enumerate(ROWS):
            assert close(mixed[row].float(), alone(compiled, given, row, deltas).float(), 5e-2)
