"""Many jobs in one batch: eight deltas trained together, beside the peer training them one after another."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

import deltaspec
from benchmarks.harness import Row, interleave, ratio, seconds, verdict
from benchmarks.models import LLAMA_LINEAR, llama

RANKS = {"ranks 4, 8, 16 and 32": (4, 8, 16, 32, 4, 8, 16, 32), "rank 8": (8,) * 8}
TARGETS = {8: 2.2, 32: 1.5, 128: 1.1}
"""Times faster, by tokens a job."""


def jobs() -> Iterator[Row]:
    """One step of eight jobs with LoRA on all linear layers, AdamW included."""
    base = llama()
    for what, ranks in RANKS.items():
        model, peers = together(base, ranks), [peer(base, rank) for rank in ranks]
        for tokens, target in TARGETS.items():
            ids = torch.randint(0, 1000, (len(ranks), tokens))
            steps = {"ours": mixed_step(model, ids), "peer": separate_steps(peers, ids)}
            times = interleave(steps, pairs=10 if tokens < 100 else 5, warm_up=2)
            median, text = ratio(times["peer"], times["ours"])
            yield Row(
                f"a step of 8 jobs, {what}, {tokens} tokens each, LoRA on 56 linears (8 × 512 Llama)",
                seconds(times["ours"]),
                f"{seconds(times['peer'])} (one after another)",
                f"{text} × faster",
                f"≥ {target} ×",
                verdict(median >= target),
            )


def together(base: nn.Module, ranks: tuple[int, ...]) -> deltaspec.CompiledModel:
    """Compile a delta a job."""
    target = {"path": [f"**.{name}" for name in LLAMA_LINEAR]}
    deltas = [{"name": f"d{n}", "method": "lora", "params": {"rank": r}, "target": target} for n, r in enumerate(ranks)]
    return deltaspec.compile(base, {"deltaspec": 1, "deltas": deltas}).train()


def peer(base: nn.Module, rank: int) -> nn.Module:
    """Wrap a copy of the model, over the same weights, with one adapter."""
    twin = copy.deepcopy(base, {id(p): nn.Parameter(p.data) for p in base.parameters()})
    config = LoraConfig(r=rank, lora_alpha=16, target_modules=list(LLAMA_LINEAR))
    wrapped: nn.Module = get_peft_model(twin, config).train()
    return wrapped


def mixed_step(model: deltaspec.CompiledModel, ids: torch.Tensor) -> Callable[[], None]:
    """Return what trains all jobs by one step, a row each."""
    names = list(model.deltas)
    optimizer = torch.optim.AdamW(model.trainable_parameters(*names), lr=1e-4)
    rows = model.rows(names)

    def run() -> None:
        logits = model(ids, use_cache=False, deltas=rows).logits
        tokens = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        tokens.view(len(names), -1).mean(1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def separate_steps(models: list[nn.Module], ids: torch.Tensor) -> Callable[[], None]:
    """Return what trains each model by one step on its row."""
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-4) for m in models]

    def run() -> None:
        for row, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            given = ids[row : row + 1]
            model(input_ids=given, labels=given, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return run
