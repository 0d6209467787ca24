"""Two weight-expressible deltas on one site: attached, merged and bypassed they compute the same, or are refused."""

import itertools

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
READERS = {"dora", "bat", "boft", "hira"}
FOLDING = {"bat", "hira"}  # these always fold: behind each other, they do see the weight


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


@pytest.mark.parametrize(("first", "second"), itertools.product(PARAMS, PARAMS))
def test_attached_is_merged(first, second):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8)).double(), torch.randn(3, 8).double()
    if second in READERS and not {first, second} <= FOLDING:
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
