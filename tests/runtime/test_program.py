"""Switching: what a switch writes, what it leaves, and that nothing of one active set reaches the next."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from inside import builder, program
from models import Counting
from torch import Tensor, nn

import deltaspec
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.diagnostics.findings import DeltaSpecError

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
DELTAS = {"a": ("lora", "0"), "b": ("lora", "0"), "c": ("lora", ["0", "2"]), "d": ("bitfit", "2")}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), Counting(), nn.Linear(4, 4))


def build(base: nn.Module | None = None) -> CompiledModel:
    deltas: list[dict[str, Any]] = [
        {"name": name, "method": method, "target": target} for name, (method, target) in DELTAS.items()
    ]
    spec = {"deltaspec": 1, "deltas": deltas}
    compiled = deltaspec.compile(base or model(), spec, capture="modules", example_inputs=X).eval()
    with torch.no_grad():
        for parameter in compiled.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    compiled.detach()
    return compiled


def forwards(compiled: CompiledModel) -> dict[str, Any]:
    return {n: m.__dict__["forward"] for n, m in compiled.backbone.named_modules() if "forward" in m.__dict__}


def buffers(compiled: CompiledModel) -> dict[str, tuple[int, Tensor]]:
    return {n: (id(b), b.clone()) for n, b in compiled.backbone.named_buffers() if "deltaspec" not in n}


def same_buffers(one: dict[str, tuple[int, Tensor]], other: dict[str, tuple[int, Tensor]]) -> bool:
    return one.keys() == other.keys() and all(
        one[n][0] == other[n][0] and torch.equal(one[n][1], other[n][1]) for n in one
    )


SETS = [(), ("a",), ("b",), ("c",), ("d",), ("a", "d"), ("a", "b", "c", "d")]


@pytest.mark.parametrize("first", SETS)
@pytest.mark.parametrize("second", SETS)
def test_every_switch_ends_as_if_it_had_come_from_nothing(first, second):
    compiled, fresh = build(), build()
    fresh.only(*second)
    before = buffers(compiled)
    for _ in range(2):  # the first time programs are made, the second time they are there
        compiled.only(*first)
        if first:  # what a detached backbone writes is its own
            compiled(X)
        compiled.only(*reversed(second))
        assert compiled.attached == second
        assert forwards(compiled).keys() == forwards(fresh).keys()
        assert same_buffers(buffers(compiled), before) or first == second
        compiled.detach()
        assert forwards(compiled) == {} and same_buffers(buffers(compiled), before)
    assert torch.equal(compiled.attach(*second)(X) if second else compiled(X), fresh(X))


def test_a_switch_makes_nothing_and_writes_the_forwards_that_were_made_before():
    compiled = build()
    seen = {}
    for _ in range(2):
        for names in SETS:
            compiled.only(*names)
            found = seen.setdefault(names, forwards(compiled))
            now = forwards(compiled)
            assert now.keys() == found.keys() and all(now[n] is found[n] for n in now)


def test_flags_that_change_while_nothing_is_attached_are_kept():
    compiled = build()
    weight, bias = compiled.backbone[0].weight, compiled.backbone[0].bias
    for state in ((True, False), (False, False), (False, True), (True, True)):
        weight.requires_grad, bias.requires_grad = state
        for names in ("a", "b"):
            compiled.only(names)
            assert not weight.requires_grad and not bias.requires_grad
        with compiled.detached():
            assert (weight.requires_grad, bias.requires_grad) == state
        assert not weight.requires_grad and not bias.requires_grad
        compiled.detach()
        assert (weight.requires_grad, bias.requires_grad) == state


@pytest.mark.parametrize("attached", [(), ("a",)])
def test_parameters_that_a_load_replaced_are_frozen_and_thawed_in_place_of_the_old(attached):
    base = model()
    base[2].weight.requires_grad = False
    compiled = build(base)
    compiled.only(*attached)
    old = compiled.backbone[0].weight
    compiled.load_state_dict({k: v.clone() for k, v in compiled.state_dict().items()}, assign=True)
    assert compiled.backbone[0].weight is not old
    for names in (("b",), (), ("c",), ()):
        compiled.only(*names)
        flags = [p.requires_grad for n, p in compiled.backbone.named_parameters() if "deltaspec" not in n]
        assert flags == ([False] * 4 if names else [True, True, False, True])


@pytest.mark.parametrize("runs", [0, 2])
def test_buffers_that_were_cast_while_attached_stay_cast_and_hold_what_they_held(runs):
    base = model()
    base[1].count += 5
    compiled = build(base)
    compiled.only("a")
    for _ in range(runs):
        compiled(X)
    compiled.double()
    for _ in range(runs):
        compiled(X.double())
    counting = compiled.backbone[1]
    kept = counting.count
    compiled.only("b")
    assert counting.count is kept and counting.count.dtype == counting.last.dtype == torch.float64
    assert counting.count == 5 and not counting.last.any()
    compiled(X.double())
    compiled.detach()
    assert counting.count is kept and counting.count == 5 and not counting.last.any()


def test_what_users_write_into_buffers_while_nothing_is_attached_stays():
    compiled = build()
    compiled.only("a")
    compiled(X)
    compiled.detach()
    compiled.backbone[1].count.fill_(3)
    compiled.backbone[1].last = torch.ones(4)
    compiled.backbone[1].register_buffer("absent", torch.ones(1))
    before = buffers(compiled)
    for names in (("a",), ("b",), ()):
        compiled.only(*names)
        compiled(X) if names else None
    assert same_buffers(buffers(compiled), before) and "1.absent" in before


def test_a_buffer_of_inference_mode_is_put_back_too():
    compiled = build()
    with torch.inference_mode():
        compiled.backbone[1].count = torch.full((), 7.0)
    for names in (("a",), ("b",)):
        compiled.only(*names)
        with torch.inference_mode():
            compiled(X)
        assert compiled.backbone[1].count == 8
    compiled.detach()
    assert compiled.backbone[1].count == 7


def test_a_copy_of_an_attached_model_puts_back_what_the_original_wrote():
    compiled = build()
    compiled.only("a")
    for _ in range(3):
        compiled(X)
    twin = copy.deepcopy(compiled)
    compiled.detach()
    for names in (("b",), ()):
        twin.only(*names)
        assert twin.backbone[1].count == 0 and not twin.backbone[1].last.any()
    assert all(p.requires_grad for p in twin.backbone.parameters())
    assert forwards(twin) == {}


def test_a_copy_of_a_detached_model_keeps_what_was_written_since():
    compiled = build()
    compiled.only("a")
    compiled.detach()
    compiled(X)
    twin = copy.deepcopy(compiled)
    before = buffers(twin)
    assert twin.backbone[1].count == 1
    for names in (("a",), ("b",), ()):
        twin.only(*names)
        twin(X) if names else None
    assert same_buffers(buffers(twin), before)


class Broken(Exception):
    """Raised on purpose."""


@pytest.mark.parametrize("before", [(), ("a",), ("c", "d")])
def test_a_switch_that_fails_changes_nothing(before, monkeypatch):
    compiled = build()
    compiled.only(*before)
    expected, written, kept = forwards(compiled), buffers(compiled), compiled.attached
    flags = [p.requires_grad for p in compiled.parameters()]

    def refuse(*args: Any) -> Any:
        raise Broken

    with monkeypatch.context() as patch:
        patch.setattr(builder(compiled), "build", refuse)
        for act in (lambda: compiled.only("b"), lambda: compiled.attach("b")):
            with pytest.raises(Broken):
                act()
            assert compiled.attached == kept and forwards(compiled) == expected
            assert same_buffers(buffers(compiled), written)
            assert flags == [p.requires_grad for p in compiled.parameters()]
    compiled.only("b")
    assert compiled.attached == ("b",)


def test_rivals_are_refused_at_every_attempt_from_wherever():
    deltas = [{"name": n, "method": "full", "target": "0", "attached": False} for n in "ab"]
    compiled = deltaspec.compile(model(), {"deltaspec": 1, "deltas": deltas})
    for names in ((), ("a",), ("b",), ()):
        compiled.only(*names)
        for act in (lambda: compiled.only("a", "b"), lambda: compiled.only("b", "a"), compiled.attach):
            with pytest.raises(DeltaSpecError, match="DS436"):
                act()
            assert compiled.attached == names


@pytest.mark.parametrize("wrong", [["a"], {"a"}, 3, None])
def test_what_is_no_name_is_refused(wrong):
    compiled = build()
    compiled.only("a")
    compiled.only("b")
    for act in (compiled.only, compiled.attach, compiled.detach):
        with pytest.raises(TypeError, match="one by one"):
            act(wrong)
        assert compiled.attached == ("b",)


def test_programs_that_write_the_same_modules_share_what_undoes_them():
    compiled = build()
    programs = [program(compiled, *names) for names in (("a",), ("b",), ("a", "b"), ("c",), ("d",))]
    assert programs[0].footprint is programs[1].footprint is programs[2].footprint
    assert len({id(each.footprint) for each in programs}) == 3


@pytest.mark.parametrize("assign", [False, True])
def test_what_is_loaded_into_buffers_while_attached_stays_and_what_forwards_write_does_not(assign):
    compiled = build()
    compiled.only("a")
    compiled(X)
    state = {key: value.clone() for key, value in compiled.state_dict().items()}
    compiled.load_state_dict(state | {"backbone.1.count": torch.tensor(7.0)}, assign=assign)
    compiled(X)
    assert float(compiled.backbone[1].count) == 8
    compiled.only("b")
    assert float(compiled.backbone[1].count) == 7
    compiled.detach()
    assert float(compiled.backbone[1].count) == 7


@pytest.mark.parametrize(
    ("method", "params", "capture"),
    [("lora", {"rank": 1}, "modules"), ("lora", {"rank": 1}, "symbolic"), ("adapter", {"width": 1}, "modules")],
)
def test_long_chain(method: str, params: dict[str, Any], capture: str) -> None:
    """Four hundred deltas at one site: emitting their graph nests no such number of calls."""
    deltas = [{"name": f"d{i}", "method": method, "params": params, "target": "0"} for i in range(400)]
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    compiled = deltaspec.compile(base, {"deltaspec": 1, "deltas": deltas}, capture=capture, example_inputs=X)
    some = ["d3", "d70", "d399"]
    with torch.no_grad():
        for name in some:
            for parameter in compiled.deltas[name].parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    output = compiled(X.double())
    output.sum().backward()
    assert compiled.deltas["d300"].tensor(next(key for key, _ in compiled.deltas["d300"].tensors())).grad is not None
    with compiled.only(*some):  # the others are still what they were drawn as, and add nothing
        torch.testing.assert_close(output, compiled(X.double()))
