"""Two processes with accelerate and with Trainer, under DDP and in shards: the numbers and files of one process."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import jobs_worker
import pytest
import torch
from torch import multiprocessing
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from trained import IDS, llama
from trainers_worker import ACCELERATE, MIXED, WORLD, build, optimizer_of, steps, tensors, work

import deltaspec


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """What each process found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (str(folder), port), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def close(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.allclose(a, b, atol=2e-5, rtol=1e-4) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("way", ACCELERATE)
def test_accelerate_trains_what_one_process_would_and_both_read_what_either_wrote(found, folder, way):
    alone = build(tied=way == "over meta")
    optimizer = optimizer_of(alone)
    expected = steps(alone, optimizer, slice(0, 8), lambda loss: loss.backward())
    whole = tensors(alone)
    for process in found:
        mine = process[way]
        assert mine["kind"] == (
            ("DistributedType.MULTI_CPU", "Parameter") if way == "ddp" else ("DistributedType.FSDP", "DTensor")
        )
        assert close(mine["tensors"], whole) and mine["again"] and mine["unwrapped"]
        assert all(map(torch.equal, mine["loaded"], mine["tensors"]))
        assert all(map(torch.equal, mine["read"], mine["tensors"]))
    mean = [sum(process[way]["losses"][i] for process in found) / WORLD for i in range(2)]
    assert mean == pytest.approx(expected, abs=1e-5)
    back = deltaspec.restore(llama(tie_word_embeddings=way == "over meta"), folder / way / "deltas")
    assert all(map(torch.equal, tensors(back), found[0][way]["tensors"]))  # `c.save`, written once, in one process
    assert len(list((folder / way / "deltas").glob("*.safetensors"))) == 2
    dcp_to_torch_save(folder / way / "dcp", folder / way / "whole.pt")
    other = build(tied=way == "over meta")
    target = other.backbone if way == "layers" else other
    target.load_state_dict(torch.load(folder / way / "whole.pt")["model"], strict=way != "over meta")
    assert all(map(torch.equal, tensors(other), found[0][way]["tensors"]))


def test_mixed_rows_in_two_processes(found):
    alone = build()
    with torch.no_grad():
        for tensor, value in zip(_held(alone), found[0]["ddp"]["read"], strict=True):
            tensor.copy_(value)
    losses = []
    for part in (slice(0, 4), slice(4, 8)):
        loss = alone(input_ids=IDS[part], labels=IDS[part], deltas=MIXED).loss
        (loss / WORLD).backward()
        losses.append(loss.item())
    assert [process["ddp"]["mixed"][0] for process in found] == pytest.approx(losses, abs=1e-5)
    assert close(found[0]["ddp"]["mixed tensors"], found[1]["ddp"]["mixed tensors"])
    assert not close(found[0]["ddp"]["mixed tensors"], found[0]["ddp"]["read"])


def _held(compiled: Any) -> list[torch.Tensor]:
    return [tensor for delta in compiled.deltas.values() for _, tensor in delta.tensors()]


@pytest.mark.parametrize("way", ["ddp", "layers"])
def test_a_trainer_resumes_and_loads_the_best(found, folder, way):
    own = [process[f"trainer {way}"] for process in found]
    assert all(one["losses"][0] == one["losses"][1] for one in own)
    assert own[0]["sharded"] is (way != "ddp")
    assert all(map(torch.equal, own[0]["tensors"], own[1]["tensors"]))
    for saved in (Path(own[0]["best"]), folder / f"trainer {way}" / "end"):
        assert all(map(torch.equal, tensors(deltaspec.restore(llama(), saved)), own[0]["tensors"]))
        names = {path.name for path in saved.iterdir()}
        assert not any("model" in name or name.startswith(".") for name in names)
    assert own[0]["losses"][0] == pytest.approx(found[0]["trainer ddp"]["losses"][0], abs=1e-4)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process finds of jobs."""
    folder = tmp_path_factory.mktemp("alone")
    trainer = jobs_worker.with_trainer(folder / "trainer", 8)
    return {"trainer": trainer, "training": jobs_worker.with_training(jobs_worker.build(), folder / "jobs", None)}


@pytest.mark.parametrize("way", ["ddp", "layers"])
def test_jobs_trainer_trains_what_one_process_would(found, alone, folder, way):
    expected = alone["trainer"]["whole"]
    assert expected["ended"] == ({"c": 3}, {"b": 2}) and alone["trainer"]["resumed"]["ended"] == expected["ended"]
    for process in found:
        whole, resumed = process["jobs"][f"trainer {way}"].values()
        assert whole["ended"] == resumed["ended"] == expected["ended"]
        assert close(whole["tensors"], expected["tensors"])
        assert whole["losses"] == pytest.approx(expected["losses"], abs=1e-5, nan_ok=True)
        assert close(resumed["tensors"], whole["tensors"])
    back = deltaspec.restore(llama(), folder / f"jobs {way}" / "checkpoint-5")
    assert back.deltas.keys() == {"a", "b", "c"}


@pytest.mark.parametrize("way", jobs_worker.WAYS)
def test_training_of_jobs_is_that_of_one_process(found, alone, folder, way):
    expected = alone["training"]
    for process in found:
        mine = process["jobs"][way]
        assert close(mine["tensors"], expected["tensors"])
        assert [job[:2] for job in mine["jobs"]] == [job[:2] for job in expected["jobs"]]
        for (_, _, losses), (_, _, others) in zip(mine["jobs"], expected["jobs"], strict=True):
            assert losses == pytest.approx(others, abs=1e-5)
        assert all(map(torch.equal, mine["loaded"], mine["tensors"]))


def test_jobs_that_processes_would_wait_for_are_refused(found):
    for process in found:
        unused, differing = process["jobs"]["refused"]
        assert "DS382" in unused and "find_unused_parameters=True" in unused
        assert "DS382" in differing and "process 1" in differing
