"""What threads may do with one view: forwards at once; a switch, or a forward with rows, only while nothing runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from inside import gate
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from views import LLAMA, build, code, outputs

import deltaspec
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.contract.trial import disturb
from deltaspec.diagnostics.findings import DeltaSpecError


@contextmanager
def held(compiled: CompiledModel, call: Callable[[], Any]) -> Iterator[Future[Any]]:
    """Run `call` in another thread, held up inside the backbone's first layer while the context lasts."""
    entered, go_on = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        entered.set()
        assert go_on.wait(60)

    handle = compiled.backbone.model.layers[0].register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        try:
            future = pool.submit(call)
            assert entered.wait(60)
            handle.remove()
            yield future
        finally:
            go_on.set()


SWITCHES: tuple[Callable[[CompiledModel], Any], ...] = (
    lambda c: c.attach("b"),
    lambda c: c.attach("a", strength=0.5),
    lambda c: c.attach("a", "d", strength=0.5),
    lambda c: c.detach(),
    lambda c: c.detach("a"),
    lambda c: c.only("b"),
    lambda c: c.only({"b": 0.5}),
    lambda c: c.detached(),
    lambda c: c.rows(["c", "d"]),  # of kinds that need new forwards
)
CALLS: tuple[Callable[[CompiledModel], Any], ...] = (
    outputs,
    lambda c: outputs(c.backbone),
    lambda c: outputs(nn.parallel.DataParallel(c, [])),
    lambda c: c.generate(**LLAMA.inputs(), max_new_tokens=3, do_sample=False),
    lambda c: outputs(c, deltas=["a", "b"]),
    lambda c: c.generate(**LLAMA.inputs(), max_new_tokens=3, do_sample=False, deltas=["a", "b"]),
)


@pytest.mark.parametrize("call", CALLS)
def test_a_switch_while_another_thread_runs_a_forward_is_refused(call):
    compiled = build()
    compiled.only("b")
    compiled.only("a")
    expected = call(compiled)
    with held(compiled, partial(call, compiled)) as future:
        for switch in SWITCHES:
            with pytest.raises(DeltaSpecError, match=r"c\.view\(\)") as error:
                switch(compiled)
            assert code(error) == "DS456" and compiled.strengths == {"a": 1.0}
        view = compiled.view()
        assert view.attached == ("a",)
        view.only("b")
        with torch.no_grad():
            outputs(view, deltas=["a", None])
    assert torch.equal(future.result(), expected)
    for switch in SWITCHES:
        switch(compiled)
    assert torch.equal(call(compiled.only("a") and compiled), expected)


@pytest.mark.parametrize("call", CALLS)
def test_a_switch_inside_a_forward_is_refused(call):
    compiled = build()
    compiled.only("a")
    expected, errors = call(compiled), []

    def switch(*_: Any) -> None:
        for act in SWITCHES:
            with pytest.raises(DeltaSpecError, match="inside a forward") as error:
                act(compiled)
            errors.append(code(error))

    handle = compiled.backbone.model.layers[1].register_forward_pre_hook(switch)
    assert torch.equal(call(compiled), expected)
    handle.remove()
    assert set(errors) == {"DS456"}


def test_a_switch_between_the_steps_of_generate_is_refused():
    compiled = build()
    compiled.only("a")
    errors = []

    def switch(_: Tensor, scores: Tensor) -> Tensor:
        with pytest.raises(DeltaSpecError) as error:
            compiled.only("b")
        errors.append(code(error))
        return scores

    for more in ({}, {"deltas": ["a", "b"]}):
        compiled.generate(**LLAMA.inputs(), max_new_tokens=3, logits_processor=[switch], **more)
    assert errors == ["DS456"] * 6


@pytest.mark.parametrize("first", CALLS)
def test_rows_run_alone_in_their_view(first):
    compiled = build()
    compiled.only("a")
    calls = CALLS if first in CALLS[4:] else CALLS[4:]
    expected = [call(compiled) for call in calls]
    alone = first(compiled)
    with held(compiled, partial(first, compiled)) as future:
        for call in calls:
            with pytest.raises(DeltaSpecError, match=r"c\.view\(\)") as error:
                call(compiled)
            assert code(error) == "DS445"
    assert torch.equal(future.result(), alone)
    assert all(torch.equal(call(compiled), wanted) for call, wanted in zip(calls, expected, strict=True))


def test_a_forward_that_starts_during_a_switch_waits_for_its_end():
    compiled = build()
    compiled.only("b")
    expected = outputs(compiled)
    compiled.only("a")
    with ThreadPoolExecutor(1) as pool:
        with gate(compiled).switching():
            future = pool.submit(outputs, compiled)
            time.sleep(0.1)
            assert not future.done()
            compiled.only("b")
        assert torch.equal(future.result(), expected)


def test_whatever_a_forward_raises_it_is_counted_out():
    compiled = build()
    for call in (
        lambda: compiled(input_ids=3),
        lambda: compiled.backbone(3),
        lambda: outputs(compiled, deltas=["a"] * 3),
    ):
        with pytest.raises((TypeError, ValueError, AttributeError, DeltaSpecError)):
            call()
        door = gate(compiled)
        assert not door.running and door.rows is None and not door.closed
        compiled.only("a")
        compiled.only("b")


def test_forwards_and_switches_of_many_threads_are_one_after_another_or_refused():
    """Every output is that of one of the active sets as a whole, whatever the threads do."""
    compiled = build()
    expected = []
    for name in ("a", "b"):
        compiled.only(name)
        with torch.no_grad():
            expected.append(outputs(compiled))
    done = threading.Event()

    def forward(_: int) -> int:
        with torch.no_grad():
            found = [outputs(compiled) for _ in range(60)]
        return sum(not any(torch.equal(one, wanted) for wanted in expected) for one in found)

    def switch(_: int) -> int:
        made = 0
        while not done.is_set():
            for name in ("a", "b"):
                try:
                    compiled.only(name)
                    made += 1
                except DeltaSpecError as error:
                    assert error.diagnostics[0].code == "DS456"
        return made

    with ThreadPoolExecutor(4) as pool:
        switches = pool.map(switch, range(2))
        wrong = sum(pool.map(forward, range(2)))
        done.set()
        assert wrong == 0 and sum(switches) > 0


# Gradient checkpointing


class Checkpointed(nn.Module):
    """Recomputes its middle in backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant, self.on = reentrant, True
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if not self.on:
            return self.second(torch.tanh(self.first(x)))
        return checkpoint(lambda h: self.second(torch.tanh(self.first(h))), x, use_reentrant=self.reentrant)


def pair(reentrant: bool) -> tuple[CompiledModel, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(3, 4, requires_grad=True)
    deltas = [{"name": n, "method": "lora", "target": {"type": "Linear"}, "attached": False} for n in ("a", "b")]
    # Tracing would look through the checkpoints.
    compiled = deltaspec.compile(Checkpointed(reentrant), {"deltaspec": 1, "deltas": deltas}, capture="modules")
    compiled(x)
    disturb(compiled)
    return compiled, x


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_backward_after_a_switch_is_refused(reentrant):
    compiled, x = pair(reentrant)
    for switch in (lambda: compiled.only("b"), compiled.detach, lambda: compiled.only({"a": 0.5})):
        compiled.only("a")
        loss = compiled(x).square().mean()
        switch()
        with pytest.raises(DeltaSpecError, match="'a', again") as error:
            loss.backward(retain_graph=True)
        assert code(error) == "DS457"
        compiled.only("a")
        loss.backward()  # back again, it is right
    loss = compiled(x, deltas=["a", "b", None]).square().mean()
    with pytest.raises(DeltaSpecError, match="without its rows") as error:
        loss.backward()
    assert code(error) == "DS457"


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_backward_that_recomputes_nothing_may_follow_a_switch(reentrant):
    compiled, x = pair(reentrant)
    gradients = {}
    for on in (True, False):
        compiled.backbone.on = on
        compiled.only("a")
        loss = compiled(x).square().mean()
        if not on:
            compiled.only("b")
        loss.backward()
        gradients[on] = [p.grad.clone() for p in compiled.deltas["a"].parameters()]
        compiled.zero_grad()
    assert all(torch.equal(one, other) for one, other in zip(gradients[True], gradients[False], strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_as_transformers_does_it(reentrant):
    compiled = build().train()
    inputs = LLAMA.inputs()
    inputs["labels"] = inputs["input_ids"]

    def loss() -> Tensor:
        compiled.only("a")
        found: Tensor = compiled(**inputs, use_cache=False).loss
        return found

    first = loss()
    compiled.only("b")
    first.backward()  # nothing is checkpointed
    expected = [p.grad.clone() for p in compiled.deltas["a"].parameters()]
    compiled.zero_grad()
    compiled.backbone.gradient_checkpointing_enable({"use_reentrant": reentrant})
    compiled.backbone.enable_input_require_grads()
    second = loss()
    compiled.only("b")
    with pytest.raises(DeltaSpecError) as error:
        second.backward()
    assert code(error) == "DS457"
    view = compiled.view()
    third = loss()
    view.only("b")  # a view's switches are its own
    third.backward()
    found = [p.grad for p in compiled.deltas["a"].parameters()]
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(found, expected, strict=True))
    compiled.zero_grad()
    compiled.eval()  # nothing is checkpointed in evaluation mode
    fourth = loss()
    compiled.only("b")
    fourth.backward()
