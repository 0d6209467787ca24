"""Mixed batches: rows under different deltas, beside one delta for all rows, and beside the peer's own mixed batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import deltaspec
from benchmarks.harness import Item, Row, interleave, ratio, seconds, verdict
from benchmarks.jobs import together
from benchmarks.models import LLAMA_LINEAR, llama, peft, spec
from benchmarks.profiles import difference
from deltaspec.backbone.reserved import find
from deltaspec.deltas.stacks import Stacks
from deltaspec.graphs.passes.fuse_rows import add_low_rank_rows_
from deltaspec.graphs.row_ops import add_linear_rows, linear_rows
from deltaspec.serving.dispatch import Batch
from deltaspec.serving.families import Family, Part, homes_of
from deltaspec.serving.slots import Slot
from deltaspec.serving.sources import Source

ROWS = 8
SITES = 32
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
    chosen = [names[place] for place in (3, 7, 1, 5, 0, 6, 2, 4)]  # not as they lie in memory
    rows = prepared.rows(chosen)
    payload = sum(p.numel() * p.element_size() for name in names for p in one.deltas[name].parameters()) / 2**20
    weights = sum(p.numel() * p.element_size() for p in base.parameters()) / 2**20
    explanation = f"{payload:.0f} MiB of eight deltas are read and gathered beside {weights:.0f} MiB of weights"
    for tokens in TOKENS:
        ids = torch.randint(0, 1000, (ROWS, tokens))
        contestants = _contestants(ids, one, listed, prepared, peer, chosen, rows)
        if tokens == TOKENS[-1]:
            del contestants["listed"]  # what a list costs does not grow with the tokens
        with torch.inference_mode():
            times = interleave(contestants, pairs=20 if tokens == 128 else 40)
            yield from _rows(contestants, times, tokens, explanation)
    yield from mixed_ranks(base)
    yield from fused()
    yield from methods(base)


def mixed_ranks(base: nn.Module) -> Iterator[Row]:
    """Eight rows under eight deltas of four ranks, over one delta of a middle rank for all."""
    ranks = (4, 8, 16, 32, 32, 16, 8, 4)
    one, mixed = together(base, (16,)).eval(), together(base, ranks).eval()
    mixed.only()
    rows = mixed.rows(list(mixed.deltas))
    for tokens in TOKENS:
        ids = torch.randint(0, 1000, (ROWS, tokens))
        contestants: dict[str, Callable[[], Any]] = {
            "mixed": lambda ids=ids: mixed(ids, use_cache=False, deltas=rows),
            "one": lambda ids=ids: one(ids, use_cache=False),
        }
        with torch.inference_mode():
            times = interleave(contestants, pairs=20 if tokens == 128 else 40)
            median, text = ratio(times["mixed"], times["one"])
            note = (
                "" if median <= 1.1 else difference(contestants["mixed"], contestants["one"], "more than one for all:")
            )
        yield Row(
            f"8 rows, ranks 4, 8, 16 and 32, over one delta of rank 16 for all, {ROWS} × {tokens} tokens ({_WHERE})",
            f"{seconds(times['mixed'])} over {seconds(times['one'])}",
            "-",
            text,
            "≤ 1.1",
            verdict(median <= 1.1),
            note,
        )


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


def _rows(
    contestants: dict[str, Callable[[], Any]], times: dict[str, list[float]], tokens: int, explanation: str
) -> Iterator[Row]:
    _, theirs = ratio(times["peer mixed"], times["peer"])
    for how, given in (("prepared", "rows made before by `c.rows`"), ("listed", "a list of names, each call")):
        if how not in times:
            continue
        median, text = ratio(times[how], times["ours"])
        note = ""
        if median > 1.05:
            note = f"{explanation}; {difference(contestants[how], contestants['ours'], 'more than one delta for all')}"
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


def fused() -> Iterator[Row]:
    """Sites of a mixed batch with and without the pass that fuses them."""
    torch.manual_seed(0)
    linears = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(SITES)))
    names = [f"d{i}" for i in range(ROWS)]
    compiled = deltaspec.compile(
        linears, spec(names, [f"{i}" for i in range(SITES)]), example_inputs=torch.randn(1, 512)
    )
    slot = Slot(0, Batch(rows=ROWS, size=ROWS))
    slot.fill(compiled.rows(names))
    found = find(compiled.backbone)
    assert found is not None
    stacks = Stacks(found[1], {planned.name: planned for planned in compiled.plan.deltas})
    stacks.ensure(names)
    sites = compiled.plan["d0"].sites
    family = Family("lora", 0)
    parts = {(s.fqn, None, None): Part(homes_of(s, stacks.of("d0")), (2.0,), True, 0.0) for s in sites}
    family.join(stacks.kind("d0"), dict.fromkeys(parts), parts, 0)
    down, up = ([Source(family, (s.fqn, None, None), name, found[1]) for s in sites] for name in ("down", "up"))
    for tokens in TOKENS:
        x = torch.randn(ROWS, tokens, 512)

        def plain(x: Tensor = x) -> None:
            for host, a, b in zip(linears, down, up, strict=True):
                h = linear_rows(x, a.take(slot, ROWS, True))
                add_linear_rows(host(x), h, b.take(slot, ROWS, True), slot, 2.0)

        def together(x: Tensor = x) -> None:
            for host, a, b in zip(linears, down, up, strict=True):
                add_low_rank_rows_(host(x), x, a, b, slot, 2.0)

        with torch.inference_mode():
            times = interleave({"plain": plain, "fused": together}, pairs=60 if tokens < 100 else 20)
        median, text = ratio(times["fused"], times["plain"])
        yield Row(
            f"pass fuse_rows, {SITES} linears of 512 × 512, {ROWS} × {tokens} tokens",
            seconds(times["fused"]),
            f"{seconds(times['plain'])} (as written)",
            f"{text} × the time",
            "≤ 1",
            verdict(median <= 1),
        )


def methods(base: nn.Module) -> Iterator[Row]:
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
