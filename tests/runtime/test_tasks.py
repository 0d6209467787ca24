"""Tasks of asyncio over one view: one never runs under what another attached since."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

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


async def serve(model: CompiledModel, name: str, pause: Awaitable[Any]) -> Tensor:
    with model.only(name):
        await pause
        return model(X)


def test_tasks_that_switch_in_between_are_refused(compiled):
    async def both() -> list[Tensor | BaseException]:
        inside, done = asyncio.Event(), asyncio.Event()

        async def one() -> Tensor:
            try:
                return await serve(compiled, "a", inside.wait())
            finally:
                done.set()

        async def other() -> Tensor:
            with compiled.only("b"):
                inside.set()
                await done.wait()  # `one` has put back what it found
                return compiled(X)

        return await asyncio.gather(one(), other(), return_exceptions=True)

    for error, was, now in zip(asyncio.run(both()), ("'a'", "'b'"), ("'b'", "nothing"), strict=True):
        assert isinstance(error, DeltaSpecError) and "DS456" in str(error) and "c.view()" in str(error)
        assert f"attached {was}" in str(error) and f"attached {now} since" in str(error)


def test_tasks_with_a_view_each_or_one_after_the_other(compiled):
    expected = {name: compiled.only(name) and compiled(X) for name in "ab"}
    compiled.detach()

    async def views() -> list[Tensor]:
        return await asyncio.gather(*(serve(compiled.view(), name, asyncio.sleep(0)) for name in "ab"))

    async def turns() -> list[Tensor]:
        lock = asyncio.Lock()

        async def one(name: str) -> Tensor:
            async with lock:
                return await serve(compiled, name, asyncio.sleep(0))

        return await asyncio.gather(one("a"), one("b"), one("a"))

    for found, names in ((asyncio.run(views()), "ab"), (asyncio.run(turns()), "aba")):
        assert all(torch.equal(output, expected[name]) for output, name in zip(found, names, strict=True))


def test_a_task_that_never_switched_runs_under_what_is_attached(compiled):
    compiled.only("a")
    expected = compiled(X)

    async def run() -> Tensor:
        return compiled(X)

    assert torch.equal(asyncio.run(run()), expected)
