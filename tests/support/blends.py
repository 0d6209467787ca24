"""Two deltas and one derived from them, on a net of two layers."""

import torch
from torch import nn

import deltaspec

X = torch.linspace(-1, 1, 3 * 8).reshape(3, 8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))


def spec(combine="linear", params=None, source=None, weights=None, method="lora", target="*", **blend):
    """Two sources of one method and one delta derived from them, which starts attached alone."""
    deltas = [
        {
            "name": name,
            "method": method,
            "params": {"rank": 3} if source is None else source,
            "target": target,
            "attached": False,
        }
        for name in ("french", "legal")
    ]
    weights = {"french": 0.7, "legal": -0.3} if weights is None else weights
    derived = {"name": "blend", "from": weights, "combine": combine, **blend}
    return {"deltaspec": 1, "deltas": [*deltas, {**derived, "params": params} if params else derived]}


def train(compiled, *names, seed=0):
    """Return deltas random values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in names:
            for parameter in compiled.deltas[name].parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def compiled_blend(model=None, **options):
    compiled = deltaspec.compile((model or Net()).eval(), spec(**options))
    train(compiled, "french", "legal")
    return compiled.attach("blend")


def tensors(compiled, name="blend"):
    return {key: value.clone() for key, value in compiled.deltas[name].tensors()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
