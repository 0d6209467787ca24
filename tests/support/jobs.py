"""Small jobs in float64, and the same trained alone in plain torch."""

from __future__ import annotations

import torch
from blends import Net
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import deltaspec
from deltaspec.training import Job
from deltaspec.training.batches import epoch_seed
from deltaspec.training.schedules import Factor

HINTS = {"lr": 1e-2, "weight_decay": 0.01, "schedule": "cosine", "warmup": 2, "seed": 5}


def compiled(dropout: float = 0.0) -> deltaspec.CompiledModel:
    """Four LoRAs of a matrix and an adapter, on a net whose weights are always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Net().double().eval()
    lora = {"name": "lora", "method": "lora", "target": "*", "params": {"dropout": dropout}, "train": HINTS}
    lora = {**lora, "matrix": {"rank": [1, 4], "train.lr_ratio": [1, 8]}}
    adapter = {"name": "ad", "method": "adapter", "target": "b", "params": {"width": 3}, "attached": False}
    return deltaspec.compile(model, {"deltaspec": 1, "deltas": [lora, {**adapter, "train": {"lr": 3e-3, "seed": 1}}]})


def pairs(number: int, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(*(torch.randn(number, 8, generator=generator, dtype=torch.float64) for _ in range(2)))


def mse(outputs: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(outputs, target)


def job(name: str, number: int, **options) -> Job:
    """A job whose size of batches, length of data, accumulation and clipping are its own."""
    data = DataLoader(pairs(12 + number, number), batch_size=3 + number, shuffle=True)
    given = {"steps": 12, "accumulate": 1 + number % 2, "max_norm": 0.5 if number % 3 else None, "loss": mse}
    return Job(*options.pop("deltas", (name,)), data=data, **{**given, **options})


def jobs(c: deltaspec.CompiledModel, **options) -> list[Job]:
    return [job(name, number, **options) for number, name in enumerate(c.deltas)]


def alone(one: Job, hints: dict) -> tuple[list[float], dict[str, Tensor]]:
    """Train a job by itself, with the delta attached: a loop of plain torch."""
    c = compiled()
    [name] = one.deltas
    c.only(name)
    c.train()
    ratio = hints.get("lr_ratio", 1)
    second = [p for key, p in c.deltas[name].named_parameters() if key.endswith("up") and ratio != 1]
    first = [p for p in c.deltas[name].parameters() if all(p is not other for other in second)]
    groups = [{"params": first, "lr": hints["lr"]}, {"params": second, "lr": hints["lr"] * ratio}]
    optimizer = torch.optim.AdamW(groups, weight_decay=hints.get("weight_decay", 0.01))
    factor = Factor(hints.get("schedule", "constant"), hints.get("warmup", 0), one.steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    batches, losses = own_batches(one, hints["seed"]), []
    for _ in range(one.steps):
        own = []
        for _ in range(one.accumulate):
            x, y = next(batches)
            loss = mse(c(x), y) / one.accumulate
            loss.backward()
            own.append(loss.item())
        if one.max_norm is not None:
            nn.utils.clip_grad_norm_(c.deltas[name].parameters(), one.max_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(sum(own))
    return losses, {key: tensor.detach().clone() for key, tensor in c.deltas[name].tensors()}


def own_batches(one: Job, seed: int):
    epoch = 0
    while True:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(epoch_seed(seed, epoch))
            taken = list(one.data)
        yield from taken
        epoch += 1
