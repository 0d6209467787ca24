"""FSDP and tensor parallelism: two processes train what one would, or the model is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from live_model import build, lora
from shards_worker import ADAPTER, WAYS, WORLD, steps, whole, work
from torch import multiprocessing


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found."""
    folder = tmp_path_factory.mktemp("shards")
    multiprocessing.spawn(work, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("way", WAYS)
def test_shards_train_what_one_process_would(found, way):
    alone = build(ADAPTER if way == "layers" else lora())
    start = whole(alone)
    losses = steps(alone, alone, slice(0, 4))
    for process in found:
        assert process[way][0] == pytest.approx(losses, abs=1e-4)
        for key, tensor in process[way][1].items():
            assert not torch.equal(tensor, start[key])
            torch.testing.assert_close(tensor, whole(alone)[key], rtol=1e-3, atol=1e-4)


def test_flags_come_back(found):
    assert all(all(process["flags"]) for process in found)


def test_what_is_loaded_after_an_evaluation_is_what_is_trained(found):
    for process in found:
        saved, loaded = process["loaded"]
        assert all(torch.equal(loaded[key], value) for key, value in saved.items())


@pytest.mark.parametrize(("case", "module"), [
    ("before", "model.layers.0"), ("parallel before", "model.layers.0.self_attn.q_proj"),
    ("parallel after", "model.layers.0.self_attn.q_proj"),
])  # fmt: skip
def test_what_deltas_cannot_follow_is_refused(found, case, module):
    for process in found:
        assert "DS459" in process[case] and module in process[case] and "fully_shard(c)" in process[case]
