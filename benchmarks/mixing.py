"""Mixed batches: rows under different deltas, beside one delta for all rows, and beside the peer's own mixed batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

import deltaspec
from benchmarks.harness import Item, Row, interleave, ratio, seconds, verdict
from benchmarks.models import LLAMA_LINEAR, llama, peft, spec
from benchmarks.profiles import difference

ROWS = 8
TOKENS = (1, 16, 128)
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "adapter": {},
    "bitfit": {},
    "ia3": {},
    "ssf": {},
    "vera": {"rank": 64},
    "reft": {},
    "parallel_adapter": {},
}
"""With the parameters that they need on this model; where they go is each method's default."""
_WHERE = "8 × 512 Llama"


def mixing() -> Iterator[Item]:
    """Eight rows under eight deltas of one kind, and of eight methods."""
    base, names = llama(), [f"d{i}" for i in range(ROWS)]
    # A model each: preparing one for rows leaves its dispatchers in place, and one delta for all rows needs none.
    one, listed, prepared = (deltaspec.compile(base, spec(names, LLAMA_LINEAR)) for _ in range(3))
    peer = peft(base, names, LLAMA_LINEAR)
    rows = prepared.rows(names)
    for tokens in TOKENS:
        ids = torch.randint(0, 1000, (ROWS, tokens))
        contestants = _contestants(ids, one, listed, prepared, peer, names, rows)
        with torch.inference_mode():
            times = interleave(contestants, pairs=20 if tokens == 128 else 40)
            yield from _rows(contestants, times, tokens)
    yield from methods(base)


def _contestants(
    ids: torch.Tensor,
    one: deltaspec.CompiledModel,
    listed: deltaspec.CompiledModel,
    prepared: deltaspec.CompiledModel,
    peer: Any,
    names: list[str],
    rows: Any,
) -> dict[str, Callable[[], Any]]:
    return {
        "ours": lambda: one(ids, use_cache=False),
        "prepared": lambda: prepared(ids, use_cache=False, deltas=rows),
        "listed": lambda: listed(ids, use_cache=False, deltas=names),
        "peer": lambda: peer(ids, use_cache=False),
        "peer mixed": lambda: peer(ids, use_cache=False, adapter_names=names),
    }


def _rows(contestants: dict[str, Callable[[], Any]], times: dict[str, list[float]], tokens: int) -> Iterator[Row]:
    _, theirs = ratio(times["peer mixed"], times["peer"])
    for how, given in (("prepared", "rows made before by `c.rows`"), ("listed", "a list of names, each call")):
        median, text = ratio(times[how], times["ours"])
        note = ""
        if median > 1.05:
            note = difference(contestants[how], contestants["ours"], "more than one delta for all rows:")
        yield Row(
            f"8 rows with 8 different deltas over one delta for all, {ROWS} × {tokens} tokens, {given} ({_WHERE})",
            f"{seconds(times[how])} over {seconds(times['ours'])}",
            f"{seconds(times['peer mixed'])} over {seconds(times['peer'])}: {theirs}",
            text,
            "≤ 1.05",
            verdict(median <= 1.05),
            note,
        )
    _, text = ratio(times["peer mixed"], times["prepared"])
    yield Row(
        f"the mixed batch itself, {ROWS} × {tokens} tokens",
        seconds(times["prepared"]),
        seconds(times["peer mixed"]),
        f"{text} × faster",
        "-",
        "-",
    )


def methods(base: torch.nn.Module) -> Iterator[Row]:
    """Eight rows under eight methods, beside LoRA for all rows, and beside eight batches of one row with switches."""
    deltas = [{"name": name, "method": name, "params": given, "attached": False} for name, given in METHODS.items()]
    document = {"deltaspec": 1, "deltas": deltas}
    apart, mixed = deltaspec.compile(base, document), deltaspec.compile(base, document)
    one = deltaspec.compile(base, document)
    one.only("lora")
    names = list(METHODS)
    rows = mixed.rows(names)
    for tokens in TOKENS[:2]:
        ids = torch.randint(0, 1000, (ROWS, tokens))

        def each(ids: torch.Tensor = ids) -> None:
            for row, name in enumerate(names):
                apart.only(name)
                apart(ids[row : row + 1], use_cache=False)

        contestants: dict[str, Callable[[], Any]] = {
            "mixed": lambda ids=ids: mixed(ids, use_cache=False, deltas=rows),
            "one": lambda ids=ids: one(ids, use_cache=False),
            "bare": lambda ids=ids: base(ids, use_cache=False),
            "each": each,
        }
        with torch.inference_mode():
            times = interleave(contestants, pairs=30)
            _, text = ratio(times["mixed"], times["one"])
            _, bare = ratio(times["mixed"], times["bare"])
            _, alone = ratio(times["mixed"], times["each"])
            note = difference(contestants["mixed"], contestants["one"], "more than LoRA for all rows:")
        yield Row(
            f"8 rows with 8 different methods over one LoRA for all, {ROWS} × {tokens} tokens ({_WHERE})",
            f"{seconds(times['mixed'])} over {seconds(times['one'])}",
            "- (cannot)",
            text,
            "-",
            "-",
            f"{', '.join(names)} at each one's default sites; {bare} × the bare backbone's time, and {alone} × that of "
            f"eight batches of one row, switching in between; {note}",
        )
