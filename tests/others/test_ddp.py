"""DistributedDataParallel: two processes train what one would, whichever deltas a step uses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ddp_worker import NAMES, WORLD, Gradients, X, build, steps, work
from torch import multiprocessing


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found."""
    folder = tmp_path_factory.mktemp("ddp")
    multiprocessing.spawn(work, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def close(one: Gradients, other: Gradients) -> bool:
    """Return whether gradients agree, and the same are missing."""
    return all(
        (mine is None) == (theirs is None) and (mine is None or torch.allclose(mine, theirs, atol=1e-6))
        for name in NAMES
        for mine, theirs in zip(one[name], other[name], strict=True)
    )


@pytest.mark.parametrize("model", ["all", "view"])
def test_gradients_are_those_of_one_process_and_unused_deltas_get_none(found, model):
    compiled = build()
    expected = steps(compiled, compiled, slice(0, 4))
    for process in found:
        assert all(close(one, other) for one, other in zip(process[model], expected, strict=True))
    used = [{name for name in NAMES if step[name][0] is not None} for step in found[0][model]]
    assert used == [{"a"}, {"a"}, {"b"}, {"b", "c"}, {"a", "b", "c"}]


def test_every_tensor_is_in_the_state_dict(found):
    assert all(process["keys"] for process in found)


def test_without_a_search_for_unused_parameters_the_others_are_frozen(found):
    compiled = build()
    compiled.only("a")
    optimizer = torch.optim.SGD(compiled.trainable_parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        compiled(X).square().mean().backward()
        optimizer.step()
    for process in found:
        trained = zip(process["trained"], compiled.deltas["a"].parameters(), strict=True)
        assert all(torch.allclose(one, other, atol=1e-6) for one, other in trained)
