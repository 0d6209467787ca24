"""Two weight-expressible deltas on one site: attached, merged and bypassed they compute the same, or are refused."""

import itertools
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import deltaspec
from deltaspec import DeltaSpecError
from deltaspec.methods.registry import builtin_methods

PARAMS = {
    **{name: (name, dict(m.small)) for name, m in builtin_methods().items() if m.promises.weight == "add"},
    "dora": ("lora", {"rank": 2, "use_dora": True}),
    "pissa": ("lora", {"rank": 2, "init": "pissa"}),
    "bat": ("miss", {"variant": "bat", "rank": 4}),
}
"""Every method that merges, and variants that compute from the weight or start elsewhere."""
NEED_BASE = {"dora", "hira"}
FOLDING = {"bat", "hira"}  # these always fold: behind one, bat does see the weight
BIASED = {"bitfit", "ia3", "norm", "road", "ssf"}  # these change the bias, too, which boft computes from


class Bypassed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return F.linear(x, self.inner.weight, self.inner.bias)


def stack(model, inputs, first, second, target):
    deltas = [
        {"name": f"d{i}", "method": PARAMS[kind][0], "params": PARAMS[kind][1], "target": target}
        for i, kind in enumerate((first, second))
    ]
    compiled = deltaspec.compile(model, {"deltaspec": 1, "deltas": deltas}, capture="modules", example_inputs=inputs)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in compiled.trainable_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return compiled


@pytest.mark.parametrize(("first", "second"), list(itertools.product(PARAMS, PARAMS)))
def test_attached_is_merged(first, second):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8)).double(), torch.randn(3, 8).double()
    unseen = second == "bat" and first not in FOLDING
    if second in NEED_BASE or unseen or (second == "boft" and first in BIASED):
        with pytest.raises(
            DeltaSpecError, match="DS406.* computes from weights that delta 'd0' before it changes"
        ) as caught:
            stack(model, x, first, second, "0")
        if "list 'd1' before 'd0'" in str(caught.value):  # then that is a way out
            stack(model, x, second, first, "0")
        else:
            with pytest.raises(DeltaSpecError, match="DS406"):
                stack(model, x, second, first, "0")
        return
    compiled = stack(model, x, first, second, "0")
    torch.testing.assert_close(compiled(x), compiled.merge()(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("first", "second"), [("lora", "hra"), ("loha", "oft"), ("ia3", "oft"), ("oft", "lora")])
def test_on_a_convolution(first, second):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(8, 8, 3)).double(), torch.randn(2, 8, 5, 5).double()
    if second in ("hra", "oft"):
        with pytest.raises(DeltaSpecError, match="DS406"):
            stack(model, x, first, second, "0")
        return
    compiled = stack(model, x, first, second, "0")
    torch.testing.assert_close(compiled(x), compiled.merge()(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("target", ["embedding", "conv"])
@pytest.mark.parametrize("kind", ["hira", "dora"])
def test_factors_of_the_backbones_weight_are_of_that_alone(kind, target):
    """Wherever they work, two of them would not both be."""
    torch.manual_seed(0)
    layers = {"embedding": nn.Embedding(9, 8), "turn": nn.Flatten(1), "shape": nn.Unflatten(1, (8, 3))}
    model = nn.Sequential(OrderedDict(layers | {"conv": nn.Conv1d(8, 8, 2)}))
    with pytest.raises(DeltaSpecError, match="DS406.* computes from weights"):
        stack(model, torch.zeros(2, 3, dtype=torch.long), kind, kind, target)
    deltas = [{"name": n, "method": PARAMS[kind][0], "params": PARAMS[kind][1], "target": target} for n in "ab"]
    spec = {"deltaspec": 1, "deltas": [deltas[0], deltas[1] | {"attached": False}]}
    compiled = deltaspec.compile(model, spec, example_inputs=torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(DeltaSpecError, match="DS436"):
        compiled.attach("b")


@pytest.mark.parametrize(("first", "second"), [("lora", "hra"), ("dora", "lora"), ("hira", "loha"), ("oft", "road")])
def test_on_a_weight_that_is_read_without_a_call(first, second):
    torch.manual_seed(0)
    model, x = Bypassed().double(), torch.randn(3, 8).double()
    compiled = stack(model, x, first, second, "inner")
    torch.testing.assert_close(compiled(x), compiled.merge()(x), rtol=1e-6, atol=1e-6)


def test_deltas_that_take_turns_may_share_the_site_but_not_act_together():
    model = nn.Sequential(nn.Linear(8, 8))
    deltas = [
        {"name": "plain", "method": "lora", "target": "0"},
        {"name": "dora", "method": "lora", "params": {"use_dora": True}, "target": "0", "attached": False},
    ]
    compiled = deltaspec.compile(model, {"deltaspec": 1, "deltas": deltas})
    compiled.only("dora")
    with pytest.raises(DeltaSpecError, match="DS436.*computes from the weight of 0"):
        compiled.attach("plain")
    assert compiled.attached == ("dora",)
