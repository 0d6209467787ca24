"""Models that read weights without calling the modules that hold them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deltaspec
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.diagnostics.findings import DeltaSpecError

INPUTS = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    """torch's own attention, which never calls its `out_proj`."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attn(x, x, x, need_weights=False)[0])


class Reader(nn.Module):
    """Reads one Linear's weight without calling it, and calls and reads another."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.both, self.idle = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(F.linear(x, self.read.weight))
        return F.linear(torch.tanh(self.both(x)), self.both.weight)


class Lists(nn.Module):
    """Bare parameters, and a list of them."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList([torch.ones(16), torch.full((16,), 0.5)])
        self.shift = nn.Parameter(torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        for scale in self.scales:
            x = x * scale
        return x + self.shift


class Recurrent(nn.Module):
    """An LSTM, and a head tied to an embedding through `F.linear`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.lstm = nn.LSTM(16, 16, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.lstm(self.embed(ids))[0], self.embed.weight)


class Encoder(nn.Module):
    """torch's encoder, whose fast path in evaluation mode reads all weights in one kernel."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


def build(kind: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().eval()


def compiled(kind: type[nn.Module], method: str, target: Any, inputs: Tensor = INPUTS, **params: Any) -> CompiledModel:
    spec = {"deltaspec": 1, "deltas": [{"name": "d", "method": method, "target": target, "params": params}]}
    made = deltaspec.compile(build(kind), spec, example_inputs=inputs)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in made.deltas["d"].parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return made


def refusal(kind: type[nn.Module], method: str, target: Any, inputs: Tensor | None = INPUTS, **params: Any) -> str:
    spec = {"deltaspec": 1, "deltas": [{"name": "d", "method": method, "target": target, "params": params}]}
    with pytest.raises(DeltaSpecError) as caught:
        deltaspec.plan(build(kind), spec, example_inputs=inputs)
    assert all(finding.suggestion for finding in caught.value.diagnostics)
    return str(caught.value)


def by_hand(kind: type[nn.Module], made: CompiledModel) -> nn.Module:
    """Write a LoRA's or BitFit's change into the weights of a plain model, by the formula."""
    model = build(kind)
    tensors = dict(made.deltas["d"].tensors())
    with torch.no_grad():
        for planned in made.plan["d"].sites:
            module = model.get_submodule(planned.fqn)
            if f"{planned.fqn}.down" in tensors:
                update = 16 / 4 * tensors[f"{planned.fqn}.up"] @ tensors[f"{planned.fqn}.down"]
                module.weight += update.t() if isinstance(module, nn.Embedding) else update
            else:
                module.bias += tensors[f"{planned.fqn}.bias"]
    return model
