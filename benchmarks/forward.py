"""What the forward of one site costs, and what each pass saves: every pass has a row that pays for it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deltaspec
from benchmarks.harness import Row, excess, interleave, many, ratio, seconds, verdict
from benchmarks.models import LLAMA_LINEAR, llama, peft, spec
from deltaspec.backbone.forwards import own_forward
from deltaspec.graphs.passes.fuse_addition import add_low_rank, add_low_rank_, add_product
from deltaspec.graphs.passes.share_inputs import narrow_products
from deltaspec.graphs.passes.share_products import add_low_ranks_
from deltaspec.graphs.row_ops import toward

SIZES = ((1, 1), (1, 16), (8, 128))
EXCESS = 0.25
"""Which part of the peer's excess over the bare backbone ours may have."""


def forwards() -> Iterator[Row]:
    """One forward with LoRA attached on all linear layers, over the bare backbone, beside the arithmetic alone."""
    base = llama()
    ours = deltaspec.compile(base, spec(["d0"], LLAMA_LINEAR))
    peer = peft(base, ["d0"], LLAMA_LINEAR)
    merged = ours.merge()
    for (batch, tokens), pairs in zip(SIZES, (200, 100, 20), strict=True):
        ids = torch.randint(0, 1000, (batch, tokens))

        def run(model: nn.Module, ids: Tensor = ids) -> Callable[[], None]:
            def forward() -> None:
                with torch.no_grad():
                    model(input_ids=ids, use_cache=False)

            return forward

        contestants = {"bare": run(base), "ours": run(ours), "peer": run(peer), "merged": run(merged)}
        times = interleave(contestants, pairs)
        first, second, part, text = excess(times["ours"], times["peer"], times["bare"])
        least = _arithmetic(ours, batch * tokens) / statistics.median(times["bare"])
        yield Row(
            f"LoRA on 56 linears attached, over bare, {batch} × {tokens} tokens (8 × 512 Llama)",
            f"{first:.3f} ×",
            f"{second:.3f} ×",
            text,
            f"≤ {EXCESS}",
            verdict(part <= EXCESS),
            f"the low-rank products alone, accumulated in place, take {least:.3f} of the bare forward",
        )
        if tokens == 16:
            _, merged_text = ratio(times["merged"], times["bare"])
            yield Row("merged, over bare, 1 × 16 tokens", f"{merged_text} ×", "-", "-", "1", "-")


def _arithmetic(ours: deltaspec.CompiledModel, rows: int) -> float:
    """Time the two products of every site on prepared operands, without any model around them; seconds."""
    calls = []
    parameters = dict(ours.deltas["d0"].named_parameters())
    for name, down in parameters.items():
        if not name.endswith("/down"):
            continue
        up = parameters[name.removesuffix("down") + "up"]
        x, y, first, second = torch.randn(rows, down.shape[1]), torch.randn(rows, up.shape[0]), down.t(), up.t()
        calls.append((x, y, first, second))

    def run() -> None:
        with torch.no_grad():
            for x, y, first, second in calls:
                y.addmm_(x.mm(first), second, alpha=2.0)

    return statistics.median(interleave({"alone": run}, 20)["alone"])


def passes() -> Iterator[Row]:
    """One site (LoRA of rank 8 on 512 → 512), without and with each pass."""
    host = nn.Linear(512, 512, bias=False).requires_grad_(False)
    down, up = nn.Parameter(torch.randn(8, 512)), nn.Parameter(torch.randn(512, 8) * 0.01)
    own, strength = MethodType(nn.Linear.forward, host), torch.tensor(0.5)

    for rows, pairs in ((1, 100), (16, 100), (1024, 30)):
        x = torch.randn(1, rows, 512)

        def plain(x: Tensor = x) -> Tensor:
            return torch.add(host(x), F.linear(F.linear(x, down), up), alpha=2.0)

        def fused(x: Tensor = x) -> Tensor:
            return add_low_rank_(host(x), x, down, up, 2.0)

        yield _against(f"pass fuse_addition, one site, {rows} rows", {"plain": plain, "fused": fused}, rows, pairs)
        yield _against(
            f"training step of one site, fused, {rows} rows",
            {"plain": _backward(plain, x), "fused": _backward(fused, x)},
            rows,
            pairs,
            training=True,
        )

        def apart(x: Tensor = x) -> Tensor:
            return add_low_rank_(add_low_rank_(host(x), x, down, up, 2.0), x, down, up, 1.0)

        def shared(x: Tensor = x) -> Tensor:
            return add_low_ranks_(host(x), x, (down, down), (up, up), (2.0, 1.0), (None, None))

        yield _against(f"pass share_products, two deltas, {rows} rows", {"plain": apart, "fused": shared}, rows, pairs)

        def lerped(x: Tensor = x) -> Tensor:
            y = host(x)
            return toward(y, torch.add(y, F.linear(F.linear(x, down), up), alpha=2.0), strength)

        def narrow(x: Tensor = x) -> Tensor:
            return add_low_rank_(host(x), x, down, up, 2.0, strength)

        yield _against(f"pass fuse_addition, a strength, {rows} rows", {"plain": lerped, "fused": narrow}, rows, pairs)

        def separate(x: Tensor = x) -> list[Tensor]:
            return [add_low_rank(host(x), x, down, up, 2.0) for _ in range(3)]

        def joint(x: Tensor = x) -> list[Tensor]:
            return [add_product(host(x), h, up, 2.0) for h in narrow_products(x, ((down,),) * 3)]

        yield _against(f"pass share_inputs, q, k and v, {rows} rows", {"plain": separate, "fused": joint}, rows, pairs)
        yield _against(
            f"training step of q, k and v, shared, {rows} rows",
            {"plain": _backward(separate, x), "fused": _backward(joint, x)},
            rows,
            pairs,
            training=True,
        )
    x = torch.randn(1, 1, 512)
    quick = own_forward(host)
    yield _against("a linear host's own forward, 1 row", {"plain": lambda: own(x), "fused": lambda: quick(x)}, 1, 100)


def _backward(run: Callable[[Tensor], Tensor | list[Tensor]], x: Tensor) -> Callable[[], None]:
    entering = x.clone().requires_grad_()

    def step() -> None:
        given = run(entering)
        torch.autograd.backward([y.sum() for y in (given if isinstance(given, list) else [given])])

    return step


def _against(
    what: str, contestants: dict[str, Callable[[], object]], rows: int, pairs: int, training: bool = False
) -> Row:
    repeats = max(1, 300 // rows)
    with torch.set_grad_enabled(training):
        times = interleave({name: many(run, repeats) for name, run in contestants.items()}, pairs)
    median, text = ratio(times["fused"], times["plain"])
    ours, theirs = seconds(times["fused"], 1 / repeats), f"{seconds(times['plain'], 1 / repeats)} (as written)"
    return Row(what, ours, theirs, f"{text} × the time", "≤ 1", verdict(median <= 1))
