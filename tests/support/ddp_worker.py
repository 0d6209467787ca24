"""What each process of the tests of DistributedDataParallel does: a module that a new process can import."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import deltaspec
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.contract.trial import disturb

NAMES = ("a", "b", "c", "d")
METHODS = ("lora", "lora", "ia3", "bitfit")
WORLD = 2


class Net(nn.Module):
    """Two linear layers with a norm between them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 12), nn.LayerNorm(12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(torch.tanh(self.norm(self.up(x))))
        return found


def build() -> CompiledModel:
    torch.manual_seed(0)
    target = {"type": "Linear"}
    deltas = [
        {"name": name, "method": method, "target": target, "attached": False}
        for name, method in zip(NAMES, METHODS, strict=True)
    ]
    compiled = deltaspec.compile(Net(), {"deltaspec": 1, "deltas": deltas}, example_inputs=torch.ones(2, 6))
    disturb(compiled)
    return compiled


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
ROWS = ["a", None, "b", ("a", "c")]
Gradients = dict[str, list[Tensor | None]]


def gradients(compiled: CompiledModel) -> Gradients:
    """Take the gradients of all deltas, and clear them."""
    found: Gradients = {
        name: [None if p.grad is None else p.grad.clone() for p in compiled.deltas[name].parameters()] for name in NAMES
    }
    compiled.zero_grad()
    return found


def steps(run: Any, compiled: CompiledModel, part: slice) -> list[Gradients]:
    """Take steps under one delta, then another, then two, then with a delta a row."""
    found = []
    for names in (("a",), ("a",), ("b",), ("b", "c"), ()):
        if names:
            compiled.only(*names)
            run(X[part]).square().mean().backward()
        else:
            run(X[part], deltas=ROWS[part]).square().mean().backward()
        found.append(gradients(compiled))
    return found


def work(rank: int, folder: str) -> None:
    """Be one of the processes."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    part = slice(rank * 2, rank * 2 + 2)
    found: dict[str, Any] = {}

    compiled = build()
    parallel = DistributedDataParallel(compiled, find_unused_parameters=True)
    found["all"] = steps(parallel, compiled, part)
    found["keys"] = set(parallel.state_dict()) == {f"module.{key}" for key in compiled.state_dict()}

    compiled = build()  # a view trains as the first model does
    view = compiled.view()
    found["view"] = steps(DistributedDataParallel(view, find_unused_parameters=True), view, part)

    compiled = build()  # where all that may be trained is used in every step, nothing has to be searched for
    compiled.only("a")
    for name in NAMES[1:]:
        compiled.deltas[name].requires_grad_(False)
    parallel = DistributedDataParallel(compiled.backbone)
    optimizer = torch.optim.SGD(compiled.trainable_parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        parallel(X[part]).square().mean().backward()
        optimizer.step()
    found["trained"] = [p.detach() for p in compiled.deltas["a"].parameters()]
    torch.save(found, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()
