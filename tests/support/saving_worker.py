"""What each of two processes does that hold parts of one model's tensors (FSDP2)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from ddp_worker import WORLD, build
from torch import distributed
from torch.distributed.fsdp import fully_shard

from deltaspec.compiler.compiled import CompiledModel
from deltaspec.diagnostics.findings import DeltaSpecError


def refused(compiled: CompiledModel, folder: Path) -> list[str]:
    """Return the codes of why no PEFT adapter is written from here."""
    try:
        compiled.save_as("peft", folder, "a", "d")
    except DeltaSpecError as error:
        return [finding.code for finding in error.diagnostics]
    return []


def work(rank: int, folder: str) -> None:
    """Be one of the processes."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    mesh = distributed.init_device_mesh("cpu", (WORLD,))
    compiled = build()
    fully_shard(compiled.backbone.up, mesh=mesh)
    fully_shard(compiled.backbone, mesh=mesh)
    found: dict[str, Any] = {"sharded": {type(p).__name__ for p in compiled.parameters()}}
    saved = Path(folder) / "saved"
    compiled.save(saved)
    found["refused"] = refused(compiled, Path(folder) / "refused")
    with torch.no_grad():
        for parameter in compiled.deltas["a"].parameters():
            parameter.zero_()
    compiled.load(saved)
    found["a"] = {key: tensor.detach().full_tensor() for key, tensor in compiled.deltas["a"].tensors()}
    if rank == 0:  # no disk can be full in the middle of it more surely
        real, calls = os.fdopen, []

        def full(*args: Any) -> Any:
            calls.append(args)
            if len(calls) > 4:
                raise OSError(28, "No space left on device")
            return real(*args)

        os.fdopen = full  # type: ignore[assignment]
    try:
        compiled.save(Path(folder) / "full")
    except OSError as error:
        found["failed"] = str(error)
    torch.save(found, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()
