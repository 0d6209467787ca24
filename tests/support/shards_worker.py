"""What each of two processes does that trains a model in shards: a module that a new process can import."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from live_model import build, llama, lora
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import deltaspec
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.diagnostics.findings import DeltaSpecError

WORLD = 2
X = torch.randint(0, 60, (4, 6), generator=torch.Generator().manual_seed(5))
ADAPTER = {"name": "a", "method": "adapter", "params": {"width": 4}}


def steps(compiled: CompiledModel, call: Any, batch: slice) -> list[float]:
    """Return the losses of three steps of SGD on the trainable parameters."""
    optimizer, losses = torch.optim.SGD([p for p in call.parameters() if p.requires_grad], lr=0.5), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = call(input_ids=X[batch], labels=X[batch]).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def whole(compiled: CompiledModel) -> dict[str, torch.Tensor]:
    """Return the tensors of the delta, gathered."""
    found = {}
    for key, tensor in compiled.deltas["a"].tensors():
        gather: Any = getattr(tensor, "full_tensor", tensor.detach)
        found[key] = gather().detach().clone()
    return found


def _layers(compiled: CompiledModel, top: nn.Module, mesh: Any) -> nn.Module:
    for layer in compiled.backbone.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(top, mesh=mesh)  # type: ignore[return-value]


WAYS: dict[str, Callable[[CompiledModel, Any], Any]] = {
    "compiled": lambda c, mesh: fully_shard(c, mesh=mesh),
    "backbone": lambda c, mesh: fully_shard(c.backbone, mesh=mesh) and c,
    "layers": lambda c, mesh: _layers(c, c, mesh),
    "layers of the backbone": lambda c, mesh: _layers(c, c.backbone, mesh) and c,
    "first version": lambda c, mesh: FullyShardedDataParallel(c, device_id=torch.device("cpu"), use_orig_params=True),
}


def refusal(run: Callable[[], Any]) -> str:
    """Return what a call is refused with."""
    try:
        run()
    except DeltaSpecError as error:
        return str(error)
    return "not refused"


def work(rank: int, folder: str) -> None:
    """Be one of the processes."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    mesh = distributed.init_device_mesh("cpu", (WORLD,))
    found: dict[str, Any] = {}
    for way, shard in WAYS.items():
        compiled = build(ADAPTER if way == "layers" else lora())
        call = shard(compiled, mesh)
        losses = torch.tensor(steps(compiled, call, slice(2 * rank, 2 * rank + 2)))
        distributed.all_reduce(losses)
        found[way] = (losses / WORLD).tolist(), {} if way == "first version" else whole(compiled)
    compiled = build(lora())
    fully_shard(compiled, mesh=mesh)
    compiled(input_ids=X)
    compiled.detach()
    found["flags"] = [p.requires_grad for n, p in compiled.backbone.named_parameters() if "deltaspec" not in n]

    compiled = build(lora())
    fully_shard(compiled, mesh=mesh)
    start = whole(compiled)
    compiled.save(f"{folder}/start")
    steps(compiled, compiled, slice(2 * rank, 2 * rank + 2))
    with torch.no_grad():
        compiled(input_ids=X)  # the root's parameters stay gathered after a forward
    compiled.load(f"{folder}/start")
    compiled(input_ids=X, labels=X).loss.backward()
    found["loaded"] = start, whole(compiled)

    spec = {"deltaspec": 1, "deltas": [lora()]}
    sharded = llama()
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    found["before"] = refusal(lambda: deltaspec.compile(sharded, spec))
    parallel = llama()
    styles = {"q_proj": ColwiseParallel(), "v_proj": ColwiseParallel(), "o_proj": RowwiseParallel()}
    parallelize_module(parallel.model.layers[0].self_attn, mesh, dict(styles))
    found["parallel before"] = refusal(lambda: deltaspec.compile(parallel, spec))
    compiled = build(lora())
    parallelize_module(compiled.backbone.model.layers[0].self_attn, mesh, dict(styles))
    found["parallel after"] = refusal(lambda: compiled(input_ids=X))
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()
