"""Switching the active delta, and mixed batches, over the number of deltas loaded (1 … 1,000)."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator

import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter_from_state_dict
from torch import nn

import deltaspec
from benchmarks.harness import LIMITS, Item, Row, Series, interleave, many, ratio, seconds, verdict
from benchmarks.models import GPT2_LINEAR, config, gpt2, peft, spec

warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
COUNTS = (1, 2, 4, 10, 30, 100, 300, 1000)
MOST_PEERS = 100
"""Each adapter that is added takes PEFT longer than the one before: 100 take a minute."""
ROWS = 8
TOKENS = 16
_WHERE = "12 × 256 GPT-2, 48 sites"
_TIMES = 200
"""Ours are too short to be timed alone."""


def switching() -> Iterator[Item]:
    """Switch the active delta, leave and enter the detached state, and mix, with ever more deltas loaded."""
    base = gpt2()
    peer = peft(base, ["d0"], GPT2_LINEAR)
    hot, one = peft(base, ["d0"], GPT2_LINEAR), compiled(base, ["d0"])
    switches: dict[str, dict[float, list[float]]] = {"deltaspec": {}, "PEFT, set_adapter": {}, "PEFT, hot-swap": {}}
    mixtures: dict[str, dict[float, list[float]]] = {"deltaspec": {}, "PEFT": {}}
    for count in LIMITS.counts(*COUNTS):
        names = [f"d{i}" for i in range(count)]
        ours = compiled(base, names)
        beside = grown(peer, names) if count <= MOST_PEERS else None
        contestants: dict[str, Callable[[], None]] = {"ours": many(_turning(ours, names), _TIMES)}
        if beside is not None:
            contestants |= {"peer": _setting(beside, names), "hot": _hot_swap(hot)}
        times = interleave(contestants)
        switches["deltaspec"][count] = [value / _TIMES for value in times["ours"]]
        if beside is not None:
            switches["PEFT, set_adapter"][count], switches["PEFT, hot-swap"][count] = times["peer"], times["hot"]
            yield from _rows(times, count)
            if count == 1:
                yield _selecting(ours, beside, names[0])
            if count == MOST_PEERS:
                yield _detached(ours, beside, count)
        for who, found in _mixed(ours, one, beside, names).items():
            mixtures[who][count] = found
    for who, points in switches.items():
        yield Series.of("switching", who, points)
    for who, points in mixtures.items():
        yield Series.of("mixing", who, points)
    del ours, contestants
    if LIMITS.loaded is None:
        yield _thousand(base)


def compiled(base: nn.Module, names: list[str]) -> deltaspec.CompiledModel:
    """Compile so many deltas, the first attached."""
    documents = [spec(names[i : i + 100], GPT2_LINEAR) for i in range(0, len(names), 100)]  # a spec's size is bounded
    for document in documents[1:]:
        document["deltas"][0]["attached"] = False
    return deltaspec.compile(base, *documents)


def grown(peer: PeftModel, names: list[str]) -> PeftModel:
    """Add the adapters that are missing."""
    for name in names:
        if name not in peer.peft_config:
            peer.add_adapter(name, config(GPT2_LINEAR))
    peer.eval()
    return peer


def _turning(ours: deltaspec.CompiledModel, names: list[str]) -> Callable[[], None]:
    """Switch between two deltas; a single one goes off and on, for there is no other switch."""
    turns = itertools.cycle([(), (names[0],)] if len(names) == 1 else [(names[0],), (names[-1],)])

    def run() -> None:
        ours.only(*next(turns))

    return run


def _setting(peer: PeftModel, names: list[str]) -> Callable[[], None]:
    turns = itertools.cycle([names[0], names[-1]])

    def run() -> None:
        peer.set_adapter(next(turns))

    return run


def _hot_swap(peer: PeftModel) -> Callable[[], None]:
    """Copy one of two adapters' tensors, which are in memory, into the only one that is loaded."""
    own = {key: value for key, value in peer.state_dict().items() if "lora_" in key}
    turns = itertools.cycle([{key: torch.randn_like(value) for key, value in own.items()} for _ in range(2)])
    settings = config(GPT2_LINEAR)

    def run() -> None:
        hotswap_adapter_from_state_dict(peer, next(turns), "d0", settings)

    return run


def _rows(times: dict[str, list[float]], count: int) -> Iterator[Row]:
    target = {1: 500, 2: 500, 100: 20_000}.get(count)
    if target is None:
        return
    median, text = ratio(times["peer"], times["ours"], _TIMES)
    note = "two is the fewest between which one can switch" if count == 2 else ""
    if count == 1:
        note = (
            "ours takes its delta off, or puts it on the bare backbone, and puts back the training flags of all 148 "
            "parameters of the backbone, or reads and clears them: most of the time, as torch has no call for many at "
            "once; PEFT's is given the adapter that is active already, and leaves the backbone's flags alone"
        )
    yield Row(
        f"switch the active delta, {count} loaded{': off or on, per call' if count == 1 else ''} ({_WHERE})",
        seconds(times["ours"], 1 / _TIMES),
        seconds(times["peer"]),
        f"{text} × faster",
        f"≥ {target:,} ×",
        verdict(median >= target),
        note,
    )
    if count == MOST_PEERS:
        _, text = ratio(times["hot"], times["ours"], _TIMES)
        yield Row(
            f"the same beside PEFT's hot-swap, {count} in memory",
            seconds(times["ours"], 1 / _TIMES),
            seconds(times["hot"]),
            f"{text} × faster",
            "-",
            "-",
            "PEFT's best form: one adapter is loaded, the others are tensors in memory, copied into it "
            "(`hotswap_adapter_from_state_dict`); it serves LoRA alone, and its cost does not grow with their number",
        )


def _selecting(ours: deltaspec.CompiledModel, peer: PeftModel, name: str) -> Row:
    """Call both for the one delta that is loaded, which is active already."""
    ours.only(name)
    times = interleave({"ours": many(lambda: ours.only(name), _TIMES), "peer": lambda: peer.set_adapter(name)})
    median, text = ratio(times["peer"], times["ours"], _TIMES)
    return Row(
        f"ask for the active delta, 1 loaded ({_WHERE})",
        seconds(times["ours"], 1 / _TIMES),
        seconds(times["peer"]),
        f"{text} × faster",
        "≥ 500 ×",
        verdict(median >= 500),
        "with one loaded this is all that `set_adapter` can be asked for; ours has nothing to do, and sees that",
    )


def _detached(ours: deltaspec.CompiledModel, peer: PeftModel, count: int) -> Row:
    """Enter and leave the detached state."""

    def enter_ours() -> None:
        with ours.detached():
            pass

    def enter_peer() -> None:
        with peer.disable_adapter():
            pass

    times = interleave({"ours": many(enter_ours, 100), "peer": enter_peer}, pairs=20)
    median, text = ratio(times["peer"], times["ours"], 100)
    return Row(
        f"`detached()`, enter and leave, {count} loaded",
        seconds(times["ours"], 1 / 100),
        seconds(times["peer"]),
        f"{text} × faster",
        "≥ 20,000 ×",
        verdict(median >= 20_000),
        "more than half of ours is reading, clearing and putting back the training flags of all 148 parameters of the "
        "backbone, which is bare in between; switching between two deltas leaves them alone",
    )


def _thousand(base: nn.Module) -> Row:
    """Switch among two and among 1,000 loaded."""
    contestants = {}
    for loaded in (2, 1000):
        names = [f"d{i}" for i in range(loaded)]
        contestants[str(loaded)] = many(_turning(compiled(base, names), names), _TIMES)
    times = interleave(contestants, pairs=40)
    median, text = ratio(times["1000"], times["2"])
    return Row(
        "switch the active delta, 1,000 loaded, over 2 loaded",
        seconds(times["1000"], 1 / _TIMES),
        "-",
        f"{text} × ours with 2",
        "≤ 1.2 ×",
        verdict(median <= 1.2),
        "PEFT is left out: each adapter that is added takes it longer than the one before",
    )


def _mixed(
    ours: deltaspec.CompiledModel, one: deltaspec.CompiledModel, peer: PeftModel | None, names: list[str]
) -> dict[str, list[float]]:
    """Return the time of a batch whose rows take the loaded deltas in turn, over one delta for all, pair by pair."""
    ids = torch.randint(0, 1000, (ROWS, TOKENS))
    last = names[-ROWS:]
    chosen = [last[row % len(last)] for row in range(ROWS)]
    rows = ours.rows(chosen)
    contestants: dict[str, Callable[[], object]] = {
        "deltaspec": lambda: ours(ids, use_cache=False, deltas=rows),
        "deltaspec one": lambda: one(ids, use_cache=False),
    }
    if peer is not None:
        peer.set_adapter(names[0])
        contestants["PEFT"] = lambda: peer(ids, use_cache=False, adapter_names=chosen)
        contestants["PEFT one"] = lambda: peer(ids, use_cache=False)
    with torch.inference_mode():
        times = interleave(contestants)
    whose = [who for who in ("deltaspec", "PEFT") if who in times]
    return {who: [a / b for a, b in zip(times[who], times[f"{who} one"], strict=True)] for who in whose}
