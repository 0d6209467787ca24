"""Tensors that are sharded over processes (FSDP2): one process writes, all go on or fail together."""

from __future__ import annotations

import json
import os

import torch
from ddp_worker import NAMES, WORLD, Net, build
from saving_worker import work
from torch import multiprocessing

import deltaspec


def test_sharded_deltas_are_saved_whole(tmp_path):
    multiprocessing.spawn(work, (str(tmp_path),), nprocs=WORLD)
    alone = build()
    alone.save(tmp_path / "alone")
    torch.manual_seed(0)
    back = deltaspec.restore(Net(), tmp_path / "saved", example_inputs=torch.ones(2, 6))
    for name in NAMES:
        for key, tensor in alone.deltas[name].tensors():
            assert torch.equal(back.deltas[name].tensor(key), tensor)
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("saved", "alone")]
    assert manifests[0]["backbone"].pop("weights") is None and manifests[1]["backbone"].pop("weights")
    assert manifests[0] == manifests[1]
    for rank in range(WORLD):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["sharded"] == {"DTensor"}
        assert all(torch.equal(found["a"][key], tensor) for key, tensor in alone.deltas["a"].tensors())
        assert "No space left" in found["failed"]
        assert set(found["refused"]) == {"DS575"}
    assert os.listdir(tmp_path / "full") == []
    assert not (tmp_path / "refused").exists()
    back.save_as("peft", tmp_path / "peft", "a", "d")  # the way out: what was saved is written by one process alone
