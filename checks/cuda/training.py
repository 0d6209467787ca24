"""Training: gradients and steps beside the CPU's, dropout, passes, memory beside the estimate, torch.compile, rows."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch

import deltaspec
from checks.cuda.base import (
    Check,
    Skipped,
    distance,
    gradients,
    ids,
    llama,
    moved,
    plain_float32,
    require,
    spec,
    trained,
)

CPU = torch.device("cpu")


def checks() -> Iterator[Check]:
    """Yield the checks of this group."""
    yield Check("training", "gradients beside the CPU's", _gradients)
    yield Check("training", "AdamW, 20 steps, dropout 0.1", _steps)
    yield Check("training", "passes beside none", _passes)
    yield Check("training", "gradient checkpointing", _checkpointing)
    yield Check("training", "memory beside the estimate", _memory)
    yield Check("rows", "each row as alone", _rows)
    yield Check("rows", "rows are trained as alone", _rows_trained)
    yield Check("rows", "generation, a delta a row", _generation)
    yield Check("inductor", "forward", _inductor)
    yield Check("inductor", "a training step", _inductor_step)


def _one_step(device: torch.device, **options: Any) -> dict[str, torch.Tensor]:
    c = moved(deltaspec.compile(llama(device), spec(rank=4), **options)).train()
    c(input_ids=ids(device), labels=ids(device)).loss.backward()
    return gradients(c.backbone)


def _gradients(device: torch.device) -> str:
    with plain_float32():
        here, there = _one_step(CPU), _one_step(device)
    require(here.keys() == there.keys() != set(), "other parameters have gradients")
    off = max(distance(there[name], here[name]) for name in here)
    require(off < 1e-3, f"{off:.1e} off")
    return f"{len(here)} parameters, within {off:.0e}"


def _steps(device: torch.device) -> str:
    model, x = llama(device), ids(device)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    c = deltaspec.compile(model, spec(rank=8, dropout=0.1)).train()
    losses = trained(c, x, 20)
    require(losses[-1] < 0.9 * losses[0], f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}")
    require(all(torch.equal(before[name], p) for name, p in model.named_parameters()), "the backbone was written to")
    return f"loss {losses[0]:.2f} to {losses[-1]:.2f}, backbone to the bit"


def _passes(device: torch.device) -> str:
    if "passes" not in inspect.signature(deltaspec.compile).parameters:
        raise Skipped("this version has no passes for training")
    with plain_float32():
        first, second = _one_step(device), _one_step(device, passes=False)
    off = max(distance(first[name], second[name]) for name in second)
    require(first.keys() == second.keys() and off < 1e-4, f"{off:.1e} off")
    return f"{len(first)} gradients, within {off:.0e}"


def _checkpointing(device: torch.device) -> str:
    x, found = ids(device), []
    for again in (False, True):
        c = moved(deltaspec.compile(llama(device), spec(rank=4, dropout=0.1))).train()
        if again:
            c.backbone.activation_checkpointing_enable()
        torch.manual_seed(3)
        c(input_ids=x, labels=x).loss.backward()
        found.append(gradients(c.backbone))
    off = max(distance(found[1][name], found[0][name]) for name in found[0])
    require(off < 1e-5, f"{off:.1e} off: dropout was drawn anew")
    return f"within {off:.0e}, dropout included"


def _memory(device: torch.device) -> str:
    if device.type != "cuda":
        raise Skipped("torch tells the peak of a CUDA device alone; the suite compares the parts on the CPU")
    model = llama(device, hidden=512, layers=4, heads=8)
    options = {"batch": 8, "length": 128, "optimizer": "adamw"}
    document, x = spec(rank=8, dropout=0.1), ids(device, 8, 128)
    estimate = deltaspec.estimate(model, document, **options)
    c = deltaspec.compile(model, document).train()
    optimizer = torch.optim.AdamW(c.trainable_parameters())
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats(device)
        optimizer.zero_grad()
        c(input_ids=x, labels=x).loss.backward()
        peak = torch.cuda.max_memory_allocated(device)
        optimizer.step()
    require(abs(estimate.total - peak) <= 0.15 * peak, f"estimated {estimate.total:,} bytes, and {peak:,} were in use")
    return f"{estimate.total / 2**20:.0f} MiB estimated, {peak / 2**20:.0f} MiB at the peak"


@torch.no_grad()
def _rows(device: torch.device) -> str:
    c, x = moved(deltaspec.compile(llama(device), spec("a", "b", rank=4))), ids(device)
    with plain_float32():
        mixed = c(input_ids=x, deltas=["a", None, "b", ("a", "b")]).logits
        alone = []
        for row, names in enumerate([("a",), (), ("b",), ("a", "b")]):
            with c.only(*names):
                alone.append(c(input_ids=x).logits[row])
    off = distance(mixed, torch.stack(alone))
    require(off < 1e-4, f"{off:.1e} off")
    return f"4 rows, within {off:.0e}"


def _rows_trained(device: torch.device) -> str:
    x = ids(device, 2)
    with plain_float32():
        c = moved(deltaspec.compile(llama(device), spec("a", "b", rank=4))).train()
        c(input_ids=x, deltas=["a", "b"]).logits.square().sum().backward()
        mixed = {name: [p.grad.clone() for p in c.deltas[name].parameters()] for name in ("a", "b")}
        for row, name in enumerate(("a", "b")):
            c.zero_grad()
            with c.only(name):
                c(input_ids=x[row : row + 1]).logits.square().sum().backward()
            off = max(map(distance, mixed[name], [p.grad for p in c.deltas[name].parameters()]))
            require(off < 1e-3, f"{name} is {off:.1e} off")
    return "2 deltas in one backward"


def _generation(device: torch.device) -> str:
    c, x = moved(deltaspec.compile(llama(device), spec("a", "b", rank=4)), 0.2), ids(device, 2, 5)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(x)}
    with plain_float32():
        mixed = c.generate(input_ids=x, deltas=["a", "b"], **options)
        for row, name in enumerate(("a", "b")):
            with c.only(name):
                alone = c.generate(input_ids=x, **options)[row]
            require(torch.equal(mixed[row, : len(alone)], alone[: mixed.shape[1]]), f"row {row} is another text")
    return f"{tuple(mixed.shape)} tokens, as alone"


@torch.no_grad()
def _inductor(device: torch.device) -> str:
    c, x = moved(deltaspec.compile(llama(device, layers=1), spec("a", "b", rank=4))), ids(device)
    compiled = _compiled(c)
    for names in (("a",), (), ("b",)):
        with c.only(*names), plain_float32():
            off = distance(compiled(input_ids=x).logits, c(input_ids=x).logits)
        require(off < 1e-3, f"under {names} it is {off:.1e} off")
    return "3 active sets"


def _inductor_step(device: torch.device) -> str:
    found = []
    for wrap in (lambda c: c, _compiled):
        c = moved(deltaspec.compile(llama(device, layers=1), spec(rank=4))).train()
        with plain_float32():
            wrap(c)(input_ids=ids(device), labels=ids(device)).loss.backward()
        found.append(gradients(c.backbone))
    off = max(distance(found[1][name], found[0][name]) for name in found[0])
    require(found[0].keys() == found[1].keys() and off < 1e-3, f"{off:.1e} off")
    return f"{len(found[0])} gradients, within {off:.0e}"


def _compiled(c: deltaspec.CompiledModel) -> Any:
    torch.compiler.reset()
    return torch.compile(c, dynamic=False)
