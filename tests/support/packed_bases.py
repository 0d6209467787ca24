"""Nets whose linear layers keep their weights as codes, in forms that need no package, and what the codes stand for."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 16


class Net(nn.Module):
    """Two linear layers that a test packs, and one that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.b(torch.relu(self.a(x)))))


class Nibbles(nn.Linear):
    """Two 4-bit codes in a byte, under the name `weight` of a parameter."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None)
        scales = plain.weight.detach().abs().amax(1, keepdim=True) / 7
        codes = (torch.round(plain.weight.detach() / scales) + 8).to(torch.uint8)
        self.hold(codes[:, 0::2] | (codes[:, 1::2] << 4), scales)
        if plain.bias is not None:
            self.bias = nn.Parameter(plain.bias.detach().clone())

    def hold(self, codes: Tensor, scales: Tensor) -> None:
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scales", scales)

    def values(self, codes: Tensor) -> Tensor:
        return (torch.stack([codes & 15, codes >> 4], -1).flatten(1).float() - 8) * self.scales

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.values(self.weight).to(input.dtype), self.bias)


class Buffered(Nibbles):
    """The codes as a buffer, as GPTQ and AWQ keep them."""

    def hold(self, codes: Tensor, scales: Tensor) -> None:
        del self.weight
        self.register_buffer("qweight", codes)
        self.register_buffer("scales", scales)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.values(self.qweight).to(input.dtype), self.bias)


class Offered(Buffered):
    """Says what its codes stand for."""

    @property
    def weight(self) -> Tensor:
        return self.values(self.qweight)

    @weight.deleter
    def weight(self) -> None:
        del self._parameters["weight"]


class Float8(Nibbles):
    """float8 values with a scale."""

    def hold(self, codes: Tensor, scales: Tensor) -> None:
        super().hold(codes, scales)
        self.weight = nn.Parameter((self.values(codes) * 4).to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype) / 4, self.bias)


class Alone(nn.Module):
    """No subclass of Linear, as the layers of GPTQ and AWQ are not."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        packed = Buffered(plain)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.register_buffer("qweight", packed.qweight)
        self.register_buffer("scales", packed.scales)
        self.register_parameter("bias", packed.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, Nibbles.values(self, self.qweight).to(x.dtype), self.bias)


UNREADABLE = {"parameter": Nibbles, "buffer": Buffered, "float8": Float8, "no Linear": Alone}
"""Forms that only the layer's own class can read."""


def net(form: type[nn.Module] | None = None, dtype: torch.dtype = torch.float32) -> Net:
    """Make the net, its first layers packed."""
    torch.manual_seed(0)
    made = Net().to(dtype)
    for name in ("a", "b") if form is not None else ():
        setattr(made, name, form(getattr(made, name)))
    return made.eval()


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
