"""How many graphs torch.compile makes: over deltas, and over mixtures given per row."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

import deltaspec
from benchmarks.harness import LIMITS, Row, verdict
from benchmarks.models import LLAMA_LINEAR, llama, peft, spec

DELTAS = 100
MIXTURES = 100
PEER = 3
"""Of PEFT's, each is compiled anew, which takes seconds."""
ROWS = 4


class Counting:
    """A backend for torch.compile that counts graphs and runs them as they are."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        """Count one."""
        self.count += 1
        return graph.forward


def graphs() -> Iterator[Row]:
    """Count graphs over 100 deltas and 100 mixtures, each given per row."""
    # What is counted does not depend on the size.
    base, ids, pick = llama(64, 128, layers=2, heads=4), torch.randint(0, 100, (ROWS, 8)), random.Random(0)
    deltas = LIMITS.counts(10, DELTAS)[-1]
    names = [f"d{i}" for i in range(deltas)]
    mixtures = [[pick.choice([None, *names]) for _ in range(ROWS)] for _ in range(LIMITS.counts(10, MIXTURES)[-1])]
    ours, peer = deltaspec.compile(base, spec(names, LLAMA_LINEAR)), peft(base, names[:PEER], LLAMA_LINEAR)
    ours.detach()

    counted, taken = _count(ours, [(ids, {"deltas": ours.rows([name] * ROWS)}) for name in names], fullgraph=True)
    theirs, slow = _switches(peer, ids, names[:PEER])
    yield Row(
        f"graphs compiled over {deltas} deltas, each for all rows",
        f"{counted} in {taken:.1f} s",
        f"{theirs} over {PEER}, in {slow:.1f} s",
        "-",
        "1",
        verdict(counted == 1),
        "a backend that counts and does not compile: the time is torch's tracing; `fullgraph=True` for ours; PEFT is "
        f"given {PEER} adapters by `set_adapter`, enough to see that each is another graph; its hot-swap makes one for "
        "all, of one adapter at a time for the whole batch",
    )
    counted, taken = _count(ours, [(ids, {"deltas": ours.rows(rows)}) for rows in mixtures], fullgraph=True)
    given = [[pick.choice(["__base__", *names[:PEER]]) for _ in range(ROWS)] for _ in range(PEER)]
    theirs, slow = _count(peer, [(ids, {"adapter_names": rows}) for rows in given], fullgraph=False)
    yield Row(
        f"graphs compiled over {len(mixtures)} mixtures, given per row",
        f"{counted} in {taken:.1f} s",
        f"{theirs} over {PEER}, in {slow:.1f} s",
        "-",
        "1",
        verdict(counted == 1),
        f"PEFT is given {PEER} mixtures, enough to see that each is compiled anew",
    )


def _count(
    model: torch.nn.Module, calls: list[tuple[torch.Tensor, dict[str, Any]]], fullgraph: bool
) -> tuple[int, float]:
    """Count the graphs that some calls make, and time them; seconds."""
    torch._dynamo.reset()
    backend = Counting()
    fast = torch.compile(model, fullgraph=fullgraph, backend=backend)
    start = time.perf_counter()
    with torch.no_grad():
        for ids, given in calls:
            fast(ids, use_cache=False, **given)
    return backend.count, time.perf_counter() - start


def _switches(peer: Any, ids: torch.Tensor, names: list[str]) -> tuple[int, float]:
    torch._dynamo.reset()
    backend = Counting()
    fast = torch.compile(peer, backend=backend)
    start = time.perf_counter()
    with torch.no_grad():
        for name in names:
            peer.set_adapter(name)
            fast(ids, use_cache=False)
    return backend.count, time.perf_counter() - start
