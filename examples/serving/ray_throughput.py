"""Rows of a mixed batch beside switching per request and a model per task, each on two replicas of Ray Serve.

The ways take turns, with the same requests, all waiting from the start. `make check-ray` runs it after the tests.
"""

from __future__ import annotations

import asyncio
import functools
import random
import statistics
import tempfile
import time
from collections.abc import Sequence

import ray
import ray_tiny
import torch
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray_replica import Replica, Score
from ray_serve import application
from rich.console import Console
from rich.table import Table
from serving_queue import weight_bytes
from torch import Tensor, nn

import deltaspec

COUNT, ROUNDS, AT_ONCE = 200, 3, 48
backbone = functools.partial(ray_tiny.backbone, width=256, layers=4)


class Measured(Replica):
    """Says how much its weights take."""

    def weights(self) -> int:
        """Return the bytes of the weights of this replica, deltas included."""
        return weight_bytes([self.c])


class Switching(Measured):
    """Attaches each request's delta and runs it by itself."""

    @torch.no_grad()
    def logits(self, rows: list[Score]) -> Tensor:
        """Return the logits of each row's next token."""
        found = []
        for row in rows:
            self.c.only(row.deltas)
            found.append(self.c(input_ids=torch.tensor([row.ids])).logits[0, -1])
        return torch.stack(found)


class Models(Measured):
    """Has a model for each task; a batch is run task by task."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.models: dict[str, nn.Module] = {"": backbone()}
        for name in self.library:
            alone = deltaspec.restore(backbone(), args[1], name)
            try:
                self.models[name] = alone.merge(name)
            except deltaspec.DeltaSpecError:  # DS435: what no weight can express stays beside the weights
                self.models[name] = alone.attach()

    def weights(self) -> int:
        """Return the bytes of the weights of all models."""
        return weight_bytes(list(self.models.values()))

    @torch.no_grad()
    def logits(self, rows: list[Score]) -> Tensor:
        """Return the logits of each row's next token."""
        found: list[Tensor] = [torch.empty(0)] * len(rows)
        for task, model in self.models.items():
            places = [place for place, row in enumerate(rows) if first_delta(row) == task]
            if places:
                logits = model(input_ids=torch.tensor([rows[place].ids for place in places])).logits
                for place, one in zip(places, logits[:, -1], strict=True):
                    found[place] = one
        return torch.stack(found)


WAYS = {"a delta a row": Measured, "switching per request": Switching, "a model per task": Models}


def first_delta(row: Score) -> str:
    """Return the name of a row's delta, empty for the bare backbone: its task."""
    return next(iter(row.deltas), "")


async def serve_all(handle: DeploymentHandle, rows: Sequence[Score]) -> Tensor:
    """Return the answers to all requests, so many at once."""
    free = asyncio.Semaphore(AT_ONCE)

    async def one(row: Score) -> list[float]:
        async with free:
            near = handle.options(multiplexed_model_id=first_delta(row))
            answer = await near.score.remote(row)
        return answer["scores"]

    return torch.tensor(await asyncio.gather(*map(one, rows)))


def main() -> None:
    """Measure and print. Raises RuntimeError where two ways do not give the same answers."""
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        c = ray_tiny.trained(backbone(), each=1, std=0.03)
        c.save(f"{folder}/deltas")
        tasks = [*c.deltas]
        rows = [  # all of one length, so that a model per task has nothing to pad either
            Score(ids=[draw.randrange(1, 97) for _ in range(24)], deltas={task: 1.0} if task else {})
            for task in (draw.choice(["", *tasks]) for _ in range(COUNT))
        ]
        options = {"num_cpus": 0.3}
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
        try:
            serve.start(http_options={"location": "NoServer"})
            handles = {}
            for place, (name, way) in enumerate(WAYS.items()):
                app = application(backbone, f"{folder}/deltas", replica=way, options=options, queue=-1)
                serve.run(app, name=f"way-{place}", route_prefix=f"/{place}")
                handles[name] = serve.get_deployment_handle("deltas", f"way-{place}")
            report(handles, rows)
            serve.shutdown()
        finally:
            ray.shutdown()


def report(handles: dict[str, DeploymentHandle], rows: Sequence[Score]) -> None:
    """Serve in turns, and print the table."""
    rates: dict[str, list[float]] = {name: [] for name in handles}
    answers: dict[str, Tensor] = {}
    for number in range(ROUNDS + 1):
        for name, handle in handles.items():
            started = time.perf_counter()
            answers[name] = asyncio.run(serve_all(handle, rows))
            if number:  # the first one builds what later ones have
                rates[name].append(len(rows) / (time.perf_counter() - started))
    first, *others = answers.values()
    if not all(torch.allclose(first, other, atol=1e-4) for other in others):
        raise RuntimeError("the ways of serving do not give the same answers")
    title = (
        f"{len(rows)} requests of {len({*map(first_delta, rows)})} tasks on two replicas, {AT_ONCE} requests at once"
    )
    table = Table("way of serving", "served 1/s", "rounds", "weights MB", title=title)
    for name, found in rates.items():
        rounds = " ".join(f"{rate:.0f}" for rate in found)
        table.add_row(
            name, f"{statistics.median(found):.0f}", rounds, f"{handles[name].weights.remote().result() / 1e6:.1f}"
        )
    Console().print(table)


if __name__ == "__main__":
    main()
