"""A training step beside PEFT's: its time, and the memory at its peak."""

from __future__ import annotations

import gc
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

import deltaspec
from benchmarks.harness import LIMITS, Row, interleave, number, ratio, seconds, verdict
from benchmarks.models import LLAMA_LINEAR, llama, peft, spec
from benchmarks.profiles import difference

SHAPE = (4, 64)
STEPS = 3
PROCESSES = 2
_ROOT = Path(__file__).parents[1]
_RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""So that glibc gives back what is freed, and a peak is what was in use."""


def training() -> Iterator[Row]:
    """One training step with LoRA on all linear layers."""
    base, ids = llama(), torch.randint(0, 1000, SHAPE)
    steps = {who: step(model, ids) for who, model in (("ours", _ours(base)), ("peer", _peer(base)))}
    times = interleave(steps)
    median, text = ratio(times["ours"], times["peer"])
    what = f"LoRA on 56 linears, {SHAPE[0]} × {SHAPE[1]} tokens (8 × 512 Llama)"
    yield Row(
        f"training step, {what}",
        seconds(times["ours"]),
        seconds(times["peer"]),
        f"{text} × the peer's time",
        "≤ 1 ×",
        verdict(median <= 1),
        "" if median <= 1 else difference(steps["ours"], steps["peer"], "more than the peer's:"),
    )
    count = PROCESSES if LIMITS.pairs is None else 1
    peaks = {"ours": list[float](), "peer": list[float]()}
    for _ in range(count):
        for who, found in peaks.items():
            found.append(_peak_of(who))
    first, second = statistics.median(peaks["ours"]), statistics.median(peaks["peer"])
    yield Row(
        f"peak memory of a training step, {what}",
        f"{first:.1f} MiB",
        f"{second:.1f} MiB",
        f"{number(first / second)} × the peer's",
        "≤ 1 ×",
        verdict(first <= second),
        f"growth of the resident set to its peak (VmHWM, reset before) over {STEPS} steps with AdamW, gradients and "
        f"the optimizer's state included, over the model before them; median of {count} processes each",
    )


def step(model: nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    """Return what trains a model by one step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def run() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def _ours(base: nn.Module) -> nn.Module:
    return deltaspec.compile(base, spec(["d0"], LLAMA_LINEAR)).train()


def _peer(base: nn.Module) -> nn.Module:
    return peft(base, ["d0"], LLAMA_LINEAR).train()


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
    base = llama()
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
