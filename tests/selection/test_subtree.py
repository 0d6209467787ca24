"""Quick ways through a model give what the plain ones give: modules, what lies below them, and its size."""

import pytest
import torch
from torch import nn

from deltaspec.backbone.tabulate import tabulate
from deltaspec.deltas.initial import _tensor
from deltaspec.names.paths import is_inside
from deltaspec.selection.subtree import Subtrees


class Part(nn.Module):
    def __init__(self, inner=None):
        super().__init__()
        self.a, self.b, self.inner = nn.Linear(2, 3), nn.Linear(2, 3), inner
        self.register_buffer("count", torch.zeros(1))


def tree():
    return nn.Sequential(Part(Part()), nn.ModuleList([Part(), Part(Part())]), Part())


def tied():
    net = tree()
    net[0].a.weight = net[2].b.weight = net[1][0].a.weight
    net[0].b.weight = net[0].inner.a.weight
    return net


def shared():
    net, part = tree(), Part(Part())
    net[0].inner = net[1][1].inner = net[2].inner = part
    part.a.weight = net[0].a.weight
    return net


def circular():
    net = tree()
    net[0].inner.inner = net[0]
    return net


@pytest.mark.parametrize("build", [tree, tied, shared, circular, Part, lambda: nn.Linear(2, 2)])
def test_modules_subtrees_and_sizes(build):
    net = build()
    table = tabulate(net)
    subtrees = Subtrees(table)
    for row in table.rows:
        below = [r for r in table.rows if any(is_inside(name, row.fqn) for name in (r.fqn, *r.aliases))]
        assert {r.fqn for r in subtrees.of(row)} == {r.fqn for r in below}
        if build is not circular:
            assert row.subtree_parameters == sum(p.numel() for p in net.get_submodule(row.fqn).parameters())
    assert table.parameters == sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("build", [tied, shared])
def test_tensors_by_name(build):
    net = build()
    named = [*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False)]
    assert all(_tensor(net, name) is tensor for name, tensor in named)
    with pytest.raises(KeyError):
        _tensor(net, "0.a.nothing")
