"""Exactness: the contract of every method, what is detached, what moves between devices, what is saved and drawn."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial

import torch

import deltaspec
from checks.cuda.base import Check, Skipped, distance, ids, llama, moved, require, spec
from deltaspec.methods import builtin_methods
from deltaspec.testing import check_method

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def checks() -> Iterator[Check]:
    """Yield the checks of this group."""
    for name in builtin_methods():
        yield Check("exactness", f"contract of {name}", partial(_contract, name))
    for dtype in DTYPES:
        yield Check("dtypes", f"attach and detach in {_named(dtype)}", partial(_detached, dtype))
    yield Check("dtypes", "autocast", _autocast)
    yield Check("exactness", "same start as on the CPU", _start)
    yield Check("exactness", "moved between devices", _there_and_back)
    yield Check("exactness", "saved there, restored on the CPU", _saved)
    yield Check("exactness", "random state of the device", _random_state)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _contract(name: str, device: torch.device) -> str:
    model, method, x = llama(device, hidden=16, heads=2), builtin_methods()[name], ids(device, 2, 6)
    if tokens := method.small.get("token_ids"):
        x[:, 0] = tokens[0]  # what is tuned must be there
    try:
        plan = check_method(name, model, {"input_ids": x}, params=dict(method.small), capture="modules")
    except deltaspec.DeltaSpecError as error:
        raise Skipped(f"not for a Llama: {error.diagnostics[0].message}") from None
    return f"every clause, sites: {len(plan.sites)}"


@torch.no_grad()
def _detached(dtype: torch.dtype, device: torch.device) -> str:
    model, x = llama(device, dtype=dtype), ids(device)
    bare = model(input_ids=x).logits
    c = moved(deltaspec.compile(model, spec("a", "b", rank=4)))
    with_a = {}
    for number in range(3):
        with c.only("a"):
            with_a[number] = c(input_ids=x).logits
        with c.detached():
            require(torch.equal(c(input_ids=x).logits, bare), "detached is not the original to the bit")
    require(all(torch.equal(with_a[0], other) for other in with_a.values()), "attached again, it gives other bits")
    require(
        bool(with_a[0].isfinite().all()) and not torch.equal(with_a[0], bare), "attached does nothing, or overflows"
    )
    merged = c.merge("a")
    off = distance(merged(input_ids=x).logits, with_a[0])
    require(off < (1e-4 if dtype is torch.float32 else 0.1), f"merged is {off:.1e} off")
    return f"detached to the bit, merged within {off:.0e}"


def _autocast(device: torch.device) -> str:
    model, x = llama(device), ids(device)
    c = moved(deltaspec.compile(model, spec(rank=4, dropout=0.1))).train()
    with torch.autocast(device.type, torch.bfloat16):
        loss = c(input_ids=x, labels=x).loss
    loss.backward()
    found = [p.grad for p in c.trainable_parameters()]
    require(all(g is not None and g.isfinite().all() and g.dtype == torch.float32 for g in found), "gradients")
    return f"{len(found)} gradients, finite and float32"


def _start(device: torch.device) -> str:
    made = [deltaspec.compile(llama(place), spec(rank=4)).deltas["d"] for place in (torch.device("cpu"), device)]
    here, there = (dict(delta.tensors()) for delta in made)
    wrong = [key for key in here if not torch.equal(here[key], there[key].cpu())]
    require(not wrong, f"{len(wrong)} tensors start otherwise, {wrong[:2]}")
    require(all(t.device.type == device.type for t in there.values()), "deltas are not where their sites are")
    return f"{len(here)} tensors"


@torch.no_grad()
def _there_and_back(device: torch.device) -> str:
    c = moved(deltaspec.compile(llama(torch.device("cpu")), spec("a", "b", rank=4)))
    x = ids(torch.device("cpu"))
    before = c(input_ids=x).logits
    c.to(device)
    require(all(p.device.type == device.type for p in c.parameters()), "parameters stayed behind")
    off = distance(c(input_ids=x.to(device)).logits, before)
    require(off < 1e-4, f"{off:.1e} off on the device")
    rows = c(input_ids=x.to(device), deltas=["a", "b", None, "a"]).logits
    require(rows.device.type == device.type, "rows are elsewhere")
    c.to("cpu")
    require(torch.equal(c(input_ids=x).logits, before), "back on the CPU it gives other bits")
    return f"within {off:.0e} there, to the bit back here"


def _saved(device: torch.device) -> str:
    c = moved(deltaspec.compile(llama(device), spec(rank=4)))
    with tempfile.TemporaryDirectory() as folder:
        c.save(folder)
        again = deltaspec.restore(llama(torch.device("cpu")), folder)
    here, there = dict(again.deltas["d"].tensors()), dict(c.deltas["d"].tensors())
    require(all(torch.equal(here[key], there[key].cpu()) for key in there), "other values")
    return f"{len(there)} tensors, to the bit"


def _random_state(device: torch.device) -> str:
    if device.type != "cuda":
        raise Skipped("the CPU's is tested in the suite")
    model = llama(device)
    before = torch.cuda.get_rng_state(device)
    c = deltaspec.compile(model, spec("a", "b", rank=4, dropout=0.1))
    with torch.no_grad():
        c(input_ids=ids(device), deltas=["a", "b", None, "a"])
    deltaspec.estimate(model, spec(rank=4, dropout=0.1), batch=2, length=8)
    require(torch.equal(before, torch.cuda.get_rng_state(device)), "compiling, rows or an estimate advanced it")
    return "as it was"
