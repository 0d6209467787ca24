"""Where a backbone holds its deltas: a root that goes through its children does not meet them."""

import copy

import pytest
import torch
from one_delta import X, perturb, single
from torch import nn

import deltaspec


class Residual(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = x + layer(x)
        return x


class Concatenated(nn.ModuleList):
    def forward(self, x):
        return torch.cat([layer(x) for layer in self], -1)


class Named(nn.ModuleDict):
    def forward(self, x):
        return {name: layer(x) for name, layer in self.items()}


class Children(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        for child in self.children():
            x = child(x)
        return x


ROOTS = {
    "sequential": lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
    "residual": lambda: Residual(nn.Linear(4, 4)),
    "list": lambda: Concatenated([nn.Linear(4, 4), nn.Linear(4, 4)]),
    "dict": lambda: Named({"x": nn.Linear(4, 4)}),
    "children": Children,
}


def bits(output):
    return list(output.values()) if isinstance(output, dict) else [output]


def equal(a, b):
    return len(bits(a)) == len(bits(b)) and all(map(torch.equal, bits(a), bits(b)))


@pytest.mark.parametrize("capture", ["modules", "auto"])
@pytest.mark.parametrize("root", ROOTS)
def test_a_root_that_goes_through_its_children_does_not_meet_the_deltas(root, capture):
    torch.manual_seed(0)
    model = ROOTS[root]()
    compiled = deltaspec.compile(model, single(), capture=capture, example_inputs=X)
    assert equal(compiled(X), model(X))
    assert [n for n, _ in compiled.backbone.named_children()] == [n for n, _ in model.named_children()]
    assert set(model.state_dict()) < set(compiled.backbone.state_dict())
    perturb(compiled)
    changed = compiled(X)
    assert not equal(changed, model(X))
    assert equal(copy.deepcopy(compiled)(X), changed)
    assert equal(compiled.detach()(X), model(X))
    for merged, attached in zip(bits(compiled.merge("d")(X)), bits(changed), strict=True):
        torch.testing.assert_close(merged, attached)


@pytest.mark.parametrize("capture", ["modules", "auto"])
def test_hooks_of_the_root_see_positional_arguments(capture):
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model.register_forward_hook(lambda module, args, output: output + args[0].sum())
    compiled = deltaspec.compile(model, single(), capture=capture)
    assert torch.equal(compiled(X), model(X))
    assert torch.equal(compiled.detach()(X), model(X))
