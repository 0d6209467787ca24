"""Deltas that come to a live model and leave it, against models that were compiled with what is there."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deltaspec
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.planning.lock import lock

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Identity())


def spec(*names: str, method: str = "lora", target: str = "0", **rest: Any) -> dict[str, Any]:
    return {"deltaspec": 1, "deltas": [{"name": n, "method": method, "target": target, **rest} for n in names]}


A, B = spec("a", "b"), spec("z", method="adapter", target="2")
MIX = {"name": "mix", "from": {"a": 0.5, "b": 2}, "combine": "cat", "attached": False}


def build(*specs: Any, **options: Any) -> CompiledModel:
    return deltaspec.compile(model(), *specs, example_inputs=X, **options)


@torch.no_grad()
def disturb(c: CompiledModel) -> None:
    generator = torch.Generator().manual_seed(1)
    for delta in c.deltas.values():
        for parameter in delta.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def assert_same(c: CompiledModel, fresh: CompiledModel) -> None:
    """Compare a model with one that was compiled at once with all that it has."""
    assert c.plan == fresh.plan and lock(c.plan) == lock(fresh.plan)
    assert list(c.state_dict()) == list(fresh.state_dict())
    assert sorted(n for n, _ in c.named_parameters()) == sorted(n for n, _ in fresh.named_parameters())
    fresh.load_state_dict(c.state_dict())
    fresh.only(*c.attached)
    assert torch.equal(c(X), fresh(X))


@pytest.mark.parametrize("capture", ["modules", "symbolic"])
def test_add(capture: str, tmp_path: Path) -> None:
    """What is there stays: objects, bits, gradients, optimizer, rows, views; the rest is a model compiled at once."""
    c, once = build(A, capture=capture), build(A, B, capture=capture)
    view, parameters = c.view(), list(c.trainable_parameters())
    optimizer = torch.optim.AdamW(parameters, 0.1)
    c(X).square().sum().backward()
    optimizer.step()
    bits, rows = [(p.detach().clone(), p.grad) for p in parameters], c.rows(["a", None, "b"])
    before = c(X, deltas=rows)
    c.add(B, example_inputs=X)
    assert c.attached == ("a", "b", "z") and view.attached == ("a", "b") and c.capture == capture
    assert torch.equal(c(X, deltas=rows), before)
    for parameter, (value, gradient) in zip(parameters, bits, strict=True):
        assert torch.equal(parameter, value) and parameter.grad is gradient
    assert_same(c, once)
    view.only("z")
    once.only("z")
    assert torch.equal(view(X), once(X))
    once.attach()
    c.save(tmp_path)
    ways: list[Callable[[CompiledModel], Any]] = [
        copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.view(), lambda m: m.simplified(),
        lambda m: deltaspec.restore(model(), tmp_path, capture=capture, example_inputs=X),
    ]  # fmt: skip
    for way in ways:
        assert torch.equal(way(c)(X), once(X))
    assert torch.equal(c.merge("a", "b")(X), once.merge("a", "b")(X))
    optimizer.zero_grad()
    c(X).square().sum().backward()
    optimizer.step()
    assert not torch.equal(parameters[0], bits[0][0])


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        (A, "DS407"),
        (spec("q", target="nope"), "DS302"),
        (spec("q", method="full"), "DS406"),
        (spec("q", params={"rank": {"budget": 1}}), "DS408"),
        (spec("q") | {"expect": {"trainable": 1}}, "DS503"),
        ({"deltaspec": 1, "deltas": [MIX | {"from": {"nobody": 1}}]}, "DS223"),
        ({"deltaspec": 1, "seed": 3, "deltas": [MIX]}, "DS487"),
        ({"deltaspec": 1, "deltas": [MIX], "expect": {"trainable": 0}}, "DS487"),
    ],
)
def test_add_refused(wrong: dict[str, Any], code: str) -> None:
    c = build(A)
    state, output, plan = list(c.state_dict()), c(X), c.plan
    with pytest.raises(DeltaSpecError, match=code):
        c.add(wrong, example_inputs=X)
    assert list(c.state_dict()) == state and torch.equal(c(X), output) and c.plan is plan


def test_derived_of_deltas_that_are_there() -> None:
    """The specs become one, as if a user had written it so."""
    c, once = build(A, B), build({"deltaspec": 1, "deltas": [*A["deltas"], *B["deltas"], MIX]})
    disturb(c)
    c.add({"deltaspec": 1, "deltas": [MIX]})
    assert_same(c, once)
    with c.only("mix"), once.only("mix"):
        assert torch.equal(c(X), once(X))
    with pytest.raises(DeltaSpecError, match="DS486"):
        c.remove("a")
    c.remove("a", "mix")
    assert_same(c, build({"deltaspec": 1, "deltas": [*spec("b")["deltas"], *B["deltas"]]}))


def test_remove() -> None:
    c = build(A, B)
    disturb(c)
    view, rows, others = c.view(), c.rows(["a", None, "b"]), c.rows(["b", None, "z"])
    view.attach("a", strength=0.5)
    with torch.no_grad():
        expected = c(X, deltas=others)
    gone = weakref.ref(next(c.deltas["a"].parameters()))
    c.remove("a")
    gc.collect()
    assert (
        gone() is None and c.attached == view.attached == ("b", "z") and not any(".a." in key for key in c.state_dict())
    )
    with torch.no_grad():
        assert torch.equal(c(X, deltas=others), expected)
    assert_same(c, build(spec("b"), B))
    refused: list[Callable[[], Any]] = [
        lambda: c(X, deltas=rows), lambda: view(X, deltas=rows), lambda: c(X, deltas=["a", None, None]),
        lambda: c.attach("a"), lambda: view.only("a"), lambda: c.remove("a"),
    ]  # fmt: skip
    for call in refused:
        with pytest.raises(DeltaSpecError, match="DS434"):
            call()
    c.add(spec("a"), example_inputs=X)  # another one of the name
    with pytest.raises(DeltaSpecError, match="DS434"):
        c(X, deltas=rows)
    c.remove("a", "b", "z")
    assert torch.equal(c(X), model()(X)) and not c.deltas and c.plan.trainable == 0
    c.add(A, example_inputs=X)
    assert_same(c, build(A))


def test_rows_in_compiled_graphs() -> None:
    """A graph that was compiled for rows refuses those that name what is gone, and runs the others."""
    c = build(A)
    disturb(c)
    compiled, rows, others = torch.compile(c, backend="eager"), c.rows(["a", None, "b"]), c.rows(["b", "b", None])
    with torch.no_grad():
        expected = c(X, deltas=others)
        assert torch.equal(compiled(X, deltas=rows), c(X, deltas=rows))
        c.add(B, example_inputs=X).remove("a")
        torch.testing.assert_close(compiled(X, deltas=others), expected)
        with pytest.raises(Exception, match="DS434"):
            compiled(X, deltas=rows)


def test_beside_a_library(tmp_path: Path) -> None:
    """Deltas of libraries apply after those that are added; their names are taken, and they are not removed here."""
    saved = build(spec("lib", method="adapter", target="0"))
    disturb(saved)
    saved.save(tmp_path)
    c, once = build(A), build(A, spec("n"))
    for m in (c, once):
        m.library(tmp_path, example_inputs=X)
    c.attach("lib")
    with pytest.raises(DeltaSpecError, match="DS407"):
        c.add(spec("lib"), example_inputs=X)
    with pytest.raises(DeltaSpecError, match="DS488"):
        c.remove("lib")
    c.add(spec("n"), example_inputs=X)
    with torch.no_grad():
        for parameter in c.deltas["n"].parameters():
            parameter.add_(0.1)
    once.load_state_dict(c.state_dict())
    once.attach("lib")
    assert c.attached == once.attached == ("a", "b", "n", "lib") and torch.equal(c(X), once(X))


def test_during_a_forward() -> None:
    """Neither is possible inside a forward; taking out, in a forward of no view."""
    c = build(A)
    view, raised = c.view(), []

    def hook(*_: Any) -> None:
        for call in (lambda: c.remove("a"), lambda: view.remove("a"), lambda: c.add(B)):
            with pytest.raises(DeltaSpecError, match="DS456") as caught:
                call()
            raised.append(caught)

    c.backbone[1].register_forward_hook(hook)
    c(X)
    assert len(raised) == 3 and list(c.deltas) == ["a", "b"]


def test_compile_names_add() -> None:
    with pytest.raises(DeltaSpecError, match=r"c\.add\(spec\)"):
        deltaspec.compile(build(A), B)


@pytest.mark.parametrize("seed", range(3))
def test_any_sequence(seed: int, tmp_path: Path) -> None:
    """Whatever comes, goes, is attached and trained: a fresh compile of what is there gives the same bits."""
    choose, c = random.Random(seed), build(spec("d0"))
    there, order, number = ["d0"], {"d0": spec("d0")}, 1
    views = [c, c.view()]
    for _ in range(12):
        action, view = choose.choice(["add", "add", "remove", "switch", "train", "rows"]), choose.choice(views)
        if action == "add":
            name, method = f"d{number}", choose.choice(["lora", "adapter", "ia3", "bitfit"])
            number += 1
            order[name] = spec(name, method=method, target=choose.choice("02"), attached=choose.random() < 0.5)
            view.add(order[name], example_inputs=X)
            there.append(name)
        elif action == "remove" and len(there) > 1:
            name = there.pop(choose.randrange(len(there)))
            view.remove(name)
        elif action == "switch":
            view.only(*choose.sample(there, choose.randint(0, len(there))))
        elif action == "train" and view.attached:
            optimizer = torch.optim.SGD(view.trainable_parameters(), 0.1)
            view(X).square().mean().backward()
            optimizer.step()
        elif action == "rows":
            chosen = [choose.choice([None, *there]) for _ in range(3)]
            with torch.no_grad():
                mixed = view(X, deltas=chosen)
                for row, name in enumerate(chosen):
                    with view.only(*([name] if name else [])):
                        torch.testing.assert_close(mixed[row], view(X)[row])
    fresh = build(*(order[name] for name in there))
    for view in views:
        assert_same(view, fresh)
    c.save(tmp_path)
    restored = deltaspec.restore(model(), tmp_path, example_inputs=X).only(*c.attached)
    assert restored is not None
