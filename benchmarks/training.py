"""A training step beside PEFT's: its time over the rows, what autograd keeps, and the memory at its peak."""

from __future__ import annotations

import functools
import gc
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deltaspec
from benchmarks.harness import LIMITS, Row, interleave, number, ratio, seconds, verdict
from benchmarks.models import LLAMA_LINEAR, llama, peft, spec
from benchmarks.profiles import difference
from deltaspec.graphs import low_rank
from deltaspec.graphs.low_rank import LowRankStep, Step

SIZES = ((1, 1, 40), (1, 16, 40), (1, 64, 24), (2, 128, 10), (8, 128, 4), (32, 128, 2))
"""Rows, tokens, and how often each is measured."""
SHAPE = (8, 128)
LAYERS = 4
STEPS = 3
PROCESSES = 2
KEPT = {0.0: 0.75, 0.1: 0.45}
"""By dropout: which part of PEFT's bytes autograd may keep."""
_ROOT = Path(__file__).parents[1]
_RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""So that glibc gives back what is freed, and a peak is what was in use."""
_WHAT = f"LoRA on {7 * LAYERS} linears ({LAYERS} × 512 Llama)"


def training() -> Iterator[Row]:
    """Training steps with LoRA on all linear layers."""
    base = llama(layers=LAYERS)
    yield from _kept(base)
    yield from _times(base)
    yield from _peaks()
    yield from _associations()


def _times(base: nn.Module) -> Iterator[Row]:
    models = {"ours": _ours(base), "peer": _peer(base)}
    for batch, tokens, pairs in SIZES:
        ids = torch.randint(0, 1000, (batch, tokens))
        steps = {who: step(model, ids) for who, model in models.items()}
        times = interleave(steps, pairs)
        median, text = ratio(times["ours"], times["peer"])
        limit = 1 / 1.15 if batch * tokens >= 256 else 1
        yield Row(
            f"training step, {_WHAT}, {batch} × {tokens} tokens",
            seconds(times["ours"]),
            seconds(times["peer"]),
            f"{text} × the peer's time",
            f"≤ {limit:.2g} ×",
            verdict(median <= limit),
            "" if median <= limit else difference(steps["ours"], steps["peer"], "more than the peer's:"),
        )


def _kept(base: nn.Module) -> Iterator[Row]:
    ids = torch.randint(0, 1000, SHAPE)
    for dropout, limit in KEPT.items():
        first, second = (kept_bytes(model, ids) for model in (_ours(base, dropout), _peer(base, dropout)))
        yield Row(
            f"bytes that autograd keeps, {_WHAT}, {SHAPE[0]} × {SHAPE[1]} tokens, dropout {dropout:g}",
            f"{first / 2**20:.1f} MiB",
            f"{second / 2**20:.1f} MiB",
            f"{number(first / second)} × the peer's",
            f"≤ {limit} ×",
            verdict(first <= limit * second),
            "storages that `torch.autograd.graph.saved_tensors_hooks` sees, each once, parameters apart",
        )


def _peaks() -> Iterator[Row]:
    count = PROCESSES if LIMITS.pairs is None else 1
    peaks = {"ours": list[float](), "peer": list[float]()}
    for _ in range(count):
        for who, found in peaks.items():
            found.append(_peak_of(who))
    first, second = statistics.median(peaks["ours"]), statistics.median(peaks["peer"])
    yield Row(
        f"peak memory of a training step, {_WHAT}, {SHAPE[0]} × {SHAPE[1]} tokens",
        f"{first:.1f} MiB",
        f"{second:.1f} MiB",
        f"{number(first / second)} × the peer's",
        "≤ 0.8 ×",
        verdict(first <= 0.8 * second),
        f"growth of the resident set to its peak (VmHWM, reset before) over {STEPS} steps with AdamW, gradients and "
        f"the optimizer's state included, over the model before them; median of {count} processes each",
    )


def _associations() -> Iterator[Row]:
    """One site's step with the update merged into the weight, over one with two narrow products: RunLoRA's choice."""
    for inner, outer, pairs in ((512, 512, 12), (512, 1376, 8), (1376, 512, 8)):
        for rows in (128, 512, 2048):
            run = _site(rows, inner, outer)
            usual = low_rank.PAYS
            try:
                times = interleave({"merged": lambda run=run: run(0), "apart": lambda run=run: run(1 << 40)}, pairs)
            finally:
                low_rank.PAYS = usual
            median, text = ratio(times["merged"], times["apart"])
            merges = rows * (inner + outer) > usual * inner * outer
            yield Row(
                f"step of one site, {inner} → {outer}, {rows} rows: merged over apart",
                seconds(times["merged"]),
                f"{seconds(times['apart'])} (apart)",
                f"{text} × the time",
                f"the rule {'merges' if merges else 'does not merge'}",
                verdict(merges == (median < 1) or abs(median - 1) < 0.03),
            )


def _site(rows: int, inner: int, outer: int) -> Callable[[int], None]:
    """Return what makes one step of one site, told how much dearer a value of the merged weight counts."""
    weight, x = torch.randn(outer, inner) * 0.02, torch.randn(rows, inner, requires_grad=True)
    down, up = nn.Parameter(torch.randn(8, inner)), nn.Parameter(torch.randn(outer, 8) * 0.01)
    given = Step(functools.partial(F.linear, weight=weight), weight, None, 2.0, 0.0, x.dtype)

    def run(pays: int) -> None:
        low_rank.PAYS = pays
        LowRankStep.apply(given, x, down, up).sum().backward()

    return run


def kept_bytes(model: nn.Module, ids: Tensor) -> int:
    """Return the bytes of the storages that autograd keeps of a forward, parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            kept.setdefault(place, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, labels=ids)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def step(model: nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    """Return what trains a model by one step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def run() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def _ours(base: nn.Module, dropout: float = 0.0) -> nn.Module:
    return deltaspec.compile(base, spec(["d0"], LLAMA_LINEAR, dropout)).train()


def _peer(base: nn.Module, dropout: float = 0.0) -> nn.Module:
    return peft(base, ["d0"], LLAMA_LINEAR, dropout).train()


def _peak_of(who: str) -> float:
    """Ask a process; MiB."""
    command = [sys.executable, "-m", "benchmarks.training", who]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=_ROOT, env=os.environ | _RETURNED)
    return float(done.stdout.splitlines()[-1])


def _resident(peak: bool) -> float:
    """Read this process's resident set, now or at its peak; MiB."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    (found,) = re.findall(rf"{'VmHWM' if peak else 'VmRSS'}:\s+(\d+) kB", text)
    return int(found) / 1024


def _measure(who: str) -> float:
    """Return the growth of this process to its peak in some steps; MiB."""
    torch.set_num_threads(1)
    base = llama(layers=LAYERS)
    model = {"ours": _ours, "peer": _peer}[who](base)
    del base
    ids = torch.randint(0, 1000, SHAPE)
    run = step(model, ids)
    with torch.no_grad():
        model(input_ids=ids[:1, :1])  # what torch prepares once is no part of a step
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _resident(peak=False)
    for _ in range(STEPS):
        run()
    return _resident(peak=True) - before


if __name__ == "__main__":
    print(_measure(sys.argv[1]))
