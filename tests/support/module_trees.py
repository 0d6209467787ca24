"""Models whose modules are tied, shared and circular."""

import torch
from torch import nn


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
