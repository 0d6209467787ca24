"""Models whose forwards write: to buffers in every way there is, and to parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

X = torch.linspace(-1, 1, 20).reshape(5, 4)
LORA = {"name": "one", "method": "lora", "params": {"rank": 2}, "target": {"path": "linear"}}


class Writer(nn.Module):
    """A Linear, and after it what writes in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.write(self.linear(x)) + self.mean

    def write(self, hidden: Tensor) -> Tensor:
        return hidden


class Norm(Writer):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def write(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden)


class Uncounted(Norm):
    def __init__(self) -> None:
        super().__init__()
        self.norm.num_batches_tracked = None


class Functional(Writer):
    def write(self, hidden: Tensor) -> Tensor:
        return F.batch_norm(hidden, self.mean, torch.ones(4), training=self.training)


def follow(mean: Tensor, value: Tensor) -> None:
    mean.data.mul_(0.9).add_(value, alpha=0.1)


class ByData(Writer):
    def write(self, hidden: Tensor) -> Tensor:
        follow(self.mean, hidden.detach().mean(0))
        return hidden


class ByNumpy(Writer):
    def write(self, hidden: Tensor) -> Tensor:
        self.mean.numpy()[:] += 0.5
        return hidden


class Replaced(Writer):
    def write(self, hidden: Tensor) -> Tensor:
        self.mean = self.mean * 0.9 + hidden.detach().mean(0)
        return hidden


class Absent(Writer):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("first", None)

    def write(self, hidden: Tensor) -> Tensor:
        if self.first is None:
            self.first = hidden.detach().mean(0)
        return hidden + self.first


class Registered(Writer):
    def write(self, hidden: Tensor) -> Tensor:
        if not hasattr(self, "first"):
            self.register_buffer("first", hidden.detach().mean(0), persistent=False)
        return hidden + self.first


class Codebook(Writer):
    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.ones(3, 4), requires_grad=False)

    def write(self, hidden: Tensor) -> Tensor:
        if self.training:
            self.codes.data[0].mul_(0.9).add_(hidden.detach().mean(0), alpha=0.1)
        return hidden + self.codes.sum(0)


class Learned(Codebook):
    def write(self, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            self.codes[0] = hidden.mean(0)
            self.codes.lerp_(torch.zeros_like(self.codes), 0.1)
        return hidden + self.codes.sum(0)


class Limited(Codebook):
    def write(self, hidden: Tensor) -> Tensor:
        return hidden + F.embedding(torch.arange(len(hidden)) % 3, self.codes, max_norm=0.1)


WRITERS = (
    Norm, Uncounted, Functional, ByData, ByNumpy, Replaced, Absent, Registered, Codebook, Learned,
    Limited,
)  # fmt: skip


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "deltaspec" not in name}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
