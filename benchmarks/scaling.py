"""What the costs grow with: sites, ranks, layers, and rows of a mixed batch."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

import deltaspec
from benchmarks.harness import LIMITS, Table, interleave, many, ratio, seconds
from benchmarks.models import LLAMA_LINEAR, llama

LAYERS = (2, 4, 8, 16, 32)
RANKS = (1, 4, 16, 64, 128)
SITES = (["q_proj"], ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"], LLAMA_LINEAR)
ROWS = (1, 2, 4, 8, 16, 32)
TOKENS = 16
_TIMES = 200
"""A switch is too short to be timed alone."""
_HEAD = (
    "compile", "compile, PEFT", "switch between two", "switch, PEFT", "forward over bare", "forward over bare, PEFT",
)  # fmt: skip


def scaling() -> Iterator[Table]:
    """Vary one thing at a time: LoRA of rank 8 on all 56 linear layers of 8 layers, 256 wide, else."""
    model = _llama(8)
    lines = [(f"{len(kinds) * 8}", *_costs(model, kinds, 8)) for kinds in _few(SITES)]
    yield Table("Over the number of sites, 8 layers, rank 8", ("sites", *_HEAD), tuple(lines), _NOTE)
    lines = [(f"{rank}", *_costs(model, LLAMA_LINEAR, rank)) for rank in _few(RANKS)]
    yield Table("Over the rank, 56 sites", ("rank", *_HEAD), tuple(lines))
    lines = [(f"{layers} ({7 * layers} sites)", *_costs(_llama(layers), LLAMA_LINEAR, 8)) for layers in _few(LAYERS)]
    yield Table("Over the number of layers, all linears, rank 8", ("layers", *_HEAD), tuple(lines))
    yield _rows(model)


_NOTE = (
    f"A Llama 256 wide. The forward is one row of {TOKENS} tokens; its excess over the bare backbone's time is "
    "Python for the most part at this size. Ours leaves the model as it is; PEFT wraps a copy made beforehand."
)


def _few(values: Any) -> Any:
    return values if LIMITS.pairs is None else values[:2]


def _llama(layers: int) -> LlamaForCausalLM:
    return llama(256, 688, layers=layers, heads=4)


def _spec(names: list[str], kinds: list[str], rank: int) -> dict[str, Any]:
    shared = {"method": "lora", "params": {"rank": rank, "alpha": 16}, "target": {"path": [f"**.{k}" for k in kinds]}}
    return {"deltaspec": 1, "deltas": [{"name": name, **shared, "attached": name == names[0]} for name in names]}


def _costs(model: nn.Module, kinds: list[str], rank: int) -> tuple[str, ...]:
    """Measure compile, switch and forward beside the peer; written."""
    settings = LoraConfig(r=rank, lora_alpha=16, target_modules=kinds)
    document = _spec(["d0", "d1"], kinds, rank)
    single = _spec(["d0"], kinds, rank)
    made = interleave(
        {"ours": lambda: deltaspec.compile(model, single), "peer": lambda twin: get_peft_model(twin, settings)},
        before={"peer": lambda: copy.deepcopy(model)},
    )
    ours, peer = deltaspec.compile(model, document), get_peft_model(copy.deepcopy(model), settings, adapter_name="d0")
    peer.add_adapter("d1", settings)
    peer.eval()
    first, second = itertools.cycle(["d0", "d1"]), itertools.cycle(["d0", "d1"])
    switched = interleave(
        {
            "ours": many(lambda: ours.only(next(first)), _TIMES),
            "peer": lambda: peer.set_adapter(next(second)),
        }
    )
    ids = torch.randint(0, 1000, (1, TOKENS))
    with torch.inference_mode():
        times = interleave({"bare": _run(model, ids), "ours": _run(ours, ids), "peer": _run(peer, ids)}, pairs=40)
    return (
        seconds(made["ours"]),
        seconds(made["peer"]),
        seconds(switched["ours"], 1 / _TIMES),
        seconds(switched["peer"]),
        f"{ratio(times['ours'], times['bare'])[1]} ×",
        f"{ratio(times['peer'], times['bare'])[1]} ×",
    )


def _run(model: nn.Module, ids: torch.Tensor) -> Callable[[], object]:
    return lambda: model(input_ids=ids, use_cache=False)


def _rows(model: nn.Module) -> Table:
    """Measure mixed batches of ever more rows, each under its own delta."""
    lines = []
    settings = LoraConfig(r=8, lora_alpha=16, target_modules=LLAMA_LINEAR)
    most = _few(ROWS)[-1]
    names = [f"d{i}" for i in range(most)]
    one, mixed = (deltaspec.compile(model, _spec(names, LLAMA_LINEAR, 8)) for _ in range(2))
    peer = get_peft_model(copy.deepcopy(model), settings, adapter_name="d0")
    for name in names[1:]:
        peer.add_adapter(name, settings)
    peer.eval()
    for count in _few(ROWS):
        ids, chosen = torch.randint(0, 1000, (count, TOKENS)), names[:count]
        rows = mixed.rows(chosen)
        contestants: dict[str, Callable[[], object]] = {
            "one": _run(one, ids),
            "mixed": lambda ids=ids, rows=rows: mixed(ids, use_cache=False, deltas=rows),
            "peer": _run(peer, ids),
            "peer mixed": lambda ids=ids, chosen=chosen: peer(ids, use_cache=False, adapter_names=chosen),
        }
        with torch.inference_mode():
            times = interleave(contestants)
        lines.append(
            (
                f"{count}",
                seconds(times["mixed"]),
                f"{ratio(times['mixed'], times['one'])[1]} ×",
                seconds(times["peer mixed"]),
                f"{ratio(times['peer mixed'], times['peer'])[1]} ×",
            )
        )
    return Table(
        "Over the rows of a mixed batch, each under its own delta",
        ("rows", "mixed", "over one delta for all", "mixed, PEFT", "over one for all, PEFT"),
        tuple(lines),
        f"{TOKENS} tokens a row, LoRA of rank 8 on 56 linears, 256 wide; rows prepared by `c.rows`.",
    )
