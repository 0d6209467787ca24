"""Adapters that PEFT wrote, read by us: beside PEFT, and beside the same deltas as we save them."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

import deltaspec
from benchmarks.harness import LIMITS, Row, interleave, ratio, seconds, verdict
from benchmarks.models import LLAMA_LINEAR, llama, peft, spec

warnings.filterwarnings("ignore", message=".*Already found a `peft_config`.*")
PAIRS = 3
"""Of loading 100: the peer takes long for each."""
_WHERE = "8 × 512 Llama, LoRA r = 8 on 56 sites, 2.4 MiB each"


def reading() -> Iterator[Row]:
    """Read PEFT directories: many into a library, and one beside what we save."""
    base, count = llama(), LIMITS.loaded or 100
    with tempfile.TemporaryDirectory() as folder:
        theirs, mine = _saved(base, Path(folder), count)
        yield _many(base, theirs, count)
        yield _library(base, theirs, mine, count)
        yield _restored(base, theirs / "d0", mine / "d0")


def _saved(base: nn.Module, folder: Path, count: int) -> tuple[Path, Path]:
    """Save adapters of different values with PEFT, and what they are here: (theirs, ours), a directory each."""
    wrapped = peft(base, ["default"], LLAMA_LINEAR)
    generator = torch.Generator().manual_seed(0)
    for index in range(count):
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0, 0.02, generator=generator)
        wrapped.save_pretrained(folder / "theirs" / f"d{index}")
        deltaspec.restore(base, folder / "theirs" / f"d{index}").save(folder / "ours" / f"d{index}")
    return folder / "theirs", folder / "ours"


def _fresh(base: nn.Module) -> deltaspec.CompiledModel:
    return deltaspec.compile(base, spec(["own"], LLAMA_LINEAR))


def _opened(model: deltaspec.CompiledModel, folder: Path) -> None:
    model.library(folder, by="folder").load()


def _many(base: nn.Module, theirs: Path, count: int) -> Row:
    def peer(wrapped: nn.Module) -> None:
        for index in range(count):
            wrapped.load_adapter(str(theirs / f"d{index}"), adapter_name=f"d{index}")

    times = interleave(
        {"ours": lambda model: _opened(model, theirs), "peer": peer},
        pairs=PAIRS,
        warm_up=0,
        before={"ours": lambda: _fresh(base), "peer": lambda: peft(base, ["own"], LLAMA_LINEAR)},
    )
    median, text = ratio(times["peer"], times["ours"])
    return Row(
        f"load {count} PEFT adapters into a library ({_WHERE})",
        seconds(times["ours"]),
        seconds(times["peer"]),
        f"{text} × faster",
        "≥ 50 ×",
        verdict(median >= 50),
        f"{PAIRS} pairs, since the peer takes so long; it is given `load_adapter` {count} times, by its defaults; ours "
        "accounts for every key and option, and checks shapes and that all values are finite",
    )


def _library(base: nn.Module, theirs: Path, mine: Path, count: int) -> Row:
    times = interleave(
        {"theirs": lambda model: _opened(model, theirs), "ours": lambda model: _opened(model, mine)},
        pairs=PAIRS,
        warm_up=1,
        before=dict.fromkeys(("theirs", "ours"), lambda: _fresh(base)),
    )
    return _beside(times, f"open a library of {count} PEFT directories and load all, over our own")


def _restored(base: nn.Module, theirs: Path, mine: Path) -> Row:
    times = interleave(
        {"theirs": lambda: deltaspec.restore(base, theirs), "ours": lambda: deltaspec.restore(base, mine)}
    )
    return _beside(times, "restore a model from a PEFT directory, over from our own")


def _beside(times: dict[str, list[float]], what: str) -> Row:
    median, text = ratio(times["theirs"], times["ours"])
    both = f"{seconds(times['theirs'])} and {seconds(times['ours'])}"
    return Row(what, both, "-", f"{text} ×", "≤ 1.5 ×", verdict(median <= 1.5))
