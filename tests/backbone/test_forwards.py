"""A host's own forward: the parameters that it reads in every call, and whether it gives new tensors."""

from __future__ import annotations

import copy

import torch
from low_rank import Net, compiled
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from deltaspec.backbone.forwards import gives_new_tensor, own_forward


def test_a_linear_host_reads_its_parameters_in_every_call():
    linear, x = nn.Linear(5, 7), torch.randn(2, 5)
    forward = own_forward(linear)
    assert torch.equal(forward(x), linear(x))
    linear.weight = nn.Parameter(torch.randn(7, 5))
    assert torch.equal(forward(x), linear(x))
    linear.bias = None
    assert torch.equal(forward(x), linear(x))
    with torch.no_grad():
        linear.weight.mul_(2)
    assert torch.equal(forward(x), linear(x))
    linear.double()
    assert torch.equal(forward(x.double()), linear(x.double()))
    linear.__dict__["weight"] = torch.ones(7, 5).double()
    assert torch.equal(forward(x.double()), linear(x.double()))


def test_a_parameter_that_is_kept_elsewhere_is_found():
    x = torch.randn(2, 5)
    pruned = nn.Linear(5, 7)
    forward = own_forward(pruned)
    prune.l1_unstructured(pruned, "weight", amount=0.5)
    assert torch.equal(forward(x), pruned(x))
    parametrised = nn.Linear(5, 7)
    forward = own_forward(parametrised)
    parametrizations.weight_norm(parametrised)
    with torch.no_grad():
        parametrised.parametrizations.weight.original0.mul_(3)
    assert torch.equal(forward(x), parametrised(x))


def test_functional_call_reaches_a_linear_host():
    c, x = compiled(), torch.randn(2, 5)
    c.only("a")
    weight = torch.randn_like(c.backbone.first.weight)
    with torch.no_grad():
        given = torch.func.functional_call(c.backbone, {"first.weight": weight}, (x,))
        twin = copy.deepcopy(c)
        twin.backbone.first.weight.copy_(weight)
        assert torch.equal(given, twin(x)) and not torch.equal(given, c(x))


def test_only_plain_layers_are_known_to_give_new_tensors():
    class Cached(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            self.last = super().forward(input)
            return self.last

    assert gives_new_tensor(nn.Linear) and not gives_new_tensor(Cached) and not gives_new_tensor(nn.Identity)
    model = Net()
    model.first = Cached(5, 7)
    c, x = compiled(model=model), torch.randn(2, 3, 5)
    with torch.no_grad():
        c(x)
        host = c.backbone.first
        assert torch.equal(host.last, F.linear(x, host.weight, host.bias))
