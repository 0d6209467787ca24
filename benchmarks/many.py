"""Many deltas on one backbone: loading, switching and memory at 1 … 1,000."""

from __future__ import annotations

import gc
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

import deltaspec
from benchmarks.harness import Row, interleave, many, number, ratio, seconds
from benchmarks.models import GPT2_LINEAR, gpt2, peft, spec

warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
warnings.filterwarnings("ignore", message=".*Already found a `peft_config`.*")
COUNTS = (1, 10, 100, 1000)
PEER_COUNTS = (1, 10, 100)
PAIRS = 2
"""Of loading 100: the peer takes minutes for each."""
_WHERE = "12 × 256 GPT-2, LoRA r = 8 on 48 sites, 1.5 MiB each"


def loading() -> Iterator[Row]:
    """Load saved deltas onto one backbone, and switch among them."""
    base = gpt2()
    with tempfile.TemporaryDirectory() as folder:
        mine, other = _saved(base, Path(folder, "ours"), 1000), _peers(base, Path(folder, "peer"), 100)
        names = [f"d{i}" for i in range(1000)]
        yield _hundred(base, mine, other, names[:100])
        yield _linear(base, mine, names)
        yield _first_attach(base, mine, names)
        yield _switch(base, mine, names)
        yield from _memory(mine, other)


def _saved(base: nn.Module, folder: Path, count: int) -> Path:
    """Save so many deltas of different values."""
    names = [f"d{i}" for i in range(count)]
    documents = [spec(names[i : i + 100], GPT2_LINEAR) for i in range(0, count, 100)]  # a spec's size is bounded
    compiled = deltaspec.compile(base, *documents)
    generator = torch.Generator().manual_seed(0)
    for delta in compiled.deltas.values():
        for parameter in delta.parameters():
            parameter.data.normal_(0, 0.02, generator=generator)
    compiled.save(folder)
    return folder


def _peers(base: nn.Module, folder: Path, count: int) -> Path:
    """Save one adapter, and copy its directory: the peer looks at no more than that."""
    peft(base, ["d0"], GPT2_LINEAR).save_pretrained(folder)
    for index in range(1, count):
        shutil.copytree(folder / "d0", folder / f"d{index}")
    return folder


def _fresh(base: nn.Module) -> deltaspec.CompiledModel:
    return deltaspec.compile(base, spec(["own"], GPT2_LINEAR))


def _hundred(base: nn.Module, mine: Path, other: Path, names: list[str]) -> Row:
    models = itertools.cycle([_fresh(base) for _ in range(PAIRS + 1)])
    wrapped = [peft(base, ["own"], GPT2_LINEAR) for _ in range(PAIRS)]

    def ours() -> None:
        next(models).library(mine).load(*names)

    def peer() -> None:
        model = wrapped.pop()
        for name in names:
            model.load_adapter(str(other / name), adapter_name=name)

    ours()  # warms up the file cache and torch; the peer's first loads do so for it
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    for _ in range(PAIRS):
        for key, run in (("ours", ours), ("peer", peer)):
            start = time.perf_counter()
            run()
            times[key].append(time.perf_counter() - start)
    median, text = ratio(times["peer"], times["ours"])
    return Row(
        f"load 100 saved deltas onto one backbone ({_WHERE})",
        seconds(times["ours"]),
        seconds(times["peer"]),
        f"{text} × faster",
        "≥ 50 ×",
        "yes" if median >= 50 else "no",
        f"{PAIRS} pairs, since the peer takes so long; ours checks digests, specs, shapes and that all values are "
        "finite; the peer is given `load_adapter`'s default, which was faster here than `low_cpu_mem_usage=True`",
    )


def _linear(base: nn.Module, mine: Path, names: list[str]) -> Row:
    compiled = _fresh(base)
    library = compiled.library(mine).load(names[-1])  # the plan of such deltas is made once
    each: dict[int, list[float]] = {count: [] for count in COUNTS[1:]}
    system: dict[int, list[float]] = {count: [] for count in COUNTS[1:]}
    for _ in range(5):
        for count, times in each.items():
            library.drop()
            before = os.times()
            library.load(*names[:count])
            after = os.times()
            times.append((after.user + after.system - before.user - before.system) / count)
            system[count].append((after.system - before.system) / count)
    text = ", ".join(f"{count:,}: {seconds(each[count])}" for count in each)
    middle = {count: sorted(values)[len(values) // 2] for count, values in each.items()}
    grown = middle[1000] / middle[10]
    of_system = ", ".join(f"{count:,}: {seconds(system[count])}" for count in system)
    return Row(
        "the same, 10, 100 and 1,000 at once: processor time for each",
        text,
        "-",
        f"{number(grown)} × from 10 to 1,000",
        "linear",
        "yes" if grown <= 1.25 else "no",
        f"medians of 5; of these the operating system's own time ({of_system}) is what grows: it hands out new memory "
        "page by page, where ten fit into what was freed before",
    )


def _first_attach(base: nn.Module, mine: Path, names: list[str]) -> Row:
    compiled = _fresh(base)
    compiled.library(mine).load(*names[:121])
    left = iter(names[:121])
    compiled.only(next(left))
    times = interleave({"ours": lambda: compiled.only(next(left))}, pairs=100)
    return Row(
        "attach a loaded delta for the first time",
        seconds(times["ours"]),
        "-",
        "-",
        "-",
        "-",
        "its forwards are bound then, and kept",
    )


def _switch(base: nn.Module, mine: Path, names: list[str]) -> Row:
    contestants = {}
    for count in (2, 1000):
        compiled = _fresh(base)
        compiled.library(mine).load(*names[:count])
        for name in names[:count]:
            compiled.only(name)
        pair = itertools.cycle([names[0], names[count - 1]])

        def turn(compiled: deltaspec.CompiledModel = compiled, pair: Iterator[str] = pair) -> None:
            compiled.only(next(pair))

        contestants[str(count)] = many(turn, 200)
    times = interleave(contestants, pairs=40)
    median, text = ratio(times["1000"], times["2"])
    return Row(
        "switch with 1,000 loaded from a library and attached before, over with 2",
        f"{seconds(times['1000'], 1 / 200)} and {seconds(times['2'], 1 / 200)}",
        "-",
        f"{text} ×",
        "≤ 1.2 ×",
        "yes" if median <= 1.2 else "no",
    )


def _memory(mine: Path, other: Path) -> Iterator[Row]:
    """Ask one process a count; growth over a process with one delta loaded and attached."""
    for count in COUNTS:
        loaded, attached, payload = _measured("ours", mine, count)
        peer = _measured("peer", other, count)[0] if count in PEER_COUNTS else None
        part = loaded / payload
        target = count == COUNTS[-1]
        yield Row(
            f"memory of {count:,} more loaded, payload {payload / 2**20:,.1f} MiB",
            f"{loaded / 2**20:,.1f} MiB; {attached / 2**20:,.1f} MiB once each was attached",
            "-" if peer is None else f"{peer / 2**20:,.1f} MiB",
            f"{number(part)} × the payload, {number(attached / payload)} × once attached",
            "a few percent above" if target else "-",
            ("yes" if part <= 1.05 else "no") if target else "-",
            "growth of the resident set, one process each, over one with one delta loaded and attached; the peer's are "
            "loaded, and all are attached by that"
            if target
            else "",
        )


def _measured(who: str, folder: Path, count: int) -> tuple[float, float, float]:
    command = [sys.executable, "-m", "benchmarks.many", who, str(folder), str(count)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    loaded, attached, payload = json.loads(output.splitlines()[-1])
    return loaded, attached, payload


def _resident() -> int:
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _grow(who: str, folder: Path, count: int) -> None:
    """Print the growth of this process by so many deltas: loaded, attached once each, and their payload; bytes."""
    torch.set_num_threads(1)
    base, names = gpt2(), [f"d{i}" for i in range(count)]
    if who == "peer":
        wrapped = peft(base, ["own"], GPT2_LINEAR)
        before = _resident()
        for name in names:
            wrapped.load_adapter(str(folder / name), adapter_name=name)
        grown = _resident() - before
        print(json.dumps([grown, grown, 0]))
        return
    compiled = _fresh(base)
    library = compiled.library(folder).load("d999")
    compiled.only("d999")
    before, held = _resident(), library.nbytes
    library.load(*names)
    loaded, payload = _resident() - before, library.nbytes - held
    for name in names:
        compiled.only(name)
    print(json.dumps([loaded, _resident() - before, payload]))


GROUPS: dict[str, Callable[[], Iterator[Row]]] = {"loading": loading}

if __name__ == "__main__":
    _grow(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
