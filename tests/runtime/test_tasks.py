"""Tasks of asyncio over one view: one never runs under what another attached since."""

from __future__ import annotations

import asyncio

import pytest
import torch
from live_model import build, lora, net
from torch import Tensor

from deltaspec.compiler.compiled import CompiledModel
from deltaspec.diagnostics.findings import DeltaSpecError

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def compiled() -> CompiledModel:
    return build(*(lora(name, ["up", "head"], attached=False) for name in "ab"), model=net())


async def serve(model: CompiledModel, name: str, pause: float) -> Tensor:
    with model.only(name):
        await asyncio.sleep(pause)
        return model(X)


def test_tasks_that_switch_in_between_are_refused(compiled):
    async def both() -> list[Tensor | BaseException]:
        return await asyncio.gather(serve(compiled, "a", 0.02), serve(compiled, "b", 0.01), return_exceptions=True)

    found = asyncio.run(both())
    expected = compiled.only("b") and compiled(X)
    assert isinstance(found[0], DeltaSpecError) and "DS456" in str(found[0]) and "c.view()" in str(found[0])
    assert isinstance(found[1], Tensor) and torch.equal(found[1], expected)


def test_tasks_with_a_view_each_or_one_after_the_other(compiled):
    expected = {name: compiled.only(name) and compiled(X) for name in "ab"}
    compiled.detach()

    async def views() -> list[Tensor]:
        return await asyncio.gather(*(serve(compiled.view(), name, 0.01) for name in "ab"))

    async def turns() -> list[Tensor]:
        lock = asyncio.Lock()

        async def one(name: str) -> Tensor:
            async with lock:
                return await serve(compiled, name, 0.005)

        return await asyncio.gather(one("a"), one("b"), one("a"))

    for found, names in ((asyncio.run(views()), "ab"), (asyncio.run(turns()), "aba")):
        assert all(torch.equal(output, expected[name]) for output, name in zip(found, names, strict=True))


def test_a_task_that_never_switched_runs_under_what_is_attached(compiled):
    compiled.only("a")
    expected = compiled(X)

    async def run() -> Tensor:
        return compiled(X)

    assert torch.equal(asyncio.run(run()), expected)
